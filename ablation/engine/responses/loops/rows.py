"""The loops over (unit, input, example) of a classifier head on the CPU, compiled by Numba.

In: plain arrays. Out: sums or deltas, written into arrays that the caller gives. Formulas are those of `series.py`
(a series in one number) and `loss.py` (the direct formula). Deltas are float32, sums float64, in a fixed order that
does not depend on the number of threads.

    t = max(d, -y) + min(y, 0)          d = step_ij x_nj, what unit i moves by behind its ReLU; y = -inf .. inf: t = d
    F = log1p(S(t))                     S(t) = sum_c q_c expm1(t u_c),   u_c = v_c - v_y,   v = V[:, i]
"""

import numpy as np

from ablation.engine.compiled import in_order, kernel
from ablation.engine.responses.loops.series import (
    ORDERS,
    REACH_LONG,
    REACH_SHORT,
    add_sums,
    close_class,
    column_of,
    direct_loss,
    flush,
    long_series,
    long_sum,
    loss_of,
    rest_of_series,
    series_of,
    short_series,
    short_sum,
)

TILE = 1024  # inputs that are summed up in float32 together: 8 KB
FLUSH = 8  # examples after which their float32 sums are added up in float64


# --- single weights ---------------------------------------------------------------------------------------------------


@kernel
def score_sites(
    steps, units, inputs, x, y, has_relu, q, z, labels, columns, is_logit, delta, touched
):  # fmt: skip
    """The loss delta of every (site, example), and whether any logit moves.

    steps, units, inputs (sites): replacement minus weight, and where.  x (inputs, examples), y (units, examples).
    """
    for site in range(steps.shape[0]):
        unit, x_site, step = units[site], x[inputs[site]], np.float64(steps[site])
        y_site = y[unit]
        column, spread, is_heard = column_of(columns, unit, is_logit)
        for n in range(x_site.shape[0]):
            t = step * np.float64(x_site[n])
            if has_relu and t != 0:
                t = max(t, -y_site[n]) + min(y_site[n], 0.0)
            if t == 0 or not is_heard:
                delta[site, n], touched[site, n] = 0.0, False
                continue
            touched[site, n] = True
            delta[site, n] = direct_loss(t, unit, spread, q[n], z[n], column, labels[n], is_logit)


# --- whole rows: all inputs of a unit ---------------------------------------------------------------------------------


@in_order
def unit_delta(d, low, high):
    """t = max(d, -y) + min(y, 0)."""
    return (d if d > low else low) + high


@kernel
def add_short(step, x, first, low, high, c, pairs, n_pairs, examples, narrow, wide):
    """Add F and F^2 of some examples for one tile of inputs: two examples a round, which share what they read."""
    size = step.shape[0]
    for k in range(0, n_pairs - 1, 2):
        p, r = pairs[k], pairs[k + 1]
        a, b = short_series(c, p), short_series(c, r)
        low_a, high_a, low_b, high_b = low[p], high[p], low[r], high[r]
        x_a, x_b = x[examples[p], first : first + size], x[examples[r], first : first + size]
        for j in range(size):
            f = short_sum(unit_delta(step[j] * x_a[j], low_a, high_a), a)
            g = short_sum(unit_delta(step[j] * x_b[j], low_b, high_b), b)
            narrow[j] += f + g
            narrow[TILE + j] += f * f + g * g
        if k % FLUSH == FLUSH - 2:
            flush(narrow, wide)
    if n_pairs % 2:
        p = pairs[n_pairs - 1]
        a = short_series(c, p)
        low_a, high_a, x_a = low[p], high[p], x[examples[p], first : first + size]
        for j in range(size):
            f = short_sum(unit_delta(step[j] * x_a[j], low_a, high_a), a)
            narrow[j] += f
            narrow[TILE + j] += f * f
    flush(narrow, wide)


@kernel
def add_long(step, x, first, low, high, c, pairs, n_pairs, examples, narrow, wide):
    """The same with the longer polynomial, one example a round."""
    size = step.shape[0]
    for k in range(n_pairs):
        p = pairs[k]
        a = long_series(c, p)
        low_a, high_a, x_a = low[p], high[p], x[examples[p], first : first + size]
        for j in range(size):
            f = long_sum(unit_delta(step[j] * x_a[j], low_a, high_a), a)
            narrow[j] += f
            narrow[TILE + j] += f * f
        if k % FLUSH == FLUSH - 1:
            flush(narrow, wide)
    flush(narrow, wide)


@kernel
def add_wide(
    step, x, first, low, high, c, pairs, n_pairs, examples, unit, spread, q, z, labels, column, is_logit, wide
):  # fmt: skip
    """The same for pairs that some input takes beyond the series: there the direct formula."""
    for k in range(n_pairs):
        p = pairs[k]
        n = examples[p]
        a = long_series(c, p)
        for j in range(step.shape[0]):
            t = unit_delta(step[j] * x[n, first + j], low[p], high[p])
            if t == 0:
                continue
            f = loss_of(t, a, unit, spread, q[n], z[n], column, labels[n], is_logit)
            wide[j] += f
            wide[TILE + j] += f * f


@kernel
def ones(bits):
    """How many bits of a 64-bit word are set; LLVM knows this form and makes one instruction of it."""
    bits -= (bits >> np.uint64(1)) & np.uint64(0x5555555555555555)
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (bits * np.uint64(0x0101010101010101)) >> np.uint64(56)


@kernel
def count_touched(step, x, first, active, opened, low, candidates, n_candidates, examples, touched):
    """Examples where t is not 0: input and unit active; or the unit closed, and opened by this input."""
    size = step.shape[0]
    for word in range(opened.shape[0]):
        bits, active_bits = opened[word], active[word, first : first + size]
        for j in range(size):
            touched[j] += np.int64(ones(bits & active_bits[j]))
    for k in range(n_candidates):
        p = candidates[k]
        x_p, low_p = x[examples[p], first : first + size], low[p]
        for j in range(size):
            touched[j] += step[j] * x_p[j] > low_p
    for j in range(size):
        if step[j] == 0:
            touched[j] = 0


@kernel
def list_pairs(largest, largest_x, y, has_relu, spread, examples, low, high, reach, opened, candidates):
    """The examples that a unit may move on, how far (times the spread), which are open, which may only be opened."""
    n_pairs = n_candidates = 0
    for n in range(largest_x.shape[0]):
        far = largest * largest_x[n]
        if far == 0 or (has_relu and y[n] <= 0 and np.float32(far) <= np.float32(-y[n])):
            continue
        examples[n_pairs], reach[n_pairs] = n, far * spread
        low[n_pairs] = -np.inf
        high[n_pairs] = 0
        if has_relu:
            low[n_pairs], high[n_pairs] = np.float32(-y[n]), np.float32(min(y[n], 0.0))
        if has_relu and y[n] <= 0:
            reach[n_pairs] = (far + y[n]) * spread
            candidates[n_candidates] = n_pairs
            n_candidates += 1
        else:
            opened[n // 64] |= np.uint64(1) << np.uint64(n % 64)
        n_pairs += 1
    return n_pairs, n_candidates


@kernel
def sort_by_reach(first, last, reach, short, long, wide):
    """Which pairs take the short series, the long one, or the direct formula for some of their inputs."""
    n_short = n_long = n_wide = 0
    for p in range(first, last):
        if reach[p] <= REACH_SHORT:
            short[n_short] = p
            n_short += 1
        elif reach[p] <= REACH_LONG:
            long[n_long] = p
            n_long += 1
        else:
            wide[n_wide] = p
            n_wide += 1
    return n_short, n_long, n_wide


@kernel
def add_rows(
    units, steps, x, largest_x, active, y, has_relu, q, z, labels, columns, is_logit, cuts, closes, per_class,
    delta, delta_squared, touched, open_delta, open_squared, within, bounds,
):  # fmt: skip
    """Add the sums over one batch of all weights of some units.

    units, steps (units, inputs): which, and replacement minus weight.  x (examples, inputs); y (units, examples).
    q, z (examples, classes), columns (units, classes) of the last Linear: u = v - v_label; none where is_logit.
    cuts: where runs of examples end; closes: whether a class ends there too, whose variance is then added to `within`.
    Everything else is (units, inputs) of sums, but for bounds (units): what the series have left out at most.
    """
    n_examples, n_inputs = x.shape
    examples = np.empty(n_examples, np.int64)
    low, high = np.empty(n_examples, np.float32), np.empty(n_examples, np.float32)
    reach, c = np.empty(n_examples, np.float64), np.empty((n_examples, ORDERS), np.float32)
    candidates, opened = np.empty(n_examples, np.int64), np.empty((n_examples + 63) // 64, np.uint64)
    short, long, wide = np.empty(n_examples, np.int64), np.empty(n_examples, np.int64), np.empty(n_examples, np.int64)
    m, kappa = np.empty(ORDERS), np.empty(ORDERS)
    narrow_sums, wide_sums = np.zeros(2 * TILE, np.float32), np.empty(2 * TILE)
    for row in range(steps.shape[0]):
        unit, step = units[row], steps[row]
        column, spread, is_heard = column_of(columns, unit, is_logit)
        if not is_heard:
            continue
        largest = np.float64(max(step.max(), -step.min()))
        opened[:] = 0
        n_pairs, n_candidates = list_pairs(
            largest, largest_x, y[row], has_relu, spread, examples, low, high, reach, opened, candidates
        )
        for p in range(n_pairs):
            n = examples[p]
            series_of(unit, column, is_logit, q[n], labels[n], m, kappa)
            c[p] = kappa
            bounds[row] += rest_of_series(reach[p], spread, 2 * kappa[1])
        for first in range(0, n_inputs, TILE):
            tile = slice(first, min(first + TILE, n_inputs))
            count_touched(
                step[tile], x, first, active, opened, low, candidates, n_candidates, examples,
                touched[row, tile],
            )  # fmt: skip
            begin = 0
            for k in range(cuts.shape[0]):
                end = begin
                while end < n_pairs and examples[end] < cuts[k]:
                    end += 1
                n_short, n_long, n_wide = sort_by_reach(begin, end, reach, short, long, wide)
                begin = end
                wide_sums[:] = 0
                add_short(step[tile], x, first, low, high, c, short, n_short, examples, narrow_sums, wide_sums)
                add_long(step[tile], x, first, low, high, c, long, n_long, examples, narrow_sums, wide_sums)
                add_wide(
                    step[tile], x, first, low, high, c, wide, n_wide, examples, unit, spread, q, z, labels, column,
                    is_logit, wide_sums,
                )  # fmt: skip
                add_sums(wide_sums, delta[row, tile], delta_squared[row, tile])
                if per_class:
                    add_sums(wide_sums, open_delta[row, tile], open_squared[row, tile])
                    if closes[k]:
                        close_class(open_delta[row, tile], open_squared[row, tile], within[row, tile], per_class)

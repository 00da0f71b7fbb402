"""The loops over (unit, input, example) of a classifier head on the CPU, compiled by Numba.

In: records of arrays (`records.py`). Out: sums or deltas, written into arrays that the caller passes. The change t of a
unit comes from `activations.py`, that of the loss from `series.py` (a series in one number) and `loss.py` (the direct
formula). Deltas are float32, sums float64, in a fixed order that does not depend on the number of threads.

    d = step_ij x_nj                    t = f(y_ni + d) - f(y_ni)
    F = log1p(S(t))                     S(t) = sum_c q_c expm1(t u_c),   u_c = v_c - v_y,   v = V[:, i]

A pair (unit, example) is of one kind for all inputs: within the short series of t and of F, within the long ones, or
beyond one of them for some input, which is then worked out from the definitions in float64. What the series leave out
is bounded pair by pair: the rest of t times the largest |dF/dt| up to there, which is at most
sum_c q_c |u_c| e^(2 |t| R), and the rest of F.

Each loop is written once and compiled for each form of t: ReLU or no function, bent functions, smooth functions.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ablation.engine.compiled import kernel, part_of_kernel
from ablation.engine.responses.loops import activations
from ablation.engine.responses.loops.activations import (
    FIRST_BENT,
    FIRST_SMOOTH,
    RELU,
    bend,
    bent_change,
    change_of,
    largest_bent_change,
    reaches_of,
    relu_change,
    relu_limits,
    rest_of_function,
    series_of_function,
    unseen_change,
)
from ablation.engine.responses.loops.records import Sums, add_run, column_of, flush
from ablation.engine.responses.loops.series import (
    ORDERS,
    REACH_LONG,
    REACH_SHORT,
    direct_loss,
    long_series,
    long_sum,
    loss_of,
    rest_of_series,
    series_of,
    short_series,
    short_sum,
)

ROW_TILE = 1024  # inputs that are summed up in float32 together: 8 KB
FLUSH_EXAMPLES = 8  # after which their float32 sums are added to float64 sums
SHORT, LONG, BEYOND, STILL = range(4)  # the kinds of pairs; a pair that is still moves for no input
_EVERY = 1e30  # a |d| that none is beyond
_NONE, _ONE = np.float32(0), np.float32(1)


class Inputs(NamedTuple):
    """Properties of a batch's inputs."""

    largest: np.ndarray  # (examples), float64: the largest |x|
    active: np.ndarray  # (words, inputs), uint64: a bit for each example, 1 where x is not 0


class Pairs(NamedTuple):
    """The examples on which one unit moves, in the batch's order; `list_pairs` fills the arrays."""

    examples: np.ndarray  # (pairs), int64
    kinds: np.ndarray  # (pairs), int64: SHORT, LONG or BEYOND
    y: np.ndarray  # (pairs), float64
    reach: np.ndarray  # (pairs), float32: the |d| up to which the numbers of t hold
    unseen: np.ndarray  # (pairs), float32: the |t| up to which rounding hides a change
    numbers: np.ndarray  # (pairs, 2 or 9), float32: low and high of a ReLU; an exact form; or a series of t
    series: np.ndarray  # (pairs, ORDERS), float32: the series of F
    candidates: np.ndarray  # (pairs), int64: the pairs whose unit is inactive behind a ReLU, and may be activated
    active: np.ndarray  # (words), uint64: a bit for each example, 1 where the unit is active
    n: np.ndarray  # (2), int64: how many pairs there are, and how many candidates


class Scratch(NamedTuple):
    """Sums of F (first half) and of F^2 (second half) for one tile of inputs, and work arrays."""

    narrow: np.ndarray  # (2 * ROW_TILE), float32
    wide: np.ndarray  # (2 * ROW_TILE), float64
    counts: np.ndarray  # (ROW_TILE), int32: the examples on which t is not 0
    near: np.ndarray  # (ROW_TILE), float32: 1 where the series reach, else 0
    chosen: np.ndarray  # (pairs), int64: the pairs of one kind


@kernel
def make_pairs(n, function):
    """Allocate the record of n pairs behind a function."""
    return Pairs(
        examples=np.empty(n, np.int64),
        kinds=np.empty(n, np.int64),
        y=np.empty(n),
        reach=np.empty(n, np.float32),
        unseen=np.empty(n, np.float32),
        numbers=np.empty((n, activations.count_numbers(function)), np.float32),
        series=np.empty((n, ORDERS), np.float32),
        candidates=np.empty(n, np.int64),
        active=np.empty((n + 63) // 64, np.uint64),
        n=np.zeros(2, np.int64),
    )


# --- single weights ---------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Single weights of a Linear: float64 replacement minus weight, unit and input of each."""

    steps: np.ndarray
    units: np.ndarray
    inputs: np.ndarray


@kernel
def score_sites(places, x, batch, follows, delta, touched):
    """The loss delta of every (site, example), and whether any logit moves. x: (inputs, examples)."""
    for site in range(places.steps.shape[0]):
        unit, x_site, step = places.units[site], x[places.inputs[site]], np.float64(places.steps[site])
        y_site = batch.y[unit]
        column, reaches_logits = column_of(follows, unit)
        for n in range(x_site.shape[0]):
            d, t = step * np.float64(x_site[n]), 0.0
            if d != 0 and reaches_logits:
                t = change_of(column.function, y_site[n], d)
            delta[site, n], touched[site, n] = 0.0, t != 0
            if t != 0:
                delta[site, n] = direct_loss(t, column, batch, n)


# --- pairs ------------------------------------------------------------------------------------------------------------


@kernel
def slope_of_loss(q, v, unit, label, is_logit):
    """An upper bound of |dF/dt| at t = 0: sum_c q_c |u_c|."""
    total = 0.0
    if is_logit:
        for c in range(q.shape[0]):
            total += q[c] if unit == label or c == unit else 0.0
        return total
    for c in range(q.shape[0]):
        total += q[c] * abs(v[c] - v[label])
    return total


@kernel
def largest_change(a, reach):
    """An upper bound of |t| without the series' remainder: sum_k |a_k| reach^k."""
    total = 0.0
    for k in range(a.shape[0] - 1, -1, -1):
        total = (total + abs(a[k])) * reach
    return total


@kernel
def kind_of(farthest):
    """The kind of a pair whose t is exact, by its largest |t| R."""
    return SHORT if farthest <= REACH_SHORT else LONG if farthest <= REACH_LONG else BEYOND


@kernel
def chart_pair(column, y, far, s, a_p, a):
    """The numbers of one pair's t, in `a`, for |d| <= far.

    Returns the pair's kind; up to which |d| the numbers hold; the largest |t| R there; the rest of t; and the |t| that
    is lost in rounding.
    """
    function, width = column.function, column.range
    if function.code < FIRST_BENT:
        is_inactive = function.code == RELU and y <= 0
        a[0], a[1] = relu_limits(function, y)
        farthest = (far + y if is_inactive else far) * width
        return kind_of(farthest), _EVERY, farthest, 0.0, 0.0
    if function.code < FIRST_SMOOTH:
        bend(function, y, a)
        largest = largest_bent_change(function, y, far)  # |t| R may be 0 where this is not: a column of equal numbers
        return (STILL if largest == 0 else kind_of(largest * width)), _EVERY, largest * width, 0.0, 0.0
    series_of_function(function, y, s, a_p)
    a[: activations.INCREMENT_ORDERS] = a_p
    short, long = reaches_of(function, y)
    reach, unseen = min(far, long), unseen_change(function, y, a_p[0])
    farthest = largest_change(a_p, reach) * width
    if far <= short and farthest <= REACH_SHORT:
        return SHORT, short, farthest, rest_of_function(function, y, far, activations.SHORT_INCREMENT), unseen
    kind = LONG if far <= long and farthest <= REACH_LONG else BEYOND
    return kind, long, farthest, rest_of_function(function, y, reach, activations.LONG_INCREMENT), unseen


@kernel
def rest_of_loss(farthest, rest, kappa_2, column, batch, n):
    """An upper bound of the error of one pair's F, in nats, if its t has an error of at most `rest`."""
    total = rest_of_series(farthest, column.range, kappa_2)
    if rest > 0:
        at_most = math.exp(2 * min(np.float64(farthest), np.float64(REACH_LONG)))
        slope = slope_of_loss(batch.q[n], column.values, column.unit, batch.labels[n], column.is_logit)
        total += rest * slope * at_most
    return total


@kernel
def list_pairs(row, largest, column, batch, inputs, pairs, bounds):
    """Fill `pairs` for one unit whose largest |step| is `largest`, and add to its bound."""
    s, a_p = np.empty(activations.INCREMENT_ORDERS + 1), np.empty(activations.INCREMENT_ORDERS)
    m, kappa = np.empty(ORDERS), np.empty(ORDERS)
    # Arrays leave their records here, once for all examples: Numba counts references wherever a record is passed on.
    q, labels, ys, largest_x, series = batch.q, batch.labels, batch.y[row], inputs.largest, pairs.series
    examples, kinds, candidates, active, numbers = (
        pairs.examples,
        pairs.kinds,
        pairs.candidates,
        pairs.active,
        pairs.numbers,
    )
    reaches, unseens, pair_ys, is_relu = pairs.reach, pairs.unseen, pairs.y, column.function.code == RELU
    n_pairs = n_candidates = 0
    active[:] = 0
    for n in range(labels.shape[0]):
        far, p, y = largest * largest_x[n], n_pairs, ys[n]
        if far == 0 or (is_relu and y <= 0 and np.float32(far) <= np.float32(-y)):  # no input activates the unit
            continue
        kind, reaches[p], farthest, rest, unseens[p] = chart_pair(column, y, far, s, a_p, numbers[p])
        if kind == STILL:
            continue
        series_of(column, q[n], labels[n], m, kappa)
        bounds[row] += rest_of_loss(farthest, rest, 2 * kappa[1], column, batch, n)
        examples[p], kinds[p], pair_ys[p] = n, kind, y
        for k in range(ORDERS):
            series[p, k] = kappa[k]
        if is_relu and y <= 0:
            candidates[n_candidates] = p
            n_candidates += 1
        else:
            active[n // 64] |= np.uint64(1) << np.uint64(n % 64)
        n_pairs += 1
    pairs.n[0], pairs.n[1] = n_pairs, n_candidates


@kernel
def pick(kinds, kind, first, last, chosen):
    """The pairs from first to last that are of one kind, in `chosen`; returns how many."""
    n = 0
    for p in range(first, last):
        if kinds[p] == kind:
            chosen[n] = p
            n += 1
    return n


# --- sums over the examples of one kind, for one tile of inputs -------------------------------------------------------


@kernel
def relu_numbers(a, k):
    """Low and high of one pair."""
    return a[k, 0], a[k, 1]


@kernel
def relu_form(d, a):
    """t of a ReLU."""
    return relu_change(d, a[0], a[1])


@kernel
def short_numbers(a, k):
    """The short series of one pair's t."""
    return a[k, 0], a[k, 1], a[k, 2], a[k, 3]


@kernel
def short_change(d, a):
    """sum_k a_k d^k, the first of order 1."""
    return d * (a[0] + d * (a[1] + d * (a[2] + d * a[3])))


@kernel
def bent_numbers(a, k):
    """The exact form of one pair's t."""
    return a[k, 0], a[k, 1], a[k, 2], a[k, 3], a[k, 4], a[k, 5], a[k, 6], a[k, 7], a[k, 8]


@kernel
def add_short_relu(step, x, first, pairs, n_chosen, scratch):
    """Add F and F^2 of the chosen pairs behind a ReLU, by the short series: two pairs a round, which share the loads
    and stores of the sums. `make_add_pairs`, which takes one pair a round, takes 1.2 times as long.
    """
    size, narrow, wide, chosen = step.shape[0], scratch.narrow, scratch.wide, scratch.chosen
    examples, low_high, series = pairs.examples, pairs.numbers, pairs.series
    for k in range(0, n_chosen - 1, 2):
        p, r = chosen[k], chosen[k + 1]
        a, b = short_series(series, p), short_series(series, r)
        low_a, high_a, low_b, high_b = low_high[p, 0], low_high[p, 1], low_high[r, 0], low_high[r, 1]
        x_a, x_b = x[examples[p], first : first + size], x[examples[r], first : first + size]
        for j in range(size):
            f = short_sum(relu_change(step[j] * x_a[j], low_a, high_a), a)
            g = short_sum(relu_change(step[j] * x_b[j], low_b, high_b), b)
            narrow[j] += f + g
            narrow[ROW_TILE + j] += f * f + g * g
        if k % FLUSH_EXAMPLES == FLUSH_EXAMPLES - 2:
            flush(narrow, wide)
    if n_chosen % 2:
        p = chosen[n_chosen - 1]
        a = short_series(series, p)
        low_a, high_a, x_a = low_high[p, 0], low_high[p, 1], x[examples[p], first : first + size]
        for j in range(size):
            f = short_sum(relu_change(step[j] * x_a[j], low_a, high_a), a)
            narrow[j] += f
            narrow[ROW_TILE + j] += f * f
    flush(narrow, wide)


def make_add_pairs(numbers_of: Any, change: Any, series: Any, series_sum: Any, *, is_counted: bool = True) -> Any:
    """The loop with t = change(d, numbers_of(pairs.numbers, p)) and F = series_sum(t, series(pairs.series, p)).

    `is_counted`: whether it counts where t is not 0, too.
    """

    def add_pairs(step, x, first, pairs, n_chosen, scratch):
        """Add F and F^2 of the chosen pairs, for one tile of inputs."""
        size, narrow, wide, counts = step.shape[0], scratch.narrow, scratch.wide, scratch.counts
        chosen, examples, numbers, coefficients = scratch.chosen, pairs.examples, pairs.numbers, pairs.series
        for k in range(n_chosen):
            p = chosen[k]
            a_p, c_p, unseen = numbers_of(numbers, p), series(coefficients, p), pairs.unseen[p]
            x_p = x[examples[p], first : first + size]
            for j in range(size):
                t = change(step[j] * x_p[j], a_p)
                f = series_sum(t, c_p)
                narrow[j] += f
                narrow[ROW_TILE + j] += f * f
                if is_counted:
                    counts[j] += abs(t) > unseen
            if k % FLUSH_EXAMPLES == FLUSH_EXAMPLES - 1:
                flush(narrow, wide)
        flush(narrow, wide)

    return part_of_kernel(add_pairs)


def make_add_near(change: Any) -> Any:
    """The loop over those inputs that both series reach. It has no branch, and so becomes vector code."""

    def add_near(step, x, a, p, width, pairs, scratch):
        """Add F and F^2 of one pair; returns the number of inputs that are left to `add_far`."""
        narrow, counts, near = scratch.narrow, scratch.counts, scratch.near
        c, reach, unseen, n_far = long_series(pairs.series, p), pairs.reach[p], pairs.unseen[p], _NONE
        for j in range(step.shape[0]):
            d = step[j] * x[j]
            t = change(d if abs(d) <= reach else _NONE, a)
            is_near = _ONE if abs(d) <= reach else _NONE
            is_near = is_near if abs(t) * width <= REACH_LONG else _NONE
            t *= is_near
            f = long_sum(t, c)
            narrow[j] += f
            narrow[ROW_TILE + j] += f * f
            counts[j] += abs(t) > unseen
            near[j] = is_near
            n_far += _ONE - is_near
        return n_far

    return part_of_kernel(add_near)


@kernel
def add_far(step, x, p, pairs, column, batch, scratch):
    """Add F and F^2 of one pair where `add_near` did not: t from its definition, F by its series or directly."""
    wide, c, y, n = scratch.wide, long_series(pairs.series, p), pairs.y[p], pairs.examples[p]
    for j in range(step.shape[0]):
        if scratch.near[j] != 0:
            continue
        t = change_of(column.function, y, np.float64(step[j]) * np.float64(x[j]))
        if t != 0:
            f = loss_of(t, c, column, batch, n)
            wide[j] += f
            wide[ROW_TILE + j] += f * f
            scratch.counts[j] += 1


add_long_relu = make_add_pairs(relu_numbers, relu_form, long_series, long_sum, is_counted=False)
add_short_bent = make_add_pairs(bent_numbers, bent_change, short_series, short_sum)
add_long_bent = make_add_pairs(bent_numbers, bent_change, long_series, long_sum)
add_short_smooth = make_add_pairs(short_numbers, short_change, short_series, short_sum)
add_long_smooth = make_add_pairs(long_series, long_sum, long_series, long_sum)
add_near_relu, add_near_bent, add_near_smooth = (make_add_near(form) for form in (relu_form, bent_change, long_sum))


@kernel
def add_beyond(step, first, pairs, n_chosen, column, batch, scratch):
    """Add F and F^2 of the chosen pairs, which some input takes beyond one of the series."""
    size, code, width = step.shape[0], column.function.code, column.range
    for k in range(n_chosen):
        p = scratch.chosen[k]
        x = batch.x[pairs.examples[p], first : first + size]
        if code < FIRST_BENT:
            n_far = add_near_relu(step, x, relu_numbers(pairs.numbers, p), p, width, pairs, scratch)
        elif code < FIRST_SMOOTH:
            n_far = add_near_bent(step, x, bent_numbers(pairs.numbers, p), p, width, pairs, scratch)
        else:
            n_far = add_near_smooth(step, x, long_series(pairs.numbers, p), p, width, pairs, scratch)
        if k % FLUSH_EXAMPLES == FLUSH_EXAMPLES - 1:
            flush(scratch.narrow, scratch.wide)
        if n_far > 0:
            add_far(step, x, p, pairs, column, batch, scratch)
    flush(scratch.narrow, scratch.wide)


@kernel
def add_kinds(step, first, pairs, between, column, batch, scratch):
    """Add F and F^2 of the pairs from `between[0]` to before `between[1]`, one kind after the other."""
    x, code, chosen = batch.x, column.function.code, scratch.chosen
    n_short = pick(pairs.kinds, SHORT, between[0], between[1], chosen)
    if code < FIRST_BENT:
        add_short_relu(step, x, first, pairs, n_short, scratch)
    elif code < FIRST_SMOOTH:
        add_short_bent(step, x, first, pairs, n_short, scratch)
    else:
        add_short_smooth(step, x, first, pairs, n_short, scratch)
    n_long = pick(pairs.kinds, LONG, between[0], between[1], chosen)
    if code < FIRST_BENT:
        add_long_relu(step, x, first, pairs, n_long, scratch)
    elif code < FIRST_SMOOTH:
        add_long_bent(step, x, first, pairs, n_long, scratch)
    else:
        add_long_smooth(step, x, first, pairs, n_long, scratch)
    n_beyond = pick(pairs.kinds, BEYOND, between[0], between[1], chosen)
    add_beyond(step, first, pairs, n_beyond, column, batch, scratch)


@kernel
def ones(bits):
    """The number of set bits of a 64-bit word; LLVM compiles this expression to one instruction."""
    bits -= (bits >> np.uint64(1)) & np.uint64(0x5555555555555555)
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (bits * np.uint64(0x0101010101010101)) >> np.uint64(56)


@kernel
def count_touched(step, x, first, active, pairs, touched):
    """Add the examples where a ReLU's t is not 0: input and unit active, or the unit activated by this input."""
    size, of_unit, numbers, examples = step.shape[0], pairs.active, pairs.numbers, pairs.examples
    for word in range(of_unit.shape[0]):
        bits, active_bits = of_unit[word], active[word, first : first + size]
        for j in range(size):
            touched[j] += np.int64(ones(bits & active_bits[j]))
    for k in range(pairs.n[1]):
        p = pairs.candidates[k]
        x_p, low_p = x[examples[p], first : first + size], numbers[p, 0]
        for j in range(size):
            touched[j] += step[j] * x_p[j] > low_p
    for j in range(size):
        if step[j] == 0:
            touched[j] = 0


# --- whole rows: all inputs of a unit ---------------------------------------------------------------------------------


@kernel
def add_tile(step, first, pairs, column, batch, runs, own, scratch):
    """Add the sums of one unit to those of one tile of inputs, run by run."""
    begin = 0
    for k in range(runs.ends.shape[0]):
        end = begin
        while end < pairs.n[0] and pairs.examples[end] < runs.ends[k]:
            end += 1
        scratch.wide[:] = 0
        scratch.counts[:] = 0
        add_kinds(step, first, pairs, (begin, end), column, batch, scratch)
        begin = end
        add_run(scratch.wide, own, runs, k)
        if column.function.code >= FIRST_BENT:
            for j in range(step.shape[0]):
                own.touched[j] += scratch.counts[j]


@kernel
def add_rows(units, steps, batch, inputs, follows, runs, sums):
    """Add the sums over one batch of all weights of some units.

    units, steps (units, inputs): which, and replacement minus weight.  batch: its y is that of these units.
    """
    n_examples, n_inputs = batch.x.shape
    pairs = make_pairs(n_examples, follows.function)
    scratch = Scratch(
        np.zeros(2 * ROW_TILE, np.float32), np.empty(2 * ROW_TILE), np.empty(ROW_TILE, np.int32),
        np.empty(ROW_TILE, np.float32), np.empty(n_examples, np.int64),
    )  # fmt: skip
    for row in range(steps.shape[0]):
        column, reaches_logits = column_of(follows, units[row])
        if not reaches_logits:
            continue
        list_pairs(row, np.float64(max(steps[row].max(), -steps[row].min())), column, batch, inputs, pairs, sums.bounds)
        for first in range(0, n_inputs, ROW_TILE):
            tile = slice(first, min(first + ROW_TILE, n_inputs))
            step, own = steps[row, tile], tile_of(sums, row, tile)
            if column.function.code < FIRST_BENT:
                count_touched(step, batch.x, first, inputs.active, pairs, own.touched)
            add_tile(step, first, pairs, column, batch, runs, own, scratch)


@kernel
def tile_of(sums, row, tile):
    """One tile of one unit's sums."""
    return Sums(
        sums.delta[row, tile], sums.delta_squared[row, tile], sums.touched[row, tile], sums.class_delta[row, tile],
        sums.class_delta_squared[row, tile], sums.within[row, tile], sums.bounds[row : row + 1],
    )  # fmt: skip

"""The loops over (unit, input, example) of a classifier head on the CPU, compiled by Numba.

In: plain arrays. Out: sums or deltas, written into arrays that the caller gives. Formulas are those of `response.py`
(a series in one number) and `loss.py` (the direct formula). Deltas are float32, sums float64, in a fixed order that
does not depend on the number of threads.

    t = max(d, -y) + min(y, 0)          d = step_ij x_nj, what unit i moves by behind its ReLU; y = -inf .. inf: t = d
    F = log1p(S(t))                     S(t) = sum_c q_c expm1(t u_c),   u_c = v_c - v_y,   v = V[:, i]

Nothing here is told that NaN and infinity don't occur.
"""

import hashlib
import inspect
import math
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np

LOOPS = ("active", "channels", "curves", "functions", "fused", "kernels", "piecewise")  # the files with compiled loops
_LANES = {"reassoc", "contract", "nsz", "arcp"}  # what LLVM may do: sums in lanes among it
_settings: Any = numba.config
_OWN_CACHE = Path.home() / ".cache" / "weight-ablation"

TILE = 1024  # inputs that are summed up in float32 together: 8 KB
FLUSH = 8  # examples after which their float32 sums are added up in float64
SHORT, LONG = 5, 8  # orders of the two polynomials
ORDERS = LONG
# A remainder of at most 1e-6 of t^2 kappa_2, by C_(K+1) / (K+1)! x^(K-1) e^x for x = |t| R (see response.py).
REACH_SHORT, REACH_LONG = np.float32(0.092), np.float32(0.347)
REST_SHORT, REST_LONG = 9.125 / 720, 420.375 / 362880
LARGE = 0.5  # as in loss.py
SMALL = np.float32(0.25)  # |z| that the polynomial of expm1 is used for


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a loop, once per machine where the result can be kept. Sums may be cut into vector lanes."""
    return _compiled(function, _LANES)


def part_of_kernel(function: Callable[..., Any]) -> Any:
    """The same for what is kept with the loop that calls it: one text in many forms, which no name tells apart."""
    return _compiled(function, _LANES, is_kept=False)


def in_order(function: Callable[..., Any]) -> Any:
    """The same for sums that must be formed as they are written, since they cancel."""
    return _compiled(function, _LANES - {"reassoc"})


def _compiled(function: Callable[..., Any], fastmath: set[str], *, is_kept: bool = True) -> Any:
    function = inspect.unwrap(function)  # of what checks types when tests run
    # Inlined, or one compiled loop may call the copy of a part that another one has brought, which rounds differently:
    # then bytes would depend on what the process has run before.
    options: Any = {"nogil": True, "fastmath": fastmath, "error_model": "numpy", "forceinline": True}
    if not is_kept:
        return numba.njit(**options)(function)
    given, _settings.CACHE_DIR = _settings.CACHE_DIR, _cache_folder()
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(**options)(function)
    finally:
        _settings.CACHE_DIR = given


@cache
def _cache_folder() -> str:
    """Where compiled loops are kept: by the text of all of them, for Numba looks only at the file that a loop is in."""
    here = Path(__file__).parent
    texts = hashlib.blake2b(b"".join((here / f"{name}.py").read_bytes() for name in LOOPS), digest_size=8)
    places = [Path(_settings.CACHE_DIR)] if _settings.CACHE_DIR else [here / "__pycache__", _OWN_CACHE]
    for place in places:
        folder = place / f"loops-{texts.hexdigest()}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return str(folder)
    return ""


# --- the loss as a function of one number -----------------------------------------------------------------------------


@kernel
def moments_of_column(q, v, label, m):
    """m[k] = sum_c q_c u_c^(k+1), u = v - v_label."""
    own = v[label]
    m1 = m2 = m3 = m4 = m5 = m6 = m7 = m8 = np.float32(0)
    for c in range(q.shape[0]):
        u = v[c] - own
        p = q[c] * u
        m1 += p
        p *= u
        m2 += p
        p *= u
        m3 += p
        p *= u
        m4 += p
        p *= u
        m5 += p
        p *= u
        m6 += p
        p *= u
        m7 += p
        p *= u
        m8 += p
    m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7] = m1, m2, m3, m4, m5, m6, m7, m8


@kernel
def moments_of_logit(q, unit, label, m):
    """The same where only logit `unit` moves: u is 1 there, and where it is the label's own -1 everywhere else."""
    total, sign = np.float64(0), 1.0
    if unit == label:
        sign = -1.0
        for c in range(q.shape[0]):
            total += q[c]
    else:
        total = np.float64(q[unit])
    for k in range(ORDERS):
        m[k] = total * sign ** (k + 1)


@kernel
def series_of_log(m, kappa):
    """Coefficients of log1p(sum_k m_k t^k / k!): cumulants kappa_k = m_k - sum_j C(k-1,j-1) kappa_j m_(k-j), over k!"""
    for k in range(1, ORDERS + 1):
        total, choose = m[k - 1], 1.0
        for j in range(1, k):
            total -= choose * kappa[j - 1] * m[k - j - 1]
            choose = choose * (k - j) / j
        kappa[k - 1] = total
    factorial = 1.0
    for k in range(1, ORDERS + 1):
        factorial *= k
        kappa[k - 1] /= factorial


@kernel
def expm1_small(z):
    """For |z| <= 1/4, to float32's last digit: z (1 + z/2 (1 + z/3 (...)))."""
    one = np.float32(1)
    high = one + z * np.float32(1 / 6) * (one + z * np.float32(1 / 7))
    low = one + z * np.float32(1 / 4) * (one + z * np.float32(1 / 5) * high)
    return z * (one + z * np.float32(1 / 2) * (one + z * np.float32(1 / 3) * low))


@kernel
def loss_of_column(t, spread, q, z, v, label):
    """log1p(sum_c q_c expm1(t u_c)) for one pair, in float64; `spread` is the largest |u_c|.

    expm1 by its series; beyond 1/4 of an eighth of z, then doubled three times, expm1(2h) = expm1(h) (2 + expm1(h)),
    which does not cancel. Large changes are a difference of losses, from the logits z.
    """
    step, own, total = np.float32(t), v[label], np.float32(0)
    reach = abs(step) * spread
    if reach <= SMALL:
        for c in range(q.shape[0]):
            total += q[c] * expm1_small(step * (v[c] - own))
    elif reach <= 8 * SMALL:
        step *= np.float32(0.125)
        for c in range(q.shape[0]):
            e = expm1_small(step * (v[c] - own))
            e *= np.float32(2) + e
            e *= np.float32(2) + e
            e *= np.float32(2) + e
            total += q[c] * e
    else:
        return large_loss_of_column(t, z, v, label)
    if not abs(total) <= LARGE:
        return large_loss_of_column(t, z, v, label)
    return math.log1p(np.float64(total))


@kernel
def large_loss_of_column(t, z, v, label):
    """The same in float64, from the logits: p_c expm1(t u_c), or for large t u_c a difference; where the sum is large
    a difference of two losses."""
    own = np.float64(v[label])
    top, moved_top = -np.inf, -np.inf
    for c in range(z.shape[0]):
        top = max(top, z[c])
        moved_top = max(moved_top, z[c] + t * np.float64(v[c]))
    before, after = 0.0, 0.0
    for c in range(z.shape[0]):
        before += math.exp(z[c] - top)
        after += math.exp(z[c] + t * np.float64(v[c]) - moved_top)
    before, after = math.log(before) + top, math.log(after) + moved_top
    total = 0.0
    for c in range(z.shape[0]):
        moved = t * (np.float64(v[c]) - own)
        if abs(moved) < 1:
            total += math.exp(z[c] - before) * math.expm1(moved)
        else:
            total += math.exp(z[c] - before + moved) - math.exp(z[c] - before)
    if abs(total) <= LARGE:
        return math.log1p(total)
    return (after - before) - t * own


@kernel
def loss_of_logit(t, unit, q, z, label):
    """The same where only logit `unit` moves: log1p(q_unit expm1(t)), or log1p(sum_c q_c expm1(-t)) for the label's."""
    total, sign = np.float64(q[unit]), 1.0
    if unit == label:
        total, sign = 0.0, -1.0
        for c in range(q.shape[0]):
            total += np.float64(q[c])
    total *= math.expm1(sign * t)
    if abs(total) <= LARGE:
        return math.log1p(total)
    top = max(z.max(), z[unit] + t)
    before, after = 0.0, 0.0
    for c in range(z.shape[0]):
        before += math.exp(z[c] - top)
        after += math.exp(z[c] + (t if c == unit else 0.0) - top)
    return math.log(after) - math.log(before) - (t if unit == label else 0.0)


@kernel
def series_of(unit, column, is_logit, q, label, m, kappa):
    """The coefficients of one (unit, example)."""
    if is_logit:
        moments_of_logit(q, unit, label, m)
    else:
        moments_of_column(q, column, label, m)
    series_of_log(m, kappa)


@kernel
def direct_loss(t, unit, spread, q, z, column, label, is_logit):
    """F(t), directly."""
    if is_logit:
        return loss_of_logit(np.float64(t), unit, q, z, label)
    return loss_of_column(np.float64(t), spread, q, z, column, label)


@kernel
def column_of(columns, unit, is_logit):
    """A unit's column of the last Linear, its spread, and whether any logit hears of the unit."""
    column = columns[0 if is_logit else unit]
    return column, np.float32(1) if is_logit else column.max() - column.min(), is_logit or column.any()


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


@kernel
def short_series(c, k):
    """The coefficients of one pair (unit, example)."""
    return c[k, 0], c[k, 1], c[k, 2], c[k, 3], c[k, 4]


@kernel
def long_series(c, k):
    """The coefficients of one pair (unit, example)."""
    return c[k, 0], c[k, 1], c[k, 2], c[k, 3], c[k, 4], c[k, 5], c[k, 6], c[k, 7]


@kernel
def short_sum(t, a):
    """sum_k a_k t^k, the first of order 1."""
    return t * (a[0] + t * (a[1] + t * (a[2] + t * (a[3] + t * a[4]))))


@kernel
def long_sum(t, a):
    """sum_k a_k t^k, the first of order 1."""
    high = a[4] + t * (a[5] + t * (a[6] + t * a[7]))
    return t * (a[0] + t * (a[1] + t * (a[2] + t * (a[3] + t * high))))


@in_order
def unit_delta(d, low, high):
    """t = max(d, -y) + min(y, 0)."""
    return (d if d > low else low) + high


@kernel
def flush(narrow, wide):
    """Add float32 sums up in float64, and begin again."""
    for j in range(narrow.shape[0]):
        wide[j] += np.float64(narrow[j])
        narrow[j] = 0


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
def loss_of(t, c, unit, spread, q, z, column, label, is_logit):
    """F(t): by the series within its reach, else directly."""
    if abs(t) * spread <= REACH_LONG:
        return np.float64(long_sum(t, c))
    return direct_loss(t, unit, spread, q, z, column, label, is_logit)


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
def rest_of_series(reach, spread, kappa_2):
    """A bound on what is left out of one pair's series, in nats."""
    reach = min(reach, REACH_LONG)
    if spread == 0:
        return 0.0
    factor = REST_SHORT * reach ** (SHORT - 1) if reach <= REACH_SHORT else REST_LONG * reach ** (LONG - 1)
    return factor * (reach / spread) ** 2 * kappa_2 * math.exp(reach)


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


@kernel
def add_sums(sums, total, squared):
    """Add the sums of F, in the first half of `sums`, and of F^2, in the second, for one tile."""
    half = sums.shape[0] // 2
    for j in range(total.shape[0]):
        total[j] += sums[j]
        squared[j] += sums[half + j]


@kernel
def close_class(total, squared, within, n):
    """Add n/(n-1) (S2 - S^2/n) of a class that is complete, and begin the next."""
    for j in range(total.shape[0]):
        if n > 1:
            within[j] += n / (n - 1) * max(0.0, squared[j] - total[j] * total[j] / n)
        total[j] = squared[j] = 0.0

# mypy: allow-untyped-defs, allow-untyped-calls
"""The loops over whole rows (`rows.py`) for CUDA devices, in Triton.

In: tensors on one device. Out: sums, added to tensors that the caller gives. Formulas, orders and reaches are those of
`rows.py` and `series.py`; a test compares the results number by number.

    list_pairs   a program per unit: the examples that it may move on, by how far it moves them
    fit_series   a warp per pair: its M_k over the classes; then, a program per unit, the coefficients of the series
    find_far     the direct formula, for the (unit, example, input) that are beyond the series
    add_rows     a program per (unit, tile of inputs): its sums stay in registers over all examples

`add_rows` takes most of the time: ten instructions and four bytes of x for each (active pair, input). Hence
- the pairs of a unit are a list and not a mask: the loop runs over a third of the examples, and as all threads of a
  program are inputs of one unit, none waits for another. (A tile of several units would share its reads of x, but runs
  over all examples on which any of them is active: for two units 15 % less to read and 70 % more to compute.)
- programs that run at the same time have the same inputs and different units, so that x comes out of the caches.
- which inputs are active matters only for `touched`; that count is a product of two matrices of 0 and 1.

Moments could be products q @ V^k instead, as in `carried/series.py`. Those cover all units, where here only listed
pairs count, and need float64, since they are shifted to v_label afterwards, which cancels; so they need a device that
is fast in float64. Here differences come first, and float32 is enough.

Each program owns what it writes and visits the examples in order: no atomics, the same bytes in whatever order programs
run. The host is waited for only where some pair is beyond the series, for the number of such inputs.

All kernels are launched by keyword. Their pointers, each to contiguous memory of the shape given:

    q             float32 (examples, classes)        softmax, 0 for the label
    z             float64 (examples, classes)        logits
    labels        int64   (examples)                 classes
    x             float32 (examples, inputs)         inputs of the layer
    y             float64 (units, examples)          outputs of the layer
    step          float32 (units, inputs)            replacement minus weight
    largest       float64 (units)                    largest |step| of a unit; 0 where no logit depends on the unit
    largest_x     float64 (examples)                 largest |x| of an example
    columns       float32 (units, classes)           the last Linear's columns v
    units         int64   (units)                    the units' numbers, which are their logits where IS_LOGIT
    u_range        float64 (units)                    max v - min v: no |u| = |v_c - v_label| is larger
    of_others     float64 (examples)                 sum of q
    ends, closes  int32   (runs)                     where runs of examples end; 1 where a class ends there, too
    example       int32   (units, examples)          the examples of a unit's pairs, in the order of `starts`
    low, high     float32 (units, examples)          of each pair: t = max(d, low) + high
    reach         float64 (units, examples)          of each pair: its largest |t| times u_range
    starts        int32   (units, runs, 4)           where a run's short, long and wide pairs begin, and where it ends
    active        float16 (units, examples)          1 where a unit that may move is active, in the batch's order
    candidates    int32   (units, examples)          the pairs whose unit is inactive and may be activated
    n_candidates  int32   (units)                    how many these are
    moments, c    float32 (units, examples, ORDERS)  of each pair: moments, which become the coefficients of F
    bounds        float64 (units)                    added to: what the series leave out at most, in nats
    far_starts    int64   (units * tiles * runs + 1) where the far inputs of a unit, tile and run begin
    far_inputs    int32   (far)                      inputs that are beyond the series
    far_losses    float64 (far)                      F of them
    rows, examples, ts, loss       (far)             unit (int64), example (int64), t (float32) and F (float64) of each
    delta, delta_squared           float64 (units, inputs)        added to: sums of F and of F^2
    class_delta, class_delta_squared   float64 (units, inputs)    added to: the same sums over the class that has begun
    within                         float64 (units, inputs)        added to: n/(n-1) (S2 - S^2/n) of complete classes
    touched                        int32   (units, inputs)        added to: examples on which t is not 0
    by_run                         float64 (units, runs, inputs)  set to: sums of F run by run
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from subprocess import SubprocessError
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from jaxtyping import Float16, Float32, Float64, Int32, Int64
from torch import Tensor

from ablation.engine.deltas import Runs
from ablation.engine.responses.loops import rows as row_loops
from ablation.engine.responses.loops import series
from ablation.engine.responses.loops.records import Batch

PAIRS_PER_LAUNCH = 1 << 23  # (unit, example): 58 bytes each
FAR_AT_ONCE = 1 << 25  # (wide pair, input) looked at together
FAR_LISTED = 1 << 27  # the most that may be listed together: 40 bytes each of those that are far
COUNTED = 2048  # examples: float16 counts to there without rounding
LISTED = 512  # examples that are listed together
CLASSES = 256  # that a program adds up side by side
MOMENT_PARTS = 4  # programs for the moments of a unit: of one warp each, so that no sum goes across warps
VALUES = 1024  # (far input, class) numbers of a program of the direct formula
LAUNCH_OPTIONS = {"enable_fp_fusion": True}  # a Triton to come makes no multiply-add unless it is told so
KINDS = tl.constexpr(3)  # short, long, wide

ORDERS = tl.constexpr(series.ORDERS)
SHORT_ORDER, LONG_ORDER = tl.constexpr(series.SHORT_ORDER), tl.constexpr(series.LONG_ORDER)
FLUSH = tl.constexpr(row_loops.FLUSH_EXAMPLES)
REACH_SHORT, REACH_LONG = tl.constexpr(float(series.REACH_SHORT)), tl.constexpr(float(series.REACH_LONG))
REST_SHORT, REST_LONG = tl.constexpr(series.REST_SHORT), tl.constexpr(series.REST_LONG)
LARGE_SUM = tl.constexpr(series.LARGE_SUM)
SMALL_EXPONENT = tl.constexpr(float(series.SMALL_EXPONENT))


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a kernel, or a part of one, when it is first used."""
    return triton.jit(inspect.unwrap(function))  # of what checks types when tests run


@cache
def can_launch() -> bool:
    """Whether kernels can be started: at its first use Triton builds the piece that talks to the device, in C."""
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, AssertionError, SubprocessError) as error:
        warnings.warn(
            f"Whole layers are computed on the CPU here, since Triton can't be used: {error}. "
            "Most likely it finds no C compiler: install gcc (and libc6-dev) for the GPU to do it.",
            stacklevel=2,
        )
        return False
    return True


# --- which pairs ------------------------------------------------------------------------------------------------------


@kernel
def _look(y, largest, largest_x, u_range, begin, last, HAS_RELU: tl.constexpr, BLOCK: tl.constexpr):
    """Return the kind (KINDS: not moved), reach, low and high of some pairs of one unit, and whether it is active."""
    n = begin + tl.arange(0, BLOCK)
    inside = n < last
    y_n = tl.load(y + n, mask=inside, other=0.0)
    far = largest * tl.load(largest_x + n, mask=inside, other=0.0)
    is_moved = inside & (far != 0)
    if HAS_RELU:
        inactive = y_n <= 0
        low, high = (-y_n).to(tl.float32), tl.minimum(y_n, 0.0).to(tl.float32)
        is_moved &= ~(inactive & (far.to(tl.float32) <= low))
        is_active = is_moved & ~inactive
        reach = tl.where(inactive, far + y_n, far) * u_range
    else:
        low, high = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
        is_active = is_moved
        reach = far * u_range
    kind = tl.where(reach <= REACH_SHORT, 0, tl.where(reach <= REACH_LONG, 1, 2))
    return n, inside, tl.where(is_moved, kind, KINDS), reach, low, high, is_active


@kernel
def _list_pairs(
    y, largest, largest_x, u_range, ends, example, low, high, reach, starts, active, candidates, n_candidates,
    n_examples, n_runs, HAS_RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pairs of one unit, run by run, in each the short ones first, then the long and the wide ones."""
    row = tl.program_id(0).to(tl.int64)
    of_row = row * n_examples
    y += of_row
    farthest, range_of_row = tl.load(largest + row), tl.load(u_range + row)
    slot = 0
    n_inactive = 0
    first = 0
    for run in range(n_runs):
        last = tl.load(ends + run)
        n_short = 0
        n_long = 0
        n_wide = 0
        for begin in range(first, last, BLOCK):
            _, _, kind, _, _, _, _ = _look(y, farthest, largest_x, range_of_row, begin, last, HAS_RELU, BLOCK)
            n_short += tl.sum((kind == 0).to(tl.int32))
            n_long += tl.sum((kind == 1).to(tl.int32))
            n_wide += tl.sum((kind == 2).to(tl.int32))
        start = starts + (row * n_runs + run) * (KINDS + 1)
        next_short = slot
        next_long = slot + n_short
        next_wide = slot + n_short + n_long
        slot += n_short + n_long + n_wide
        tl.store(start, next_short)
        tl.store(start + 1, next_long)
        tl.store(start + 2, next_wide)
        tl.store(start + 3, slot)
        for begin in range(first, last, BLOCK):
            n, inside, kind, reach_n, low_n, high_n, is_active = _look(
                y, farthest, largest_x, range_of_row, begin, last, HAS_RELU, BLOCK
            )
            is_short = (kind == 0).to(tl.int32)
            is_long = (kind == 1).to(tl.int32)
            is_wide = (kind == 2).to(tl.int32)
            before = tl.where(kind == 0, next_short, tl.where(kind == 1, next_long, next_wide))
            rank = tl.where(kind == 0, tl.cumsum(is_short), tl.where(kind == 1, tl.cumsum(is_long), tl.cumsum(is_wide)))
            pair, is_moved = before + rank - 1, kind < KINDS
            place = of_row + pair
            tl.store(example + place, n, mask=is_moved)
            tl.store(low + place, low_n, mask=is_moved)
            tl.store(high + place, high_n, mask=is_moved)
            tl.store(reach + place, reach_n, mask=is_moved)
            tl.store(active + of_row + n, is_active.to(tl.float16), mask=inside)
            next_short += tl.sum(is_short)
            next_long += tl.sum(is_long)
            next_wide += tl.sum(is_wide)
            is_inactive = is_moved & ~is_active
            rank = tl.cumsum(is_inactive.to(tl.int32))
            tl.store(candidates + of_row + n_inactive + rank - 1, pair, mask=is_inactive)
            n_inactive += tl.sum(is_inactive.to(tl.int32))
        first = last
    tl.store(n_candidates + row, n_inactive)


# --- the loss as a function of one number -----------------------------------------------------------------------------


@kernel
def _moments(
    q, columns, labels, example, starts, moments, n_examples, n_classes, n_runs, CLASSES: tl.constexpr
):  # fmt: skip
    """Store sum_c q_c u_c^k of some pairs of one unit: every CLASSES-th class is added up, then these sums are."""
    row = tl.program_id(0).to(tl.int64)
    of_row = row * n_examples
    column = columns + row * n_classes
    n_pairs = tl.load(starts + (row + 1) * n_runs * (KINDS + 1) - 1)
    for pair in range(tl.program_id(1), n_pairs, tl.num_programs(1)):
        n = tl.load(example + of_row + pair).to(tl.int64)
        own = tl.load(column + tl.load(labels + n))
        m1 = tl.zeros([CLASSES], tl.float32)
        m2, m3, m4, m5, m6, m7, m8 = m1, m1, m1, m1, m1, m1, m1
        for begin in range(0, n_classes, CLASSES):
            c = begin + tl.arange(0, CLASSES)
            inside = c < n_classes
            u = tl.load(column + c, mask=inside, other=0.0) - own
            p = tl.load(q + n * n_classes + c, mask=inside, other=0.0)
            p *= u
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
        m = moments + (of_row + pair) * ORDERS
        tl.store(m, tl.sum(m1))
        tl.store(m + 1, tl.sum(m2))
        tl.store(m + 2, tl.sum(m3))
        tl.store(m + 3, tl.sum(m4))
        tl.store(m + 4, tl.sum(m5))
        tl.store(m + 5, tl.sum(m6))
        tl.store(m + 6, tl.sum(m7))
        tl.store(m + 7, tl.sum(m8))


@kernel
def _moment_of_logit(q, units, labels, of_others, row, n, listed, n_classes):
    """The factor in q_c's place where only one logit moves, and the sign of u."""
    unit = tl.load(units + row)
    is_label = tl.load(labels + n, mask=listed, other=0) == unit
    own = tl.load(q + n * n_classes + unit, mask=listed, other=0.0).to(tl.float64)
    return tl.where(is_label, tl.load(of_others + n, mask=listed, other=0.0), own), tl.where(is_label, -1.0, 1.0)


@kernel
def _power(x, K: tl.constexpr):
    """x^K, one factor after the other."""
    total = x
    for _ in tl.static_range(K - 1):
        total *= x
    return total


@kernel
def _series(
    q, units, labels, of_others, u_range, example, reach, starts, c, bounds, n_examples, n_classes, n_runs,
    IS_LOGIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn moments into the coefficients of log1p(sum_k m_k t^k / k!) in place, and add to the bounds."""
    row = tl.program_id(0).to(tl.int64)
    of_row = row * n_examples
    n_pairs = tl.load(starts + (row + 1) * n_runs * (KINDS + 1) - 1)
    range_of_row = tl.load(u_range + row)
    left_out = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n_pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        listed = pair < n_pairs
        a = c + (of_row + pair) * ORDERS
        if IS_LOGIT:
            n = tl.load(example + of_row + pair, mask=listed, other=0).to(tl.int64)
            m2, sign = _moment_of_logit(q, units, labels, of_others, row, n, listed, n_classes)
            m1 = sign * m2
            m3, m4, m5, m6, m7, m8 = m1, m2, m1, m2, m1, m2
        else:
            m1 = tl.load(a, mask=listed, other=0.0).to(tl.float64)
            m2 = tl.load(a + 1, mask=listed, other=0.0).to(tl.float64)
            m3 = tl.load(a + 2, mask=listed, other=0.0).to(tl.float64)
            m4 = tl.load(a + 3, mask=listed, other=0.0).to(tl.float64)
            m5 = tl.load(a + 4, mask=listed, other=0.0).to(tl.float64)
            m6 = tl.load(a + 5, mask=listed, other=0.0).to(tl.float64)
            m7 = tl.load(a + 6, mask=listed, other=0.0).to(tl.float64)
            m8 = tl.load(a + 7, mask=listed, other=0.0).to(tl.float64)
        k1 = m1
        k2 = m2 - k1 * m1
        k3 = m3 - k1 * m2 - 2 * k2 * m1
        k4 = m4 - k1 * m3 - 3 * k2 * m2 - 3 * k3 * m1
        k5 = m5 - k1 * m4 - 4 * k2 * m3 - 6 * k3 * m2 - 4 * k4 * m1
        k6 = m6 - k1 * m5 - 5 * k2 * m4 - 10 * k3 * m3 - 10 * k4 * m2 - 5 * k5 * m1
        k7 = m7 - k1 * m6 - 6 * k2 * m5 - 15 * k3 * m4 - 20 * k4 * m3 - 15 * k5 * m2 - 6 * k6 * m1
        k8 = m8 - k1 * m7 - 7 * k2 * m6 - 21 * k3 * m5 - 35 * k4 * m4 - 35 * k5 * m3 - 21 * k6 * m2 - 7 * k7 * m1
        tl.store(a, k1.to(tl.float32), mask=listed)
        tl.store(a + 1, (k2 / 2).to(tl.float32), mask=listed)
        tl.store(a + 2, (k3 / 6).to(tl.float32), mask=listed)
        tl.store(a + 3, (k4 / 24).to(tl.float32), mask=listed)
        tl.store(a + 4, (k5 / 120).to(tl.float32), mask=listed)
        tl.store(a + 5, (k6 / 720).to(tl.float32), mask=listed)
        tl.store(a + 6, (k7 / 5040).to(tl.float32), mask=listed)
        tl.store(a + 7, (k8 / 40320).to(tl.float32), mask=listed)
        far = tl.load(reach + of_row + pair, mask=listed, other=0.0)
        left_out += tl.where(listed, _rest_of_series(far, range_of_row, k2), 0.0)
    tl.store(bounds + row, tl.load(bounds + row) + tl.sum(left_out))


@kernel
def _rest_of_series(reach, u_range, kappa_2):
    """A bound on what each pair's series leaves out, in nats."""
    reach = tl.minimum(reach, REACH_LONG)
    short, long = REST_SHORT * _power(reach, SHORT_ORDER - 1), REST_LONG * _power(reach, LONG_ORDER - 1)
    factor = tl.where(reach <= REACH_SHORT, short, long)
    return factor * _power(reach / tl.where(u_range == 0, 1.0, u_range), 2) * kappa_2 * tl.exp(reach)


@kernel
def _sum_short(t, c1, c2, c3, c4, c5):
    """sum_k c_k t^k."""
    return t * (c1 + t * (c2 + t * (c3 + t * (c4 + t * c5))))


@kernel
def _sum_long(t, c1, c2, c3, c4, c5, c6, c7, c8):
    """sum_k c_k t^k."""
    high = c5 + t * (c6 + t * (c7 + t * c8))
    return t * (c1 + t * (c2 + t * (c3 + t * (c4 + t * high))))


@kernel
def _unit_delta(d, low, high):
    """t = max(d, -y) + min(y, 0)."""
    return tl.maximum(d, low) + high


@kernel
def _expm1_small(z):
    """expm1(z) for |z| <= 1/4, to float32's last digit."""
    high = 1 + z * (1 / 6) * (1 + z * (1 / 7))
    low = 1 + z * (1 / 4) * (1 + z * (1 / 5) * high)
    return z * (1 + z * (1 / 2) * (1 + z * (1 / 3) * low))


@kernel
def _expm1(z):
    """expm1(z) in float64: below 1 by the series at z/8, doubled three times: expm1(2h) = expm1(h) (2 + expm1(h))."""
    h = z / 8
    total = 1 + h / 14
    for k in tl.static_range(12):
        total = 1 + h / (13 - k) * total
    e = h * total
    e *= 2 + e
    e *= 2 + e
    e *= 2 + e
    return tl.where(tl.abs(z) < 1, e, tl.exp(z) - 1)


@kernel
def _log1p(x):
    """log1p(x) in float64 by Kahan's formula, in which the rounding of 1 + x cancels."""
    rounded = 1 + x
    near = rounded == 1
    return tl.where(near, x, tl.log(rounded) * (x / tl.where(near, 1.0, rounded - 1)))


@kernel
def _logits(z, column, unit, n, c, n_classes, IS_LOGIT: tl.constexpr):
    """Some classes' logits of each example, and by how much t moves them, in float64."""
    inside = (c < n_classes)[None, :]
    z_c = tl.load(z + n[:, None] * n_classes + c[None, :], mask=inside, other=float("-inf"))
    if IS_LOGIT:
        v = (c[None, :] == unit[:, None]).to(tl.float64)
    else:
        v = tl.load(column[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float64)
    return z_c, v, inside


@kernel
def _large_loss(
    t, z, column, unit, own, n, n_classes, IS_LOGIT: tl.constexpr, FARS: tl.constexpr, CLASSES: tl.constexpr
):  # fmt: skip
    """F(t) in float64 from the logits: by p_c expm1(t u_c), or by a difference for large t u_c; where their sum is
    large, a difference of two losses. Where only one logit moves, u is 1 there and 0 elsewhere."""
    top = tl.full([FARS], float("-inf"), tl.float64)
    moved_top = tl.full([FARS], float("-inf"), tl.float64)
    for begin in range(0, n_classes, CLASSES):
        z_c, v, _ = _logits(z, column, unit, n, begin + tl.arange(0, CLASSES), n_classes, IS_LOGIT)
        top = tl.maximum(top, tl.max(z_c, 1))
        moved_top = tl.maximum(moved_top, tl.max(z_c + t[:, None] * v, 1))
    before, after = tl.zeros([FARS], tl.float64), tl.zeros([FARS], tl.float64)
    for begin in range(0, n_classes, CLASSES):
        z_c, v, _ = _logits(z, column, unit, n, begin + tl.arange(0, CLASSES), n_classes, IS_LOGIT)
        before += tl.sum(tl.exp(z_c - top[:, None]), 1)
        after += tl.sum(tl.exp(z_c + t[:, None] * v - moved_top[:, None]), 1)
    before, after = tl.log(before) + top, tl.log(after) + moved_top
    total = tl.zeros([FARS], tl.float64)
    for begin in range(0, n_classes, CLASSES):
        z_c, v, inside = _logits(z, column, unit, n, begin + tl.arange(0, CLASSES), n_classes, IS_LOGIT)
        moved = t[:, None] * (v - own[:, None])
        p = tl.exp(z_c - before[:, None])
        near = tl.abs(moved) < 1
        by_difference = tl.exp(z_c - before[:, None] + moved) - p
        term = tl.where(near, p * _expm1(tl.where(near, moved, 0.0)), by_difference)
        total += tl.sum(tl.where(inside, term, 0.0), 1)
    small = tl.abs(total) <= LARGE_SUM
    return tl.where(small, _log1p(tl.where(small, total, 0.0)), (after - before) - t * own)


@kernel
def _far_losses(
    rows, examples, ts, units, u_range, q, z, labels, of_others, columns, loss, n_far, n_classes,
    IS_LOGIT: tl.constexpr, FARS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Store F(t) = log1p(sum_c q_c expm1(t u_c)) in float64, from its definition, for some (unit, example, t)."""
    k = tl.program_id(0).to(tl.int64) * FARS + tl.arange(0, FARS)
    listed = k < n_far
    row, n = tl.load(rows + k, mask=listed, other=0), tl.load(examples + k, mask=listed, other=0)
    t = tl.load(ts + k, mask=listed, other=0.0)
    column, unit, label = columns + row * n_classes, tl.load(units + row), tl.load(labels + n)
    if IS_LOGIT:
        own = (unit == label).to(tl.float64)
        of_q, sign = _moment_of_logit(q, units, labels, of_others, row, n, listed, n_classes)
        total = of_q * _expm1(sign * t)
        small = tl.abs(total) <= LARGE_SUM
    else:
        own_narrow = tl.load(column + label)
        own = own_narrow.to(tl.float64)
        reach = tl.abs(t) * tl.load(u_range + row).to(tl.float32)
        is_near = reach <= SMALL_EXPONENT
        shrunk = tl.where(is_near, t, t * 0.125)
        narrow = tl.zeros([FARS], tl.float32)
        for begin in range(0, n_classes, CLASSES):
            c = begin + tl.arange(0, CLASSES)
            inside = (c < n_classes)[None, :]
            u = tl.load(column[:, None] + c[None, :], mask=inside, other=0.0) - own_narrow[:, None]
            e = _expm1_small(shrunk[:, None] * u)
            doubled = e * (2 + e)
            doubled *= 2 + doubled
            doubled *= 2 + doubled
            q_c = tl.load(q + n[:, None] * n_classes + c[None, :], mask=inside, other=0.0)
            narrow += tl.sum(q_c * tl.where(is_near[:, None], e, doubled), 1)
        small = (reach <= 8 * SMALL_EXPONENT) & (tl.abs(narrow) <= LARGE_SUM)
        total = narrow.to(tl.float64)
    result = _log1p(tl.where(small, total, 0.0))
    if tl.min(small.to(tl.int32)) == 0:
        large = _large_loss(t.to(tl.float64), z, column, unit, own, n, n_classes, IS_LOGIT, FARS, CLASSES)
        result = tl.where(small, result, large)
    tl.store(loss + k, result, mask=listed)


# --- whole rows: all inputs of a unit ---------------------------------------------------------------------------------


@kernel
def _add_series(
    total, squared, begin, end, step, j, inside, x, n_inputs, example, low, high, c, u_range,
    IS_SHORT: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Return the sums plus F and F^2 of some pairs: FLUSH pairs in float32, their sums in float64."""
    for first in range(begin, end, FLUSH):
        narrow = tl.zeros_like(step)
        narrow_squared = tl.zeros_like(step)
        for k in tl.static_range(FLUSH):
            pair = first + k
            listed = pair < end
            n = tl.load(example + pair, mask=listed, other=0).to(tl.int64)
            low_n, high_n = tl.load(low + pair, mask=listed, other=0.0), tl.load(high + pair, mask=listed, other=0.0)
            x_n = tl.load(x + n * n_inputs + j, mask=inside, other=0.0)
            t = _unit_delta(step * x_n, low_n, high_n)
            a = c + pair * ORDERS
            c1 = tl.load(a, mask=listed, other=0.0)
            c2 = tl.load(a + 1, mask=listed, other=0.0)
            c3 = tl.load(a + 2, mask=listed, other=0.0)
            c4 = tl.load(a + 3, mask=listed, other=0.0)
            c5 = tl.load(a + 4, mask=listed, other=0.0)
            if IS_SHORT:
                f = _sum_short(t, c1, c2, c3, c4, c5)
            else:
                c6 = tl.load(a + 5, mask=listed, other=0.0)
                c7 = tl.load(a + 6, mask=listed, other=0.0)
                c8 = tl.load(a + 7, mask=listed, other=0.0)
                f = _sum_long(t, c1, c2, c3, c4, c5, c6, c7, c8)
            if IS_WIDE:  # the others are among the far ones
                f = tl.where(tl.abs(t) * u_range <= REACH_LONG, f, 0.0)
            narrow += f
            narrow_squared += f * f
        total += narrow.to(tl.float64)
        squared += narrow_squared.to(tl.float64)
    return total, squared


@kernel
def _add_rows(
    step, x, u_range, example, low, high, c, starts, far_starts, far_inputs, far_losses, closes,
    delta, delta_squared, class_delta, class_delta_squared, within, by_run, n_examples, n_inputs, n_runs,
    TILE: tl.constexpr, HAS_FAR: tl.constexpr, HAS_SQUARES: tl.constexpr, HAS_RUNS: tl.constexpr,
    PER_CLASS: tl.constexpr,
):  # fmt: skip
    """Add the sums over a batch of one unit's weights to a tile of inputs, and complete classes to `within`."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tile * TILE + tl.arange(0, TILE)
    inside = j < n_inputs
    of_row, out = row * n_examples, row * n_inputs + j
    step_j, range_of_row = tl.load(step + out, mask=inside, other=0.0), tl.load(u_range + row).to(tl.float32)
    example += of_row
    low += of_row
    high += of_row
    c += of_row * ORDERS
    total = tl.zeros([TILE], tl.float64)
    squared = tl.zeros([TILE], tl.float64)
    if PER_CLASS:
        of_class = tl.load(class_delta + out, mask=inside, other=0.0)
        of_class_squared = tl.load(class_delta_squared + out, mask=inside, other=0.0)
        deviations = tl.zeros([TILE], tl.float64)
    for run in range(n_runs):
        start = starts + (row * n_runs + run) * (KINDS + 1)
        short, long, wide, end = tl.load(start), tl.load(start + 1), tl.load(start + 2), tl.load(start + 3)
        run_total = tl.zeros([TILE], tl.float64)
        run_squared = tl.zeros([TILE], tl.float64)
        run_total, run_squared = _add_series(
            run_total, run_squared, short, long, step_j, j, inside, x, n_inputs, example, low, high, c, range_of_row,
            True, False,
        )  # fmt: skip
        run_total, run_squared = _add_series(
            run_total, run_squared, long, wide, step_j, j, inside, x, n_inputs, example, low, high, c, range_of_row,
            False, False,
        )  # fmt: skip
        if HAS_FAR:
            run_total, run_squared = _add_series(
                run_total, run_squared, wide, end, step_j, j, inside, x, n_inputs, example, low, high, c,
                range_of_row, False, True,
            )  # fmt: skip
            place = far_starts + (row * tl.num_programs(1) + tile) * n_runs + run
            for k in range(tl.load(place), tl.load(place + 1)):
                f = tl.where(j == tl.load(far_inputs + k), tl.load(far_losses + k), 0.0)
                run_total += f
                run_squared += f * f
        if HAS_RUNS:
            tl.store(by_run + (row * n_runs + run) * n_inputs + j, run_total, mask=inside)
        total += run_total
        squared += run_squared
        if PER_CLASS:
            of_class += run_total
            of_class_squared += run_squared
            if tl.load(closes + run) != 0:
                if PER_CLASS > 1:
                    left = tl.maximum(of_class_squared - of_class * of_class / PER_CLASS, 0.0)
                    deviations += PER_CLASS / (PER_CLASS - 1) * left
                of_class = tl.zeros([TILE], tl.float64)
                of_class_squared = tl.zeros([TILE], tl.float64)
    tl.store(delta + out, tl.load(delta + out, mask=inside) + total, mask=inside)
    if HAS_SQUARES:
        tl.store(delta_squared + out, tl.load(delta_squared + out, mask=inside) + squared, mask=inside)
    if PER_CLASS:
        tl.store(class_delta + out, of_class, mask=inside)
        tl.store(class_delta_squared + out, of_class_squared, mask=inside)
        tl.store(within + out, tl.load(within + out, mask=inside) + deviations, mask=inside)


@kernel
def _count_activated(
    step, x, low, example, candidates, n_candidates, touched, n_examples, n_inputs, TILE: tl.constexpr
):  # fmt: skip
    """Add the examples on which an input activates the unit."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tile * TILE + tl.arange(0, TILE)
    inside = j < n_inputs
    of_row, out = row * n_examples, row * n_inputs + j
    step_j = tl.load(step + out, mask=inside, other=0.0)
    count = tl.load(touched + out, mask=inside, other=0)
    for k in range(tl.load(n_candidates + row)):
        pair = of_row + tl.load(candidates + of_row + k)
        n, low_n = tl.load(example + pair).to(tl.int64), tl.load(low + pair)
        x_n = tl.load(x + n * n_inputs + j, mask=inside, other=0.0)
        count += (step_j * x_n > low_n).to(tl.int32)
    tl.store(touched + out, tl.where(step_j == 0, 0, count), mask=inside)


# --- tensors in, tensors out ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The last Linear's columns of some units; where the units are the logits, only their numbers."""

    units: Int64[Tensor, " units"]
    values: Float32[Tensor, "units classes"] | None
    has_relu: bool

    @property
    def is_logit(self) -> bool:
        """Whether each unit is a logit itself."""
        return self.values is None

    @cached_property
    def u_range(self) -> Float64[Tensor, " units"]:
        """The largest |u|, a float32 number."""
        if self.values is None:
            return torch.ones(len(self.units), dtype=torch.float64, device=self.units.device)
        return (self.values.amax(1) - self.values.amin(1)).double()

    @cached_property
    def reaches_logits(self) -> Tensor:
        """Whether any logit depends on a unit, for each of them."""
        return torch.ones_like(self.units, dtype=torch.bool) if self.values is None else (self.values != 0).any(1)

    def pick(self, rows: slice | Int64[Tensor, " chosen"]) -> "Columns":
        """The columns of some of the units."""
        values = None if self.values is None else self.values[rows]
        return Columns(self.units[rows], values, self.has_relu)


def sum_of_others(batch: Batch) -> Float64[Tensor, " examples"]:
    """The sum of each example's q: the softmax of all classes but the label."""
    return batch.q.double().sum(1)


@dataclass(frozen=True)
class Pairs:
    """The examples on which each unit may move, in the order of `starts`: in each run short, long and wide pairs."""

    example: Int32[Tensor, "units examples"]
    low: Float32[Tensor, "units examples"]
    high: Float32[Tensor, "units examples"]
    reach: Float64[Tensor, "units examples"]
    starts: Int32[Tensor, "units runs cuts"]
    active: Float16[Tensor, "units examples"]  # 1 where the unit is active on an example, in the order of the batch
    candidates: Int32[Tensor, "units examples"]  # the pairs whose unit is inactive and may be activated
    n_candidates: Int32[Tensor, " units"]


@dataclass(frozen=True)
class Far:
    """(unit, example, input) beyond the series, sorted by unit, tile of inputs and run; where each of these begins."""

    inputs: Int32[Tensor, " far"]
    losses: Float64[Tensor, " far"]
    starts: Int64[Tensor, " cuts"]


def add_rows(
    columns: Columns,
    steps: Float32[Tensor, "units inputs"],
    batch: Batch,
    runs: Runs,
    sums: dict[str, Tensor],
    bounds: Float64[Tensor, " units"],
) -> None:
    """Add the sums over one batch of all weights of some units, as `rows.add_rows` does.

    sums: each (units, inputs), and contiguous: `delta` and, where wanted, `delta_squared`, `touched`; for runs of
    classes `class_delta`, `class_delta_squared` and `within`. Or, for a few units: `by_run` (units, runs, inputs),
    set to the sums of each run.
    """
    at_once = max(1, PAIRS_PER_LAUNCH // batch.y.shape[1])
    for first in range(0, len(steps), at_once):
        rows = slice(first, first + at_once)
        own = {name: values[rows] for name, values in sums.items()}
        with torch.cuda.device_of(steps):  # Triton runs on the current one
            _add_units(columns.pick(rows), steps[rows], batch._replace(y=batch.y[rows]), runs, own, bounds[rows])


def _add_units(
    columns: Columns, steps: Tensor, batch: Batch, runs: Runs, sums: dict[str, Tensor], bounds: Tensor
) -> None:
    ends, closes = (torch.from_numpy(each).to(steps.device, torch.int32) for each in (runs.ends, runs.closes))
    pairs = list_pairs(columns, steps, batch, ends)
    wide = wide_pairs(pairs)
    if len(wide) * steps.shape[1] > FAR_LISTED and len(steps) > 1:
        for rows in (slice(0, len(steps) // 2), slice(len(steps) // 2, None)):
            own = {name: values[rows] for name, values in sums.items()}
            _add_units(columns.pick(rows), steps[rows], batch._replace(y=batch.y[rows]), runs, own, bounds[rows])
        return
    coefficients = fit_series(columns, pairs, batch, bounds)
    far = find_far(columns, steps, pairs, batch, ends, wide) if len(wide) else None
    if "touched" in sums:
        count_touched(steps, pairs, batch, sums["touched"])
    n_runs, n_inputs = len(ends), steps.shape[1]
    tile = tile_of(n_inputs)
    unused = sums["delta"]
    grid = len(steps), triton.cdiv(n_inputs, tile)
    _add_rows[grid](
        step=steps, x=batch.x, u_range=columns.u_range, example=pairs.example, low=pairs.low, high=pairs.high,
        c=coefficients, starts=pairs.starts, far_starts=ends if far is None else far.starts,
        far_inputs=ends if far is None else far.inputs, far_losses=unused if far is None else far.losses,
        closes=closes, delta=unused, delta_squared=sums.get("delta_squared", unused),
        class_delta=sums.get("class_delta", unused), class_delta_squared=sums.get("class_delta_squared", unused),
        within=sums.get("within", unused), by_run=sums.get("by_run", unused), n_examples=batch.y.shape[1],
        n_inputs=n_inputs, n_runs=n_runs, TILE=tile, HAS_FAR=far is not None, HAS_SQUARES="delta_squared" in sums,
        HAS_RUNS="by_run" in sums, PER_CLASS=runs.per_class, **LAUNCH_OPTIONS,
    )  # fmt: skip


def tile_of(n_inputs: int) -> int:
    """The number of inputs that one program adds up: a power of two."""
    return min(row_loops.ROW_TILE, triton.next_power_of_2(n_inputs))


def list_pairs(columns: Columns, steps: Tensor, batch: Batch, ends: Tensor) -> Pairs:
    """The pairs of each unit, listed by a kernel."""
    y = batch.y
    largest = torch.where(columns.reaches_logits, steps.abs().amax(1), 0).double()

    def made(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=y.device)

    pairs = Pairs(
        example=made(*y.shape, dtype=torch.int32),
        low=made(*y.shape, dtype=torch.float32),
        high=made(*y.shape, dtype=torch.float32),
        reach=made(*y.shape, dtype=torch.float64),
        starts=made(len(y), len(ends), KINDS.value + 1, dtype=torch.int32),
        active=made(*y.shape, dtype=torch.float16),
        candidates=made(*y.shape, dtype=torch.int32),
        n_candidates=made(len(y), dtype=torch.int32),
    )
    _list_pairs[(len(y),)](
        y=y, largest=largest, largest_x=batch.x.abs().amax(1).double(), u_range=columns.u_range, ends=ends,
        example=pairs.example, low=pairs.low, high=pairs.high, reach=pairs.reach, starts=pairs.starts,
        active=pairs.active, candidates=pairs.candidates, n_candidates=pairs.n_candidates, n_examples=y.shape[1],
        n_runs=len(ends), HAS_RELU=columns.has_relu, BLOCK=min(LISTED, triton.next_power_of_2(y.shape[1])),
        **LAUNCH_OPTIONS,
    )  # fmt: skip
    return pairs


def fit_series(
    columns: Columns, pairs: Pairs, batch: Batch, bounds: Float64[Tensor, " units"]
) -> Float32[Tensor, "units examples orders"]:
    """The coefficients of every pair's series, first of order 1; what they leave out is added to `bounds`."""
    shape, n_runs = pairs.example.shape, pairs.starts.shape[1]
    c = torch.empty(*shape, ORDERS.value, dtype=torch.float32, device=pairs.example.device)
    n_classes = batch.q.shape[1]
    if columns.values is not None:
        _moments[(shape[0], MOMENT_PARTS)](
            q=batch.q, columns=columns.values, labels=batch.labels, example=pairs.example, starts=pairs.starts,
            moments=c, n_examples=shape[1], n_classes=n_classes, n_runs=n_runs,
            CLASSES=min(CLASSES, triton.next_power_of_2(n_classes)), num_warps=1, **LAUNCH_OPTIONS,
        )  # fmt: skip
    _series[(shape[0],)](
        q=batch.q, units=columns.units, labels=batch.labels, of_others=sum_of_others(batch), u_range=columns.u_range,
        example=pairs.example, reach=pairs.reach, starts=pairs.starts, c=c, bounds=bounds, n_examples=shape[1],
        n_classes=n_classes, n_runs=n_runs, IS_LOGIT=columns.is_logit, BLOCK=128, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return c


def wide_pairs(pairs: Pairs) -> Int64[Tensor, "wide 2"]:
    """The pairs that some input may take beyond the series, as (unit, pair)."""
    n_pairs = pairs.starts[:, -1, -1:]
    listed = torch.arange(pairs.reach.shape[1], device=n_pairs.device) < n_pairs
    return (listed & ~(pairs.reach <= REACH_LONG.value)).nonzero()


def find_far(
    columns: Columns, steps: Tensor, pairs: Pairs, batch: Batch, ends: Tensor, wide: Int64[Tensor, "wide 2"]
) -> Far:
    """The inputs that take a wide pair beyond the series, and its loss there."""
    n_units, n_runs = pairs.starts.shape[:2]
    tile = tile_of(steps.shape[1])
    n_tiles = triton.cdiv(steps.shape[1], tile)
    at_once = max(1, FAR_AT_ONCE // steps.shape[1])
    parts = [_far_inputs(columns, steps, pairs, batch, part) for part in wide.split(at_once)]
    units, examples, inputs, losses = (torch.cat(each) for each in zip(*parts, strict=True))
    run = torch.searchsorted(ends.long(), examples, right=True)
    keys, order = torch.sort((units * n_tiles + inputs // tile) * n_runs + run, stable=True)
    places = torch.arange(n_units * n_tiles * n_runs + 1, device=keys.device)
    return Far(inputs[order].int(), losses[order], torch.searchsorted(keys, places))


def _far_inputs(
    columns: Columns, steps: Tensor, pairs: Pairs, batch: Batch, wide: Int64[Tensor, "wide 2"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return unit, example, input and loss of each input that takes one of these pairs beyond the series."""
    unit, pair = wide.unbind(1)
    example = pairs.example[unit, pair].long()
    low, high = pairs.low[unit, pair], pairs.high[unit, pair]
    t = torch.maximum(steps[unit] * batch.x[example], low[:, None]) + high[:, None]
    place, inputs = (~(t.abs() * columns.u_range[unit, None].float() <= REACH_LONG.value)).nonzero().unbind(1)
    losses = far_losses(columns, unit[place], example[place], t[place, inputs], batch)
    return unit[place], example[place], inputs, losses


def far_losses(
    columns: Columns,
    rows: Int64[Tensor, " far"],
    examples: Int64[Tensor, " far"],
    ts: Float32[Tensor, " far"],
    batch: Batch,
) -> Float64[Tensor, " far"]:
    """The loss deltas from their definition, in nats. rows: positions in the columns' units."""
    losses = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    n_classes = batch.q.shape[1]
    if not len(rows):
        return losses
    classes = min(CLASSES, triton.next_power_of_2(n_classes))
    fars = VALUES // classes
    values = batch.q if columns.values is None else columns.values
    _far_losses[(triton.cdiv(len(rows), fars),)](
        rows=rows, examples=examples, ts=ts, units=columns.units, u_range=columns.u_range, q=batch.q, z=batch.z,
        labels=batch.labels, of_others=sum_of_others(batch), columns=values, loss=losses, n_far=len(rows),
        n_classes=n_classes, IS_LOGIT=columns.is_logit, FARS=fars, CLASSES=classes, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return losses


def count_touched(steps: Tensor, pairs: Pairs, batch: Batch, touched: Int32[Tensor, "units inputs"]) -> None:
    """Add the examples where t is not 0: input and unit are active, or the input activates the unit."""
    n_inputs = steps.shape[1]
    for first in range(0, len(batch.x), COUNTED):
        some = slice(first, first + COUNTED)
        touched += (pairs.active[:, some] @ (batch.x[some] != 0).half()).int()
    tile = tile_of(n_inputs)
    _count_activated[(len(steps), triton.cdiv(n_inputs, tile))](
        step=steps, x=batch.x, low=pairs.low, example=pairs.example, candidates=pairs.candidates,
        n_candidates=pairs.n_candidates, touched=touched, n_examples=pairs.example.shape[1], n_inputs=n_inputs,
        TILE=tile, **LAUNCH_OPTIONS,
    )  # fmt: skip

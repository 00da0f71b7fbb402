"""The loops over (weight, example) of heads and tails behind another function than ReLU, compiled.

The same sums as in `rows.py` and `averaged.py`, with another t(d) = f(y + d) - f(y) (`activations.py`): behind a bent
function by its exact form; behind a smooth one by its series where |d| is within reach, else as the difference of two
values in float64. Then F(t) by its own series within reach, else by the direct formula.

Whatever the series leave out is bounded pair by pair: the rest of t times the largest |dF/dt| up to there, which is
at most sum_c q_c |u_c| e^(2 |t| R), and the rest of F.

One loop serves many forms of t: it is written once, and compiled for each.
"""

import math
from typing import Any

import numpy as np

from ablation.engine.compiled import kernel, part_of_kernel
from ablation.engine.responses.loops import activations
from ablation.engine.responses.loops.activations import (
    FIRST_SMOOTH,
    bend,
    bent_change,
    change_of,
    largest_bent_change,
    reaches_of,
    rest_of_function,
    series_of_function,
    unseen_change,
    value_of,
)
from ablation.engine.responses.loops.averaged import AT_ONCE, add_series
from ablation.engine.responses.loops.rows import FLUSH, TILE
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

_SHORT, _LONG, _WIDE, _STILL = range(4)  # how the pairs of one (unit, example) are worked out
_EVERY = 1e30  # a |d| that none is beyond
_NONE, _ONE = np.float32(0), np.float32(1)


@kernel
def slope_of_loss(q, v, unit, label, is_logit):
    """sum_c q_c |u_c|: no dF/dt at t = 0 is larger in size."""
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
    """sum_k |a_k| reach^k: no |t| is larger, but for the rest."""
    total = 0.0
    for k in range(a.shape[0] - 1, -1, -1):
        total = (total + abs(a[k])) * reach
    return total


@kernel
def short_numbers(a, k):
    """The short series of t of one pair."""
    return a[k, 0], a[k, 1], a[k, 2], a[k, 3]


@kernel
def short_change(d, a):
    """sum_k a_k d^k, the first of order 1."""
    return d * (a[0] + d * (a[1] + d * (a[2] + d * a[3])))


@kernel
def bent_numbers(a, k):
    """The exact form of one pair."""
    return a[k, 0], a[k, 1], a[k, 2], a[k, 3], a[k, 4], a[k, 5], a[k, 6], a[k, 7], a[k, 8]


# --- single weights ---------------------------------------------------------------------------------------------------


@kernel
def score_curved_sites(
    steps, units, inputs, x, y, function, q, z, labels, columns, is_logit, delta, touched
):  # fmt: skip
    """As `rows.score_sites`."""
    for site in range(steps.shape[0]):
        unit, x_site, step = units[site], x[inputs[site]], np.float64(steps[site])
        y_site = y[unit]
        column, spread, is_heard = column_of(columns, unit, is_logit)
        for n in range(x_site.shape[0]):
            d, t = step * np.float64(x_site[n]), 0.0
            if d != 0 and is_heard:
                t = change_of(function, y_site[n], d)
            delta[site, n], touched[site, n] = 0.0, t != 0
            if t != 0:
                delta[site, n] = direct_loss(t, unit, spread, q[n], z[n], column, labels[n], is_logit)


# --- whole rows: all inputs of a unit ---------------------------------------------------------------------------------


def make_add_curve(numbers_of: Any, change: Any, series: Any, series_sum: Any) -> Any:
    """The loop with t = change(d, numbers_of(a, pair)) and F = series_sum(t, series(c, pair))."""

    def add_curve(step, x, first, a, c, unseen, pairs, n_pairs, examples, narrow, wide, counts):
        """Add F, F^2 and whether t moved, of some examples for one tile of inputs."""
        size = step.shape[0]
        for k in range(n_pairs):
            p = pairs[k]
            a_p, c_p, unseen_p = numbers_of(a, p), series(c, p), unseen[p]
            x_p = x[examples[p], first : first + size]
            for j in range(size):
                t = change(step[j] * x_p[j], a_p)
                f = series_sum(t, c_p)
                narrow[j] += f
                narrow[TILE + j] += f * f
                counts[j] += abs(t) > unseen_p
            if k % FLUSH == FLUSH - 1:
                flush(narrow, wide)
        flush(narrow, wide)

    return part_of_kernel(add_curve)


def make_add_near(change: Any) -> Any:
    """The loop of those inputs that both series reach. No branch, and nothing else in it: it becomes vector code."""

    def add_near(step, x, a, c, reach, spread, unseen, near, narrow, counts):
        """The same for one example; `near` becomes 1 where both do, else 0. Returns how many they don't reach."""
        n_far = _NONE
        for j in range(step.shape[0]):
            d = step[j] * x[j]
            t = change(d if abs(d) <= reach else _NONE, a)
            is_near = _ONE if abs(d) <= reach else _NONE
            is_near = is_near if abs(t) * spread <= REACH_LONG else _NONE
            t *= is_near
            f = long_sum(t, c)
            narrow[j] += f
            narrow[TILE + j] += f * f
            counts[j] += abs(t) > unseen
            near[j] = is_near
            n_far += _ONE - is_near
        return n_far

    return part_of_kernel(add_near)


@kernel
def add_far(step, x, c, function, y, near, unit, spread, q, z, label, column, is_logit, wide, counts):
    """The same for the others: t is a difference of two values, and F as it comes."""
    for j in range(step.shape[0]):
        if near[j] != 0:
            continue
        t = change_of(function, y, np.float64(step[j]) * np.float64(x[j]))
        if t != 0:
            f = loss_of(t, c, unit, spread, q, z, column, label, is_logit)
            wide[j] += f
            wide[TILE + j] += f * f
            counts[j] += 1


add_bent_short = make_add_curve(bent_numbers, bent_change, short_series, short_sum)
add_bent_long = make_add_curve(bent_numbers, bent_change, long_series, long_sum)
add_short = make_add_curve(short_numbers, short_change, short_series, short_sum)
add_long = make_add_curve(long_series, long_sum, long_series, long_sum)
add_near_bent, add_near = make_add_near(bent_change), make_add_near(long_sum)


@kernel
def add_wide(
    step, x, first, a, c, unseen, pairs, n_pairs, examples, function, y, reach, near, unit, spread, q, z, labels,
    column, is_logit, narrow, wide, counts,
):  # fmt: skip
    """The same for pairs that some input takes beyond one of the series. `near` (TILE): scratch."""
    size = step.shape[0]
    for k in range(n_pairs):
        p = pairs[k]
        n, c_p = examples[p], long_series(c, p)
        x_p = x[n, first : first + size]
        if function.code < FIRST_SMOOTH:
            a_p = bent_numbers(a, p)
            n_far = add_near_bent(step, x_p, a_p, c_p, reach[p], spread, unseen[p], near, narrow, counts)
        else:
            n_far = add_near(step, x_p, long_series(a, p), c_p, reach[p], spread, unseen[p], near, narrow, counts)
        if k % FLUSH == FLUSH - 1:
            flush(narrow, wide)
        if n_far > 0:
            add_far(
                step,
                x_p,
                c_p,
                function,
                y[n],
                near,
                unit,
                spread,
                q[n],
                z[n],
                labels[n],
                column,
                is_logit,
                wide,
                counts,
            )
    flush(narrow, wide)


@kernel
def chart_pair(function, y, far, spread, s, a_p, a):
    """One (unit, example): the numbers of its t, how it is worked out, up to which |d|; the largest |t| R there, the
    rest of t, and what of t is lost in rounding."""
    if function.code < FIRST_SMOOTH:
        bend(function, y, a)
        largest = largest_bent_change(function, y, far)
        farthest = largest * spread  # 0 where a unit moves all logits alike, too
        how = _SHORT if farthest <= REACH_SHORT else _LONG if farthest <= REACH_LONG else _WIDE
        return (_STILL if largest == 0 else how), _EVERY, farthest, 0.0, 0.0
    series_of_function(function, y, s, a_p)
    a[: activations.ORDERS] = a_p
    short, long = reaches_of(function, y)
    reach, unseen = min(far, long), unseen_change(function, y, a_p[0])
    farthest = largest_change(a_p, reach) * spread
    if far <= short and farthest <= REACH_SHORT:
        return _SHORT, short, farthest, rest_of_function(function, y, far, activations.SHORT), unseen
    how = _LONG if far <= long and farthest <= REACH_LONG else _WIDE
    return how, long, farthest, rest_of_function(function, y, reach, activations.LONG), unseen


@kernel
def pick(kinds, kind, first, last, pairs):
    """The pairs from first to last that are of one kind."""
    n = 0
    for p in range(first, last):
        if kinds[p] == kind:
            pairs[n] = p
            n += 1
    return n


@kernel
def add_curved_rows(
    units, steps, x, largest_x, y, function, q, z, labels, columns, is_logit, cuts, closes, per_class,
    delta, delta_squared, touched, open_delta, open_squared, within, bounds,
):  # fmt: skip
    """Add the sums over one batch of all weights of some units: as `rows.add_rows`, behind `function`."""
    n_examples, n_inputs = x.shape
    examples, kinds = np.empty(n_examples, np.int64), np.empty(n_examples, np.int64)
    short, long, beyond = np.empty(n_examples, np.int64), np.empty(n_examples, np.int64), np.empty(n_examples, np.int64)
    a, c = np.empty((n_examples, activations.N_BENT), np.float32), np.empty((n_examples, ORDERS), np.float32)
    reach, unseen = np.empty(n_examples, np.float32), np.empty(n_examples, np.float32)
    s, a_p = np.empty(activations.ORDERS + 1), np.empty(activations.ORDERS)
    m, kappa = np.empty(ORDERS), np.empty(ORDERS)
    narrow, wide, near = np.zeros(2 * TILE, np.float32), np.empty(2 * TILE), np.empty(TILE, np.float32)
    counts = np.empty(TILE, np.int32)
    for row in range(steps.shape[0]):
        unit, step = units[row], steps[row]
        column, spread, is_heard = column_of(columns, unit, is_logit)
        if not is_heard:
            continue
        largest = np.float64(max(step.max(), -step.min()))
        n_pairs = 0
        for n in range(n_examples):
            far = largest * largest_x[n]
            if far == 0:
                continue
            p = n_pairs
            kind, reach[p], farthest, rest, unseen[p] = chart_pair(function, y[row, n], far, spread, s, a_p, a[p])
            if kind == _STILL:
                continue
            series_of(unit, column, is_logit, q[n], labels[n], m, kappa)
            bounds[row] += rest_of_series(farthest, spread, 2 * kappa[1])
            if rest > 0:
                at_most = math.exp(2 * np.float64(min(farthest, REACH_LONG)))
                bounds[row] += rest * slope_of_loss(q[n], column, unit, labels[n], is_logit) * at_most
            examples[p], kinds[p], c[p] = n, kind, kappa
            n_pairs += 1
        for first in range(0, n_inputs, TILE):
            tile = slice(first, min(first + TILE, n_inputs))
            size = tile.stop - tile.start
            begin = 0
            for k in range(cuts.shape[0]):
                end = begin
                while end < n_pairs and examples[end] < cuts[k]:
                    end += 1
                wide[:] = 0
                counts[:] = 0
                n_short = pick(kinds, _SHORT, begin, end, short)
                n_long = pick(kinds, _LONG, begin, end, long)
                n_wide = pick(kinds, _WIDE, begin, end, beyond)
                if function.code < FIRST_SMOOTH:
                    add_bent_short(step[tile], x, first, a, c, unseen, short, n_short, examples, narrow, wide, counts)
                    add_bent_long(step[tile], x, first, a, c, unseen, long, n_long, examples, narrow, wide, counts)
                else:
                    add_short(step[tile], x, first, a, c, unseen, short, n_short, examples, narrow, wide, counts)
                    add_long(step[tile], x, first, a, c, unseen, long, n_long, examples, narrow, wide, counts)
                add_wide(
                    step[tile], x, first, a, c, unseen, beyond, n_wide, examples, function, y[row], reach, near, unit,
                    spread, q, z, labels, column, is_logit, narrow, wide, counts,
                )  # fmt: skip
                begin = end
                add_sums(wide, delta[row, tile], delta_squared[row, tile])
                for j in range(size):
                    touched[row, first + j] += counts[j]
                if per_class:
                    add_sums(wide, open_delta[row, tile], open_squared[row, tile])
                    if closes[k]:
                        close_class(open_delta[row, tile], open_squared[row, tile], within[row, tile], per_class)


# --- convolutions whose channel is averaged ---------------------------------------------------------------------------


@kernel
def score_curved_weights(
    channels, sources, kernel_offsets, steps, units, x, offsets, y, function, q, z, labels, columns, is_logit, delta,
    touched,
):  # fmt: skip
    """As `averaged.score_weights`. Here t is a mean of differences in float64: for few weights series don't pay."""
    n_examples, n_positions = x.shape[0], offsets.shape[0]
    intact = np.empty((n_examples, n_positions))
    c, m, kappa = np.empty((n_examples, ORDERS), np.float32), np.empty(ORDERS), np.empty(ORDERS)
    before = -1
    for site in range(steps.shape[0]):
        channel = channels[site]
        unit = units[channel]
        column, spread, is_heard = column_of(columns, unit, is_logit)
        if not is_heard:
            delta[site], touched[site] = 0.0, False
            continue
        if channel != before:
            for n in range(n_examples):
                for p in range(n_positions):
                    intact[n, p] = value_of(function, y[n, channel, p])
                series_of(unit, column, is_logit, q[n], labels[n], m, kappa)
                c[n] = kappa
            before = channel
        for n in range(n_examples):
            x_n, t = x[n, sources[site]], 0.0
            for p in range(n_positions):
                d = steps[site] * np.float64(x_n[offsets[p] + kernel_offsets[site]])
                if d != 0:
                    t += value_of(function, y[n, channel, p] + d) - intact[n, p]
            t /= n_positions
            delta[site, n], touched[site, n] = 0.0, t != 0
            if t != 0:
                c_n = long_series(c, n)
                delta[site, n] = loss_of(t, c_n, unit, spread, q[n], z[n], column, labels[n], is_logit)


def make_add_position(change: Any) -> Any:
    """The loop over input channels of one form of t."""

    def add_position(total, step, x, a):
        """Add t of one position of one (channel, example), for many input channels."""
        for j in range(total.shape[0]):
            total[j] += change(step[j] * x[j], a)

    return part_of_kernel(add_position)


add_bent_position = make_add_position(bent_change)
add_short_position = make_add_position(short_change)
add_long_position = make_add_position(long_sum)


@kernel
def add_near_position(total, step, x, a, reach):
    """The same of those inputs that the long series reaches; returns how many it doesn't."""
    n_far = _NONE
    for j in range(total.shape[0]):
        d = step[j] * x[j]
        total[j] += long_sum(d if abs(d) <= reach else _NONE, a)
        n_far += _NONE if abs(d) <= reach else _ONE
    return n_far


@kernel
def add_far_position(total, step, x, reach, function, y):
    """The same of the others: the difference of two values."""
    for j in range(total.shape[0]):
        if not abs(step[j] * x[j]) <= reach:
            total[j] += np.float32(change_of(function, y, np.float64(step[j]) * np.float64(x[j])))


@kernel
def chart_positions(function, y, far, s, a, a_p, reaches):
    """All positions of one (channel, example): numbers of t, reaches; the means of the largest |t| and of the rest."""
    farthest, rest = 0.0, 0.0
    for p in range(y.shape[0]):
        if function.code < FIRST_SMOOTH:
            bend(function, y[p], a[p])
            farthest += largest_bent_change(function, y[p], far)
            continue
        series_of_function(function, y[p], s, a_p)
        short, long = reaches_of(function, y[p])
        a[p, : activations.ORDERS], reaches[p, 0], reaches[p, 1] = a_p, short, long
        farthest += largest_change(a_p, min(far, long))
        rest += max(
            rest_of_function(function, y[p], min(far, short), activations.SHORT),
            rest_of_function(function, y[p], min(far, long), activations.LONG),
        )
    return farthest / y.shape[0], rest / y.shape[0]


@kernel
def add_curved_channels(
    channels, steps, units, x, largest_x, offsets, kernel_offsets, y, function, q, z, labels, columns, is_logit,
    cuts, closes, per_class, delta, delta_squared, touched, open_delta, open_squared, within, bounds,
):  # fmt: skip
    """Add the sums over one batch of all weights of some channels: as `averaged.add_channels`, behind `function`.

    largest_x (examples, padded positions).
    """
    n_examples, _, n_inputs = x.shape
    n_positions, n_kernel = offsets.shape[0], kernel_offsets.shape[0]
    a = np.empty((n_examples, n_positions, activations.N_BENT), np.float32)
    reaches, c = np.empty((n_examples, n_positions, 2), np.float32), np.empty((n_examples, ORDERS), np.float32)
    s, a_p = np.empty(activations.ORDERS + 1), np.empty(activations.ORDERS)
    m, kappa = np.empty(ORDERS), np.empty(ORDERS)
    total, narrow, wide = np.empty(AT_ONCE, np.float32), np.zeros(2 * AT_ONCE, np.float32), np.empty(2 * AT_ONCE)
    counts = np.empty(AT_ONCE, np.int32)
    inverse = np.float32(1 / n_positions)
    for row in range(channels.shape[0]):
        channel = channels[row]
        unit = units[channel]
        column, spread, is_heard = column_of(columns, unit, is_logit)
        if not is_heard:
            continue
        largest = np.float64(max(steps[row].max(), -steps[row].min()))
        for n in range(n_examples):
            far = largest * largest_x[n].max()
            farthest, rest = chart_positions(function, y[n, channel], far, s, a[n], a_p, reaches[n])
            series_of(unit, column, is_logit, q[n], labels[n], m, kappa)
            c[n] = kappa
            bounds[row] += rest_of_series(farthest * spread, spread, 2 * kappa[1])
            if rest > 0:
                at_most = math.exp(2 * min(farthest * spread, np.float64(REACH_LONG)))
                bounds[row] += rest * slope_of_loss(q[n], column, unit, labels[n], is_logit) * at_most
        for k in range(n_kernel):
            shift = kernel_offsets[k]
            for first in range(0, n_inputs, AT_ONCE):
                size = min(AT_ONCE, n_inputs - first)
                step = steps[row, k, first : first + size]
                largest = np.float64(max(step.max(), -step.min()))
                begin = 0
                for cut in range(cuts.shape[0]):
                    wide[:] = 0
                    counts[:] = 0
                    for n in range(begin, cuts[cut]):
                        total[:] = 0
                        for p in range(n_positions):
                            at, y_p = offsets[p] + shift, y[n, channel, p]
                            far = largest * largest_x[n, at]
                            x_p, given = x[n, at, first : first + size], total[:size]
                            if far == 0:
                                continue
                            if function.code < FIRST_SMOOTH:
                                if largest_bent_change(function, y_p, far) > 0:
                                    add_bent_position(given, step, x_p, bent_numbers(a[n], p))
                                continue
                            short, long = reaches[n, p, 0], reaches[n, p, 1]
                            if far <= short:
                                add_short_position(given, step, x_p, short_numbers(a[n], p))
                            elif far <= long:
                                add_long_position(given, step, x_p, long_series(a[n], p))
                            elif add_near_position(given, step, x_p, long_series(a[n], p), long) > 0:
                                add_far_position(given, step, x_p, long, function, y_p)
                        n_far = 0
                        for j in range(size):
                            total[j] *= inverse
                            n_far += abs(total[j]) * spread > REACH_LONG
                        c_n = long_series(c, n)
                        if n_far > 0:
                            for j in range(size):
                                t = total[j]
                                if abs(t) * spread > REACH_LONG:
                                    f = loss_of(t, c_n, unit, spread, q[n], z[n], column, labels[n], is_logit)
                                    wide[j] += f
                                    wide[AT_ONCE + j] += f * f
                                    counts[j] += 1
                                    total[j] = 0
                        add_series(total[:size], c_n, narrow, counts)
                        if n % FLUSH == FLUSH - 1:
                            flush(narrow, wide)
                    flush(narrow, wide)
                    begin = cuts[cut]
                    tile = slice(first, first + size)
                    add_sums(wide, delta[row, tile, k], delta_squared[row, tile, k])
                    for j in range(size):
                        touched[row, first + j, k] += counts[j]
                    if per_class:
                        add_sums(wide, open_delta[row, tile, k], open_squared[row, tile, k])
                        if closes[cut]:
                            close_class(
                                open_delta[row, tile, k], open_squared[row, tile, k], within[row, tile, k], per_class
                            )

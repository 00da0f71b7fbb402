"""The loops over (weight, example) of a convolution whose channel is averaged before the last Linear, compiled.

    t = 1/P sum_p [ f(y_p + s x_p) - f(y_p) ]     s = step times BatchNorm's scale, x_p: the shifted input
    F = log1p(S(t))                               as in `rows.py`

Behind a ReLU, positions that are inactive and that no weight activates take no part: those that do are listed once for
each (channel, example). Each position's t comes from `activations.py`, in the form that holds for it.
"""

from typing import Any, NamedTuple

import numpy as np

from ablation.engine.compiled import in_order, kernel, part_of_kernel
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
    value_of,
)
from ablation.engine.responses.loops.records import Sums, add_run, column_of, flush
from ablation.engine.responses.loops.rows import (
    FLUSH_EXAMPLES,
    bent_numbers,
    largest_change,
    rest_of_loss,
    short_change,
    short_numbers,
)
from ablation.engine.responses.loops.series import ORDERS, REACH_LONG, long_series, long_sum, loss_of, series_of

CHANNEL_TILE = 128  # input channels that are summed up together
_NEVER = np.float32(1e30)  # as low and, negative, as high: a position that adds 0
_NONE, _ONE = np.float32(0), np.float32(1)


class Layout(NamedTuple):
    """The layout of a convolution's channels and positions in the arrays."""

    units: np.ndarray  # (channels), int64: the last Linear's input
    offsets: np.ndarray  # (positions), int64: where each output position begins among the padded input positions
    shifts: np.ndarray  # (kernel positions), int64: from there to what each kernel position is multiplied with


class Weights(NamedTuple):
    """Single weights of a convolution, channel by channel."""

    channels: np.ndarray  # int64
    sources: np.ndarray  # int64: input channels
    shifts: np.ndarray  # int64, as in `Layout`
    steps: np.ndarray  # float64: replacement minus weight, times BatchNorm's scale


class Chart(NamedTuple):
    """The numbers that one channel's t is computed from on every example: buffers that `chart_channel` fills."""

    offsets: np.ndarray  # (positions), int64, as in `Layout`
    largest: np.ndarray  # (examples, padded positions), float64: the largest |x|
    moving: np.ndarray  # (examples), int64: how many positions are listed, a multiple of four behind a ReLU
    at: np.ndarray  # (examples, positions + 3), int64: the positions that move behind a ReLU
    numbers: np.ndarray  # (examples, positions + 3, 2 or 9), float32: low and high; an exact form; or a series of t
    reaches: np.ndarray  # (examples, positions, 2), float32: the |d| that a smooth function's two series hold for
    series: np.ndarray  # (examples, ORDERS), float32: the series of F
    may_be_far: np.ndarray  # (examples), bool: whether a weight may take t beyond that series


class Scratch(NamedTuple):
    """t of one example, and sums as in `rows.Scratch`, for one tile of input channels."""

    total: np.ndarray  # (CHANNEL_TILE), float32
    narrow: np.ndarray  # (2 * CHANNEL_TILE), float32
    wide: np.ndarray  # (2 * CHANNEL_TILE), float64
    counts: np.ndarray  # (CHANNEL_TILE), int32


class Place(NamedTuple):
    """A tile of one channel's weights: the channel, its first input channel, and the shift of its kernel position."""

    channel: int
    first: int
    shift: int


# --- single weights ---------------------------------------------------------------------------------------------------


@in_order
def add_one(total, d, low, high):
    """Add one position's t behind a ReLU, for one weight."""
    return total + relu_change(d, low, high)


@kernel
def mean_relu_change(step, x, shift, offsets, limits):
    """t of one weight on one example behind a ReLU, in float32 as for whole channels."""
    total, n_positions = np.float32(0), offsets.shape[0]
    for p in range(n_positions):
        total = add_one(total, step * x[offsets[p] + shift], limits[p, 0], limits[p, 1])
    return np.float64(total * np.float32(1 / n_positions))


@kernel
def mean_change(function, step, x, shift, offsets, y, intact):
    """t of one weight on one example: a mean of differences in float64, since series don't pay for few weights."""
    total, n_positions = 0.0, offsets.shape[0]
    for p in range(n_positions):
        d = step * np.float64(x[offsets[p] + shift])
        if d != 0:
            total += value_of(function, y[p] + d) - intact[p]
    return total / n_positions


@kernel
def score_weights(weights, layout, batch, follows, delta, touched):
    """The loss delta of every (weight, example), and whether any logit moves.

    batch: x is (examples, inputs, padded positions), y (all channels, examples, positions).
    """
    x, offsets, function = batch.x, layout.offsets, follows.function
    n_examples, n_positions, is_relu = x.shape[0], offsets.shape[0], function.code < FIRST_BENT
    intact, limits = np.empty((n_examples, n_positions)), np.empty((n_examples, n_positions, 2), np.float32)
    m, kappa, series = np.empty(ORDERS), np.empty(ORDERS), np.empty((n_examples, ORDERS), np.float32)
    before = -1
    for site in range(weights.steps.shape[0]):
        channel, source = weights.channels[site], weights.sources[site]
        column, reaches_logits = column_of(follows, layout.units[channel])
        delta[site], touched[site] = 0.0, False
        if not reaches_logits:
            continue
        y = batch.y[channel]
        if channel != before:
            for n in range(n_examples):
                if is_relu:
                    fill_limits(function, y[n], limits[n])
                else:
                    fill_values(function, y[n], intact[n])
                series_of(column, batch.q[n], batch.labels[n], m, kappa)
                series[n] = kappa
            before = channel
        step, shift = weights.steps[site], weights.shifts[site]
        for n in range(n_examples):
            if is_relu:
                t = mean_relu_change(np.float32(step), x[n, source], shift, offsets, limits[n])
            else:
                t = mean_change(function, step, x[n, source], shift, offsets, y[n], intact[n])
            if t != 0:
                touched[site, n] = True
                delta[site, n] = loss_of(t, long_series(series, n), column, batch, n)


@kernel
def fill_values(function, y, values):
    """f(y), position by position."""
    for p in range(y.shape[0]):
        values[p] = value_of(function, y[p])


@kernel
def fill_limits(function, y, limits):
    """Low and high of a ReLU's t, position by position."""
    for p in range(y.shape[0]):
        limits[p, 0], limits[p, 1] = relu_limits(function, y[p])


# --- what is looked up for one channel --------------------------------------------------------------------------------


@kernel
def list_positions(function, y, largest, at, numbers):
    """The positions of one (channel, example) that may move behind a ReLU, padded to a multiple of four."""
    n = 0
    for p in range(y.shape[0]):
        if function.code == RELU and y[p] <= 0 and largest <= -y[p]:
            continue
        at[n] = p
        numbers[n, 0], numbers[n, 1] = relu_limits(function, y[p])
        n += 1
    end = n
    while end % 4:
        at[end], numbers[end, 0], numbers[end, 1] = 0, _NEVER, -_NEVER
        end += 1
    return n, end


@kernel
def chart_positions(function, y, far, a, reaches):
    """The numbers of t, and their reaches, of all positions of one (channel, example) for |d| <= far.

    Returns the means over the positions of the largest |t| and of the rest of t.
    """
    s, a_p = np.empty(activations.INCREMENT_ORDERS + 1), np.empty(activations.INCREMENT_ORDERS)
    farthest, rest = 0.0, 0.0
    for p in range(y.shape[0]):
        if function.code < FIRST_SMOOTH:
            bend(function, y[p], a[p])
            farthest += largest_bent_change(function, y[p], far)
            continue
        series_of_function(function, y[p], s, a_p)
        short, long = reaches_of(function, y[p])
        a[p, : activations.INCREMENT_ORDERS], reaches[p, 0], reaches[p, 1] = a_p, short, long
        farthest += largest_change(a_p, min(far, long))
        rest += max(
            rest_of_function(function, y[p], min(far, short), activations.SHORT_INCREMENT),
            rest_of_function(function, y[p], min(far, long), activations.LONG_INCREMENT),
        )
    return farthest / y.shape[0], rest / y.shape[0]


@kernel
def chart_channel(y, largest, column, batch, chart, bound):
    """Fill the chart of one channel whose largest |step| is `largest`; returns the bound plus what is left out."""
    m, kappa = np.empty(ORDERS), np.empty(ORDERS)
    n_positions = y.shape[1]
    for n in range(y.shape[0]):
        far, rest = largest * chart.largest[n].max(), 0.0
        if column.function.code < FIRST_BENT:
            n_moving, chart.moving[n] = list_positions(column.function, y[n], far, chart.at[n], chart.numbers[n])
            reach = far * column.range * n_moving / n_positions
            chart.may_be_far[n] = reach > REACH_LONG
        else:
            farthest, rest = chart_positions(column.function, y[n], far, chart.numbers[n], chart.reaches[n])
            reach, chart.moving[n], chart.may_be_far[n] = farthest * column.range, n_positions, True
        if chart.moving[n]:
            series_of(column, batch.q[n], batch.labels[n], m, kappa)
            chart.series[n] = kappa
            bound += rest_of_loss(reach, rest, 2 * kappa[1], column, batch, n)
    return bound


# --- t of one example, for one tile of input channels -----------------------------------------------------------------


@in_order
def add_four(total, step, x0, x1, x2, x3, low, high):
    """Add t of four positions of one (channel, example) behind a ReLU. Four share the loads and stores of the sums."""
    l0, l1, l2, l3 = low
    h0, h1, h2, h3 = high
    for j in range(total.shape[0]):
        s = step[j]
        d0, d1, d2, d3 = s * x0[j], s * x1[j], s * x2[j], s * x3[j]
        a = ((d0 if d0 > l0 else l0) + h0) + ((d1 if d1 > l1 else l1) + h1)
        b = ((d2 if d2 > l2 else l2) + h2) + ((d3 if d3 > l3 else l3) + h3)
        total[j] += a + b


@kernel
def add_relu_positions(total, step, x, first, begins, at, a, n_moving):
    """Add t of the positions that move behind a ReLU. begins: where each position begins among those of x."""
    last = first + step.shape[0]
    for p in range(0, n_moving, 4):
        x0, x1 = x[begins[at[p]], first:last], x[begins[at[p + 1]], first:last]
        x2, x3 = x[begins[at[p + 2]], first:last], x[begins[at[p + 3]], first:last]
        low, high = (a[p, 0], a[p + 1, 0], a[p + 2, 0], a[p + 3, 0]), (a[p, 1], a[p + 1, 1], a[p + 2, 1], a[p + 3, 1])
        add_four(total, step, x0, x1, x2, x3, low, high)


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
    """Add t of one position for those inputs that the long series reaches; returns how many it doesn't."""
    n_far = _NONE
    for j in range(total.shape[0]):
        d = step[j] * x[j]
        total[j] += long_sum(d if abs(d) <= reach else _NONE, a)
        n_far += _NONE if abs(d) <= reach else _ONE
    return n_far


@kernel
def add_far_position(total, step, x, reach, function, y):
    """Add t of one position for the other inputs: the difference of two values."""
    for j in range(total.shape[0]):
        if not abs(step[j] * x[j]) <= reach:
            total[j] += np.float32(change_of(function, y, np.float64(step[j]) * np.float64(x[j])))


@kernel
def add_curved_positions(total, step, x, place, chart, n, unit):
    """Add t of all positions behind a bent or smooth function. unit: f and y."""
    function, y = unit
    offsets, largest_x, a, reaches = chart.offsets, chart.largest[n], chart.numbers[n], chart.reaches[n]
    largest, first, last = np.float64(max(step.max(), -step.min())), place.first, place.first + step.shape[0]
    for p in range(y.shape[0]):
        at = offsets[p] + place.shift
        far, x_p = largest * largest_x[at], x[at, first:last]
        if far == 0:
            continue
        if function.code < FIRST_SMOOTH:
            if largest_bent_change(function, y[p], far) > 0:
                add_bent_position(total, step, x_p, bent_numbers(a, p))
        elif far <= reaches[p, 0]:
            add_short_position(total, step, x_p, short_numbers(a, p))
        elif far <= reaches[p, 1]:
            add_long_position(total, step, x_p, long_series(a, p))
        elif add_near_position(total, step, x_p, long_series(a, p), reaches[p, 1]) > 0:
            add_far_position(total, step, x_p, reaches[p, 1], function, y[p])


# --- whole channels ---------------------------------------------------------------------------------------------------


@kernel
def add_series(total, c, narrow, counts):
    """Add F, F^2 and whether t is not 0, for many input channels."""
    size = total.shape[0]
    for j in range(size):
        t = total[j]
        f = long_sum(t, c)
        narrow[j] += f
        narrow[CHANNEL_TILE + j] += f * f
        counts[j] += t != 0


@kernel
def count_far(total, width):
    """How many t are beyond the series of F."""
    n_far = 0
    for j in range(total.shape[0]):
        n_far += abs(total[j]) * width > REACH_LONG
    return n_far


@kernel
def add_far(total, c, n, column, batch, scratch):
    """Add F and F^2 where t is beyond the series, and set t to 0 there."""
    for j in range(total.shape[0]):
        t = total[j]
        if abs(t) * column.range > REACH_LONG:
            f = loss_of(t, c, column, batch, n)
            scratch.wide[j] += f
            scratch.wide[CHANNEL_TILE + j] += f * f
            scratch.counts[j] += 1
            total[j] = 0


@kernel
def add_tile(step, place, column, batch, chart, runs, own, scratch):
    """Add the sums of one tile of weights, run by run."""
    # Arrays leave their records here, once for all examples: Numba counts references wherever a record is passed on,
    # which for each position of each example doubles the time.
    x, y, at, numbers, series = batch.x, batch.y[place.channel], chart.at, chart.numbers, chart.series
    moving, may_be_far, total = chart.moving, chart.may_be_far, scratch.total[: step.shape[0]]
    narrow, wide, counts, begins = scratch.narrow, scratch.wide, scratch.counts, chart.offsets + place.shift
    inverse, is_relu, begin = np.float32(1 / begins.shape[0]), column.function.code < FIRST_BENT, 0
    for k in range(runs.ends.shape[0]):
        wide[:] = 0
        counts[:] = 0
        for n in range(begin, runs.ends[k]):
            if moving[n] == 0:
                continue
            total[:] = 0
            if is_relu:
                add_relu_positions(total, step, x[n], place.first, begins, at[n], numbers[n], moving[n])
            else:
                add_curved_positions(total, step, x[n], place, chart, n, (column.function, y[n]))
            for j in range(total.shape[0]):
                total[j] *= inverse
            c = long_series(series, n)
            if may_be_far[n] and count_far(total, column.range) > 0:
                add_far(total, c, n, column, batch, scratch)
            add_series(total, c, narrow, counts)
            if n % FLUSH_EXAMPLES == FLUSH_EXAMPLES - 1:
                flush(narrow, wide)
        flush(narrow, wide)
        begin = runs.ends[k]
        add_run(wide, own, runs, k)
        for j in range(step.shape[0]):
            own.touched[j] += counts[j]


@kernel
def add_channels(channels, steps, layout, largest, batch, follows, runs, sums):
    """Add the sums over one batch of all weights of some channels.

    channels, steps (channels, kernel positions, inputs): which, and the steps times the scale.  largest: as in `Chart`.
    batch: x is (examples, padded positions, inputs), y (all channels, examples, positions).  Sums are (channels,
    inputs, kernel positions), bounds (channels).
    """
    n_examples, n_positions, n_inputs = batch.x.shape[0], layout.offsets.shape[0], batch.x.shape[2]
    chart = Chart(
        layout.offsets, largest, np.empty(n_examples, np.int64), np.empty((n_examples, n_positions + 3), np.int64),
        np.empty((n_examples, n_positions + 3, activations.count_numbers(follows.function)), np.float32),
        np.empty((n_examples, n_positions, 2), np.float32), np.empty((n_examples, ORDERS), np.float32),
        np.empty(n_examples, np.bool_),
    )  # fmt: skip
    scratch = Scratch(
        np.empty(CHANNEL_TILE, np.float32), np.zeros(2 * CHANNEL_TILE, np.float32), np.empty(2 * CHANNEL_TILE),
        np.empty(CHANNEL_TILE, np.int32),
    )  # fmt: skip
    for row in range(channels.shape[0]):
        channel = channels[row]
        column, reaches_logits = column_of(follows, layout.units[channel])
        if not reaches_logits:
            continue
        farthest = np.float64(max(steps[row].max(), -steps[row].min()))
        sums.bounds[row] = chart_channel(batch.y[channel], farthest, column, batch, chart, sums.bounds[row])
        for k in range(layout.shifts.shape[0]):
            for first in range(0, n_inputs, CHANNEL_TILE):
                tile = slice(first, min(first + CHANNEL_TILE, n_inputs))
                place, own = Place(channel, first, layout.shifts[k]), tile_of(sums, row, tile, k)
                add_tile(steps[row, k, tile], place, column, batch, chart, runs, own, scratch)


@kernel
def tile_of(sums, row, tile, k):
    """One tile of one channel's sums, at one kernel position."""
    return Sums(
        sums.delta[row, tile, k], sums.delta_squared[row, tile, k], sums.touched[row, tile, k],
        sums.class_delta[row, tile, k], sums.class_delta_squared[row, tile, k], sums.within[row, tile, k],
        sums.bounds[row : row + 1],
    )  # fmt: skip

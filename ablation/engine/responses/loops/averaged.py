"""The loops over (weight, example) of a convolution whose channel is averaged before the last Linear, compiled.

    t = 1/P sum_p [ max(s x_p, -y_p) + min(y_p, 0) ]     s = step times BatchNorm's scale, x_p: the shifted input
    F = log1p(S(t))                                      as in `rows.py`

Positions that are closed and that no weight opens take no part: they are listed once for each (channel, example).
"""

import numpy as np

from ablation.engine.compiled import in_order, kernel
from ablation.engine.responses.loops.series import (
    ORDERS,
    REACH_LONG,
    add_sums,
    close_class,
    column_of,
    flush,
    long_series,
    long_sum,
    loss_of,
    rest_of_series,
    series_of,
)

AT_ONCE = 128  # input channels that are summed up together
FLUSH = 8  # examples after which their float32 sums are added up in float64
_NEVER = np.float32(1e30)  # as low and, negative, as high: a position that adds 0


@kernel
def list_positions(y, largest, has_relu, at, low, high):
    """The positions of one (channel, example) that may move, padded to a multiple of four."""
    n = 0
    for p in range(y.shape[0]):
        if has_relu and y[p] <= 0 and largest <= -y[p]:
            continue
        at[n], low[n], high[n] = p, -np.inf, 0
        if has_relu:
            low[n], high[n] = np.float32(-y[p]), np.float32(min(y[p], 0.0))
        n += 1
    end = n
    while end % 4:
        at[end], low[end], high[end] = 0, _NEVER, -_NEVER
        end += 1
    return n, end


@in_order
def add_one(total, d, low, high):
    """One position, for one weight."""
    return total + ((d if d > low else low) + high)


@kernel
def score_weights(
    channels, sources, kernel_offsets, steps, units, x, offsets, y, has_relu, q, z, labels, columns, is_logit, delta,
    touched,
):  # fmt: skip
    """The loss delta of every (site, example), and whether any logit moves. Sites come channel by channel.

    channels, sources, kernel_offsets, steps (sites): where the weight is, and its step times the scale.
    units (channels): the last Linear's input.  x (examples, inputs, padded positions), offsets (positions): into them.
    y (examples, channels, positions).
    """
    n_examples, n_positions = x.shape[0], offsets.shape[0]
    at = np.empty((n_examples, n_positions + 3), np.int64)
    low = np.empty((n_examples, n_positions + 3), np.float32)
    high = np.empty((n_examples, n_positions + 3), np.float32)
    n_moving, c = np.empty(n_examples, np.int64), np.empty((n_examples, ORDERS), np.float32)
    m, kappa = np.empty(ORDERS), np.empty(ORDERS)
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
                _, n_moving[n] = list_positions(y[n, channel], np.inf, has_relu, at[n], low[n], high[n])
                series_of(unit, column, is_logit, q[n], labels[n], m, kappa)
                c[n] = kappa
            before = channel
        step = np.float32(steps[site])
        for n in range(n_examples):
            x_n, total = x[n, sources[site]], np.float32(0)
            for k in range(n_moving[n]):
                d = step * x_n[offsets[at[n, k]] + kernel_offsets[site]]
                total = add_one(total, d, low[n, k], high[n, k])
            t = total * np.float32(1 / n_positions)
            touched[site, n] = t != 0
            delta[site, n] = 0.0
            if t != 0:
                delta[site, n] = loss_of(t, long_series(c, n), unit, spread, q[n], z[n], column, labels[n], is_logit)


@in_order
def add_position(total, step, x, low, high):
    """Four positions of one (channel, example), for many input channels."""
    x0, x1, x2, x3 = x
    l0, l1, l2, l3 = low
    h0, h1, h2, h3 = high
    for j in range(total.shape[0]):
        s = step[j]
        d0, d1, d2, d3 = s * x0[j], s * x1[j], s * x2[j], s * x3[j]
        a = ((d0 if d0 > l0 else l0) + h0) + ((d1 if d1 > l1 else l1) + h1)
        b = ((d2 if d2 > l2 else l2) + h2) + ((d3 if d3 > l3 else l3) + h3)
        total[j] += a + b


@kernel
def add_series(total, c, narrow, counts):
    """F, F^2 and whether t moved, for many input channels."""
    size = total.shape[0]
    for j in range(size):
        t = total[j]
        f = long_sum(t, c)
        narrow[j] += f
        narrow[AT_ONCE + j] += f * f
        counts[j] += t != 0


@kernel
def add_channels(
    channels, steps, units, x, largest_x, offsets, kernel_offsets, y, has_relu, q, z, labels, columns, is_logit,
    cuts, closes, per_class, delta, delta_squared, touched, open_delta, open_squared, within, bounds,
):  # fmt: skip
    """Add the sums over one batch of all weights of some channels.

    channels, steps (channels, kernel positions, inputs): which, and the steps times the scale.  units (all channels).
    x (examples, padded positions, inputs), largest_x (examples); offsets (positions), kernel_offsets: into them.
    y (examples, all channels, positions).  Sums are (channels, inputs, kernel positions), bounds (channels).
    """
    n_examples, _, n_inputs = x.shape
    n_positions, n_kernel = offsets.shape[0], kernel_offsets.shape[0]
    at = np.empty((n_examples, n_positions + 3), np.int64)
    low = np.empty((n_examples, n_positions + 3), np.float32)
    high = np.empty((n_examples, n_positions + 3), np.float32)
    n_moving, c = np.empty(n_examples, np.int64), np.empty((n_examples, ORDERS), np.float32)
    is_far = np.empty(n_examples, np.bool_)
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
            far = largest * largest_x[n]
            moving, n_moving[n] = list_positions(y[n, channel], far, has_relu, at[n], low[n], high[n])
            reach = far * spread * moving / n_positions
            is_far[n] = reach > REACH_LONG
            if moving:
                series_of(unit, column, is_logit, q[n], labels[n], m, kappa)
                c[n] = kappa
                bounds[row] += rest_of_series(reach, spread, 2 * kappa[1])
        for k in range(n_kernel):
            shift = kernel_offsets[k]
            for first in range(0, n_inputs, AT_ONCE):
                size = min(AT_ONCE, n_inputs - first)
                step = steps[row, k, first : first + size]
                begin = 0
                for cut in range(cuts.shape[0]):
                    wide[:] = 0
                    counts[:] = 0
                    for n in range(begin, cuts[cut]):
                        if n_moving[n] == 0:
                            continue
                        total[:] = 0
                        for p in range(0, n_moving[n], 4):
                            add_position(
                                total[:size], step,
                                (
                                    x[n, offsets[at[n, p]] + shift, first : first + size],
                                    x[n, offsets[at[n, p + 1]] + shift, first : first + size],
                                    x[n, offsets[at[n, p + 2]] + shift, first : first + size],
                                    x[n, offsets[at[n, p + 3]] + shift, first : first + size],
                                ),
                                (low[n, p], low[n, p + 1], low[n, p + 2], low[n, p + 3]),
                                (high[n, p], high[n, p + 1], high[n, p + 2], high[n, p + 3]),
                            )  # fmt: skip
                        for j in range(size):
                            total[j] *= inverse
                        if is_far[n]:
                            for j in range(size):
                                t = total[j]
                                if abs(t) * spread > REACH_LONG:
                                    f = loss_of(
                                        t, long_series(c, n), unit, spread, q[n], z[n], column, labels[n], is_logit
                                    )
                                    wide[j] += f
                                    wide[AT_ONCE + j] += f * f
                                    counts[j] += 1
                                    total[j] = 0
                        add_series(total[:size], long_series(c, n), narrow, counts)
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

"""The loss change as a function of one number, piece by piece: where two ReLUs and two Linears follow the target.

    x -> y1 = W1 x + b1 -> relu -> y2 = W2 a + b2 -> relu -> z = V b + c -> cross-entropy

Replacing any weight of row i moves unit i alone, by t = relu(y1_i + d) - relu(y1_i) with d = (r - w_ij) x_j. So for one
example all weights of a row share one function F(t), with a kink wherever a unit k of the second layer
flips, at t = -y2_k / W2_ki. Between kinks the logits are affine in t. With u_c = dz_c/dt - dz_y/dt and p the softmax
where the piece starts,

    F(s + t) = F(s) + log sum_c p_c e^(u_c t) = F(s) + sum_k kappa_k t^k / k!

kappa_k: the cumulants of u under p, here from moments about the label, which keeps the digits of confident examples
(`loss.py`). The work on a block of examples:

    reach    the range of t that the weights of a row really have: per (example, unit)
    chart    u at t = 0 of all units that move at all: a product of matrices, and most of the time; shifted so that
             dF/dt at 0 is exact. Then outward on both sides, at every kink a row of V added to u, and six moments
    add_up   t, and a polynomial: per (example, unit, input)

Numerics. The series after order 6 is off by at most C_7/7! x^5 e^x t^2 kappa_2, x = |t| R, R = max u - min u: the
7th cumulant is at most C_7 R^5 kappa_2 (from |central moment k| <= R^(k-2) kappa_2 and kappa_2 <= R^2/4), and kappa_2
grows by at most e^x on the way. Pieces end where x reaches PIECE_REACH, which makes that 1e-6 for any network. Beyond
MOST_PIECES pieces, F is a difference of two losses in float64. Deltas are float32, their sums float64, and kinks are
placed in float64. Every number is computed in the same order by however many threads.

Not here: the intact network in float64, and which weights and examples there are.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from ablation.engine.compiled import kernel
from ablation.engine.responses.loops.records import Batch
from ablation.engine.threads import run_ranges

PIECE_REACH = 0.17  # largest |t| R of one piece: with C_7 = 28.125, 28.125/5040 x^5 e^x is 9.4e-7
REST = 28.125 / 5040
MOST_PIECES = 512  # pieces on either side of 0
BLOCK_EXAMPLES = 64  # examples per block: a unit's sums are fetched once for all of them (32 and 128 are slower)
PAIRS = 64  # (example, unit) pairs charted by one call: their u stay in the cache
INPUTS = 1536  # inputs summed at once: a unit's weights and sums of them stay in the first-level cache
VECTOR = 64  # running maxima kept side by side, so that the loop over them becomes vector code
NOWHERE = -1  # marks a pair (example, unit) that no weight moves

# Columns of a piece: its start, 1 / the length that PIECE_REACH allows it, F's series in units of that length, and
# whether logits move.
START, SCALE, CONSTANT, MOVES, N_PIECE = 0, 1, 2, 9, 10
# Columns of a pair's `ends`: where its first piece ends, where its last ones do, and its range of t; columns of its
# `spans`: its pieces, and the weights beyond them.
LOW, HIGH, LAST_LOW, LAST_HIGH, LEAST, MOST, N_ENDS = 0, 1, 2, 3, 4, 5, 6
PIECE, N_BELOW, N_ABOVE, FAR, N_FAR, N_SPAN = 0, 1, 2, 3, 4, 5

ZERO, ONE, TINY = np.float32(0), np.float32(1), np.float32(1e-30)
E2, E3, E4, E5, E6 = (np.float32(1 / math.factorial(k)) for k in range(2, 7))


class Units(NamedTuple):
    """Some units of the target, and the network behind them."""

    change: Float32[np.ndarray, "units inputs"]  # r - w; finite
    columns: Float32[np.ndarray, "units second"]  # W2[:, i] of each unit
    last: Float32[np.ndarray, "second classes"]  # V transposed
    largest: Float32[np.ndarray, " units"]  # max |r - w|
    steepest: Float32[np.ndarray, " second"]  # max |W2_ki| over the units


class Example(NamedTuple):
    """The values of the intact network on one example."""

    x: np.ndarray  # (inputs), float32
    y1: np.ndarray  # (units), float64
    y2: np.ndarray  # (second), float64
    gradient: np.ndarray  # (second), float64: d loss / d y2
    logits: np.ndarray  # (classes), float64
    softmax: np.ndarray  # (classes), float32
    label: int
    loss: float


class Kinks(NamedTuple):
    """The kinks on one side of t = 0, in the order of |t|: the flips of units of the second layer."""

    at: np.ndarray  # (kinks), float64: |t|
    which: np.ndarray  # (kinks), int64: units of the second layer
    column: np.ndarray  # (second), float32: W2[:, i]
    last: np.ndarray  # (second, classes), float32: V transposed
    label: int


class Used(NamedTuple):
    """The inputs that are not 0, one example after the other."""

    inputs: np.ndarray  # int32: which
    values: np.ndarray  # float32
    cuts: np.ndarray  # (examples, blocks + 1), int64: where each INPUTS begin


class Totals(NamedTuple):
    """Sums that are added to, (units, inputs) or one unit's."""

    delta: np.ndarray  # float64: of the loss deltas, in nats
    squared: np.ndarray  # float64
    touched: np.ndarray  # int32: the examples on which any logit moves


class Charts(NamedTuple):
    """F of some examples and units, piece by piece.

    A pair's pieces lie one after the other: the one at 0 (good for both signs of t), then those below 0 and those
    above, each from the inside outward and in terms of |t|.
    """

    at: Int32[np.ndarray, "examples units"]  # which pair, or NOWHERE
    first: Float32[np.ndarray, "examples units"]  # y1
    ends: Float32[np.ndarray, "pairs 6"]
    spans: Int64[np.ndarray, "pairs 5"]
    pieces: Float32[np.ndarray, "pieces 10"]
    far_inputs: Int32[np.ndarray, " far"]  # weights whose t lies behind the last piece
    far_values: Float64[np.ndarray, " far"]
    far_moves: Int32[np.ndarray, " far"]


def make_units(
    change: Float32[np.ndarray, "units inputs"],
    columns: Float32[np.ndarray, "units second"],
    last: Float32[np.ndarray, "second classes"],
) -> Units:
    """Make the record of some units from r - w, W2 transposed and V transposed."""
    change, columns, last = (np.ascontiguousarray(values) for values in (change, columns, last))
    return Units(change, columns, last, np.abs(change).max(axis=1), np.abs(columns).max(axis=0))


def add_rows(
    target: Units,
    batch: Batch,
    sums: Float64[np.ndarray, "units inputs"],
    squares: Float64[np.ndarray, "units inputs"],
    touched: Int32[np.ndarray, "units inputs"],
    bounds: Float64[np.ndarray, " units"],
    chosen: Int64[np.ndarray, "weights 2"] | None = None,
) -> tuple[Float64[np.ndarray, "weights examples"], Bool[np.ndarray, "weights examples"]]:
    """Add to these arrays what replacing each weight of these units, alone, does to these examples.

    All numbers must be finite, and `target.change` must be 0 for weights that are not replaced.

    Args:
        target: the units, and the network behind them.
        batch: the examples; `y` is the target's output of these units, `second` the second Linear's output.
        sums: sums of the loss deltas, ablated minus intact, in nats.
        squares: sums of the squared loss deltas.
        touched: numbers of examples on which any logit's delta is nonzero.
        bounds: upper bounds, in nats, on what the series leave out of any sum of a unit.
        chosen: weights (unit, input), units counted as in `target`, whose deltas are returned one by one.

    Returns:
        The deltas of the chosen weights, one by one, and whether any logit moves.

    Numerics: float32 deltas, added in float64. Sums are within 1e-6 of the sum of the deltas' sizes, and within 1e-4 of
    max(|u|, 0.01 rms u), both tested against brute force in float64.
    """
    chosen = np.empty((0, 2), np.int64) if chosen is None else np.ascontiguousarray(chosen)
    n, totals = len(batch.labels), Totals(sums, squares, touched)
    deltas, moved = np.zeros((len(chosen), n)), np.zeros((len(chosen), n), bool)
    for first in range(0, n, BLOCK_EXAMPLES):
        block = slice(first, min(first + BLOCK_EXAMPLES, n))
        some = batch.of_examples(np.arange(block.start, block.stop))
        charts = make_charts(target, some)
        _add_charts(target, some.x, charts, totals)
        _add_rests(charts.at, charts.ends, charts.spans, charts.pieces, bounds)
        _pick(chosen, target.change, some.x, charts, deltas[:, block], moved[:, block])
    return deltas, moved


def make_charts(target: Units, batch: Batch) -> Charts:
    """F for every example and unit that a weight of the unit can move."""
    y1 = np.ascontiguousarray(batch.y.T)
    first = y1.astype(np.float32)
    low, high = np.zeros((2, *first.shape), np.float32)
    biggest = np.abs(batch.x).max(axis=1)

    def find_reach(start: int, stop: int) -> None:
        _reach(start, stop, target, batch.x, biggest, first, low, high)

    run_ranges(find_reach, first.shape[1])
    at, tasks = _cut(low, high)
    ends = np.zeros((at.max(initial=NOWHERE) + 1, N_ENDS), np.float32)
    spans = np.zeros((len(ends), N_SPAN), np.int64)
    charted: list[tuple[np.ndarray, ...]] = [()] * len(tasks)
    softmax, loss = _intact(batch.z, batch.labels)
    gradient = np.zeros(batch.second.shape)

    def pull(start: int, stop: int) -> None:
        _pull(start, stop, target.last, batch.second, softmax, batch.labels, gradient)

    run_ranges(pull, len(gradient))

    def chart(start: int, stop: int) -> None:
        for k in range(start, stop):
            n, units = tasks[k]
            here = slice(at[n, units[0]], at[n, units[-1]] + 1)
            example = Example(
                batch.x[n], y1[n], batch.second[n], gradient[n], batch.z[n], softmax[n].astype(np.float32),
                int(batch.labels[n]), float(loss[n]),
            )  # fmt: skip
            charted[k] = _chart(units, target, example, low[n], high[n], ends[here], spans[here])

    run_ranges(chart, len(tasks))
    for column, part in ((PIECE, 0), (FAR, 1)):  # from a place in the task to the place among all
        before = np.cumsum([0, *(len(parts[part]) for parts in charted)])
        for k, (n, units) in enumerate(tasks):
            spans[at[n, units[0]] : at[n, units[-1]] + 1, column] += before[k]
    nothing = (np.empty((0, N_PIECE), np.float32), np.empty(0, np.int32), np.empty(0), np.empty(0, np.int32))
    return Charts(at, first, ends, spans, *(np.concatenate(parts) for parts in zip(nothing, *charted, strict=True)))


def _cut(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """The pairs that move, numbered by example, and cut into tasks of some units of one example."""
    moving = (low < 0) | (high > 0)
    at = np.where(moving, np.cumsum(moving).reshape(moving.shape) - 1, NOWHERE).astype(np.int32)
    tasks = []
    for n in range(len(moving)):
        units = moving[n].nonzero()[0]
        tasks += [(n, units[first : first + PAIRS]) for first in range(0, len(units), PAIRS)]
    return at, tasks


def _intact(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax and loss of each example."""
    above = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = above.sum(axis=1, keepdims=True)
    own = np.take_along_axis(logits - logits.max(axis=1, keepdims=True), labels[:, None], axis=1)
    return above / total, (np.log(total) - own)[:, 0]


def _find_used(inputs: np.ndarray) -> Used:
    """List the inputs that are not 0."""
    n_examples, n_inputs = inputs.shape
    example, used = inputs.nonzero()
    edges = np.append(np.arange(0, n_inputs, INPUTS), n_inputs)
    cuts = np.searchsorted(example * n_inputs + used, np.arange(n_examples)[:, None] * n_inputs + edges)
    return Used(used.astype(np.int32), inputs[example, used], cuts)


def _add_charts(target: Units, inputs: np.ndarray, charts: Charts, totals: Totals) -> None:
    """Add the deltas: the piece at 0 for all inputs, as vector code; the other pieces for inputs that are not 0."""
    used = _find_used(inputs)

    def add_up(start: int, stop: int) -> None:
        _add_up(start, stop, target.change, inputs, used, charts, totals)

    run_ranges(add_up, len(target.change))


# --- the range of t ---------------------------------------------------------------------------------------------------


@kernel
def _moved(d, y):
    """relu(y + d) - relu(y), exact for small d."""
    zero = y - y
    return (d if d > -y else -y) + (y if y < zero else zero)


@kernel
def _reach(first, last, target, inputs, biggest, y, low, high):
    """The least and the largest t of each unit's weights: low, high (examples, units), which are 0 before."""
    most, least = np.empty(VECTOR, np.float32), np.empty(VECTOR, np.float32)
    whole = inputs.shape[1] // VECTOR * VECTOR
    for i in range(first, last):
        for n in range(inputs.shape[0]):
            if y[n, i] + target.largest[i] * biggest[n] <= 0:
                continue
            x, step = inputs[n], target.change[i]
            most[:] = 0
            least[:] = 0
            for j in range(0, whole, VECTOR):
                for v in range(VECTOR):
                    d = step[j + v] * x[j + v]
                    most[v] = d if d > most[v] else most[v]
                    least[v] = d if d < least[v] else least[v]
            up, down = _fold(most, least)
            for j in range(whole, inputs.shape[1]):
                up, down = max(up, step[j] * x[j]), min(down, step[j] * x[j])
            low[n, i], high[n, i] = _moved(down, y[n, i]), _moved(up, y[n, i])


@kernel
def _fold(most, least):
    """The largest and the smallest of all running maxima."""
    half = VECTOR // 2
    while half:
        for v in range(half):
            most[v] = most[v + half] if most[v + half] > most[v] else most[v]
            least[v] = least[v + half] if least[v + half] < least[v] else least[v]
        half //= 2
    return most[0], least[0]


# --- F, piece by piece ------------------------------------------------------------------------------------------------


@kernel
def _chart(units, target, example, low, high, ends, spans):
    """F of some units on one example: fills `ends` and `spans`, returns the pieces and the far values."""
    columns, y2, softmax, label = target.columns, example.y2, example.softmax, example.label
    slopes = _slopes(units, columns, target.last, y2)
    farthest = 0.0
    for i in units:
        farthest = max(farthest, np.float64(high[i]), -np.float64(low[i]))
    near = (np.abs(y2) <= farthest * target.steepest).nonzero()[0]  # what any of these units can flip
    pieces = np.empty((16 * len(units), N_PIECE), np.float32)
    far_inputs, far_values, far_moves = np.empty(0, np.int32), np.empty(0, np.float64), np.empty(0, np.int32)
    u, p, n = np.empty_like(softmax), np.empty_like(softmax), 0
    for k in range(len(units)):
        i, slope = units[k], slopes[k]
        own = slope[label]
        slope -= own
        pieces = _with_room(pieces, n)
        head, n = n, n + 1
        spans[k, PIECE], spans[k, FAR] = head, len(far_inputs)
        ends[k, LEAST], ends[k, MOST] = low[i], high[i]
        exact = _dot(columns[i], example.gradient)
        _level(exact, softmax, label, slope)
        _write_piece(0.0, 0.0, softmax, slope, own != 0, pieces[head])
        for side in (-1, 1):
            end = np.float64(high[i]) if side > 0 else -np.float64(low[i])
            kinks = Kinks(*_find_kinks(side, y2, columns[i], near, end), columns[i], target.last, label)
            u[:] = slope if side > 0 else -slope
            p[:] = softmax
            before = n
            first_end, last_end, pieces, n = _walk(side, end, kinks, own * side, (p, u), pieces, head, n)
            ends[k, HIGH if side > 0 else LOW] = side * first_end
            ends[k, LAST_HIGH if side > 0 else LAST_LOW] = side * last_end
            spans[k, N_ABOVE if side > 0 else N_BELOW] = n - before
            if last_end < end:
                u[:] = slope if side > 0 else -slope
                inputs, t = _find_far(side, target.change[i], example.x, example.y1[i], ends[k])
                values, moves = _far(t, kinks, own * side, u, example.logits, example.loss)
                far_inputs = np.append(far_inputs, inputs)
                far_values = np.append(far_values, values)
                far_moves = np.append(far_moves, moves)
        spans[k, N_FAR] = len(far_inputs) - spans[k, FAR]
    return pieces[:n].copy(), far_inputs, far_values, far_moves


@kernel
def _pull(first, last, v, y2, softmax, labels, gradient):
    """d loss / d y2 of some examples (examples, second), 0 before: sum_c p_c (V_ck - V_yk) where unit k is active."""
    for n in range(first, last):
        for k in range(len(v)):
            if y2[n, k] > 0:
                total, row, own = 0.0, v[k], np.float64(v[k, labels[n]])
                for c in range(len(row)):
                    total += softmax[n, c] * (row[c] - own)
                gradient[n, k] = total


@kernel
def _dot(a, b):
    """The dot product of two vectors, in float64."""
    total = 0.0
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


@kernel
def _level(exact, p, label, u):
    """Shift all slopes but the label's so that dF/dt at 0, which is sum p u, equals its float64 value.

    A float32 product of a thousand terms is off by 1e-6, and most of that by the label's slope, which is in every u.
    Utilities cancel over examples: without this they would be off by as much of 0.01 of their root mean square as 1e-4.
    """
    own = u[label]
    now, rest = 0.0, 0.0
    for c in range(len(u)):
        now += np.float64(p[c]) * u[c]
        rest += np.float64(p[c]) if c != label else 0.0
    if rest > 0:
        u += np.float32((exact - now) / rest)
        u[label] = own


@kernel
def _slopes(units, columns, last, y2):
    """dz/dt at 0 of each unit: the sum over the active k of W2_ki V[:, k]. Padded with zeros to a multiple of four."""
    active = (y2 > 0).nonzero()[0]
    rows = np.zeros(-(-len(active) // 8) * 8, np.int64)
    for k in range(len(active)):
        rows[k] = active[k]
    weights = np.zeros((-(-len(units) // 4) * 4, len(rows)), np.float32)
    for p in range(len(units)):
        column = columns[units[p]]
        for k in range(len(active)):
            weights[p, k] = column[active[k]]
    slopes = np.zeros((len(weights), last.shape[1]), np.float32)
    for k in range(0, len(rows), 8):
        for p in range(0, len(weights), 4):
            _multiply(weights[p : p + 4, k : k + 8], rows[k : k + 8], last, slopes[p : p + 4])
    return slopes


@kernel
def _multiply(a, k, v, out):
    """out (4, classes) += a (4, 8) @ v[k]: as fast as a library's product, without copying the rows of v together."""
    a00, a01, a02, a03, a04, a05, a06, a07 = a[0, 0], a[0, 1], a[0, 2], a[0, 3], a[0, 4], a[0, 5], a[0, 6], a[0, 7]
    a10, a11, a12, a13, a14, a15, a16, a17 = a[1, 0], a[1, 1], a[1, 2], a[1, 3], a[1, 4], a[1, 5], a[1, 6], a[1, 7]
    a20, a21, a22, a23, a24, a25, a26, a27 = a[2, 0], a[2, 1], a[2, 2], a[2, 3], a[2, 4], a[2, 5], a[2, 6], a[2, 7]
    a30, a31, a32, a33, a34, a35, a36, a37 = a[3, 0], a[3, 1], a[3, 2], a[3, 3], a[3, 4], a[3, 5], a[3, 6], a[3, 7]
    v0, v1, v2, v3, v4, v5, v6, v7 = v[k[0]], v[k[1]], v[k[2]], v[k[3]], v[k[4]], v[k[5]], v[k[6]], v[k[7]]
    out0, out1, out2, out3 = out[0], out[1], out[2], out[3]
    for c in range(v.shape[1]):
        x0, x1, x2, x3, x4, x5, x6, x7 = v0[c], v1[c], v2[c], v3[c], v4[c], v5[c], v6[c], v7[c]
        y0, y1, y2, y3 = out0[c], out1[c], out2[c], out3[c]
        y0, y1, y2, y3 = y0 + a00 * x0, y1 + a10 * x0, y2 + a20 * x0, y3 + a30 * x0
        y0, y1, y2, y3 = y0 + a01 * x1, y1 + a11 * x1, y2 + a21 * x1, y3 + a31 * x1
        y0, y1, y2, y3 = y0 + a02 * x2, y1 + a12 * x2, y2 + a22 * x2, y3 + a32 * x2
        y0, y1, y2, y3 = y0 + a03 * x3, y1 + a13 * x3, y2 + a23 * x3, y3 + a33 * x3
        y0, y1, y2, y3 = y0 + a04 * x4, y1 + a14 * x4, y2 + a24 * x4, y3 + a34 * x4
        y0, y1, y2, y3 = y0 + a05 * x5, y1 + a15 * x5, y2 + a25 * x5, y3 + a35 * x5
        y0, y1, y2, y3 = y0 + a06 * x6, y1 + a16 * x6, y2 + a26 * x6, y3 + a36 * x6
        y0, y1, y2, y3 = y0 + a07 * x7, y1 + a17 * x7, y2 + a27 * x7, y3 + a37 * x7
        out0[c], out1[c], out2[c], out3[c] = y0, y1, y2, y3


@kernel
def _with_room(pieces, n):
    """Return the pieces in an array with room for number n."""
    if n < len(pieces):
        return pieces
    larger = np.empty((2 * len(pieces), N_PIECE), np.float32)
    for k in range(n):  # a loop compiles sooner than an assignment of slices
        for column in range(N_PIECE):
            larger[k, column] = pieces[k, column]
    return larger


@kernel
def _find_kinks(side, y2, column, near, end):
    """The units of the second layer that flip on one side, and the |t| at which they do, in the order of |t|.

    A unit at exactly 0 is inactive, and is activated at once on one side.
    """
    at, which, n = np.empty(len(near)), np.empty(len(near), np.int64), 0
    for k in near:
        w = side * column[k]
        if w != 0 and (y2[k] > 0) == (w < 0):
            t = abs(y2[k] / w)
            if t < end:
                at[n], which[n] = t, k
                n += 1
    order = np.argsort(at[:n])
    return at[:n][order], which[:n][order]


@kernel
def _walk(side, end, kinks, own, tilt, pieces, head, n):
    """Write the pieces of one side, from where the one at 0 ends; `tilt`: p and u = du/d|t| there, own: the label's
    slope.

    Every kink adds |W2_ki| V[:, k], whichever way the unit flips: a ReLU is convex. Returns the ends of the first piece
    and of the last, and the pieces.
    """
    (p, u), at, last = tilt, kinks.at, kinks.last
    row, sign, start, total, k, first = head, side, 0.0, 0.0, 0, n
    stop = first_stop = _next_stop(start, pieces[row], at, k)
    while stop < end and n - first < MOST_PIECES:
        total += _rise(pieces[row], sign * np.float32(stop - start))
        weight, v = np.float32(0), last[0]
        if k < len(at) and at[k] <= stop:
            weight, v = abs(kinks.column[kinks.which[k]]), last[kinks.which[k]]
            k += 1
        _advance(np.float32(stop - start), weight, v, kinks.label, p, u)
        own += weight * v[kinks.label]
        pieces = _with_room(pieces, n)
        _write_piece(stop, total, p, u, own != 0 or pieces[row, MOVES] != 0, pieces[n])
        row, sign, start, n = n, 1, stop, n + 1
        stop = _next_stop(start, pieces[row], at, k)
    return first_stop, stop, pieces, n


@kernel
def _next_stop(start, piece, at, k):
    """The end of a piece: the next kink, or the limit of the series."""
    kink = at[k] if k < len(at) else np.inf
    return min(kink, start + 1 / np.float64(piece[SCALE])) if piece[SCALE] > 0 else kink


@kernel
def _advance(t, weight, v, label, p, u):
    """Advance by t: update p, and add weight * v to the slopes. |t u| is at most PIECE_REACH."""
    own, mass = v[label], np.float32(0)
    for c in range(len(u)):
        x = t * u[c]
        p[c] *= ONE + x * (ONE + x * (E2 + x * (E3 + x * (E4 + x * (E5 + x * E6)))))
        mass += p[c]
        u[c] += weight * (v[c] - own)
    if mass > 1e6 or mass < 1e-6:  # only ratios count
        p /= mass


@kernel
def _write_piece(start, constant, p, u, moves, piece):
    """kappa_k / k! of u under p, in units of the piece's full length, so that no power over- or underflows."""
    u_range = _range_of(u)
    scale = u_range / np.float32(PIECE_REACH)
    length = ONE / scale if scale > TINY else np.float32(0)
    m0 = m1 = m2 = m3 = m4 = m5 = m6 = np.float32(0)
    for c in range(len(u)):
        r, q = length * u[c], p[c]
        m0 += q
        q *= r
        m1 += q
        q *= r
        m2 += q
        q *= r
        m3 += q
        q *= r
        m4 += q
        q *= r
        m5 += q
        q *= r
        m6 += q
    mass = np.float64(m0)
    a1, a2, a3, a4, a5, a6 = m1 / mass, m2 / mass / 2, m3 / mass / 6, m4 / mass / 24, m5 / mass / 120, m6 / mass / 720
    b1 = a1
    b2 = a2 - b1 * a1 / 2
    b3 = a3 - (b1 * a2 + 2 * b2 * a1) / 3
    b4 = a4 - (b1 * a3 + 2 * b2 * a2 + 3 * b3 * a1) / 4
    b5 = a5 - (b1 * a4 + 2 * b2 * a3 + 3 * b3 * a2 + 4 * b4 * a1) / 5
    b6 = a6 - (b1 * a5 + 2 * b2 * a4 + 3 * b3 * a3 + 4 * b4 * a2 + 5 * b5 * a1) / 6
    piece[START], piece[SCALE], piece[CONSTANT] = start, scale if scale > TINY else 0, constant
    piece[3], piece[4], piece[5], piece[6], piece[7], piece[8] = b1, b2, b3, b4, b5, b6
    piece[MOVES] = moves or u_range > 0


@kernel
def _range_of(u):
    """max u - min u; u is 0 for the label."""
    most, least = np.zeros(VECTOR, np.float32), np.zeros(VECTOR, np.float32)
    whole = len(u) // VECTOR * VECTOR
    for c in range(0, whole, VECTOR):
        for v in range(VECTOR):
            most[v] = u[c + v] if u[c + v] > most[v] else most[v]
            least[v] = u[c + v] if u[c + v] < least[v] else least[v]
    up, down = _fold(most, least)
    for c in range(whole, len(u)):
        up, down = max(up, u[c]), min(down, u[c])
    return up - down


@kernel
def _rise(piece, t):
    """F(start + t) - F(start)."""
    x = t * piece[SCALE]
    return x * (piece[3] + x * (piece[4] + x * (piece[5] + x * (piece[6] + x * (piece[7] + x * piece[8])))))


# --- what lies too far out for pieces ---------------------------------------------------------------------------------


@kernel
def _find_far(side, step, x, y1, ends):
    """The inputs that move the unit beyond the last piece of one side, and their |t| in float64."""
    found, far, n = np.empty(len(x), np.int32), np.empty(len(x)), 0
    for j in range(len(x)):
        t = _moved(step[j] * x[j], np.float32(y1))
        if t > ends[LAST_HIGH] if side > 0 else t < ends[LAST_LOW]:
            found[n], far[n] = j, side * _moved(np.float64(step[j]) * np.float64(x[j]), y1)
            n += 1
    return found[:n].copy(), far[:n].copy()


@kernel
def _far(t, kinks, own, u, logits, loss):
    """F as a difference of two losses in float64, from the inside outward; and whether any logit moves."""
    at, label = kinks.at, kinks.label
    values, moves = np.empty(len(t)), np.zeros(len(t), np.int32)
    slope, shift = u.astype(np.float64), logits - logits[label]
    own_shift, start, k = 0.0, 0.0, 0
    for q in np.argsort(t):
        while k < len(at) and at[k] <= t[q]:
            v, weight = kinks.last[kinks.which[k]], np.float64(abs(kinks.column[kinks.which[k]]))
            for c in range(len(slope)):
                shift[c] += (at[k] - start) * slope[c]
                slope[c] += weight * (v[c] - v[label])
            own_shift += (at[k] - start) * own
            own += weight * v[label]
            start, k = at[k], k + 1
        there = shift + (t[q] - start) * slope
        above = there.max()
        values[q] = above + np.log(np.exp(there - above).sum()) - loss
        moves[q] = own_shift + (t[q] - start) * own != 0 or (there != logits - logits[label]).any()
    return values, moves


# --- the sums ---------------------------------------------------------------------------------------------------------


@kernel
def _add_up(first, last, change, inputs, used, charts, totals):
    """Add the deltas of all examples to the rows of some units."""
    at, spans, pieces = charts.at, charts.spans, charts.pieces
    for i in range(first, last):
        own = Totals(totals.delta[i], totals.squared[i], totals.touched[i])
        for b in range(used.cuts.shape[1] - 1):
            here = slice(b * INPUTS, min((b + 1) * INPUTS, inputs.shape[1]))
            for n in range(inputs.shape[0]):
                k = at[n, i]
                if k == NOWHERE:
                    continue
                y, ends = charts.first[n, i], charts.ends[k]
                _add_inner(
                    change[i, here], inputs[n, here], y, ends, pieces[spans[k, PIECE]],
                    own.delta[here], own.squared[here], own.touched[here],
                )  # fmt: skip
                if spans[k, N_BELOW] + spans[k, N_ABOVE] > 0:
                    there = slice(used.cuts[n, b], used.cuts[n, b + 1])
                    _add_outer(used.inputs[there], used.values[there], change[i], y, ends, spans[k], pieces, own)
        for n in range(inputs.shape[0]):
            k = at[n, i]
            for q in range(spans[k, FAR], spans[k, FAR] + spans[k, N_FAR]) if k != NOWHERE else range(0):
                j, value = charts.far_inputs[q], charts.far_values[q]
                own.delta[j] += value
                own.squared[j] += value * value
                own.touched[j] += charts.far_moves[q]


@kernel
def _add_inner(step, x, y, ends, piece, sums, squares, touched):
    """Add the deltas of the weights whose t lies in the piece at 0, and 0 for the others."""
    floor, shift = -y, min(y, y - y)
    low, high, scale, moves = ends[LOW], ends[HIGH], piece[SCALE], np.int32(piece[MOVES])
    c1, c2, c3, c4, c5, c6 = piece[3], piece[4], piece[5], piece[6], piece[7], piece[8]
    for j in range(len(x)):
        d = step[j] * x[j]
        t = (d if d > floor else floor) + shift
        r = t * scale
        delta = r * (c1 + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * c6)))))
        inside = (t >= low) & (t <= high)
        wide = np.float64(delta if inside else ZERO)
        sums[j] += wide
        squares[j] += wide * wide
        touched[j] += moves if inside & (t != 0) else np.int32(0)


@kernel
def _add_outer(used, values, step, y, ends, span, pieces, own):
    """Add the deltas of the weights whose t lies in other pieces; these are few, so they are gathered first."""
    room = len(used) + VECTOR
    where, t, n = np.empty(room, np.int32), np.empty(room, np.float32), 0
    low, high, last_low, last_high = ends[LOW], ends[HIGH], ends[LAST_LOW], ends[LAST_HIGH]
    for k in range(len(used)):
        moved = _moved(step[used[k]] * values[k], y)
        where[n], t[n] = used[k], moved
        n += np.int64(moved < low) + np.int64(moved > high)
    deltas, moves = _values(t, n, span, pieces)
    for k in range(n):
        if t[k] < last_low or t[k] > last_high:
            continue
        wide = np.float64(deltas[k])
        own.delta[where[k]] += wide
        own.squared[where[k]] += wide * wide
        own.touched[where[k]] += moves[k]


@kernel
def _values(t, n, span, pieces):
    """F of the first n of t, none of which is in the piece at 0, and whether logits move.

    `t` must have room for VECTOR more entries.
    """
    whole = (n + VECTOR - 1) // VECTOR * VECTOR
    t[n:whole] = 0
    deltas, moves = np.zeros(whole, np.float32), np.zeros(whole, np.int32)
    first = span[PIECE] + 1
    for k in range(first, first + span[N_BELOW]):
        _correct(t, np.float32(-1), pieces[k], deltas, moves)
    first += span[N_BELOW]
    for k in range(first, first + span[N_ABOVE]):
        _correct(t, np.float32(1), pieces[k], deltas, moves)
    return deltas, moves


@kernel
def _correct(t, side, piece, deltas, moves):
    """Replace the deltas of all t beyond the start of this piece; the next piece then corrects those beyond its own."""
    start, scale, constant, moving = piece[START], piece[SCALE], piece[CONSTANT], np.int32(piece[MOVES])
    c1, c2, c3, c4, c5, c6 = piece[3], piece[4], piece[5], piece[6], piece[7], piece[8]
    for q in range(len(deltas)):
        far = side * t[q] - start
        r = far * scale
        delta = constant + r * (c1 + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * c6)))))
        deltas[q] = delta if far > 0 else deltas[q]
        moves[q] = moving if far > 0 else moves[q]


@kernel
def _add_rests(at, ends, spans, pieces, bounds):
    """Add to each unit's bound what the series leave out at most at the farther end of its range of t."""
    for n in range(at.shape[0]):
        for i in range(at.shape[1]):
            k = at[n, i]
            if k == NOWHERE:
                continue
            head, first = pieces[spans[k, PIECE]], spans[k, PIECE] + 1
            middle, last = first + spans[k, N_BELOW], first + spans[k, N_BELOW] + spans[k, N_ABOVE]
            least, most = -ends[k, LEAST], ends[k, MOST]
            below = _rest(head, min(least, -ends[k, LOW])) + _rests(pieces[first:middle], least)
            above = _rest(head, min(most, ends[k, HIGH])) + _rests(pieces[middle:last], most)
            bounds[i] += max(below, above)


@kernel
def _rests(pieces, end):
    """A bound on what the series of adjacent pieces leave out, up to the end of the last one."""
    total = 0.0
    for k in range(len(pieces)):
        stop = pieces[k + 1, START] if k + 1 < len(pieces) else end
        total += _rest(pieces[k], stop - pieces[k, START])
    return total


@kernel
def _rest(piece, t):
    """C_7/7! x^5 e^x t^2 kappa_2 at t, or at the end of the piece where that comes first."""
    if piece[SCALE] <= 0:
        return 0.0
    r = min(1.0, np.float64(t) * piece[SCALE])
    x = PIECE_REACH * r
    return REST * x**5 * math.exp(x) * 2 * abs(np.float64(piece[4])) * r * r


@kernel
def _pick(chosen, change, inputs, charts, deltas, moved):
    """The deltas of single weights (weights, examples) and whether logits move; both are 0 before."""
    for q in range(len(chosen)):
        i, j = chosen[q]
        for n in range(inputs.shape[0]):
            k = charts.at[n, i]
            if k != NOWHERE:
                t = _moved(change[i, j] * inputs[n, j], charts.first[n, i])
                deltas[q, n], moved[q, n] = _delta_at(t, j, k, charts)


@kernel
def _delta_at(t, j, k, charts):
    """F(t) of pair number k, where input j leads to t, and whether logits move."""
    ends, span = charts.ends[k], charts.spans[k]
    if t >= ends[LOW] and t <= ends[HIGH]:
        piece = charts.pieces[span[PIECE]]
        return np.float64(_rise(piece, t)), t != 0 and piece[MOVES] != 0
    if t >= ends[LAST_LOW] and t <= ends[LAST_HIGH]:
        values, moves = _values(np.full(VECTOR, t), 1, span, charts.pieces)
        return np.float64(values[0]), moves[0] != 0
    for f in range(span[FAR], span[FAR] + span[N_FAR]):
        if charts.far_inputs[f] == j:
            return charts.far_values[f], charts.far_moves[f] != 0
    return 0.0, False

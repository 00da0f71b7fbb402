"""The busiest loops of the finite-difference path on a CPU, in float32: one pass where PyTorch's operations take many.

    product        a matrix product by oneDNN (MKL leaves AVX-512 unused on other makers' processors: half the speed)
    picked         some rows and columns of a matrix; `lengths`: of its rows, over some of the columns
    expm1_sums     sum_c q_c expm1(dz_c - dz_y), pair by pair: what `loss.py` asks for
    run_rows       what a ReLU lets through of a Linear, where a short run of its inputs moves
    column_rows    the same, where a few columns of its input move

Each has a form in PyTorch's operations where it is called, which other devices and float64 take; `is_ready` is the one
place that decides. The kernels are compiled by Numba and release the GIL: Python threads share the rows, every row is
computed by one thread in the same order, so results don't depend on how many threads there are.

Numerics: float32; sums over classes in runs of 256 that are added in float64. NaN and infinity come out as NaN or
infinity: fast-math here may reorder and contract, but not assume them away.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64
from numba import njit
from torch import Tensor

from ablation.engine.head import relu_delta
from ablation.engine.kernels import kernel
from ablation.engine.threads import run_ranges

TILE = 64  # units that one entry of a run is multiplied by at once: four vectors
STEP = 64  # units are taken in multiples of it
LARGE = 1 << 24  # products that are worth the making of a kernel for their shape
CLASSES = 256  # summed in float32, before float64 takes over
SMALL = 1 << 22  # numbers: below, PyTorch's threads, which wait busily after each of its operations, are in the way

_inlined = njit(inline="always")


def is_ready(*tensors: Tensor) -> bool:
    """Whether the kernels take these: float32 on the CPU."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """a b^T. The layouts of the two don't matter; oneDNN takes most of a millisecond for each new shape."""
    if is_ready(a, b) and _has_onednn() and a.numel() * len(b) > LARGE:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return F.linear(a, b)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _over_rows(loop: Callable[..., None], n_rows: int, size: int, *args: Any) -> None:
    """Run `loop(first, last, *args)` on all rows; `size` is how many numbers it goes over."""
    if size < SMALL:
        loop(0, n_rows, *args)
    else:
        run_ranges(lambda first, last: loop(first, last, *args), n_rows)


# --- parts of a matrix ------------------------------------------------------------------------------------------------


def picked(
    matrix: Float32[Tensor, "rows columns"], rows: Int64[Tensor, " some_rows"], columns: Int64[Tensor, " some_columns"]
) -> Float32[Tensor, "some_rows some_columns"]:
    """Some rows and columns of a matrix."""
    result = torch.empty(len(rows), len(columns))
    places = [each.numpy().view(np.uint64) for part in (rows, columns) for each in part.sort()]  # in memory's order
    _over_rows(_picked, len(rows), result.numel(), matrix.numpy(), *places, result.numpy())
    return result


@kernel
@no_type_check
def _picked(first, last, matrix, rows, row_places, columns, column_places, result):
    for row in range(first, last):
        source, target = matrix[rows[row]], result[row_places[row]]
        for k in range(len(columns)):
            target[column_places[k]] = source[columns[k]]


def lengths(
    matrix: Float32[Tensor, "rows columns"], counted: Float32[Tensor, "cases columns"]
) -> Float32[Tensor, "cases rows"]:
    """The length of each row, over the columns that are counted (1, the others 0) in each case."""
    result = torch.empty(len(counted), len(matrix))
    _over_rows(_lengths, len(matrix), matrix.numel(), matrix.numpy(), counted.numpy(), result.numpy())
    return result


@kernel
@no_type_check
def _lengths(first, last, matrix, counted, result):
    for row in range(first, last):
        for case in range(len(counted)):
            total = np.float32(0)
            for k in range(matrix.shape[1]):
                total += matrix[row, k] * matrix[row, k] * counted[case, k]
            result[case, row] = np.sqrt(total)


# --- the loss ---------------------------------------------------------------------------------------------------------


def expm1_sums(
    dz: Float32[Tensor, "pairs classes"],
    rest: Float[Tensor, "examples classes"],
    labels: Int64[Tensor, " examples"],
    examples: Int64[Tensor, " pairs"],
) -> tuple[Float64[Tensor, " pairs"], Bool[Tensor, " pairs"]]:
    """sum_c q_c expm1(dz_c - dz_y) of each pair, q = `rest`; and whether any of its dz is not 0.

    Numerics: within 3e-7 (1 + |dz|) of sum_c q_c |expm1(dz_c - dz_y)|.
    """
    sums, moves = np.empty(len(dz)), np.empty(len(dz), np.bool_)
    args = (dz.contiguous().numpy(), rest.float().numpy(), labels.numpy(), examples.numpy(), sums, moves)
    _over_rows(_expm1_sums, len(dz), dz.numel(), *args)
    return torch.from_numpy(sums), torch.from_numpy(moves)


@_inlined
@no_type_check
def _expm1(z):
    """With z = n log 2 + r: 2^n expm1(r) + (2^n - 1), expm1(r) by its series. Infinite or NaN above 88.3."""
    z = min(max(z, np.float32(-87)), np.float32(88.8))
    n = np.floor(z * np.float32(1.4426950408889634) + np.float32(0.5))
    r = z - n * np.float32(0.6931471805599453)
    t = np.float32(1 / 5040) + r * np.float32(1 / 40320)
    t = np.float32(1 / 720) + r * t
    t = np.float32(1 / 120) + r * t
    t = np.float32(1 / 24) + r * t
    t = np.float32(1 / 6) + r * t
    t = np.float32(1 / 2) + r * t
    power = np.int32((n + np.float32(127)) * np.float32(1 << 23)).view(np.float32)
    return power * (r + r * r * t) + (power - np.float32(1))


@kernel
@no_type_check
def _expm1_sums(first, last, dz, rest, labels, examples, sums, moves):
    for pair in range(first, last):
        logits, weights = dz[pair], rest[examples[pair]]
        of_label = logits[labels[examples[pair]]]
        bits = np.int32(0)
        for number in logits.view(np.int32):
            bits |= number
        moves[pair] = (bits & np.int32(0x7FFFFFFF)) != 0  # but for the sign
        total = 0.0
        for begin in range(0, len(logits) if moves[pair] else 0, CLASSES):
            some, their = logits[begin : begin + CLASSES], weights[begin : begin + CLASSES]
            part = np.float32(0)
            for c in range(len(some)):
                part += their[c] * _expm1(some[c] - of_label)
            total += part
        sums[pair] = total


# --- a Linear and a ReLU behind a short run of inputs -----------------------------------------------------------------


def run_rows(
    matrix: Float32[Tensor, "outputs inputs"],
    first: Int64[Tensor, " ablations"],
    numbers: Float32[Tensor, "ablations examples run"],
    base: Float32[Tensor, "examples outputs"],
) -> list[tuple[Int64[Tensor, " _"], Float32[Tensor, "ablations _"]]]:
    """relu(y + dy) - relu(y) for dy = W dx, where dx is `numbers` from input `first` on: of each example, the outputs
    that are open before or for any ablation, and their deltas.

    Ablations of the same run share its columns of the matrix, a tile of outputs at a time; zeros of dx are skipped.
    """
    starts, unit, counts = first.unique(return_inverse=True, return_counts=True)
    order = unit.argsort(stable=True)
    bounds = F.pad(counts.cumsum(0), (1, 0)).numpy()
    moves = numbers.index_select(0, order).transpose(0, 1).contiguous().numpy()
    n_examples, n_lanes, _ = moves.shape
    room = (n_examples, n_lanes, -(-moves.shape[2] // 4) * 4)
    values, places, n_moving = np.zeros(room, np.float32), np.zeros(room, np.uint64), np.zeros(room[:2], np.int64)
    _over_rows(_compress, n_lanes, moves.size, moves, values, places, n_moving)
    n_tiles = -(-len(matrix) // TILE)
    dense = torch.empty(n_examples, len(matrix), n_lanes + 16)  # no power of two: rows would share cache lines
    opened = base > 0
    args = (matrix.numpy(), starts.numpy(), bounds, moves.shape[2], values, places, n_moving, base.numpy())
    _over_rows(_run_tiles, n_tiles, dense.numel(), *args, dense.numpy(), opened.numpy())
    rows = []
    for example in range(n_examples):
        which = _filled(opened[example])
        result = torch.empty(len(which), n_lanes)
        _over_rows(
            _in_order, len(which), result.numel(),
            dense[example].numpy(), which.numpy(), opened[example].numpy(), order.numpy(), result.numpy(),
        )  # fmt: skip
        rows.append((which, result.T))
    return rows


def _filled(chosen: Bool[Tensor, " units"]) -> Int64[Tensor, " _"]:
    """The chosen units, and a few others."""
    n = _rounded(int(chosen.sum()), len(chosen), STEP // 2)
    return torch.cat([chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]])[:n]


def _rounded(n: int, most: int, step: int = STEP) -> int:
    """Up to the next multiple of `step`: each new shape of a product costs time."""
    return min(most, -(-n // step) * step)


@kernel
@no_type_check
def _compress(first, last, moves, values, places, n_moving):
    """The numbers that are not 0, and where they are; 0 at place 0 behind."""
    for lane in range(first, last):
        for example in range(len(moves)):
            n = 0
            for k in range(moves.shape[2]):
                if moves[example, lane, k] != 0:
                    values[example, lane, n] = moves[example, lane, k]
                    places[example, lane, n] = k
                    n += 1
            n_moving[example, lane] = n


@kernel
@no_type_check
def _run_tiles(first, last, matrix, starts, bounds, run, values, places, n_moving, base, dense, opened):
    n_examples, n_outputs = base.shape
    tile = np.zeros((run, TILE), np.float32)
    moved = np.empty(TILE, np.float32)
    shut = np.empty((n_examples, TILE), np.float32)  # what a delta must exceed to open a unit
    is_open = np.empty((n_examples, TILE), np.uint64)  # unsigned: no check for places counted from the end
    n_open = np.empty(n_examples, np.int64)
    for at in range(first, last):
        begin = at * TILE
        size = min(TILE, n_outputs - begin)
        for e in range(n_examples):
            n_open[e] = 0
            shut[e] = np.inf
            for u in range(size):
                if base[e, begin + u] > 0:
                    is_open[e, n_open[e]] = u
                    n_open[e] += 1
                else:
                    shut[e, u] = -base[e, begin + u]
        for s in range(len(starts)):
            _turn(matrix, begin, size, starts[s], run, tile)
            for e in range(n_examples):
                here, was, shuts = dense[e, begin : begin + size], base[e, begin : begin + size], shut[e]
                for lane in range(bounds[s], bounds[s + 1]):
                    for u in range(TILE):
                        moved[u] = 0
                    for j in range(0, n_moving[e, lane], 4):
                        a, b = values[e, lane, j], values[e, lane, j + 1]
                        c, d = values[e, lane, j + 2], values[e, lane, j + 3]
                        p, q = places[e, lane, j], places[e, lane, j + 1]
                        r, t = places[e, lane, j + 2], places[e, lane, j + 3]
                        for u in range(TILE):
                            moved[u] += a * tile[p, u] + b * tile[q, u] + c * tile[r, u] + d * tile[t, u]
                    for k in range(n_open[e]):
                        u = is_open[e, k]
                        here[u, lane] = -was[u] if moved[u] < -was[u] else moved[u]
                    n_opening = np.int32(0)
                    for u in range(TILE):
                        n_opening += np.int32(not moved[u] <= shuts[u])  # NaN opens
                    if n_opening:
                        for u in range(size):
                            if not moved[u] <= shuts[u]:
                                if not opened[e, begin + u]:
                                    opened[e, begin + u] = True
                                    here[u] = 0
                                here[u, lane] = moved[u] - shuts[u]


@kernel
@no_type_check
def _turn(matrix, begin, size, start, run, tile):
    """A part of the matrix, transposed: four rows at a time, which keeps up with the memory."""
    whole = size - size % 4
    for u in range(0, whole, 4):
        for k in range(run):
            tile[k, u] = matrix[begin + u, start + k]
            tile[k, u + 1] = matrix[begin + u + 1, start + k]
            tile[k, u + 2] = matrix[begin + u + 2, start + k]
            tile[k, u + 3] = matrix[begin + u + 3, start + k]
    for u in range(whole, size):
        for k in range(run):
            tile[k, u] = matrix[begin + u, start + k]


@kernel
@no_type_check
def _in_order(first, last, dense, which, opened, order, result):
    """The rows asked for, lanes back in their order; 0 where nothing opens."""
    for row in range(first, last):
        if opened[which[row]]:
            for lane in range(len(order)):
                result[row, order[lane]] = dense[which[row], lane]
        else:
            result[row] = 0


# --- a Linear and a ReLU behind few columns ---------------------------------------------------------------------------


def column_rows(
    matrix: Float32[Tensor, "outputs inputs"],
    columns: tuple[Int64[Tensor, " _"], ...],
    numbers: tuple[Float32[Tensor, "ablations _"], ...],
    base: Float32[Tensor, "examples outputs"],
) -> list[tuple[Int64[Tensor, " _"], Float32[Tensor, "ablations _"]]]:
    """relu(y + dy) - relu(y) for dy = W dx, where of each example only some `columns` of dx move: the outputs that are
    open before or for any ablation, and their deltas.

    |dy_o| <= |W_o| |dx| (Cauchy-Schwarz): a closed output is computed only for the ablations that may open it.
    """
    counted = torch.zeros(len(base), matrix.shape[1])
    for example, which in enumerate(columns):
        counted[example, which] = 1
    reach = -base / (lengths(matrix, counted) * (1 + 1e-3))  # with room for rounding
    reach = reach.nan_to_num(nan=torch.inf).masked_fill(base > 0, -torch.inf)
    return [_column_row(matrix, *row) for row in zip(columns, numbers, base, reach, strict=True)]


def _column_row(matrix: Tensor, columns: Tensor, numbers: Tensor, base: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Of one example. `reach`: how long dx must be to open a unit, without end where none can, below 0 where open."""
    moves = numbers.T.contiguous()
    size, order = _squares(moves).sqrt().nan_to_num(nan=torch.inf).sort(descending=True)
    reach, units = reach.sort()
    most, base = len(units), base[units]
    within = _rounded(int(torch.searchsorted(reach, 0.0)), most)  # open, and a few more
    n_lanes = len(order)
    cuts = [0, *(n_lanes >> shift for shift in (5, 3, 2, 1) if n_lanes >> shift), n_lanes]
    ends = [_rounded(int(n), most, 2 * STEP) for n in torch.searchsorted(reach, size[cuts[:-1]])]
    part = picked(matrix, units[: max(within, *ends)], columns)
    opened = torch.zeros(most - within, dtype=torch.bool)
    found = []
    for begin, stop, end in zip(cuts, cuts[1:], ends, strict=False):
        if end > within:
            lanes = order[begin:stop]
            others = product(part[within:end], moves.index_select(1, lanes).T)
            which = (~(others.amax(dim=1) <= -base[within:end])).nonzero()[:, 0]  # NaN opens
            opened[which] = True
            found.append((lanes, which, relu_delta(base[within + which, None], others[which])))
    kept = _filled(opened)
    result = torch.empty(within + len(kept), n_lanes)
    torch.maximum(product(part[:within], moves.T), -base[:within, None], out=result[:within])
    result[:within][base[:within] < 0] += base[:within][base[:within] < 0, None]  # max(dy, -y) + min(y, 0)
    result[within:] = 0
    place = torch.empty(len(opened), dtype=torch.int64)
    place[kept] = torch.arange(within, len(result))
    for lanes, which, moved in found:
        result[place[which][:, None], lanes] = moved
    return units[torch.cat([torch.arange(within), within + kept])], result.T


def _squares(moves: Float32[Tensor, "columns ablations"]) -> Float32[Tensor, " ablations"]:
    """The squared length of each ablation's column."""
    result = torch.zeros(moves.shape[1])
    _over_rows(_add_squares, len(result), moves.numel(), moves.numpy(), result.numpy())
    return result


@kernel
@no_type_check
def _add_squares(first, last, moves, result):
    some = result[first:last]
    for k in range(len(moves)):
        row = moves[k, first:last]
        for lane in range(len(some)):
            some[lane] += row[lane] * row[lane]

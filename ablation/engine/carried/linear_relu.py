"""Compiled loops of a Linear and the ReLU behind it, in float32 on a CPU: one pass where PyTorch takes many.

    product        a matrix product by oneDNN (MKL leaves AVX-512 unused on other makers' processors: half the speed)
    picked         some rows and columns of a matrix; `lengths`: of its rows, over some of the columns
    run_rows       what a ReLU lets through of a Linear, where a short run of its inputs moves
    column_rows    the same, where a few columns of its input move

Each has a form in PyTorch's operations where it is called, which other devices and float64 take; `is_ready` is the one
place that decides. The kernels are compiled by Numba and release the GIL: Python threads share the rows, every row is
computed by one thread in the same order, so results don't depend on how many threads there are.

Numerics: float32. NaN and infinity propagate (`compiled.py`).
"""

from functools import cache
from typing import NamedTuple, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from ablation.engine.compiled import is_ready, kernel
from ablation.engine.increments import relu_delta
from ablation.engine.threads import over_rows

TILE_UNITS = 64  # that one entry of a run is multiplied by at once: four vectors
UNIT_STEP = 32  # numbers of units are rounded up to multiples of it
ONEDNN_PRODUCTS = 1 << 24  # multiplications that are worth the making of a kernel for their shape
SHARED = 4  # where 1 of so many ablations may activate a unit, it is computed for all: a product is quicker


def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """a b^T. The layouts of the two don't matter; oneDNN takes most of a millisecond for each new shape."""
    if is_ready(a, b) and _has_onednn() and a.numel() * len(b) > ONEDNN_PRODUCTS:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return F.linear(a, b)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


# --- parts of a matrix ------------------------------------------------------------------------------------------------


def picked(
    matrix: Float32[Tensor, "rows columns"], rows: Int64[Tensor, " some_rows"], columns: Int64[Tensor, " some_columns"]
) -> Float32[Tensor, "some_rows some_columns"]:
    """Some rows and columns of a matrix."""
    result = matrix.new_empty(len(rows), len(columns))
    over_rows(_picked, len(rows), result.numel(), matrix.numpy(), rows.numpy(), columns.numpy(), result.numpy())
    return result


@kernel
@no_type_check
def _picked(first, last, matrix, rows, columns, result):
    for row in range(first, last):
        source, target = matrix[rows[row]], result[row]
        for k in range(len(columns)):
            target[k] = source[np.uint64(columns[k])]


def lengths(
    matrix: Float32[Tensor, "rows columns"], counted: Bool[Tensor, "cases columns"]
) -> Float64[Tensor, "cases rows"]:
    """The length of each row, over the columns that are counted in each case. Never too large or small for float64."""
    result = torch.empty(len(counted), len(matrix), dtype=torch.float64, device="cpu")
    over_rows(_lengths, len(matrix), matrix.numel(), matrix.numpy(), counted.numpy(), result.numpy())
    return result


@kernel
@no_type_check
def _lengths(first, last, matrix, counted, result):
    for row in range(first, last):
        for case in range(len(counted)):
            numbers, which, total = matrix[row], counted[case], 0.0
            for k in range(len(numbers)):
                number = np.float64(numbers[k]) if which[k] else 0.0
                total += number * number
            result[case, row] = np.sqrt(total)


# --- which units may be activated -------------------------------------------------------------------------------------


def sizes(moves: Float[Tensor, "rows columns"]) -> Float64[Tensor, " rows"]:
    """The length of each row, infinite where a number is none; never too large or small for float64."""
    if moves.dtype != torch.float64:
        return torch.linalg.vector_norm(moves, dim=1, dtype=torch.float64).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    scale = moves.abs().sum(dim=1)
    parts = moves / torch.where(scale > 0, scale, 1)[:, None]
    return (scale * parts.norm(dim=1)).nan_to_num_(nan=torch.inf, posinf=torch.inf)


def reaches(base: Float[Tensor, "*shape"], length: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """The least length of dx that can activate an inactive unit, dy = W dx: |dy_o| <= |W_o| |dx| (Cauchy-Schwarz).

    Infinity where nothing finite can, minus infinity where the unit is active.
    """
    reach = -base.double() / (length * (1 + 1e-3))  # with room for rounding
    return reach.nan_to_num_(nan=torch.inf, posinf=torch.inf).masked_fill_(base > 0, -torch.inf)


# --- a Linear and a ReLU behind a short run of inputs -----------------------------------------------------------------


def run_rows(
    matrix: Float32[Tensor, "outputs inputs"],
    first: Int64[Tensor, " ablations"],
    numbers: Float32[Tensor, "ablations examples run"],
    base: Float32[Tensor, "examples outputs"],
) -> list[tuple[Int64[Tensor, " _"], Float32[Tensor, "ablations _"]]]:
    """relu(y + dy) - relu(y) for dy = W dx, where dx is `numbers` from input `first` on: for each example, the outputs
    that are active before or under any ablation, and their deltas.

    Ablations of the same run share its columns of the matrix, a tile of outputs at a time; zeros of dx are skipped.
    """
    starts, unit, counts = first.unique(return_inverse=True, return_counts=True)
    order = unit.argsort(stable=True)
    bounds = F.pad(counts.cumsum(0), (1, 0)).numpy()
    moves = numbers.index_select(0, order).transpose(0, 1).contiguous().numpy()
    n_examples, n_ablations, _ = moves.shape
    room = (n_examples, n_ablations, -(-moves.shape[2] // 4) * 4)
    values, places, n_moving = np.zeros(room, np.float32), np.zeros(room, np.uint64), np.zeros(room[:2], np.int64)
    over_rows(_compress, n_ablations, moves.size, moves, values, places, n_moving)
    is_active = base > 0
    n_active = F.pad(is_active, (0, -len(matrix) % TILE_UNITS)).unflatten(1, (-1, TILE_UNITS)).sum(dim=2).cumsum(dim=1)
    n_before = F.pad(n_active, (1, 0)).numpy()  # active units in the tiles before each
    kept = matrix.new_empty(n_examples, n_ablations, int(n_active[:, -1].max()) + 1)  # the active units' deltas
    others = matrix.new_empty(
        n_examples, len(matrix), n_ablations + 16
    )  # those of the few units that an ablation activates
    activated = torch.zeros_like(is_active)
    over_rows(
        _run_tiles, n_before.shape[1] - 1, n_ablations * base.numel(), matrix.numpy(),
        _Runs(starts.numpy(), bounds, moves.shape[2]), _Moves(values, places, n_moving), base.numpy(),
        _Results(kept.numpy(), others.numpy(), activated.numpy(), n_before),
    )  # fmt: skip
    rows = []
    for example in range(n_examples):
        n = int(n_active[example, -1])
        behind = _filled(activated[example], ~(is_active[example] | activated[example]), n)
        result = matrix.new_empty(n_ablations, n + len(behind))
        over_rows(
            _in_order, n_ablations, result.numel(), kept[example, :, :n].numpy(), others[example].numpy(),
            behind.numpy(), activated[example].numpy(), order.numpy(), result.numpy(),
        )  # fmt: skip
        rows.append((torch.cat([is_active[example].nonzero()[:, 0], behind]), result))
    return rows


def _filled(chosen: Bool[Tensor, " units"], rest: Bool[Tensor, " units"], n_before: int) -> Int64[Tensor, " _"]:
    """The chosen units, padded from the others so that with `n_before` they are a multiple of `UNIT_STEP`."""
    which = torch.cat([chosen.nonzero()[:, 0], rest.nonzero()[:, 0]])
    return which[: _rounded(n_before + int(chosen.sum()), n_before + len(which)) - n_before]


def _rounded(n: int, most: int) -> int:
    """Round up to a multiple of `UNIT_STEP`, since each new shape of a product costs time."""
    return min(most, -(-n // UNIT_STEP) * UNIT_STEP)


@kernel
@no_type_check
def _compress(first, last, moves, values, places, n_moving):
    """Write the numbers that are not 0 and their places, padded with 0 at place 0."""
    for ablation in range(first, last):
        for example in range(len(moves)):
            n = 0
            for k in range(moves.shape[2]):
                if moves[example, ablation, k] != 0:
                    values[example, ablation, n] = moves[example, ablation, k]
                    places[example, ablation, n] = k
                    n += 1
            n_moving[example, ablation] = n


class _Runs(NamedTuple):
    """The distinct first inputs of the ablations."""

    starts: np.ndarray  # (starts), int64
    bounds: np.ndarray  # (starts + 1), int64: the ablations of each start, which lie one after the other
    length: int


class _Moves(NamedTuple):
    """The numbers of dx that are not 0, by example and ablation."""

    values: np.ndarray
    places: np.ndarray  # uint64: where in the run they are
    counts: np.ndarray


class _Results(NamedTuple):
    """The deltas of units behind the ReLU."""

    kept: np.ndarray  # (examples, ablations, active units)
    others: np.ndarray  # (examples, units, ablations): of the inactive units that an ablation activates
    activated: np.ndarray  # (examples, units): which units those are
    n_before: np.ndarray  # (examples, tiles + 1): how many active units there are in the tiles before each


class _Tile(NamedTuple):
    """One tile of units, on each example."""

    columns: np.ndarray  # (run, TILE_UNITS): the matrix, transposed
    moved: np.ndarray  # (TILE_UNITS): dy of one ablation
    least: np.ndarray  # (examples, TILE_UNITS): an active unit's delta where the ablation deactivates it
    threshold: np.ndarray  # (examples, TILE_UNITS): dy must exceed it to activate a unit; infinite for active ones
    is_active: np.ndarray  # (examples, TILE_UNITS), unsigned: no check for places counted from the end


@kernel
@no_type_check
def _run_tiles(first, last, matrix, runs, moves, base, results):
    """Fill `results` for some tiles of units; a tile of the matrix is shared by all ablations of the same run."""
    n_examples = base.shape[0]
    tile = _Tile(
        np.zeros((runs.length, TILE_UNITS), np.float32), np.empty(TILE_UNITS, np.float32),
        np.empty((n_examples, TILE_UNITS), np.float32), np.empty((n_examples, TILE_UNITS), np.float32),
        np.empty((n_examples, TILE_UNITS), np.uint64),
    )  # fmt: skip
    for at in range(first, last):
        begin = at * TILE_UNITS
        size = min(TILE_UNITS, base.shape[1] - begin)
        for e in range(n_examples):
            _list_active(base[e, begin : begin + size], tile.is_active[e], tile.least[e], tile.threshold[e])
        for s in range(len(runs.starts)):
            _turn(matrix, begin, size, runs.starts[s], runs.length, tile.columns)
            for e in range(n_examples):
                for ablation in range(runs.bounds[s], runs.bounds[s + 1]):
                    _multiply(
                        tile.columns,
                        moves.values[e, ablation],
                        moves.places[e, ablation],
                        moves.counts[e, ablation],
                        tile.moved,
                    )
                    _keep(e, ablation, at, base[e, begin : begin + size], tile, results)


@kernel
@no_type_check
def _list_active(base, is_active, least, threshold):
    """Fill one example's row of a tile: its active units with their least deltas, and the other units' thresholds."""
    n = 0
    threshold[:] = np.inf
    for u in range(len(base)):
        if base[u] > 0:
            is_active[n] = u
            least[n] = -base[u]
            n += 1
        else:
            threshold[u] = -base[u]


@kernel
@no_type_check
def _multiply(columns, values, places, n, moved):
    """dy of one tile of units: four numbers of dx at a time."""
    for u in range(TILE_UNITS):
        moved[u] = 0
    for j in range(0, n, 4):
        a, b, c, d = values[j], values[j + 1], values[j + 2], values[j + 3]
        p, q, r, t = places[j], places[j + 1], places[j + 2], places[j + 3]
        for u in range(TILE_UNITS):
            moved[u] += a * columns[p, u] + b * columns[q, u] + c * columns[r, u] + d * columns[t, u]


@kernel
@no_type_check
def _keep(e, ablation, at, base, tile, results):
    """Write the deltas of one (example, ablation) for the active units of a tile, and for those that it activates."""
    which, leasts, thresholds, moved = tile.is_active[e], tile.least[e], tile.threshold[e], tile.moved
    here = results.kept[e, ablation, results.n_before[e, at] : results.n_before[e, at + 1]]
    for k in range(len(here)):
        u = which[k]
        here[k] = leasts[k] if moved[u] < leasts[k] else moved[u]
    n_opening = np.int32(0)
    for u in range(TILE_UNITS):
        n_opening += np.int32(not moved[u] <= thresholds[u])  # NaN activates
    if n_opening:
        units = slice(at * TILE_UNITS, at * TILE_UNITS + len(base))
        activated, others = results.activated[e, units], results.others[e, units]
        for u in range(len(base)):
            if not (moved[u] <= thresholds[u] or base[u] > 0):
                if not activated[u]:
                    activated[u] = True
                    others[u] = 0
                others[u, ablation] = moved[u] - thresholds[u]


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
def _in_order(first, last, kept, others, behind, activated, order, result):
    """Write the ablations back in their order: the active units, and those behind them; 0 where none is activated."""
    n = kept.shape[1]
    for ablation in range(first, last):
        row = result[order[ablation]]
        row[:n] = kept[ablation]
        for k in range(len(behind)):
            row[n + k] = others[behind[k], ablation] if activated[behind[k]] else np.float32(0)


# --- a Linear and a ReLU behind few columns ---------------------------------------------------------------------------


def column_rows(
    matrix: Float32[Tensor, "outputs inputs"],
    columns: tuple[Int64[Tensor, " _"], ...],
    numbers: tuple[Float32[Tensor, "ablations _"], ...],
    base: Float32[Tensor, "examples outputs"],
) -> list[tuple[Int64[Tensor, " _"], Float32[Tensor, "ablations _"]]]:
    """relu(y + dy) - relu(y) for dy = W dx, where of each example only some `columns` of dx move: the outputs that are
    active before or under any ablation, and their deltas.

    An inactive output is computed only for the ablations that may activate it (`reaches`).
    """
    counted = torch.zeros(len(base), matrix.shape[1], dtype=torch.bool, device="cpu")
    for example, which in enumerate(columns):
        counted[example, which] = True
    reach = reaches(base, lengths(matrix, counted))
    return [_column_row(matrix, *row) for row in zip(columns, numbers, base, reach, strict=True)]


def _column_row(matrix: Tensor, columns: Tensor, moves: Tensor, base: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Return one example's units and their deltas: active units, near ones, far ones.

    Near units may be activated by many ablations and are computed for all of them; far ones only by a few.
    """
    moves = moves.contiguous()
    size, order = sizes(moves).sort(descending=True)
    reach, units = reach.sort(stable=True)
    base = base[units]
    # Each unit may be activated by so many of the ablations that move most.
    n_ablations = torch.searchsorted(-size, -reach, right=True)
    n_active = int(torch.searchsorted(reach, 0.0))
    n_near = _rounded(int((n_ablations * SHARED > len(moves)).sum()), len(units)) - n_active
    n_far = max(0, int((n_ablations > 0).sum()) - n_active - n_near)
    inactive, inactive_units, n_ablations = base[n_active:], units[n_active:], n_ablations[n_active:]
    moved = product(moves, picked(matrix, units[: n_active + n_near], columns))
    others = moves.new_empty(len(inactive), len(moves))
    activated = torch.zeros(len(inactive), dtype=torch.bool, device="cpu")
    others[:n_near] = relu_delta(inactive[:n_near], moved[:, n_active:]).T
    activated[:n_near] = (others[:n_near] != 0).any(dim=1)
    far = _Far(
        *(each[n_near : n_near + n_far].numpy() for each in (inactive_units, n_ablations, inactive, others, activated))
    )
    args = matrix.numpy(), columns.numpy(), moves.numpy(), order.numpy(), far
    over_rows(_activate, n_far, n_far * len(moves) * len(columns), *args)
    behind = _filled(activated, ~activated, n_active)
    result = moves.new_empty(len(moves), n_active + len(behind))
    torch.maximum(moved[:, :n_active], -base[:n_active], out=result[:, :n_active])
    result[:, n_active:] = torch.where(activated[behind, None], others[behind], 0).T
    return torch.cat([units[:n_active], inactive_units[behind]]), result


class _Far(NamedTuple):
    """Inactive units that only some ablations may activate."""

    units: np.ndarray
    n_ablations: np.ndarray  # how many of the ablations that move most may activate each
    base: np.ndarray
    others: np.ndarray  # (units, ablations): their deltas
    activated: np.ndarray  # whether an ablation activates them


@kernel
@no_type_check
def _activate(first, last, matrix, columns, moves, order, far):
    """Compute the outputs of inactive units, each for the ablations that may activate it."""
    row = np.empty(len(columns), np.float32)
    for k in range(first, last):
        source = matrix[far.units[k]]
        for j in range(len(columns)):
            row[j] = source[np.uint64(columns[j])]
        for n in range(far.n_ablations[k]):
            _activate_one(k, order[n], row, moves[order[n]], far)


@kernel
@no_type_check
def _activate_one(k, ablation, row, move, far):
    """Write the delta of one far unit for one ablation, where that activates it."""
    moved = far.base[k]
    for j in range(len(row)):
        moved += row[j] * move[j]
    if not moved <= 0:  # NaN activates
        if not far.activated[k]:
            far.activated[k] = True
            far.others[k] = 0
        far.others[k, ablation] = moved

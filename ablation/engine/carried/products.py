"""How matrix products and convolutions carry a finite change: d(A B) = dA B + (A + dA) dB.

Structure saves most of the work:

    one entry of the weight moves    one column or channel of the result moves, by a scaled (shifted) input: a block
    one unit of the input moves      only that column or input channel of the weight is needed
    few entries of the input move    the others are left out (after a ReLU only active units carry a delta)

These are rules as in `rules.py`.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ablation.engine.carried import linear_relu
from ablation.engine.carried.dispatch import Call, Changed, Entries, Move, Moves
from ablation.engine.carried.representations import Block, Columns, Product
from ablation.engine.carried.rules import RULES as RULES  # with those of this file
from ablation.engine.carried.rules import aten, fold, product, rule, times, total, wide

MOST_MOVING = 0.7  # largest share of moving entries at which selecting them is faster than multiplying by zeros
N_CHANNELS_SAMPLED = 4  # channels that are looked at first to find (ablation, example) pairs without a change
FEWEST_ABLATIONS = 32  # with fewer ablations, selecting matrix rows for each example costs more than it saves


@rule(aten.mm)
def mm(call: Call, out: Tensor, a: Tensor, b: Tensor) -> Moves:
    """d(A B) = dA B + (A + dA) dB."""
    if (entries := call.entries(b)) is not None:
        column = _one_column(call, a, call.delta(a), entries, b.shape[1])
        if not call.moves(a):
            return [column]
        return [total(call, out, column.dense(), written_out(_times_matrix(call, a, b)))]
    if not call.moves(b):
        return [_times_matrix(call, a, b)]
    return [total(call, out, *product(torch.matmul, call.base(a), call.base(b), call.delta(a), call.delta(b)))]


@rule(aten.bmm)
def bmm(call: Call, out: Tensor, a: Tensor, b: Tensor) -> Moves:
    """d(A B) = dA B + (A + dA) dB, matrix by matrix; where B is one matrix for all, as in a Linear, row by row."""
    da, shared = call.delta(a), b.stride(0) == 0 or len(b) == 1
    moves = []
    if shared and (entries := call.entries(b[0])) is not None:
        rows = _one_column(call, a.flatten(0, 1), None if da is None else da.flatten(1, 2), entries, out.shape[2])
        column = Block(2, rows.first, rows.numbers.unflatten(1, a.shape[:2]), rows.size)
        if da is None:
            return [column]
        moves.append(column.dense())
    elif call.moves(b) or not shared:
        return [total(call, out, *product(torch.matmul, call.base(a), call.base(b), da, call.delta(b)))]
    assert da is not None
    return [total(call, out, *moves, _dense_times_matrix(da, call.base(b[0])))]


@rule(aten.addmm)
def addmm(call: Call, out: Tensor, c: Tensor, a: Tensor, b: Tensor, beta: Any = 1, alpha: Any = 1) -> Moves:
    """d(beta c + alpha A B) = beta dc + alpha d(A B)."""
    moves = mm(call, out, a, b) if call.moves(a) or call.moves(b) else None
    change = moves[0] if moves else None
    if change is not None and alpha == 1 and not call.moves(c):
        return [change]
    if change is None and (entries := call.entries(c)) is not None and c.dim() == 1:  # a bias: one column
        step = (beta * entries.step).to(call.dtype)
        return [Block(1, entries.place[0], step[:, None, None].expand(-1, len(out), 1), out.shape[1])]
    return [total(call, out, times(beta, wide(call, c, out)), times(alpha, written_out(change)))]


class Convolution(NamedTuple):
    """The options of `aten.convolution`, in its order."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


@rule(aten.convolution)
def convolution(
    call: Call, out: Tensor, x: Tensor, w: Tensor, b: Tensor | None, *options: Any,
) -> Moves:  # fmt: skip
    """d(w * x + b) = w * dx + dw * (x + dx) + db."""
    how = Convolution(*options)
    if call.moves(b):
        if call.moves(x) or call.moves(w):
            return None
        entries = call.entries(b)
        if entries is None:
            return None
        step = entries.step.to(call.dtype).view(-1, *[1] * out.dim())
        return [Block(1, entries.place[0], step.expand(-1, len(out), 1, *out.shape[2:]), out.shape[1])]
    moves: list[Tensor] = []
    if call.moves(w):
        entries = call.entries(w)
        if entries is None:
            return None
        channel = (_one_transposed_channel if how.transposed else _one_channel)(call, out, x, w, entries, how)
        if not call.moves(x):
            return [channel]
        moves.append(channel.dense())
    block = call.representation(x)
    if not moves and isinstance(block, Block) and block.axis == 1 and not how.transposed and x.dim() == 4:
        through = _channels_through(call, block, w, out, how)
        if through is not None:
            return [through.numbers if through.length == out.shape[1] else through]
    dx = call.delta(x)
    assert dx is not None
    weight = call.base(w)
    moves.append(_fold_moving(lambda d: aten.convolution(d, weight, None, *how), dx))
    return [total(call, out, *moves)]


# --- one entry of the weight moves ------------------------------------------------------------------------------------


def _one_column(call: Call, x: Tensor, dx: Tensor | None, entries: Entries, size: int) -> Block:
    """d(x W)[:, o] = dw x_i for the ablated entry (i, o) of W."""
    source, unit = entries.place
    taken = call.base(x.index_select(1, source)).T
    if dx is not None:
        taken = taken + dx[torch.arange(call.n, device=x.device), :, source]
    return Block(1, unit, (entries.step.to(call.dtype)[:, None] * taken)[:, :, None], size)


def _one_channel(call: Call, out: Tensor, x: Tensor, w: Tensor, entries: Entries, how: Convolution) -> Block:
    """d(w * x)[:, o] = dw x_i, shifted to the ablated kernel position."""
    unit, source, *kernel = entries.place
    source = source + unit.div(w.shape[0] // how.groups, rounding_mode="floor") * w.shape[1]
    around = [amount for each in reversed(how.padding) for amount in (each, each)]
    padded = F.pad(call.base(x), around)
    moves = None if call.delta(x) is None else F.pad(_own_channels(call, x, source), around)
    numbers = padded.new_empty(len(x), call.n, *out.shape[2:])
    for position, ablations in _by_position(kernel):
        seen = [
            slice(at * gap, at * gap + (size - 1) * step + 1, step)
            for at, gap, step, size in zip(position, how.dilation, how.stride, out.shape[2:], strict=True)
        ]
        taken = padded[:, :, *seen].index_select(1, source[ablations])
        numbers[:, ablations] = taken if moves is None else taken + moves[:, :, *seen].index_select(1, ablations)
    return _scaled_channel(call, unit, entries, numbers, out.shape[1])


def _one_transposed_channel(call: Call, out: Tensor, x: Tensor, w: Tensor, entries: Entries, how: Convolution) -> Block:
    """d(w * x)[:, o] of a transposed convolution: dw x_i, spread out by the stride and shifted."""
    source, unit, *kernel = entries.place
    unit = unit + source.div(w.shape[0] // how.groups, rounding_mode="floor") * w.shape[1]
    taken = _input_channels(call, x, source)
    whole = [
        max((size - 1) * step + (n - 1) * gap + 1, pad + wanted)
        for size, step, n, gap, pad, wanted in zip(
            x.shape[2:], how.stride, w.shape[2:], how.dilation, how.padding, out.shape[2:], strict=True
        )
    ]
    numbers = taken.new_zeros(len(x), call.n, *whole)
    for position, ablations in _by_position(kernel):
        places = [
            slice(at * gap, at * gap + (size - 1) * step + 1, step)
            for at, gap, step, size in zip(position, how.dilation, how.stride, x.shape[2:], strict=True)
        ]
        numbers[:, :, *places][:, ablations] = taken.index_select(1, ablations)
    inner = [slice(pad, pad + size) for pad, size in zip(how.padding, out.shape[2:], strict=True)]
    return _scaled_channel(call, unit, entries, numbers[:, :, *inner], out.shape[1])


def _input_channels(call: Call, x: Tensor, source: Tensor) -> Tensor:
    """x_i + dx_i of each ablation's input channel: (examples, ablations, ...)."""
    taken = call.base(x.index_select(1, source))
    return taken if call.delta(x) is None else taken + _own_channels(call, x, source)


def _own_channels(call: Call, x: Tensor, source: Tensor) -> Tensor:
    """dx_i of each ablation's input channel: (examples, ablations, ...)."""
    dx = call.delta(x)
    assert dx is not None
    return dx[torch.arange(call.n, device=x.device), :, source].transpose(0, 1)


def _scaled_channel(call: Call, unit: Tensor, entries: Entries, numbers: Tensor, size: int) -> Block:
    step = entries.step.to(call.dtype).view(-1, *[1] * (numbers.dim() - 2))
    return Block(1, unit, (numbers * step).transpose(0, 1).unsqueeze(2), size)


def _by_position(kernel: list[Tensor]) -> list[tuple[list[int], Tensor]]:
    """The ablations at each position of the kernel."""
    positions, which = torch.stack(kernel, 1).unique(dim=0, return_inverse=True)
    return [(position, (which == k).nonzero()[:, 0]) for k, position in enumerate(positions.tolist())]


# --- one unit of the input moves --------------------------------------------------------------------------------------


def _times_matrix(call: Call, a: Tensor, b: Tensor) -> Move:
    """dA B, by the rows of B that the moving units need."""
    matrix, factor = call.base(b), call.representation(a)
    if isinstance(factor, Columns) or (isinstance(factor, Block) and factor.axis == 1):
        product = Product(factor, matrix)
        return product if len(a) <= call.n else product.dense()
    da = call.delta(a)
    assert da is not None
    columns = _active_columns(da)
    return _dense_times_matrix(da, matrix) if columns is None else Product(columns, matrix)


def _dense_times_matrix(da: Tensor, matrix: Tensor) -> Tensor:
    """dA B for all ablations at once."""
    return linear_relu.product(da.flatten(0, -2), matrix.T).unflatten(0, da.shape[:-1])


def written_out(move: Move) -> Tensor | None:
    """The dense tensor of a delta in any representation; None where there is no delta."""
    assert not isinstance(move, Changed)  # no result of a product is an index
    return move if move is None or isinstance(move, Tensor) else move.dense()


def _channels_through(call: Call, block: Block, w: Tensor, out: Tensor, how: Convolution) -> Block | None:
    """w * dx by the input channels that move; None where a block's channels belong to several groups."""
    n_in, n_out = w.shape[1], w.shape[0] // how.groups
    group = block.first.div(n_in, rounding_mode="floor")
    if n_in % block.length or bool((block.first % block.length).any()):
        return None
    units = (group * n_out)[:, None] + torch.arange(n_out, device=w.device)
    inside = block.places() - group[:, None] * n_in
    kernels = call.base(w)[units[:, :, None], inside[:, None, :]].flatten(2)  # (ablations, outputs, run x kernel)
    numbers = block.numbers
    if math.prod(w.shape[2:]) * math.prod(how.stride) > 1 or any(how.padding):
        numbers = fold(
            lambda d: F.unfold(d, w.shape[2:], tuple(how.dilation), tuple(how.padding), tuple(how.stride)), numbers
        )
    else:
        numbers = numbers.flatten(3)
    through = torch.matmul(kernels[:, None], numbers)
    return Block(1, group * n_out, through.unflatten(3, out.shape[2:]), out.shape[1])


# --- few entries move -------------------------------------------------------------------------------------------------


def _active_columns(da: Tensor) -> Columns | None:
    """The columns that any ablation moves, for each matrix row; None where selecting them does not pay."""
    if len(da) < FEWEST_ABLATIONS or da.shape[1] > len(da):
        return None
    active = (da != 0).any(dim=0)
    if active.float().mean() > MOST_MOVING:
        return None
    columns = tuple(row.nonzero()[:, 0] for row in active)
    return Columns(columns, tuple(da[:, row, which] for row, which in enumerate(columns)), da.shape[2])


def _fold_moving(function: Any, delta: Tensor) -> Tensor:
    """Apply a linear function of a batch to the batches of all ablations, without the pairs where nothing moves."""
    pairs = delta.flatten(0, 1)
    for some in (pairs[:, :: max(1, pairs.shape[1] // N_CHANNELS_SAMPLED)], pairs):
        moving = (some != 0).flatten(1).any(dim=1)
        if moving.float().mean() > MOST_MOVING:
            return function(pairs).unflatten(0, delta.shape[:2])
    some = function(pairs[moving])
    result = some.new_zeros(len(pairs), *some.shape[1:])
    result[moving] = some
    return result.unflatten(0, delta.shape[:2])

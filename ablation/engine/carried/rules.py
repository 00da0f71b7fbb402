"""How each operation carries a finite change: one rule per operation, with its formula.

A rule gets the call, the result, and the call's arguments as they were before it. `call.delta(x)` is dx, or None where
x does not move; `call.base(x)` is x as precise as the deltas. It returns the deltas of the results (ablations, *shape),
None for one that has none; or None in place of all, where it does not cover the case: then the general rule runs.

Where one unit moves (a channel, a feature), operations that treat units apart run on that unit alone: `along` says on
which axis of the result it comes out. The rule is the same: `call.base(x)` then is that unit of x.
docs/07-add-a-rule.md shows how to add one.

Small deltas must stay accurate: a linear operation is applied to the delta itself; other functions have a form without
cancellation, or f(x + dx) - f(x) is taken in float64.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablation.engine.carried.dispatch import CHANGED, Call, Move, Moves, Rule
from ablation.engine.carried.representations import Block, Product
from ablation.engine.increments import hardsigmoid_delta, relu_delta, sigmoid_delta

aten = torch.ops.aten
RULES: dict[Any, Rule] = {}


def nowhere(block: Block, out: Tensor, *args: Any, **more: Any) -> int | None:
    """Return None: the operation mixes units, or its rule handles blocks itself."""
    return None


def elementwise(block: Block, out: Tensor, *args: Any, **more: Any) -> int | None:
    """The result's axis of a block in an elementwise operation, which keeps every unit in its place."""
    return block.axis if block.rank == out.dim() and all(_fits(arg, block.axis, out) for arg in args) else None


def channels(block: Block, out: Tensor, *args: Any, **more: Any) -> int | None:
    """The result's axis of a block in an operation that treats channels (axis 1) separately."""
    return block.axis if block.axis == 1 else None


def planes(block: Block, out: Tensor, *args: Any, **more: Any) -> int | None:
    """The result's axis of a block in an operation that treats the channels of images separately."""
    return block.axis if block.axis == 1 and out.dim() == 4 else None


def rule(*operations: Any, along: Callable[..., int | None] = nowhere) -> Callable[..., Any]:
    """Register a function as the rule of these operations."""

    def register(function: Callable[..., Moves]) -> Callable[..., Moves]:
        RULES.update(dict.fromkeys(operations, Rule(function, along)))
        return function

    return register


# --- sums and products: d(a + b) = da + db; d(a b) = da b + a db + da db ----------------------------------------------


@rule(aten.add, along=elementwise)
def add(call: Call, out: Tensor, a: Any, b: Any, alpha: Any = 1) -> Moves:
    """d(a + alpha b) = da + alpha db."""
    return [total(call, out, wide(call, a, out), times(alpha, wide(call, b, out)))]


@rule(aten.sub, along=elementwise)
def sub(call: Call, out: Tensor, a: Any, b: Any, alpha: Any = 1) -> Moves:
    """d(a - alpha b) = da - alpha db."""
    return [total(call, out, wide(call, a, out), times(-alpha, wide(call, b, out)))]


@rule(aten.rsub)
def rsub(call: Call, out: Tensor, a: Any, b: Any, alpha: Any = 1) -> Moves:
    """d(b - alpha a) = db - alpha da."""
    return sub(call, out, b, a, alpha)


@rule(aten.mul, along=elementwise)
def mul(call: Call, out: Tensor, a: Any, b: Any) -> Moves:
    """d(a b) = da b + a db + da db."""
    da, db, a, b = wide(call, a, out), wide(call, b, out), call.base(a), call.base(b)
    return [total(call, out, *product(torch.mul, a, b, da, db))]


@rule(aten.div, along=elementwise)
def div(call: Call, out: Tensor, a: Any, b: Any, rounding_mode: str | None = None) -> Moves:
    """d(a / b) = (da - (a / b) db) / (b + db)."""
    if rounding_mode:
        return None
    da, db, b = wide(call, a, out), wide(call, b, out), call.base(b)
    if db is None:
        return [total(call, out, da / b)]
    return [total(call, out, ((0 if da is None else da) - call.base(out) * db) / (b + db))]


# --- linear operations on each example: the delta goes through as it is -----------------------------------------------


@rule(
    aten._adaptive_avg_pool2d, aten.avg_pool2d, aten.upsample_bilinear2d, aten.upsample_nearest2d,
    aten.upsample_bicubic2d, along=planes,
)  # fmt: skip
def per_channel(call: Call, out: Tensor, x: Tensor, *rest: Any, **more: Any) -> Moves:
    """d f(x) = f(dx), with ablations and examples together as the examples."""
    return [fold(lambda d: call.func(d, *rest, **more), moved(call, x))]


@rule(aten.avg_pool1d, aten.avg_pool3d, aten.pixel_shuffle, aten.native_channel_shuffle)
def per_example(call: Call, out: Tensor, x: Tensor, *rest: Any, **more: Any) -> Moves:
    """d f(x) = f(dx), with ablations and examples together as the examples."""
    return [fold(lambda d: call.func(d, *rest, **more), moved(call, x))]


def _reduced(block: Block, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **more: Any) -> int | None:
    axis, axes = block.axis, _axes(x, dim)
    return None if axis in axes else axis if keepdim else axis - sum(other < axis for other in axes)


@rule(aten.mean, aten.sum, along=_reduced)
def reduce(call: Call, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Moves:
    """d mean(x) = mean(dx)."""
    function = torch.mean if call.name == "mean" else torch.sum
    return [function(moved(call, x), [axis + 1 for axis in _axes(x, dim)], keepdim)]


@rule(aten.clone, aten.alias, aten.lift_fresh, aten._to_copy, along=elementwise)
def copy(call: Call, out: Tensor, x: Tensor, *rest: Any, **more: Any) -> Moves:
    """d x = dx."""
    return [call.delta(x)] if out.is_floating_point() else None


@rule(aten.cat)
def cat(call: Call, out: Tensor, parts: list[Tensor], dim: int = 0) -> Moves:
    """d cat(a, b) = cat(da, db); where only units of one part move, they keep to themselves."""
    axis = dim % out.dim()
    starts = [sum(part.shape[axis] for part in parts[:k] if part.dim() == out.dim()) for k in range(len(parts))]
    moving = [(part, start) for part, start in zip(parts, starts, strict=True) if call.moves(part)]
    block = call.representation(moving[0][0])
    if len(moving) == 1 and isinstance(block, Block) and block.axis == axis:
        return [Block(axis, block.first + moving[0][1], block.numbers, out.shape[axis])]
    return [torch.cat([dense(call, part) for part in parts if part.dim() == out.dim()], axis + 1)]


@rule(aten.stack)
def stack(call: Call, out: Tensor, parts: list[Tensor], dim: int = 0) -> Moves:
    """d stack(a, b) = stack(da, db)."""
    return [torch.stack([dense(call, part) for part in parts], dim % out.dim() + 1)]


@rule(aten.copy)
def write(call: Call, out: Tensor, x: Tensor, source: Tensor, *rest: Any) -> Moves:
    """The result of a copy has its source's delta."""
    delta = wide(call, source, out)
    return [zero(call, out) if delta is None else delta.expand(call.n, *out.shape)]


@rule(aten.index)
def index(call: Call, out: Tensor, x: Tensor, indices: list[Tensor | None]) -> Moves:
    """d x[i] = dx[i]."""
    if not indices or None in indices or any(call.moves(each) for each in indices):
        return None
    return [aten.index(moved(call, x), [None, *indices])]


@rule(aten.index_select)
def index_select(call: Call, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Moves:
    """d x[i] = dx[i]."""
    return [moved(call, x).index_select(dim % x.dim() + 1, index)]


@rule(aten.roll)
def roll(call: Call, out: Tensor, x: Tensor, shifts: Any, dims: Any = ()) -> Moves:
    """d roll(x) = roll(dx)."""
    return [torch.roll(moved(call, x), tuple(shifts), [dim % x.dim() + 1 for dim in dims])] if dims else None


def _not_padded(block: Block, out: Tensor, x: Tensor, amounts: list[int], value: float = 0) -> int | None:
    return block.axis if 2 * (x.dim() - block.axis) > len(amounts) else None


@rule(aten.constant_pad_nd, along=_not_padded)
def pad(call: Call, out: Tensor, x: Tensor, amounts: list[int], value: float = 0) -> Moves:
    """The padding does not move."""
    return [F.pad(moved(call, x), amounts)]


@rule(aten.masked_fill)
def masked_fill(call: Call, out: Tensor, x: Tensor, mask: Tensor, value: Any) -> Moves:
    """The delta is 0 where the mask covers x."""
    delta = wide(call, x, out)
    return None if delta is None or call.moves(value) or call.moves(mask) else [delta.masked_fill(mask, 0)]


@rule(aten.where)
def where(call: Call, out: Tensor, mask: Tensor, a: Any, b: Any) -> Moves:
    """The delta of whichever operand the mask selects."""
    if call.moves(mask):
        return None
    none = torch.zeros((), dtype=call.dtype, device=out.device)
    da, db = (wide(call, each, out) for each in (a, b))
    return [torch.where(mask, none if da is None else da, none if db is None else db).expand(call.n, *out.shape)]


# --- functions of one number ------------------------------------------------------------------------------------------


@rule(aten.relu, along=elementwise)
def relu(call: Call, out: Tensor, x: Tensor) -> Moves:
    """d relu(x) = max(dx, -x) + min(x, 0)."""
    if isinstance(product := call.representation(x), Product):
        return [product.relu(x)]
    return [relu_delta(call.base(x), moved(call, x))]


@rule(aten.hardtanh, aten.clamp, along=elementwise)
def clip(call: Call, out: Tensor, x: Tensor, low: Any = None, high: Any = None) -> Moves:
    """With c = clip(x): d c = min(max(dx + (x - c), low - c), high - c)."""
    if not call.moves(x) or isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    if call.name == "hardtanh":
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    dx, x = moved(call, x), call.exact(x)
    clipped = x.clamp(low, high)
    delta = dx + (x - clipped).to(dx.dtype)
    delta = delta if low is None else torch.maximum(delta, (low - clipped).to(dx.dtype))
    return [delta if high is None else torch.minimum(delta, (high - clipped).to(dx.dtype))]


@rule(aten.sigmoid, along=elementwise)
def sigmoid(call: Call, out: Tensor, x: Tensor) -> Moves:
    """With a < b the two of x and x + dx: s(b) - s(a) = s(b) s(-a) (1 - exp(a - b))."""
    return [sigmoid_delta(moved(call, x), call.base(x))]


@rule(aten.silu, along=elementwise)
def silu(call: Call, out: Tensor, x: Tensor) -> Moves:
    """d(x s(x)) = dx s(x + dx) + x ds."""
    dx, x = moved(call, x), call.base(x)
    return [dx * torch.sigmoid(x + dx) + x * sigmoid_delta(dx, x)]


@rule(aten.hardsigmoid, along=elementwise)
def hardsigmoid(call: Call, out: Tensor, x: Tensor) -> Moves:
    """d clip(x / 6 + 1/2, 0, 1)."""
    return [hardsigmoid_delta(moved(call, x), call.exact(x))]


@rule(aten.hardswish, along=elementwise)
def hardswish(call: Call, out: Tensor, x: Tensor) -> Moves:
    """With h = hardsigmoid: d(x h(x)) = dx h(x + dx) + x dh."""
    dx, exact = moved(call, x), call.exact(x)
    dh = hardsigmoid_delta(dx, exact)
    x, h = exact.to(dx.dtype), F.hardsigmoid(exact).to(dx.dtype)
    return [torch.addcmul(x * dh, dx, h + dh)]


@rule(
    aten.gelu, aten.tanh, aten.elu, aten.leaky_relu, aten.softplus, aten.mish, aten.exp, aten.expm1, aten.log,
    aten.log1p, aten.log2, aten.sqrt, aten.rsqrt, aten.erf, aten.abs, aten.clamp_min, aten.clamp_max, aten.reciprocal,
    aten.neg, aten.square, aten.log_sigmoid_forward, aten.celu, aten.sin, aten.cos, aten.pow, aten.softshrink,
    aten.hardshrink, aten.threshold, along=elementwise,
)  # fmt: skip
def of_one_number(call: Call, out: Tensor, x: Any, *rest: Any, **more: Any) -> Moves:
    """d f(x) = f(x + dx) - f(x), in float64: right to 2e-16 of f(x)."""
    if not isinstance(x, Tensor) or any(isinstance(each, Tensor) for each in rest):
        return None
    f = getattr(aten, call.name)
    dx, exact = moved(call, x), call.exact(x)
    changed, intact = f(exact + dx, *rest, **more), f(exact, *rest, **more)
    if isinstance(changed, tuple):  # log_sigmoid has a second result, for its gradient
        changed, intact = changed[0], intact[0]
    delta = (changed - intact).masked_fill_(dx == 0, 0)  # the two calls may round differently
    return [delta]


# --- normalisation, softmax, pooling ----------------------------------------------------------------------------------


@rule(aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm, along=channels)
def batch_norm(
    call: Call, out: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, mean: Any, var: Any, *rest: Any
) -> Moves:
    """In eval mode, with x^ = (x - mean) / sqrt(var + eps): d(w x^ + b) = w dx^ + dw (x^ + dx^) + db."""
    if call.name != "_native_batch_norm_legit_no_training" and rest[0]:
        return None
    if mean is None or call.moves(mean) or call.moves(var):
        return None
    of_channels = (-1, *[1] * (x.dim() - 2))
    scale = (var + rest[-1]).rsqrt().view(of_channels)
    dx, dw, db = call.delta(x), call.delta(w), call.delta(b)
    gain = scale if w is None else scale * w.view(of_channels)
    moves = [None if dx is None else dx * call.base(gain)]
    if dw is not None:
        normal = (x - mean.view(of_channels)) * scale
        dw = dw.view(call.n, 1, *of_channels)
        moves.append(dw * (normal if dx is None else normal + dx * scale))
    if db is not None:
        moves.append(db.view(call.n, 1, *of_channels))
    return [total(call, out, *moves), None, None, None]


@rule(aten.native_layer_norm)
def layer_norm(
    call: Call, out: Tensor, x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, eps: float
) -> Moves:
    """With c = x - mean(x), v = mean(c^2), s = sqrt(v + eps), and s' after the change:

    dv = mean(2 c dc + dc^2), d(c / s) = dc / s' - c dv / (s s' (s + s')); d(w x^ + b) = w dx^ + dw (x^ + dx^) + db.
    Where s' is much smaller than s, the difference (c + dc) / s' - c / s itself is accurate and is used instead.
    """
    axes = tuple(range(-len(shape), 0))
    dx, dw, db = call.delta(x), wide(call, w, out), wide(call, b, out)
    c = x - x.mean(axes, keepdim=True)
    s = (c.square().mean(axes, keepdim=True) + eps).sqrt()
    c, s = call.base(c), call.base(s)
    if dx is not None:
        dc = dx - dx.mean(axes, keepdim=True)
        dv = ((2 * c + dc) * dc).mean(axes, keepdim=True)
        after = ((c + dc).square().mean(axes, keepdim=True) + eps).sqrt()
        dx = dc / after - c * (dv / (s * after * (s + after)))
        if (shrunk := after < s / 10).any():
            dx = torch.where(shrunk, (c + dc) / after - c / s, dx)
    moves = [None if dx is None else dx if w is None else dx * call.base(w)]
    if dw is not None:
        moves.append(dw * (c / s if dx is None else c / s + dx))
    return [total(call, out, *moves, db), None, None]


@rule(aten._softmax, aten._safe_softmax)
def softmax(call: Call, out: Tensor, x: Tensor, dim: int, *rest: Any, **more: Any) -> Moves:
    """With e = expm1(dx - dx_m), m the largest entry of x: dp = p (e - S) / (1 + S), S = sum p e."""
    axis, dx = dim % x.dim(), moved(call, x)
    largest = x.argmax(axis, keepdim=True)
    shifted = dx - dx.gather(axis + 1, largest.expand(call.n, *largest.shape))
    if not bool(shifted.amax() < 10):  # so much larger that e is no small number, or NaN from -inf - -inf
        if call.name != "_softmax":
            return None
        delta = torch.softmax(x + dx, axis + 1) - torch.softmax(x, axis)
        return [delta.masked_fill_((dx == 0).all(axis + 1, keepdim=True), 0)]
    e, p = torch.expm1(shifted), call.base(out)
    sum_e = (p * e).sum(axis + 1, keepdim=True)
    return [p * (e - sum_e) / (1 + sum_e)]


@rule(aten.max_pool2d_with_indices, along=planes)
def max_pool2d(
    call: Call, out: Tensor, x: Tensor, kernel: list[int], stride: Any = None, padding: Any = 0, *rest: Any
) -> Moves:
    """The largest of (x + dx) minus the largest of x: (x_e - x_m) + dx_e, where e wins after the change."""
    dx, exact = moved(call, x), call.exact(x)
    window = (kernel, stride or kernel, padding, *rest)
    winners = fold(lambda each: aten.max_pool2d_with_indices(each, *window)[1], exact + dx).flatten(-2)
    flat = exact.flatten(-2).expand(*dx.shape[:-2], -1)
    gain = flat.gather(-1, winners) - call.exact(out).flatten(-2)
    return [(gain + dx.flatten(-2).gather(-1, winners)).unflatten(-1, out.shape[-2:]), CHANGED]


# --- helpers of the rules ---------------------------------------------------------------------------------------------


def moved(call: Call, x: Tensor) -> Tensor:
    """The delta of the one argument that can move."""
    dx = call.delta(x)
    assert dx is not None
    return dx


def wide(call: Call, value: Any, out: Tensor) -> Tensor | None:
    """The delta of `value` with as many axes as the result has, so that the two broadcast; None where it has none."""
    delta = call.delta(value)
    return None if delta is None else delta.view(len(delta), *[1] * (out.dim() - delta.dim() + 1), *delta.shape[1:])


def times(factor: Any, delta: Tensor | None) -> Tensor | None:
    """factor * delta; None where there is no delta."""
    return delta if delta is None or factor == 1 else factor * delta


def total(call: Call, out: Tensor, *moves: Tensor | None) -> Move:
    """The sum of those deltas that are not None, with the result's shape."""
    first, *others = [move for move in moves if move is not None]
    for other in others:
        first = first + other
    return first if call.is_part else first.expand(call.n, *out.shape)


def product(multiply: Any, a: Any, b: Any, da: Tensor | None, db: Tensor | None) -> list[Tensor | None]:
    """The terms of da b + (a + da) db; None for a term whose delta is None."""
    if da is None or db is None:
        return [None if da is None else multiply(da, b), None if db is None else multiply(a, db)]
    return [multiply(da, b), multiply(a + da, db)]


def zero(call: Call, out: Tensor) -> Tensor:
    """A delta of 0 with the shape of `out`."""
    return torch.zeros((), dtype=call.dtype, device=out.device).expand(call.n, *out.shape)


def dense(call: Call, part: Tensor) -> Tensor:
    """The dense delta of an argument; zeros where it has none."""
    delta = call.delta(part)
    return zero(call, part) if delta is None else delta


def fold(function: Callable[[Tensor], Tensor], delta: Tensor) -> Tensor:
    """Apply a function of a batch to the batches of all ablations at once."""
    return function(delta.flatten(0, 1)).unflatten(0, delta.shape[:2])


def _axes(x: Tensor, dim: Any) -> list[int]:
    axes = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [axis % x.dim() for axis in axes]


def _fits(arg: Any, axis: int, out: Tensor) -> bool:
    """Whether an argument has the block's axis as the result has it, or is the same for every unit."""
    if not isinstance(arg, Tensor) or arg.dim() < out.dim() - axis:
        return True
    return arg.shape[axis - out.dim()] in (1, out.shape[axis])

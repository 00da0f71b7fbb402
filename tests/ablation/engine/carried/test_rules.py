"""Every rule, on small functions: equal to the general rule, and to the function run again on base + delta.

Each example is run with every one of its arguments moving alone and with all at once; as plain numbers, and one unit at
a time along every axis, so that the rules for blocks are taken wherever they are claimed to hold.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ablation.engine.carried.products import RULES
from ablation.engine.carried.representations import Block
from tests.ablation.engine.carried.carrying import (
    STILL,
    N,
    Seen,
    carry_through,
    compute_again,
    draw,
    largest_error,
    make_block,
    make_dense,
)

aten = torch.ops.aten
ON_CUDA_ONLY = {aten.cudnn_batch_norm}
DECOMPOSED = {
    aten.avg_pool1d,
    aten.square,
}  # on this version and device into other operations, before the engine sees them


@dataclass(frozen=True)
class Example:
    """A function, and arguments of which any may move (but for those at places in `still`)."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    still: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name


X = draw(3, 4, 7, 6)  # examples, channels, height, width; 5 ablations
ROWS = draw(3, 4, seed=3)
TOKENS = draw(2, 3, 4, seed=4)
POSITIVE = X.abs() + 0.1
LAST = X.to(memory_format=torch.channels_last)


def make_examples() -> tuple[Example, ...]:
    """At least one for each rule."""
    return (*sums_and_products(), *linear_operations(), *of_one_number(), *in_place(), *normalisations(), *products())


def sums_and_products() -> Iterator[Example]:
    pairs = {
        "": (X, draw(3, 4, 7, 6, seed=5)),
        "-by-channel": (X, draw(4, 1, 1, seed=5)),
        "-by-row": (X, draw(6, seed=5)),
        "-by-plane": (X, draw(7, 6, seed=5)),
        "-by-image": (X, draw(4, 7, 6, seed=5)),
        "-by-gate": (X, draw(3, 4, 1, 1, seed=5)),
        "-by-mask": (X, draw(3, 1, 7, 6, seed=5)),
        "-outer": (draw(3, 4, 1, seed=6), draw(1, 1, 6, seed=5)),
        "-first-smaller": (draw(4, 7, 6, seed=6), X),
        "-square": (draw(4, 4, seed=6), draw(4, seed=5)),
        "-of-equal-axes": (draw(4, 4, 4, seed=6), draw(4, 4, seed=5)),
        "-by-number": (X, draw(seed=5)),
        "-last": (LAST, draw(3, 4, 7, 6, seed=5).to(memory_format=torch.channels_last)),
        "-mixed-layouts": (LAST, draw(3, 4, 7, 6, seed=5)),
    }
    for how, (a, b) in pairs.items():
        yield Example(f"add{how}", lambda a, b: a + b, (a, b))
        yield Example(f"sub{how}", lambda a, b: a - b, (a, b))
        yield Example(f"mul{how}", lambda a, b: a * b, (a, b))
        yield Example(f"div{how}", lambda a, b: a / (2 + b.abs()), (a, b))
    yield Example("add-alpha", lambda a, b: torch.add(a, b, alpha=-1.7), (X, X + 1))
    yield Example("sub-alpha", lambda a, b: torch.sub(a, b, alpha=-1.7), (X, X + 1))
    yield Example("rsub", lambda a, b: torch.rsub(a, b, alpha=0.3), (X, X + 1))
    yield Example("rsub-of-a-number", lambda a: 1 - a, (X,))
    yield Example("add-of-a-number", lambda a: a + 1.5, (X,))
    yield Example("mul-of-a-number", lambda a: 1.5 * a, (X,))
    yield Example("div-by-a-number", lambda a: a / 1.5, (X,))
    yield Example("div-of-a-number", lambda a: 1.5 / a, (POSITIVE,))
    yield Example("div-floor", lambda a: torch.div(3 * a, 1.5, rounding_mode="floor"), (X,))
    yield Example("mul-with-itself", lambda a: a * a, (X,))
    yield Example("mul-with-its-transpose", lambda a: a * a.T, (draw(4, 4),))
    yield Example("add-to-its-transpose", lambda a: a + a.T, (draw(4, 4),))
    yield Example("add-one-unit-to-many", lambda a, b: a + b, (draw(3, 1, 6), draw(3, 4, 6, seed=7)))
    yield Example("mul-one-unit-with-many", lambda a, b: a * b, (draw(3, 1, 6), draw(3, 4, 6, seed=7)))


def linear_operations() -> Iterator[Example]:
    yield Example("adaptive-avg-pool", lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (X,))
    yield Example("adaptive-avg-pool-last", lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (LAST,))
    yield Example("avg-pool-1d", lambda x: F.avg_pool1d(x, 2), (TOKENS,))
    yield Example("avg-pool-1d-of-rows", lambda x: F.avg_pool1d(x, 2), (ROWS,))
    yield Example("avg-pool-2d", lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (X,))
    yield Example("avg-pool-2d-without-batch", lambda x: F.avg_pool2d(x, 2), (draw(3, 4, 6),))
    yield Example("avg-pool-3d", lambda x: F.avg_pool3d(x, 2), (draw(2, 3, 4, 6, 4),))
    yield Example("bilinear", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (X,))
    yield Example("bicubic", lambda x: F.interpolate(x, (9, 8), mode="bicubic", align_corners=True), (X,))
    yield Example("nearest", lambda x: F.interpolate(x, (10, 8)), (X,))
    yield Example("pixel-shuffle", lambda x: F.pixel_shuffle(x, 2), (X,))
    yield Example("channel-shuffle-operation", lambda x: aten.native_channel_shuffle(x, 2), (X,))
    yield Example("channel-shuffle", lambda x: F.channel_shuffle(x, 2), (X,))
    for dim in (0, 1, -1, (2, 3), (1, 2), None):
        yield Example(f"mean-{dim}", lambda x, dim=dim: x.mean(dim), (X,))
        yield Example(f"sum-{dim}-kept", lambda x, dim=dim: x.sum(dim, keepdim=dim is not None), (X,))
    yield Example("mean-last", lambda x: x.mean((2, 3)), (LAST,))
    yield Example("clone", lambda x: x.clone(), (X,))
    yield Example("contiguous", lambda x: x.contiguous(), (LAST,))
    yield Example("channels-last", lambda x: x.to(memory_format=torch.channels_last), (X,))
    yield Example("alias", lambda x: aten.alias(x).detach() + 0, (X,))
    yield Example("lift-fresh", lambda x: aten.lift_fresh(x) + 0, (X,))
    yield Example("to-copy", lambda x: x.to(torch.float64, copy=True), (X,))
    for dim in (0, 1, -1):
        yield Example(f"cat-{dim}", lambda a, b, dim=dim: torch.cat([a, b], dim), (X, draw(3, 4, 7, 6, seed=5)))
        yield Example(f"stack-{dim}", lambda a, b, dim=dim: torch.stack([a, b], dim), (X, draw(3, 4, 7, 6, seed=5)))
    yield Example("cat-unequal", lambda a, b: torch.cat([b, a, b], 1), (X, draw(3, 2, 7, 6, seed=5)))
    yield Example("cat-with-itself", lambda a: torch.cat([a, a], 1), (X,))
    yield Example("cat-with-nothing", lambda a: torch.cat([torch.empty(0), a], 1), (X,))
    yield Example("cat-last", lambda a, b: torch.cat([a, b], 1), (LAST, X))
    yield Example("copy", lambda a, b: a.clone().copy_(b), (X, draw(7, 6, seed=5)))
    yield Example("copy-into-a-slice", lambda a, b: _assigned(a, b), (X, draw(3, 2, 7, 6, seed=5)))
    rows, columns = torch.tensor([2, 0, 2]), torch.tensor([1, 3, 1])
    yield Example("index", lambda x: x[rows], (X,))
    yield Example("index-two-axes", lambda x: x[rows, columns], (X,))
    yield Example("index-second-axis", lambda x: x[:, columns], (X,))
    yield Example("index-by-mask", lambda x: x[torch.tensor([True, False, True])], (X,))
    yield Example("index-select", lambda x: x.index_select(-3, columns), (X,))
    yield Example("roll", lambda x: torch.roll(x, (2, -1), (2, 3)), (X,))
    yield Example("roll-channels", lambda x: torch.roll(x, 1, 1), (X,))
    yield Example("roll-all", lambda x: torch.roll(x, 3), (X,))
    yield Example("pad", lambda x: F.pad(x, (1, 2, 0, 3)), (X,))
    yield Example("pad-with-ones", lambda x: F.pad(x, (1, 2), value=1.0), (X,))
    yield Example("pad-channels", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), (X,))
    yield Example("pad-cuts", lambda x: F.pad(x, (-1, 2)), (X,))
    mask = X > 0
    yield Example("masked-fill", lambda x: x.masked_fill(mask, -9.0), (X,))
    yield Example("masked-fill-by-plane", lambda x: x.masked_fill(mask[0, 0], -9.0), (X,))
    yield Example("masked-fill-by-channel", lambda x: x.masked_fill(mask[0, :, :1, :1], -9.0), (X,))
    yield Example("masked-fill-wider", lambda x: aten.masked_fill(x, mask, -9.0), (X[:1, :1],))
    yield Example("masked-fill-with", lambda x, v: x.masked_fill(mask, v), (X, draw(seed=6)))
    yield Example("where", lambda a, b: torch.where(mask, a, b), (X, draw(4, 1, 1, seed=5)))
    yield Example("where-number", lambda a: torch.where(mask, a, 2.0), (X,))
    yield Example("where-plane", lambda a, b: torch.where(mask[0, 0], a, b), (X, draw(6, seed=5)))


def of_one_number() -> Iterator[Example]:
    functions: dict[str, Callable[[Tensor], Any]] = {
        "relu": F.relu,
        "relu6": F.relu6,
        "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.25),
        "clamp": lambda x: x.clamp(-0.5, 0.25),
        "clamp-below": lambda x: x.clamp(min=-0.5),
        "clamp-above": lambda x: x.clamp(max=0.25),
        "clamp-min": lambda x: torch.clamp_min(x, -0.5),
        "clamp-max": lambda x: torch.clamp_max(x, 0.25),
        "clamp-by-tensor": lambda x: x.clamp(
            torch.full_like(X, -0.5).reshape(x.shape[-3:] if x.dim() < 4 else X.shape)
        ),
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "hardsigmoid": lambda x: F.hardsigmoid(4 * x),
        "hardswish": lambda x: F.hardswish(4 * x),
        "gelu": F.gelu,
        "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
        "tanh": torch.tanh,
        "elu": lambda x: F.elu(x, 1.3),
        "selu": F.selu,
        "celu": lambda x: F.celu(x, 1.3),
        "leaky-relu": lambda x: F.leaky_relu(x, 0.2),
        "softplus": lambda x: F.softplus(x, 2.0, 1.5),
        "mish": F.mish,
        "log-sigmoid": F.logsigmoid,
        "softshrink": F.softshrink,
        "hardshrink": F.hardshrink,
        "threshold": lambda x: F.threshold(x, 0.1, 20.0),
        "exp": torch.exp,
        "expm1": torch.expm1,
        "erf": torch.erf,
        "abs": torch.abs,
        "neg": torch.neg,
        "square": torch.square,
        "sin": torch.sin,
        "cos": torch.cos,
        "pow": lambda x: x**3,
        "pow-of-a-number": lambda x: 1.7**x,
        "sign": torch.sign,
        "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
        "relu-last": lambda x: F.relu(x.contiguous(memory_format=torch.channels_last)),
        "sigmoid-last": lambda x: torch.sigmoid(x.contiguous(memory_format=torch.channels_last)),
        "hardtanh-transposed": lambda x: F.hardtanh(x.transpose(1, 3)),
        "norm-last": lambda x: torch.linalg.vector_norm(x, 3, -1, keepdim=True),
    }
    for name, function in functions.items():
        yield Example(name, function, (X,))
    positive: dict[str, Callable[[Tensor], Tensor]] = {
        "log": torch.log,
        "log2": torch.log2,
        "log1p": torch.log1p,
        "sqrt": torch.sqrt,
        "rsqrt": torch.rsqrt,
        "reciprocal": torch.reciprocal,
        "pow-half": lambda x: x**0.5,
    }
    for name, function in positive.items():
        yield Example(name, lambda x, function=function: function(x.abs() + 0.1), (X,))
    yield Example("pow-of-two", lambda x, y: torch.pow(x.abs() + 0.1, y), (X, draw(6, seed=5)))


def in_place() -> Iterator[Example]:
    functions: dict[str, Callable[[Tensor], Any]] = {
        "relu": torch.relu_,
        "hardtanh": lambda x: F.hardtanh(x, inplace=True),
        "clamp": lambda x: x.clamp_(-0.5, 0.25),
        "sigmoid": torch.sigmoid_,
        "silu": lambda x: F.silu(x, inplace=True),
        "hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
        "hardswish": lambda x: F.hardswish(x, inplace=True),
        "leaky-relu": lambda x: F.leaky_relu(x, 0.2, inplace=True),
        "elu": lambda x: F.elu(x, inplace=True),
        "mish": lambda x: F.mish(x, inplace=True),
        "tanh": torch.tanh_,
        "exp": torch.exp_,
        "neg": torch.neg_,
        "square": torch.square_,
        "threshold": lambda x: F.threshold(x, 0.1, 20.0, inplace=True),
        "masked-fill": lambda x: x.masked_fill_(x.new_ones(7, 6, dtype=torch.bool).tril(), 4.0),
        "zero": lambda x: x.zero_(),
        "fill": lambda x: x.fill_(2.0),
        "add-itself": lambda x: x.add_(x),
        "mul-itself": lambda x: x.mul_(x),
        "out": lambda x: torch.exp(x, out=torch.empty_like(x)),
        "onto-itself": lambda x: torch.exp(x, out=x),
    }
    for name, function in functions.items():
        yield Example(f"in-place-{name}", lambda x, function=function: _seen(function, x), (X,))
    for name in ("relu", "sigmoid", "out", "add-itself"):
        yield Example(f"in-place-{name}-last", lambda x, name=name: _seen(functions[name], x), (LAST,))
    others = {"": draw(3, 4, 7, 6, seed=5), "-by-channel": draw(4, 1, 1, seed=5), "-by-row": draw(6, seed=5)}
    for how, other in others.items():
        yield Example(f"in-place-add{how}", lambda a, b: a.clone().add_(b, alpha=0.7), (X, other))
        yield Example(f"in-place-sub{how}", lambda a, b: a.clone().sub_(b), (X, other))
        yield Example(f"in-place-mul{how}", lambda a, b: a.clone().mul_(b), (X, other))
        yield Example(f"in-place-div{how}", lambda a, b: a.clone().div_(2 + b.abs()), (X, other))


def normalisations() -> Iterator[Example]:
    w, b, mean, var = draw(4, seed=5), draw(4, seed=6), draw(4, seed=7), draw(4, seed=8).abs()
    still = (3, 4)
    for name, x in (
        ("", X),
        ("-last", LAST),
        ("-rows", ROWS),
        ("-tokens", draw(2, 4, 3)),
        ("-3d", draw(2, 4, 3, 2, 2)),
    ):
        yield Example(
            f"batch-norm{name}",
            lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, eps=1e-3),
            (x, w, b, mean, var),
            still,
        )
    yield Example("batch-norm-plain", lambda x: F.batch_norm(x, mean, var), (X,))
    yield Example("batch-norm-of-the-batch", lambda x: F.batch_norm(x, None, None, training=True), (X,))
    for name in ("native_batch_norm", "_native_batch_norm_legit_no_training"):
        modes = (False, 0.1, 1e-3) if name == "native_batch_norm" else (0.1, 1e-3)
        yield Example(
            name, lambda x, w, b, name=name, modes=modes: getattr(aten, name)(x, w, b, mean, var, *modes)[0], (X, w, b)
        )
    yield Example("batch-norm-moving-statistics", lambda x, m, v: F.batch_norm(x, m, v.abs() + 1), (X, mean, var))
    yield Example("instance-norm", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (X, w, b))
    yield Example("group-norm", lambda x, w, b: F.group_norm(x, 2, w, b), (X, w, b))
    yield Example("layer-norm", lambda x, w, b: F.layer_norm(x, (6,), w, b), (X, draw(6, seed=5), draw(6, seed=6)))
    yield Example("layer-norm-plain", lambda x: F.layer_norm(x, (7, 6)), (X,))
    planes = draw(7, 6, seed=5), draw(7, 6, seed=6)
    yield Example("layer-norm-of-planes", lambda x, w, b: F.layer_norm(x, (7, 6), w, b), (X, *planes))
    yield Example("rms-norm", lambda x, w: F.rms_norm(x, (6,), w), (X, draw(6, seed=5)))
    yield Example("normalize", lambda x: F.normalize(x, dim=1), (X,))
    for dim in (0, 1, -1):
        yield Example(f"softmax-{dim}", lambda x, dim=dim: F.softmax(3 * x, dim), (X,))
        yield Example(f"log-softmax-{dim}", lambda x, dim=dim: F.log_softmax(3 * x, dim), (X,))
    hidden = torch.zeros(7, 6).masked_fill(torch.ones(7, 6).triu(1).bool(), float("-inf"))
    yield Example("softmax-masked", lambda x: F.softmax(x + hidden.double(), -1), (X,))
    yield Example("safe-softmax", lambda x: aten._safe_softmax(x, -1), (X,))
    yield Example("attention", lambda q, k, v: _attention(q, k, v), (TOKENS, TOKENS + 1, 2 * TOKENS))
    for layout, x in (("", X), ("-last", LAST)):
        yield Example(f"max-pool{layout}", lambda x: F.max_pool2d(x, 3, 2, 1), (x,))
        yield Example(f"max-pool-dilated{layout}", lambda x: F.max_pool2d(x, (2, 3), 1, 0, (2, 1), True), (x,))
    yield Example("max-pool-without-batch", lambda x: F.max_pool2d(x, 2), (draw(3, 4, 6),))
    yield Example("max-pool-ties", lambda x: F.max_pool2d(x, 2), (X.round(),))
    yield Example("max-pool-1d", lambda x: F.max_pool1d(x, 2), (TOKENS,))
    yield Example("adaptive-max-pool", lambda x: F.adaptive_max_pool2d(x, (3, 2)), (X,))


def products() -> Iterator[Example]:
    yield Example("mm", lambda a, b: a @ b, (ROWS, draw(4, 6)))
    yield Example("mm-with-itself", lambda a: a @ a, (draw(4, 4),))
    yield Example("mm-with-its-transpose", lambda a: a @ a.T, (ROWS,))
    yield Example("addmm", lambda c, a, b: torch.addmm(c, a, b), (draw(6), ROWS, draw(4, 6)))
    yield Example(
        "addmm-scaled", lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=-2), (draw(3, 6), ROWS, draw(4, 6))
    )
    yield Example("linear-of-tokens", F.linear, (TOKENS, draw(6, 4), draw(6)))
    yield Example("bmm", torch.bmm, (TOKENS, draw(2, 4, 6)))
    yield Example("bmm-shared", lambda a, b: torch.bmm(a, b.expand(2, 4, 6)), (TOKENS, draw(4, 6)))
    yield Example("matmul", lambda a, b: a @ b, (draw(2, 3, 4), draw(4)))
    yield Example("matmul-left", lambda a, b: a @ b, (draw(6, 3), draw(2, 3, 4)))
    yield Example("einsum", lambda a, b: torch.einsum("nchw,kc->nkhw", a, b), (X, draw(2, 4)))
    yield Example("baddbmm", torch.baddbmm, (draw(2, 3, 6), TOKENS, draw(2, 4, 6)))
    yield Example("conv-1d", F.conv1d, (draw(2, 4, 7), draw(6, 4, 3), draw(6)))
    yield Example("conv-2d", lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 2), (1, 2)), (X, draw(6, 4, 3, 2), draw(6)))
    yield Example("conv-2d-last", lambda x, w: F.conv2d(x, w, None, 2, 1), (LAST, draw(6, 4, 3, 3)))
    yield Example("conv-2d-groups", lambda x, w: F.conv2d(x, w, groups=2), (X, draw(6, 2, 3, 3)))
    yield Example("conv-2d-depthwise", lambda x, w: F.conv2d(x, w, padding=1, groups=4), (X, draw(8, 1, 3, 3)))
    yield Example("conv-2d-1x1", lambda x, w: F.conv2d(x, w), (X, draw(2, 4, 1, 1)))
    yield Example("conv-2d-1x1-strided", lambda x, w: F.conv2d(x, w, stride=2), (X, draw(2, 4, 1, 1)))
    yield Example("conv-3d", lambda x, w: F.conv3d(x, w, padding=(0, 1, 1)), (draw(2, 3, 4, 4, 2), draw(6, 3, 2, 3, 1)))
    yield Example("conv-transposed", lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1), (X, draw(4, 2, 3, 3)))
    yield Example("bilinear-form", F.bilinear, (ROWS, draw(3, 6), draw(2, 4, 6), draw(2)))


def _assigned(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[:, 1:3] = b
    return a


def _seen(function: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """A write under one name is seen under all, and what was taken before it stays."""
    x = x.clone()
    view, before = x[:, 1:], x + 0
    written = function(x)
    return [x, view + 0, before, written + 0]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


EXAMPLES = make_examples()


def ways_to_move(example: Example) -> Iterator[tuple[str, dict[int, Tensor | Block]]]:
    """All arguments together, then each alone; as plain numbers, then a unit at a time along each axis."""
    places = [place for place in range(len(example.inputs)) if place not in example.still]
    for moving in [places] + ([[place] for place in places] if len(places) > 1 else []):
        inputs = {place: example.inputs[place] for place in moving}
        yield f"{moving}", {place: make_dense(x, seed=place + 1) for place, x in inputs.items()}
        for axis in range(max(x.dim() for x in inputs.values())):
            blocks = {place: make_block(x, axis, seed=place + 1) for place, x in inputs.items() if axis < x.dim()}
            yield f"{moving} along {axis}", blocks


def in_float32(moves: dict[int, Tensor | Block]) -> dict[int, Tensor | Block]:
    return {
        place: move.float() if isinstance(move, Tensor) else replace(move, numbers=move.numbers.float())
        for place, move in moves.items()
    }


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_equals_running_again(example: Example) -> None:
    """In float64 to rounding of the values; where nothing moves, exactly 0."""
    size = max((float(each.abs().max()) for each in _results(example)), default=0.0)
    wrong = []
    for how, moves in ways_to_move(example):
        truth = compute_again(example.function, example.inputs, moves)
        wrong += compare(how, carry_through(example.function, example.inputs, moves), truth, 1e-13, size)
    assert not wrong, f"{example}: " + "; ".join(wrong)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_float32_deltas_equal_running_again(example: Example) -> None:
    """On a float64 base, to rounding of the deltas themselves: none of their digits are lost."""
    wrong = []
    for how, moves in [*ways_to_move(example)][: max(x.dim() for x in example.inputs) + 1]:
        moves = in_float32(moves)
        truth = compute_again(example.function, example.inputs, moves)
        carried = carry_through(example.function, example.inputs, moves, dtype=torch.float32)
        wrong += compare(how, carried, truth, 2e-6, 0.0)
    assert not wrong, f"{example}: " + "; ".join(wrong)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_the_general_rule_equals_running_again(example: Example) -> None:
    """It knows no operation and no form: plain numbers of all arguments are enough."""
    size = max((float(each.abs().max()) for each in _results(example)), default=0.0)
    how, moves = next(ways_to_move(example))
    truth = compute_again(example.function, example.inputs, moves)
    wrong = compare(how, carry_through(example.function, example.inputs, moves, rules={}), truth, 1e-13, size)
    assert not wrong, f"{example}: " + "; ".join(wrong)


def compare(how: str, carried: list[Tensor], truth: list[Tensor], bound: float, size: float) -> list[str]:
    """What is wrong: an error above `bound` of the largest number, or a move where nothing moves."""
    wrong = []
    for k, (own, true) in enumerate(zip(carried, truth, strict=True)):
        assert own.shape == true.shape
        error = largest_error(own, true, size)
        if not error <= bound:
            wrong.append(f"{how}, result {k}: error {error:.2g}")
        if own[STILL].any():
            wrong.append(f"{how}, result {k}: moves by {own[STILL].abs().max():.2g} where nothing does")
    return wrong


def _results(example: Example) -> list[Tensor]:
    results = example.function(*example.inputs)
    return [each for each in (results if isinstance(results, tuple | list) else [results]) if each.is_floating_point()]


def test_every_rule_has_an_example() -> None:
    """A new rule without one fails here."""
    seen = Seen()
    with torch.no_grad(), seen:
        for example in EXAMPLES:
            example.function(*(x.clone() for x in example.inputs))
    missing = set(RULES) - seen.operations - ON_CUDA_ONLY - DECOMPOSED
    assert not missing, f"no example runs {sorted(map(str, missing))}: add one to make_examples()"


# --- small and large deltas in float32 --------------------------------------------------------------------------------

PRECISE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "relu": (F.relu, X),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 0.25), X),
    "clamp": (lambda x: x.clamp(min=-0.5), X),
    "relu6": (lambda x: F.relu6(4 * x), X),
    "sigmoid": (torch.sigmoid, 9 * X),
    "silu": (F.silu, 4 * X),
    "hardsigmoid": (lambda x: F.relu6(x + 3) / 6 if x.requires_grad else F.hardsigmoid(x), 4 * X),  # no 2nd derivative
    "hardswish": (F.hardswish, 4 * X),
    "mul": (lambda x: x * x.flip(-1), X),
    "div": (lambda x: x / (x.flip(-1).abs() + 0.5), X),
    "softmax": (lambda x: F.softmax(x, -1), X),
    "softmax-sure": (lambda x: F.softmax(x, -1), 5 * X),
    "layer-norm": (lambda x: F.layer_norm(x, (7, 6)), X + 40),
    "rms-norm": (lambda x: F.rms_norm(x, (6,)), X),
    "batch-norm": (lambda x: F.batch_norm(x, draw(4), draw(4, seed=2).abs()), X),
    "max-pool": (lambda x: F.max_pool2d(x, 2), X),
}


SUMS = {"silu", "hardswish", "mul", "div", "softmax", "softmax-sure", "layer-norm", "rms-norm", "batch-norm"}


@pytest.mark.parametrize("name", PRECISE)
def test_small_deltas_keep_their_digits(name: str) -> None:
    """A change of 1e-9 of the values, in float32: right to 1e-5 entry by entry; of its row, where terms can cancel."""
    function, x = PRECISE[name]
    delta = (1e-9 * x * draw(N, *x.shape, seed=9)).float()
    truth = torch.stack([torch.autograd.functional.jvp(function, x, each.double())[1] for each in delta])
    (carried,) = carry_through(function, (x,), {0: delta}, dtype=torch.float32)
    size = truth.square().mean(-1, keepdim=True).sqrt() if name in SUMS else truth.abs()
    error = (carried.double() - truth).abs() / size
    worst = error.where(carried != truth, 0).max()
    assert worst <= 1e-5, f"{name}: error {worst:.2g}"


LARGE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    **PRECISE,
    "exp": (lambda x: torch.exp(x / 1e6), X),
    "gelu": (F.gelu, X),
    "tanh": (torch.tanh, X),
    "elu": (F.elu, X),
    "softplus": (F.softplus, X),
    "mish": (F.mish, X),
    "log-sigmoid": (F.logsigmoid, X),
    "log-softmax": (lambda x: F.log_softmax(x, -1), X),
    "group-norm": (lambda x: F.group_norm(x, 2), X),
}


SQUARES = {"rms-norm": 2e-7}
"""Of a sum of squares that is an operation of its own, float32 keeps 6e-8: that times the change's size is lost."""


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("large", [1e3, 1e6])
def test_large_deltas_stay_right(name: str, large: float) -> None:
    """A change of a thousand times the values and more: finite, and right to float32."""
    function, x = LARGE[name]
    delta = (large * x * draw(N, *x.shape, seed=9)).float()
    truth = compute_again(function, (x,), {0: delta})[0]
    (carried,) = carry_through(function, (x,), {0: delta}, dtype=torch.float32)
    assert truth.isfinite().all()
    assert carried.isfinite().all(), f"{name}: {int((~carried.isfinite()).sum())} numbers are not finite"
    error = largest_error(carried, truth)
    assert error <= 1e-5 + SQUARES.get(name, 0) * large, f"{name}: error {error:.2g}"


GIANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer-norm": lambda x: F.layer_norm(x, (6,)),
    "rms-norm": lambda x: F.rms_norm(x, (6,)),
    "group-norm": lambda x: F.group_norm(x, 2),
    "softmax": lambda x: F.softmax(x, -1),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


@pytest.mark.parametrize("name", GIANTS)
@pytest.mark.parametrize("giant", [50.0, 1e3])
def test_the_loss_of_a_giant(name: str, giant: float) -> None:
    """One activation dwarfs the others, as in many transformers, and goes away.

    Of the delta -1000 float32 keeps 6e-5; the others are about 1. So what is left can be right to 1e-4, not more.
    """
    x = X.clone()
    x[..., 2] = giant * (1 + X[..., 2] / 10)
    delta = torch.zeros(N, *x.shape)
    delta[..., 2] = (draw(N, *x.shape[:-1], seed=9) - x[..., 2]).float()
    function = GIANTS[name]
    truth = compute_again(function, (x,), {0: delta})[0]
    (carried,) = carry_through(function, (x,), {0: delta}, dtype=torch.float32)
    error = largest_error(carried, truth)
    assert error <= 1e-4 + SQUARES.get(name, 0) * giant**2, f"{name} without {giant:g}: error {error:.2g}"

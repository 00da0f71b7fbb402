"""Every kind of weight, in layers of every form: all weights of small layers against brute force.

Behind each layer come a ReLU, pooling and Linear layers, so that what moves is taken on as a block, as columns and as a
product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablation
from ablation.engine.carried.dispatch import Call, Moves
from ablation.engine.carried.products import RULES
from ablation.errors import ModelError
from tests.ablation.engine.carried.carrying import N, carry_through, compute_again, draw, largest_error
from tests.ablation.engine.exact import check_exact, make, make_data, some_sites

N_CLASSES = 3
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.AvgPool3d}


@dataclass(frozen=True)
class Layer:
    """A layer, the shape of its inputs, and which of its parameters are targets."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    parameters: tuple[str, ...] = ("weight", "bias")
    sites: int = 36


class Behind(nn.Module):
    """The layer, then two layers that its units meet in; the last ones treat each example's tokens together."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            found = self.units(torch.zeros(2, *shape[1:]))
        self.middle = nn.Linear(found.flatten(1).shape[1], 6)
        self.out = nn.Linear(6, N_CLASSES)

    def units(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x = torch.relu(x[0] if isinstance(x, tuple) else x)
        return POOLS[x.dim() - 2](2)(x) if x.dim() > 2 and min(x.shape[2:]) > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.middle(self.units(x).flatten(1))))


class BehindConv(nn.Module):
    """The layer's channels go on into a convolution, depthwise and dense, and a norm before they are flattened."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        channels = layer(torch.zeros(2, *shape[1:])).shape[1]
        self.norm = nn.BatchNorm2d(channels)
        self.each = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.mixed = nn.Conv2d(channels, 4, 2)
        self.out = nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.layer(x)))
        return self.out(F.silu(self.mixed(self.each(x))).mean((2, 3)))


class Tokens(nn.Module):
    """A Linear on (examples, tokens, channels) with another behind, tokens averaged at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(F.gelu(self.layer(x))).mean(1))


class Functional(nn.Module):
    """A parameter in a product that is no layer's."""

    def __init__(self, shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.product = product
        self.out = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.product(x, self.weight)).flatten(1))


class Words(nn.Module):
    """An embedding of whole numbers, which the inputs are made into."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(6, 4, padding_idx=0)
        self.out = nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer((3 * x.abs()).long().clamp(max=5)).sum(1)))


class Pairs(nn.Module):
    """A bilinear form of two Linear layers' results."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 3)
        self.layer = nn.Bilinear(4, 3, 2)
        self.out = nn.Linear(2, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.layer(torch.relu(self.left(x)), self.right(x))))


class Twice(nn.Module):
    """A layer used twice, another in between, and its bias with it."""

    def __init__(self, layer: nn.Module, between: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.between = layer, between
        self.out = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(torch.relu(self.between(torch.relu(self.layer(x))))))
        return self.out(x.flatten(2).mean(2) if x.dim() > 2 else x)


class Recurrent(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(3, 4, batch_first=True, **options)
        self.out = nn.Linear(8 if options.get("bidirectional") else 4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


def _into_own_memory(x: Tensor, w: Tensor) -> Tensor:
    own = x.new_zeros(len(x), w.shape[1])
    torch.mm(x, w, out=own)
    return own


def _weight_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(layer)


def _spectral_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.parametrizations.spectral_norm(layer)


IMAGE, LINE, VOLUME = (6, 4, 7, 5), (7, 4, 9), (5, 2, 4, 5, 3)
KERNELS = ("weight",)
CONVOLUTIONS = (
    Layer("conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), LINE),
    Layer("conv1d-circular", lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), LINE),
    Layer("conv2d", lambda: nn.Conv2d(4, 6, 3), IMAGE),
    Layer("conv2d-asymmetric", lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 3), (1, 2)), IMAGE),
    Layer("conv2d-groups", lambda: nn.Conv2d(4, 6, (2, 3), groups=2, padding=(1, 0)), IMAGE),
    Layer("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, stride=(1, 2)), IMAGE),
    Layer("conv2d-circular", lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 2), padding_mode="circular"), IMAGE),
    Layer("conv2d-reflect", lambda: nn.Conv2d(4, 6, (2, 3), padding=(2, 1), padding_mode="reflect"), IMAGE, KERNELS),
    Layer("conv2d-replicate", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), IMAGE, KERNELS),
    Layer("conv2d-same", lambda: nn.Conv2d(4, 6, (1, 3), padding="same", dilation=(1, 2)), IMAGE, KERNELS),
    Layer("conv2d-1x1", lambda: nn.Conv2d(4, 6, 1, stride=(2, 1), bias=False), IMAGE, KERNELS),
    Layer("conv2d-to-one-channel", lambda: nn.Conv2d(4, 1, 3), IMAGE),
    Layer("conv2d-from-one-channel", lambda: nn.Conv2d(1, 6, 3), (6, 1, 7, 5)),
    Layer("conv3d", lambda: nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 2), groups=2), VOLUME),
    Layer("transposed1d", lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, output_padding=1, dilation=2), LINE),
    Layer("transposed2d", lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2)), IMAGE),
    Layer("transposed2d-groups", lambda: nn.ConvTranspose2d(4, 6, (2, 3), 2, 1, groups=2, dilation=(2, 1)), IMAGE),
    Layer("transposed2d-depthwise", lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), IMAGE),
    Layer("transposed2d-cut", lambda: nn.ConvTranspose2d(4, 6, 2, 1, (2, 1), dilation=(3, 2)), IMAGE, KERNELS),
    Layer("transposed3d", lambda: nn.ConvTranspose3d(2, 4, (2, 1, 3), (1, 2, 1), 0, (0, 1, 0), groups=2), VOLUME),
)
OTHERS = (
    Layer("linear", lambda: nn.Linear(5, 7), (9, 5)),
    Layer("linear-to-one", lambda: nn.Linear(5, 1), (9, 5)),
    Layer("linear-from-one", lambda: nn.Linear(1, 7), (9, 1)),
    Layer(
        "group-norm",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 2), nn.GroupNorm(3, 6)),
        IMAGE,
        ("0.weight", "1.weight", "1.bias"),
    ),
    Layer("group-norm-first", lambda: nn.GroupNorm(2, 4), IMAGE),
    Layer(
        "instance-norm",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 2), nn.InstanceNorm2d(6, affine=True)),
        IMAGE,
        ("0.weight", "1.weight", "1.bias"),
        30,
    ),
    Layer("instance-norm-tracking", lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
    Layer("batch-norm", lambda: nn.BatchNorm2d(4), IMAGE),
    Layer("batch-norm-1d", lambda: nn.BatchNorm1d(5), (9, 5)),
    Layer("batch-norm-3d", lambda: nn.BatchNorm3d(2), VOLUME),
    Layer("layer-norm", lambda: nn.LayerNorm((7, 5)), IMAGE),
    Layer("layer-norm-rows", lambda: nn.LayerNorm(5), (9, 5)),
    Layer("rms-norm", lambda: nn.RMSNorm(5), (9, 5), KERNELS),
    Layer("prelu", lambda: nn.Sequential(nn.PReLU(4), nn.Conv2d(4, 6, 2)), IMAGE, ("0.weight",)),
    Layer("prelu-one", lambda: nn.Sequential(nn.PReLU(), nn.Conv2d(4, 6, 2)), IMAGE, ("0.weight",)),
    Layer(
        "weight-norm",
        lambda: _weight_norm(nn.Linear(5, 7)),
        (9, 5),
        ("parametrizations.weight.original0", "parametrizations.weight.original1", "bias"),
    ),
    Layer(
        "weight-norm-conv",
        lambda: _weight_norm(nn.Conv2d(4, 6, 2)),
        IMAGE,
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        24,
    ),
    Layer("spectral-norm", lambda: _spectral_norm(nn.Linear(5, 7)), (9, 5), ("parametrizations.weight.original",)),
)
NETWORKS = (
    Layer("tokens", Tokens, (7, 6, 4), ("layer.weight", "layer.bias", "norm.weight", "norm.bias", "out.weight")),
    Layer("matmul", lambda: Functional((4, 6), torch.matmul, 18), (7, 3, 4), KERNELS),
    Layer("matmul-left", lambda: Functional((6, 3), lambda x, w: w @ x, 24), (7, 3, 4), KERNELS),
    Layer(
        "bmm",
        lambda: Functional((3, 4, 2), lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), 6),
        (7, 3, 4),
        KERNELS,
    ),
    Layer(
        "einsum", lambda: Functional((3, 4, 6), lambda x, w: torch.einsum("ntc,tck->nkt", x, w), 18), (7, 3, 4), KERNELS
    ),
    Layer(
        "einsum-own-square",
        lambda: Functional((4, 4), lambda x, w: torch.einsum("ntc,ck,kd->ntd", x, w, w), 12),
        (7, 3, 4),
        KERNELS,
    ),
    Layer("gram", lambda: Functional((4, 6), lambda x, w: x @ (w @ w.T), 4), (7, 4), KERNELS),
    Layer("added", lambda: Functional((3, 4), lambda x, w: x + w, 12), (7, 3, 4), KERNELS),
    Layer("added-number", lambda: Functional((), lambda x, w: x + w, 12), (7, 3, 4), KERNELS),
    Layer("scaled-by-number", lambda: Functional((), lambda x, w: x * w, 12), (7, 3, 4), KERNELS),
    Layer(
        "expanded-token",
        lambda: Functional((1, 1, 4), lambda x, w: torch.cat([w.expand(len(x), -1, -1), x], 1), 16),
        (7, 3, 4),
        KERNELS,
    ),
    Layer(
        "standardised",
        lambda: Functional((6, 4), lambda x, w: F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)), 6),
        (7, 4),
        KERNELS,
    ),
    Layer(
        "positions-by-net",
        lambda: Functional((5, 4), lambda x, w: x + F.linear(torch.ones(3, 5).cumsum(0).to(w) / 5, w.T), 12),
        (7, 3, 4),
        KERNELS,
    ),
    Layer("matmul-out", lambda: Functional((4, 6), _into_own_memory, 6), (7, 4), KERNELS),
    Layer("bilinear", Pairs, (9, 5), ("layer.weight", "layer.bias", "left.weight", "right.weight")),
    Layer("embedding", Words, (9, 5), ("layer.weight",)),
    Layer(
        "linear-twice",
        lambda: Twice(nn.Linear(5, 5), nn.Linear(5, 5), 5),
        (9, 5),
        ("layer.weight", "layer.bias", "between.weight"),
    ),
    Layer(
        "conv-twice",
        lambda: Twice(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), 4),
        (5, 4, 6, 3),
        ("layer.weight", "layer.bias", "between.bias"),
        36,
    ),
    Layer(
        "norm-twice",
        lambda: Twice(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), 4),
        (5, 4, 6, 3),
        ("layer.weight", "layer.bias"),
    ),
    Layer(
        "lstm",
        lambda: Recurrent(nn.LSTM),
        (6, 5, 3),
        ("layer.weight_ih_l0", "layer.weight_hh_l0", "layer.bias_hh_l0"),
        20,
    ),
    Layer(
        "lstm-both-ways",
        lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2),
        (6, 5, 3),
        ("layer.weight_hh_l0_reverse", "layer.weight_ih_l1"),
        6,
    ),
    Layer(
        "gru",
        lambda: Recurrent(nn.GRU),
        (6, 5, 3),
        ("layer.weight_ih_l0", "layer.weight_hh_l0", "layer.bias_ih_l0"),
        20,
    ),
    Layer("rnn", lambda: Recurrent(nn.RNN), (6, 5, 3), ("layer.weight_ih_l0", "layer.weight_hh_l0"), 20),
)

REFUSED_IN_MIXED = {f"{name}:layer.weight_ih_l0" for name in ("lstm", "gru", "rnn")}


@cache
def networks() -> dict[str, tuple[nn.Module, str, tuple[int, ...], int]]:
    """Each layer in a network, by a name: the network, the target, the inputs' shape, how many sites."""
    found = {}
    for behind, layers in ((Behind, CONVOLUTIONS + OTHERS), (BehindConv, CONVOLUTIONS)):
        for layer in layers:
            if behind is BehindConv and len(layer.shape) != 4:
                continue
            model = make(3, lambda layer=layer, behind=behind: behind(layer.build(), layer.shape))
            for parameter in [name for name in layer.parameters if _has(model, f"layer.{name}")]:
                name = f"{layer.name}-{behind.__name__.lower()}:{parameter}"
                found[name] = (_settled(model, layer.shape), f"layer.{parameter}", layer.shape, layer.sites)
    for layer in NETWORKS:
        model = _settled(make(3, layer.build), layer.shape)
        found |= {
            f"{layer.name}:{parameter}": (model, parameter, layer.shape, layer.sites) for parameter in layer.parameters
        }
    return found


def _has(model: nn.Module, parameter: str) -> bool:
    return parameter in dict(model.named_parameters())


def _settled(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """With biases, scales and running statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or (parameter == 1).all():
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
        model(make_data(shape, N_CLASSES, seed=5)[0])
    return model.eval()


@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("name", networks())
def test_equals_brute_force(name: str, precision: str) -> None:
    model, parameter, shape, n = networks()[name]
    precision = "float64" if name in REFUSED_IN_MIXED else precision
    x, y = make_data(shape, N_CLASSES)
    check_exact(model, parameter, x, y, precision, indices=some_sites(model, parameter, n))


@pytest.mark.parametrize("name", [name for name in networks() if not name.endswith("bias")][::2])
def test_the_general_rule_equals_brute_force(name: str) -> None:
    model, parameter, shape, _ = networks()[name]
    precision = "float64" if name in REFUSED_IN_MIXED else "mixed"
    x, y = make_data(shape, N_CLASSES)
    check_exact(model, parameter, x, y, precision, indices=some_sites(model, parameter, 2), rules={})


@pytest.mark.parametrize("value", [-3.0, 1e3])
@pytest.mark.parametrize(
    "name", ["conv2d-behindconv:weight", "linear-behind:weight", "tokens:layer.weight", "lstm:layer.weight_hh_l0"]
)
def test_constants(name: str, value: float) -> None:
    model, parameter, shape, _ = networks()[name]
    x, y = make_data(shape, N_CLASSES)
    for precision in ("mixed", "float64"):
        check_exact(model, parameter, x, y, precision, indices=some_sites(model, parameter, 20), value=value)


def test_many_lanes_take_the_way_of_active_columns() -> None:
    """Enough ablations at once for products to be deferred until a ReLU says which of their entries are needed."""
    model = make(
        4,
        lambda: nn.Sequential(
            nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 11), nn.ReLU(), nn.Linear(11, 3)
        ),
    )
    with torch.no_grad():
        for k in (0, 2, 4):
            model[k].bias.sub_(0.3)
    x, y = make_data((13, 9), N_CLASSES)
    for precision in ("mixed", "float64"):
        for value in (0.0, 2.0):
            check_exact(model, "0.weight", x, y, precision, indices=np.arange(180), lanes=200, batch=7, value=value)


@pytest.mark.parametrize("n_moving", [1, 3, 4], ids=["one", "some", "most"])
def test_a_single_number_that_moves_goes_through_a_convolution(n_moving: int) -> None:
    """Pairs (ablation, example) where nothing moves are left out, and a look at some numbers doesn't decide that."""
    x, weight = draw(2, 3, 40, 40), draw(4, 3, 3, 3, seed=3)
    moves = torch.zeros(N, *x.shape, dtype=torch.float64)
    for lane in range(n_moving):
        moves[lane, lane % 2, 2, 39 - lane, 37] = 0.3

    def convolve(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    (carried,), (truth,) = carry_through(convolve, (x,), {0: moves}), compute_again(convolve, (x,), {0: moves})
    assert largest_error(carried, truth) <= 1e-13
    assert truth.flatten(1).any(dim=1).sum() == n_moving


def test_a_wrong_rule_is_caught() -> None:
    """The control: a rule that forgets the last term of (A + dA) (B + dB) does not pass."""

    def forgetful(call: Call, out: Tensor, c: Tensor, a: Tensor, b: Tensor) -> Moves:
        da, db = call.delta(a), call.delta(b)
        terms = [None if da is None else da @ b, None if db is None else a @ db]
        return [sum((term for term in terms if term is not None), torch.zeros(call.n, *out.shape))]

    model, parameter, shape, _ = networks()["linear-twice:layer.weight"]
    x, y = make_data(shape, N_CLASSES)
    addmm = torch.ops.aten.addmm
    with pytest.raises(AssertionError, match="error"):
        check_exact(
            model, parameter, x, y, "float64", rules={**RULES, addmm: replace(RULES[addmm], function=forgetful)}
        )


def test_recurrent_layers_are_refused_in_mixed_precision_where_they_insist_on_one_type() -> None:
    """`torch.nn.RNNBase` compares the type of its input with that of its first weight."""
    model, parameter, shape, _ = networks()["lstm:layer.weight_ih_l0"]
    with pytest.raises(ModelError, match="Use precision='float64'"):
        ablation.ablate(model, parameter, {"test": make_data(shape, N_CLASSES)}, progress=False)

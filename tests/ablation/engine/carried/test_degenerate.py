"""Numbers at the edges: nothing moves, all is certain, almost nothing, enormous; batches and lanes of any size."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablation
from ablation.errors import ExampleError, ProofError
from tests.ablation.engine.exact import carry, check_exact, make, make_data, some_sites
from tests.compare import brute_force, count_moved

PRECISIONS = pytest.mark.parametrize("precision", ["mixed", "float64"])


class Net(nn.Module):
    """Convolution, norm, residual, two hidden Linear layers: what most networks have."""

    def __init__(self, n_classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.again = nn.Conv2d(5, 5, 3, padding=1)
        self.hidden = nn.Linear(20, 7)
        self.deeper = nn.Linear(7, 11)
        self.out = nn.Linear(11, n_classes)
        self.unused = nn.Linear(7, 3)
        self.unread = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = F.max_pool2d(torch.relu(x + self.again(x)), 2)
        x = torch.relu(self.hidden(x.flatten(1)))
        self.unread(x)
        return self.out(torch.relu(self.deeper(x)))


TARGETS = ("conv.weight", "norm.weight", "again.weight", "hidden.weight", "hidden.bias", "deeper.weight", "out.weight")
SHAPE = (7, 2, 4, 5)


def net(seed: int = 1, n_classes: int = 4) -> nn.Module:
    return make(seed, lambda: Net(n_classes)).eval()


def edited(model: nn.Module, edit: Callable[[nn.Module], object]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        edit(model)
    return model


# --- nothing moves ----------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("parameter", ["conv.weight", "again.weight", "hidden.weight"])
def test_all_zero_activations(parameter: str, precision: str) -> None:
    """Behind a layer that is dead on every example nothing can move: 0, not 1e-17, and provably."""
    model = edited(net(), lambda model: model.hidden.bias.fill_(-100.0))
    partial = check_exact(model, parameter, *make_data(SHAPE, 4), precision)
    assert not partial.delta.any()
    assert not partial.touched.any()


@PRECISIONS
def test_an_input_of_zeros(precision: str) -> None:
    x, y = make_data(SHAPE, 4)
    partial = check_exact(net(), "conv.weight", torch.zeros_like(x), y, precision)
    assert not partial.touched.any()


@PRECISIONS
@pytest.mark.parametrize("parameter", TARGETS)
def test_weights_that_are_zero_already(parameter: str, precision: str) -> None:
    """Utility exactly 0, no example touched; -0.0 is 0 too."""
    model = net()
    model.get_parameter(parameter).data.view(-1)[::3] = 0.0
    model.get_parameter(parameter).data.view(-1)[::6] = -0.0
    indices = some_sites(model, parameter, 10**6)
    partial = check_exact(model, parameter, *make_data(SHAPE, 4), precision, indices=indices)
    assert not partial.delta[::3].any()
    assert not partial.touched[::3].any()
    if parameter.endswith("weight"):
        assert partial.touched[1::3].any()


@PRECISIONS
def test_a_replacement_by_the_weight_itself(precision: str) -> None:
    model = edited(net(), lambda model: model.again.weight.fill_(0.25))
    partial = check_exact(model, "again.weight", *make_data(SHAPE, 4), precision, value=0.25)
    assert not partial.delta.any()
    assert not partial.touched.any()


@PRECISIONS
@pytest.mark.parametrize("parameter", ["unused.weight", "unread.weight"])
def test_a_layer_that_nobody_uses(parameter: str, precision: str) -> None:
    """Not called at all, or called and its result left."""
    partial = check_exact(net(), parameter, *make_data(SHAPE, 4), precision)
    assert not partial.delta.any()
    assert not partial.touched.any()


@PRECISIONS
def test_a_layer_that_only_some_batches_use(precision: str) -> None:
    """An expert that no example of the last batches is sent to."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows = [(self.first if row[0] > 0 else self.second)(row[None]) for row in x]
            return self.out(torch.relu(torch.cat(rows)))

    x, y = make_data((11, 5), 3)
    x[:, 0] = torch.tensor([1.0] * 5 + [-1.0] * 6)
    check_exact(make(2, Experts), "first.weight", x, y, precision)
    check_exact(make(2, Experts), "second.weight", x, y, precision)


@PRECISIONS
@pytest.mark.parametrize("activation", ["relu", "hardswish", "gelu", "mish", "softplus", "sigmoid"])
def test_touched_says_whether_a_logit_moves(activation: str, precision: str) -> None:
    """Some examples are dead, behind every kind of activation: exactly those where plain PyTorch sees no logit move."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(getattr(F, activation)(self.second(torch.relu(self.first(x)))))

    model = make(3, Two)
    x, y = make_data((12, 5), 3)
    indices = some_sites(model, "first.weight", 30)
    partial = check_exact(model, "first.weight", x, y, precision)
    moved = count_moved(model, "first.weight", indices, x)
    assert 0 < moved.min() < 12
    np.testing.assert_array_equal(partial.touched, moved)


# --- certainty --------------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("parameter", TARGETS)
@pytest.mark.parametrize(
    ("loss", "right"), [(0, True), (50, False), (800, False)], ids=["loss-0", "loss-50", "loss-800"]
)
def test_a_saturated_softmax(loss: float, right: bool, parameter: str, precision: str) -> None:
    """All answers certain: right (the loss is 0 in float64), or wrong by 50 or 800 nats."""
    model, (x, _) = net(), make_data(SHAPE, 4)
    with torch.no_grad():
        logits = model(x)
        answer, other = logits.argmax(1), logits.argmin(1)
        first, second = logits.topk(2, dim=1).values.unbind(1)
        margin = (first - second).min() if right else (first - logits.min(1).values).mean()
        for each in model.out.parameters():
            each.mul_(float((loss or 1000) / margin))
    y = answer if right else other
    partial = check_exact(model, parameter, x, y, precision)
    mean = partial.loss / len(y)
    assert (mean == 0) if right else (0.3 * loss < mean < 3 * loss)
    assert partial.touched.any()


@PRECISIONS
def test_tiny_probabilities_keep_their_digits(precision: str) -> None:
    """Right answers with 1 - p = 1e-20: brute force sees 0, the truth is the derivative."""
    model = make(5, lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([46.0, 0.0, -1.0]))
        model[0].weight.mul_(1e-7)  # small deltas: a second order is not seen
    x, y = make_data((9, 4), 3)
    y = torch.zeros_like(y)
    partial = carry(model, "0.weight", np.arange(24), x, y, precision)
    model = copy.deepcopy(model).double()
    logits = model(x.double())
    loss = (logits[:, 1:] - logits[:, :1]).exp().sum(1).log1p()  # without cancellation
    weight = model[0].weight
    gradient = torch.autograd.grad(loss.sum(), weight)[0]
    truth = (-weight * gradient).detach().view(-1).numpy()
    scale = 0.1 * np.sqrt((truth**2).mean())
    assert 0 < np.abs(truth).max() < 1e-24
    assert (np.abs(partial.delta - truth) <= 1e-4 * np.maximum(np.abs(truth), scale)).all()


# --- few classes, few examples ----------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("n_classes", [1, 2])
@pytest.mark.parametrize("parameter", TARGETS)
def test_few_classes(parameter: str, n_classes: int, precision: str) -> None:
    """With one class the loss is 0, whatever the weights."""
    partial = check_exact(net(1, n_classes), parameter, *make_data(SHAPE, n_classes), precision)
    if n_classes == 1:
        assert not partial.delta.any()
        assert partial.touched.any()


@PRECISIONS
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_any_number_of_examples(n: int, batch: int, precision: str) -> None:
    x, y = make_data((n, *SHAPE[1:]), 4)
    for parameter in TARGETS[:4]:
        indices = some_sites(net(), parameter, 20)
        check_exact(net(), parameter, x, y, precision, indices=indices, batch=batch)


@pytest.mark.parametrize("lanes", [1, 7, 10_000])
def test_any_number_of_lanes_gives_the_same(lanes: int) -> None:
    x, y = make_data(SHAPE, 4)
    for parameter in TARGETS[::2]:
        indices = some_sites(net(), parameter, 10)
        some, others = (carry(net(), parameter, indices, x, y, "float64", lanes=n, batch=3) for n in (lanes, 4))
        np.testing.assert_allclose(some.delta, others.delta, rtol=1e-9, atol=1e-16)
        np.testing.assert_array_equal(some.touched, others.touched)


def test_one_site() -> None:
    x, y = make_data(SHAPE, 4)
    check_exact(net(), "again.weight", x, y, "float64", indices=np.array([5]), lanes=1)
    check_exact(net(), "again.weight", x, y, "float64", indices=np.array([5]), lanes=64)


@PRECISIONS
def test_ties_of_the_largest_logits_and_of_the_largest_in_a_window(precision: str) -> None:
    model = net()
    with torch.no_grad():
        model.out.weight[1] = model.out.weight[0]
        model.out.bias[1] = model.out.bias[0]
    x, y = make_data(SHAPE, 4)
    x = x.round()
    for parameter in TARGETS:
        check_exact(model, parameter, x, y % 2, precision, indices=some_sites(model, parameter, 24))
        check_exact(model, parameter, torch.ones_like(x), y, precision, indices=some_sites(model, parameter, 24))


# --- tiny and enormous ------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("parameter", TARGETS)
@pytest.mark.parametrize("size", [1e-20, 1e-40])
def test_tiny_weights(size: float, parameter: str, precision: str) -> None:
    """Down to float32's denormal numbers: not NaN, not more than there is."""
    model = edited(net(), lambda model: model.get_parameter(parameter).mul_(size))
    partial = check_exact(model, parameter, *make_data(SHAPE, 4), precision, indices=some_sites(model, parameter, 24))
    assert np.isfinite(partial.delta).all()
    assert np.abs(partial.delta).max() <= 1e4 * size


@PRECISIONS
def test_denormal_activations(precision: str) -> None:
    x, y = make_data(SHAPE, 4)
    check_exact(net(), "conv.weight", x * 1e-41, y, precision)
    model = edited(net(), lambda model: (model.hidden.weight.mul_(1e-42), model.hidden.bias.mul_(1e-42)))
    for parameter in TARGETS:
        partial = carry(model, parameter, some_sites(model, parameter, 24), x, y, precision)
        assert np.isfinite(partial.delta).all(), parameter


@PRECISIONS
@pytest.mark.parametrize("parameter", ["hidden.weight", "out.weight", "again.weight"])
def test_huge_weights(parameter: str, precision: str) -> None:
    """1e30 in the target: the loss is 1e30 nats, and finite."""
    model = edited(net(), lambda model: model.get_parameter(parameter).mul_(1e30))
    check_exact(model, parameter, *make_data(SHAPE, 4), precision, indices=some_sites(model, parameter, 24))


@PRECISIONS
@pytest.mark.parametrize("parameter", ["conv.weight", "again.weight", "hidden.weight"])
def test_huge_weights_behind(parameter: str, precision: str) -> None:
    model = edited(net(), lambda model: model.out.weight.mul_(1e30))
    check_exact(model, parameter, *make_data(SHAPE, 4), precision, indices=some_sites(model, parameter, 24))


@PRECISIONS
@pytest.mark.parametrize("parameter", TARGETS[::3] + TARGETS[5:])
@pytest.mark.parametrize("value", [1e3, -1e6, 1e15, 1e30, -1e100])
def test_huge_replacements(value: float, parameter: str, precision: str) -> None:
    """Replaced by a number that no float32 network could hold: the truth is float64's, and finite."""
    x, y = make_data(SHAPE, 4)
    model = net()
    indices = some_sites(model, parameter, 16)
    truth = brute_force(model, parameter, indices, x, y, value)
    assert np.isfinite(truth).all()
    check_exact(model, parameter, x, y, precision, indices=indices, value=value)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(6),
    "group": lambda: nn.GroupNorm(2, 6),
    "softmax": lambda: nn.Softmax(1),
}


@PRECISIONS
@pytest.mark.parametrize("value", [1e3, 1e8, 1e30])
@pytest.mark.parametrize("norm", NORMS)
def test_huge_replacements_before_a_normalisation(norm: str, value: float, precision: str) -> None:
    """What is normalised stays small, however large the weight; softmax is certain then."""
    x, y = make_data((9, 5), 3)
    check_exact(normed(NORMS[norm]), "first.weight", x, y, precision, value=value)


def normed(norm: Callable[[], nn.Module]) -> nn.Module:
    return make(
        4, lambda: nn.Sequential(OrderedDict(first=nn.Linear(5, 6), norm=norm(), tanh=nn.Tanh(), out=nn.Linear(6, 3)))
    )


@PRECISIONS
def test_an_rms_norm_bears_large_replacements_and_the_proof_refuses_huge_ones(precision: str) -> None:
    """Its root is an operation of its own: of its change by 1e-30 nothing is left in float64 beside what it was."""
    x, y = make_data((9, 5), 3)
    model = normed(lambda: nn.RMSNorm(6))
    check_exact(model, "first.weight", x, y, precision, value=1e3)
    with pytest.raises(ProofError):
        ablation.ablate(model, "first", {"test": (x, y)}, value=1e30, precision=precision, progress=False)


def test_an_overflow_is_refused() -> None:
    """Where float64 itself overflows there is no truth."""
    with pytest.raises(ExampleError, match="once a weight is replaced"):
        carry(net(), "hidden.weight", np.arange(8), *make_data(SHAPE, 4), "float64", value=1e308)


@PRECISIONS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_input_that_is_no_number_is_refused(bad: float, precision: str) -> None:
    """By the example's place in the split."""
    x, y = make_data(SHAPE, 4)
    x[5, 1, 2, 3] = bad
    with pytest.raises(ExampleError, match="NaN or infinite logits") as caught:
        carry(net(), "again.weight", np.arange(4), x, y, precision)
    assert caught.value.position == 5

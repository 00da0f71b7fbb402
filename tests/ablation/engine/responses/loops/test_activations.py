"""The elementwise functions of the compiled loops: torch's own values, autograd's derivatives, bounds that hold."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablation.engine.calls import record_calls
from ablation.engine.responses.loops import activations
from ablation.engine.responses.loops.activations import Function
from ablation.engine.responses.way import find_head

TORCH: dict[str, tuple[Function, Callable[[Tensor], Tensor]]] = {
    "leaky": (Function(activations.LEAKY, 0.2), lambda y: F.leaky_relu(y, 0.2)),
    "hardtanh": (Function(activations.HARDTANH, -0.5, 2.0), lambda y: F.hardtanh(y, -0.5, 2.0)),
    "hardsigmoid": (Function(activations.HARDSIGMOID), F.hardsigmoid),
    "hardswish": (Function(activations.HARDSWISH), F.hardswish),
    "sigmoid": (Function(activations.SIGMOID), torch.sigmoid),
    "tanh": (Function(activations.TANH), torch.tanh),
    "softplus": (Function(activations.SOFTPLUS, 2.0, 6.0), lambda y: F.softplus(y, 2.0, 6.0)),
    "silu": (Function(activations.SILU), F.silu),
    "gelu": (Function(activations.GELU), F.gelu),
}
# The same by what autograd differentiates as often as it is asked to.
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": lambda y: torch.log1p(torch.exp(2 * y)) / 2,
    "silu": lambda y: y * torch.sigmoid(y),
    "gelu": lambda y: y / 2 * (1 + torch.erf(y * math.sqrt(0.5))),
}
BENT = [name for name in TORCH if name not in SMOOTH]
generator = np.random.default_rng(0)


def series_at(function: Function, y: float) -> np.ndarray:
    a = np.empty(activations.INCREMENT_ORDERS)
    activations.series_of_function(function, y, np.empty(activations.INCREMENT_ORDERS + 1), a)
    return a


def sum_of(a: np.ndarray, d: np.ndarray) -> np.ndarray:
    return d * np.polynomial.polynomial.polyval(d, a)


def change_at(function: Function, y: float, d: np.float32) -> float:
    b = np.empty(activations.N_BENT, np.float32)
    activations.bend(function, y, b)
    return activations.bent_change(d, tuple(b))


def slope_at(own: Callable[[Tensor], Tensor], y: float) -> float:
    at = torch.tensor(y, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(own(at), at)[0].item()


@pytest.mark.parametrize("name", TORCH)
def test_values_are_torchs(name: str) -> None:
    function, own = TORCH[name]
    y = torch.cat([torch.linspace(-7, 7, 1401), torch.tensor([-60.0, -20.0, 0.0, 3.0, 20.0, 60.0])]).double()
    ours = np.array([activations.value_of(function, value) for value in y.numpy()])
    np.testing.assert_allclose(ours, own(y).numpy(), rtol=4e-16, atol=1e-15)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("y", [-5.3, -1.278, -0.4, 0.0, 0.75, 2.9])
def test_series_are_autograds_derivatives(name: str, y: float) -> None:
    at = torch.tensor(y, dtype=torch.float64, requires_grad=True)
    derivative, expected = SMOOTH[name](at), []
    for k in range(1, activations.INCREMENT_ORDERS + 1):
        (derivative,) = torch.autograd.grad(derivative, at, create_graph=True)
        expected.append(derivative.item() / math.factorial(k))
    np.testing.assert_allclose(series_at(TORCH[name][0], y), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", BENT)
def test_exact_forms_are_the_differences_of_values(name: str) -> None:
    function, own = TORCH[name]
    n_flat, straight = 0, 0.0
    for y in (*np.linspace(-5.03, 5.07, 51), -3.0, -0.5, 0.0, 2.0, 3.0):
        d = np.concatenate([generator.normal(size=50) * scale for scale in (1e-3, 1.0, 5.0)]).astype(np.float32)
        ours = np.array([change_at(function, y, each) for each in d])
        t = own(torch.tensor(y + d.astype(np.float64))).numpy() - own(torch.tensor(y).double()).item()
        assert (np.abs(ours - t) <= 1e-6 * np.abs(d)).all(), y
        is_flat = (t == 0) & (slope_at(own, y) == 0)
        assert (ours[is_flat] == 0).all(), y
        n_flat += is_flat.sum()
        far = float(np.abs(d).max())
        assert np.abs(t).max() <= activations.largest_bent_change(function, y, far) * (1 + 1e-12)
        straight = max(straight, np.abs(t - d * slope_at(own, y)).max())  # the control: no kink at all
    assert straight > 0.1
    assert bool(n_flat) is (name != "leaky")


def test_a_softplus_that_jumps_is_not_continued_by_its_series() -> None:
    function = Function(activations.SOFTPLUS, 2.0, 6.0)
    assert activations.reaches_of(function, 2.9)[1] < 0.1
    assert activations.reaches_of(function, 3.2)[1] < 0.2
    assert (
        activations.reaches_of(function, 0.0)[1]
        == activations.REACHES[activations.SOFTPLUS - activations.FIRST_SMOOTH, 1] / 2
    )


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("which", [0, 1])
def test_what_series_leave_out_is_within_its_bound(name: str, which: int) -> None:
    function, order = TORCH[name][0], (activations.SHORT_INCREMENT, activations.LONG_INCREMENT)[which]
    scale = function.first if name == "softplus" else 1.0
    most = max(abs(series_at(function, y)[0]) for y in np.linspace(-4, 4, 81))
    cut_short = 0.0
    for y in np.linspace(-8, 8, 101) / scale:
        reach, a = activations.reaches_of(function, y)[which], series_at(function, y)
        if reach == 0:
            continue
        d = np.linspace(-reach, reach, 9)
        t = np.array([activations.change_of(function, y, each) for each in d])
        rest = activations.rest_of_function(function, y, reach, order)
        assert np.abs(sum_of(a[:order], d) - t).max() <= rest + 3e-15
        assert rest <= 5e-7 * reach * max(abs(a[0]), most / 10)
        cut_short = max(cut_short, np.abs(sum_of(a[: order - 2], d) - t).max() / (rest + 3e-15))
    assert cut_short > 1


@pytest.mark.parametrize("name", SMOOTH)
def test_changes_that_rounding_swallows_are_not_seen(name: str) -> None:
    function, own = TORCH[name]
    y = torch.linspace(-6, 6, 25).double() + 0.01
    for value in y.numpy():
        slope = series_at(function, value)[0]
        unseen = activations.unseen_change(function, value, slope)
        if slope == 0:
            continue
        for factor, is_seen in ((0.001, False), (50.0, True)):
            d = factor * unseen / slope
            moved = own(torch.tensor(value + d)) != own(torch.tensor(value))
            assert bool(moved) is is_seen or unseen == 0, (value, factor)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LeakyReLU(0.2, inplace=True), Function(activations.LEAKY, 0.2)),
        (nn.LeakyReLU(), Function(activations.LEAKY, 0.01)),
        (nn.ReLU6(inplace=True), Function(activations.HARDTANH, 0.0, 6.0)),
        (nn.Hardtanh(), Function(activations.HARDTANH, -1.0, 1.0)),
        (nn.Hardtanh(-2, 3, inplace=True), Function(activations.HARDTANH, -2.0, 3.0)),
        (nn.Hardsigmoid(), Function(activations.HARDSIGMOID)),
        (nn.Hardswish(inplace=True), Function(activations.HARDSWISH)),
        (nn.Sigmoid(), Function(activations.SIGMOID)),
        (nn.Tanh(), Function(activations.TANH)),
        (nn.Softplus(beta=3), Function(activations.SOFTPLUS, 3.0, 20.0)),
        (nn.SiLU(inplace=True), Function(activations.SILU)),
        (nn.GELU(), Function(activations.GELU)),
        (nn.GELU("tanh"), None),
        (nn.Softplus(beta=-1.0), None),
        (nn.ELU(), None),
        (nn.Mish(), None),
        (nn.ReLU(), Function(activations.RELU)),
        (nn.Identity(), Function(activations.IDENTITY)),
    ],
)
def test_functions_are_known_with_their_arguments(module: nn.Module, expected: Function | None) -> None:
    model = nn.Sequential(nn.Linear(5, 4), module, nn.Linear(4, 3))
    head = find_head(record_calls(model, torch.randn(2, 5)), "0.weight")
    assert head is not None
    assert head.function == expected
    assert head.is_relu is isinstance(module, nn.ReLU)


def test_functions_called_in_other_ways_are_known_too() -> None:
    class Other(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.target, self.function = nn.Linear(5, 4), function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.target(x))

    found = []
    for function in (
        lambda y: F.hardtanh_(y, max_val=4.0),
        lambda y: F.leaky_relu_(y, 0.3),
        lambda y: y.sigmoid_(),
        lambda y: torch.tanh(y),
        lambda y: F.softplus(y, 2.0, threshold=5),
        lambda y: torch.tanh(torch.sigmoid(y)),  # two of them are none
    ):
        head = find_head(record_calls(Other(function), torch.randn(2, 5)), "target.weight")
        found.append(None if head is None else head.function)
    assert found == [
        Function(activations.HARDTANH, -1.0, 4.0),
        Function(activations.LEAKY, 0.3),
        Function(activations.SIGMOID),
        Function(activations.TANH),
        Function(activations.SOFTPLUS, 2.0, 5.0),
        None,
    ]

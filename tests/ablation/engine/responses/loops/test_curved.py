"""Heads and tails behind other functions than ReLU, where `test_whole.py` doesn't reach: saturation, blocks, bounds."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ablation.engine.batches import run_batches
from ablation.engine.calls import record_calls
from ablation.engine.deltas import Deltas, make_runs
from ablation.engine.interface import Setup
from ablation.engine.paths import open_path
from ablation.engine.responses.loops import rows
from ablation.engine.responses.loops.activations import GELU, HARDSWISH, HARDTANH, IDENTITY, RELU, Function
from ablation.engine.responses.way import find_averaged
from ablation.sites import EveryWeight, Sites
from tests.compare import brute_force, count_moved

GENERATOR = torch.Generator().manual_seed(4)


def make_tail(function: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(5, 7, (2, 3)), nn.BatchNorm2d(7), function, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)
    )
    nn.init.normal_(model[1].weight, std=3.0)
    return model.eval()


def every_weight(model: nn.Module) -> EveryWeight:
    weight = model[0].weight.detach().reshape(-1)
    return EveryWeight(weight, 0, len(weight), "zero")


def open_for(model: nn.Module, sites: Sites, x: Tensor, path: str) -> Any:
    return open_path(path, Setup(model, "0.weight", sites), x[:2])


def sums_of(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The sums over one batch of all weights, and what the series left out at most, by unit."""
    sites = every_weight(model)
    _, (responses,) = open_for(model, sites, x, "response").run(x, labels)
    assert not isinstance(responses, Deltas)
    sums: dict[str, np.ndarray] = {"delta": np.zeros(len(sites)), "touched": np.zeros(len(sites), np.int32)}
    bounds = np.zeros(responses.n_units)
    responses.add(sums, make_runs(len(labels), 0, None), bounds)
    return sums, bounds


@pytest.mark.parametrize("function", [nn.SiLU(), nn.Hardswish(), nn.Tanh()])
def test_blocks_of_classes_of_a_tail_are_those_of_one_by_one(function: nn.Module) -> None:
    model, x = make_tail(function), torch.randn(36, 5, 6, 5, generator=GENERATOR)
    labels = torch.randint(4, (36,), generator=GENERATOR)
    sites = every_weight(model)
    single, rows = (
        run_batches(
            open_for(model, given, x, path),
            model,
            zip(x.split(11), labels.split(11), strict=True),  # classes of 9 begin and end within batches
            n_sites=len(sites),
            first_example=0,
            per_class=9,
            proof_examples=frozenset({3, 30}),
            device=x.device,
            on_step=lambda examples, sites: None,
        )
        for path, given in (("direct", sites.listed()), ("response", sites))
    )
    for field in ("delta", "delta_squared", "within", "proof"):
        ours, expected = getattr(rows, field), getattr(single, field)
        assert expected.any()
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max(), err_msg=field)
    np.testing.assert_array_equal(rows.touched, single.touched)


@pytest.mark.parametrize(("function", "bias"), [(nn.Tanh(), 22.0), (nn.GELU(), -40.0), (nn.Hardswish(), -9.0)])
def test_what_rounding_swallows_is_untouched_in_every_path(function: nn.Module, bias: float) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 5), function, nn.Linear(5, 3))
    model[0].bias.data[:3] = bias  # units where f is flat to the last digit; two others
    x, labels = torch.randn(21, 6, generator=GENERATOR), torch.randint(3, (21,), generator=GENERATOR)
    rows = sums_of(model, x, labels)[0]["touched"]
    sites = every_weight(model).listed()
    _, pieces = open_for(model, sites, x, "direct").run(x, labels)
    single = torch.cat([piece.touched for piece in pieces]).sum(dim=1).numpy()
    truth = count_moved(model, "0.weight", np.arange(30), x.double())
    np.testing.assert_array_equal(rows, truth)
    np.testing.assert_array_equal(single, truth)
    assert not truth[:18].any()
    assert truth[18:].all()


@pytest.mark.parametrize("function", [nn.ReLU(), nn.Hardswish(), nn.SiLU()])
def test_a_unit_that_moves_all_logits_alike_is_touched(function: nn.Module) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 5), function, nn.Linear(5, 3))
    model[2].weight.data[:, 1] = 0.5
    x, labels = torch.randn(21, 6, generator=GENERATOR), torch.randint(3, (21,), generator=GENERATOR)
    sums, _ = sums_of(model, x, labels)
    own = slice(6, 12)
    np.testing.assert_array_equal(sums["touched"], count_moved(model, "0.weight", np.arange(30), x.double()))
    assert sums["touched"][own].all()
    assert not sums["delta"][own].any()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_what_is_left_out_is_bounded_and_small(scale: float) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3))
    model[0].weight.data.mul_(scale)
    x, labels = torch.randn(40, 6, generator=GENERATOR), torch.randint(3, (40,), generator=GENERATOR)
    sums, bounds = sums_of(model, x, labels)
    brute = brute_force(model, "0.weight", np.arange(30), x.double(), labels)
    rounding = 1e-6 * np.abs(brute).sum(axis=1)  # of float32
    error = np.abs(sums["delta"] - brute.sum(axis=1))
    assert (error <= rounding + bounds.repeat(6)).all()
    assert (bounds > 0).all()
    assert (bounds <= 1e-5 * np.abs(brute).sum(axis=1).reshape(5, 6).max(axis=1)).all()


def test_the_loss_is_no_steeper_than_its_bound() -> None:
    generator = np.random.default_rng(6)
    closest = 0.0
    for confidence in (0.0, 4.0):
        z = generator.normal(size=9) + confidence * (np.arange(9) == 2)
        v = generator.normal(size=9)
        for label in range(9):
            q = np.exp(z) / np.exp(z).sum()
            q[label] = 0
            reach = 0.3 / (v.max() - v.min())
            t = np.linspace(-reach, reach, 41)
            loss = np.log1p((q * np.expm1(t[:, None] * (v - v[label]))).sum(axis=1))
            steepest = np.abs(np.diff(loss) / np.diff(t)).max()
            slope = rows.slope_of_loss(q, v, 0, label, False)
            assert steepest <= slope * np.exp(2 * 0.3)
            closest = max(closest, steepest / slope)
            moved = np.log1p(q[0] * np.expm1(t)) if label else np.log1p(q.sum() * np.expm1(-t))
            assert np.abs(np.diff(moved) / np.diff(t)).max() <= rows.slope_of_loss(q, v, 0, label, True) * np.exp(0.6)
    assert closest > 1  # the control: without the growth on the way it is no bound


def test_tails_say_which_function_they_have() -> None:
    x = torch.randn(2, 5, 4, 4)
    cases = {
        nn.ReLU(): Function(RELU),
        nn.ReLU6(): Function(HARDTANH, 0.0, 6.0),
        nn.Hardswish(): Function(HARDSWISH),
        nn.GELU(): Function(GELU),
    }
    for module, expected in cases.items():
        tail = find_averaged(record_calls(make_tail(module), x), "0.weight")
        assert tail is not None
        assert tail.function == expected
    without = find_averaged(record_calls(make_tail(nn.Identity()), x), "0.weight")
    assert without is not None
    assert without.function == Function(IDENTITY)
    for unknown in (
        nn.ELU(),
        nn.GELU("tanh"),
        nn.Sequential(nn.ReLU(), nn.SiLU()),
        nn.Sequential(nn.SiLU(), nn.ReLU()),
    ):
        assert find_averaged(record_calls(make_tail(unknown), x), "0.weight") is None

"""The finite path on a small network, next to plain PyTorch."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ablation.engine.batches import run_batches
from ablation.engine.carried.dispatch import Rule
from ablation.engine.carried.finite import Finite
from ablation.engine.carried.products import RULES
from ablation.engine.interface import Setup
from ablation.partial import PartialSums
from ablation.sites import make_sites
from ablation.spec import Constant
from tests.compare import BOUND, brute_force, utility_error


def make(seed: int, build: Any) -> nn.Module:
    """A network of random weights, which does not touch the random state of others."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return build()


def make_data(shape: tuple[int, ...], n_classes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randint(n_classes, shape[:1], generator=generator)


def some_sites(model: nn.Module, parameter: str, n: int) -> np.ndarray:
    """All weights of a small layer, about `n` spread over a larger one."""
    n_weights = model.get_parameter(parameter).numel()
    return np.arange(n_weights)[:: max(1, round(n_weights / n))]


def carry(
    model: nn.Module,
    parameter: str,
    indices: np.ndarray,
    inputs: Tensor,
    labels: Tensor,
    precision: str,
    *,
    value: float = 0.0,
    lanes: int = 24,
    batch: int = 4,
    rules: Mapping[Any, Rule] = RULES,
) -> PartialSums:
    """What the finite path sums up, in batches that don't divide the examples."""
    if precision == "float64":
        model = copy.deepcopy(model).double()
    weights = model.get_parameter(parameter)
    sites = make_sites(weights, indices, Constant(constant=value) if value else "zero")
    path = Finite(Setup(model, parameter, sites, precision, lanes=lanes), rules=rules)
    return run_batches(
        path,
        model,
        zip(inputs.to(weights.dtype).split(batch), labels.split(batch), strict=True),
        n_sites=len(sites),
        device=torch.device("cpu"),
        on_step=lambda examples, sites: None,
        first_example=0,
        per_class=None,
        proof_examples=frozenset(),
    )


def check_exact(
    model: nn.Module,
    parameter: str,
    inputs: Tensor,
    labels: Tensor,
    precision: str,
    *,
    indices: np.ndarray | None = None,
    value: float = 0.0,
    **options: Any,
) -> PartialSums:
    """Carry about 40 sites (or `indices`), and compare with brute force within the bounds of docs/02-exactness.md."""
    indices = some_sites(model, parameter, 40) if indices is None else indices
    partial = carry(model, parameter, indices, inputs, labels, precision, value=value, **options)
    truth = brute_force(model, parameter, indices, inputs, labels, value)
    n = len(labels)
    utility, loss = partial.delta / n, partial.loss / n
    worst = int(np.abs(utility - truth.mean(1)).argmax())
    unseen = np.abs(utility - truth.mean(1)) <= 4e-15 * (1 + loss)  # brute force is no better than that
    error = utility_error(np.where(unseen, truth.mean(1), utility), truth, precision, loss)
    assert error <= BOUND[precision], (
        f"{parameter}, {precision}: error {error:.3g}; at {indices[worst]} {utility[worst]:.17g} "
        f"instead of {truth[worst].mean():.17g}"
    )
    seen = (np.abs(truth) > 1e-13 * (1 + loss)).sum(axis=1)
    assert (partial.touched >= seen).all(), f"{parameter}, {precision}: touched {partial.touched} below {seen}"
    return partial

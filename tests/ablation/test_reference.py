"""The reference against numbers worked out by hand, and against brute force written without it."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ablation.reference import in_float64, reference_deltas
from ablation.sites import make_sites
from tests.cases import make_cases
from tests.compare import brute_force


def tiny() -> nn.Module:
    """Two inputs, two classes, no bias: logits z = W x."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    return model


def test_by_hand() -> None:
    # x = (1, 2): z = (1 + 4, 3 - 2) = (5, 1), label 0: loss = log(1 + e^-4).
    # Without w_01 = 2: z = (1, 1), loss = log 2. Without w_10 = 3: z = (5, -2), loss = log(1 + e^-7).
    sites = make_sites(tiny().weight, np.array([1, 2]), "zero")
    deltas = reference_deltas(tiny(), "weight", sites, torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    intact = math.log1p(math.exp(-4))
    assert deltas.dtype == torch.float64
    assert deltas[0, 0].item() == pytest.approx(math.log(2) - intact, rel=1e-14)  # positive: the weight helps
    assert deltas[1, 0].item() == pytest.approx(math.log1p(math.exp(-7)) - intact, rel=1e-12)  # negative: it hurts


@pytest.mark.parametrize("case", make_cases(), ids=str)
def test_equals_brute_force(case) -> None:
    weights = case.model.get_parameter(case.parameter)
    indices = np.arange(weights.numel())[:: max(1, weights.numel() // 12)]
    sites = make_sites(weights, indices, "zero")
    deltas = reference_deltas(in_float64(case.model), case.parameter, sites, case.inputs.double(), case.labels)
    truth = brute_force(case.model, case.parameter, indices, case.inputs, case.labels)
    np.testing.assert_allclose(deltas.numpy(), truth, rtol=1e-10, atol=1e-14)


def test_leaves_the_model_as_it_was() -> None:
    case = next(case for case in make_cases() if case.name == "convnet")
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    assert case.model.training
    sites = make_sites(case.model.get_parameter(case.parameter), np.array([0, 3]), "zero")
    reference_deltas(case.model, case.parameter, sites, case.inputs, case.labels)
    assert case.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in case.model.state_dict().items())

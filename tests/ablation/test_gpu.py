"""Comparisons of the CPU tests, repeated on a CUDA device (`make test-gpu`) by the code that the CPU tests run."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ablation
from tests.cases import Case, make_cases
from tests.compare import BOUND, brute_force, count_moved, utility_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("case", make_cases(), ids=str)
def test_exact_on_a_gpu(case: Case, precision: str) -> None:
    sites = min(12, case.model.get_parameter(case.parameter).numel())
    splits = {"test": (case.inputs, case.labels)}
    layer = case.parameter.removesuffix(".weight")
    table = ablation.ablate(case.model, layer, splits, sites=sites, precision=precision, device="cuda", progress=False)
    truth = brute_force(case.model, case.parameter, table.columns["index"], case.inputs, case.labels)
    loss = table.about["baseline"]["test"]["loss"]
    bound = BOUND["float64"] if precision == "float64" else 1e-3  # float32 convolutions may run in TF32 there
    assert utility_error(table.columns["utility_test"], truth, precision, loss) <= bound
    assert next(case.model.parameters()).device.type == "cpu"


def test_same_bytes_on_a_gpu() -> None:
    case = next(case for case in make_cases() if case.parameter == "fc1.weight")
    splits = {"test": (case.inputs, case.labels)}
    options = {"sites": 40, "device": "cuda", "progress": False}
    first, again = (ablation.ablate(case.model, "fc1", splits, **options) for _ in range(2))
    np.testing.assert_array_equal(first.columns["utility_test"], again.columns["utility_test"])


@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("sites", ["all", 200])
def test_whole_rows_on_a_gpu_equal_brute_force(layer: str, sites: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 29), nn.ReLU(), nn.Linear(29, 11))
    with torch.no_grad():
        model[2].weight[0, :9] *= 40  # some steps beyond the series
        model[2].weight[:, 3] = 0  # a unit that no logit hears of
    x, labels = torch.randn(531, 37).relu(), torch.arange(531) % 11
    options: dict[str, Any] = {"sites": sites, "engine": "response", "device": "cuda", "progress": False}
    table, again = (ablation.ablate(model, layer, {"test": (x, labels)}, **options) for _ in range(2))
    columns = table.columns
    truth = brute_force(model, f"{layer}.weight", columns["index"], x, labels)
    assert utility_error(columns["utility_test"], truth, "mixed") <= BOUND["mixed"]
    moved = count_moved(model, f"{layer}.weight", columns["index"], x)
    np.testing.assert_array_equal(columns["touched_test"], moved)
    assert columns["utility_test"].tobytes() == again.columns["utility_test"].tobytes()
    assert utility_error(columns["utility_test"], np.roll(truth, 1, axis=0), "mixed") > BOUND["mixed"]  # the control

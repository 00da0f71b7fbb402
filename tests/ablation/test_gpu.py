"""The same comparisons over again on a CUDA device (`make test-gpu`); the code is the one that the CPU tests run."""

import numpy as np
import pytest
import torch

import ablation
from tests.cases import Case, make_cases
from tests.compare import BOUND, brute_force, utility_error

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

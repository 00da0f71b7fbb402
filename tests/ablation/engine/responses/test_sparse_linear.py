"""The Linear that leaves out inputs of 0: the numbers of all products, whatever the shapes, batches and threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ablation.engine.responses import sparse_linear
from ablation.engine.responses.sparse_linear import Linear


def make_inputs(share: float, n: int = 40, inputs: int = 517) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, inputs, generator=generator)
    return x * (torch.rand(n, inputs, generator=generator) < share)


def make_weight(units: int = 1100, inputs: int = 517) -> Tensor:
    return torch.randn(units, inputs, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples the loop was given, each time it ran."""
    seen: list[int] = []
    add = sparse_linear.add_active

    def counted(x, columns, y):  # type: ignore[no-untyped-def]
        seen.append(len(x))
        add(x, columns, y)

    monkeypatch.setattr(sparse_linear, "add_active", counted)
    return seen


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_same_as_all_products(share: float, dtype: torch.dtype, has_bias: bool, runs: list[int]) -> None:
    x, weight = make_inputs(share), make_weight().to(dtype)
    bias = torch.randn(len(weight)).to(dtype) if has_bias else None
    y = Linear(weight, bias, torch.float64)(x)
    assert sum(runs) == len(x)
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == torch.float64
    assert (y - truth).abs().max() < 1e-12


def test_a_number_depends_neither_on_its_batch_mates_nor_on_threads(runs: list[int]) -> None:
    x, linear = make_inputs(0.2), Linear(make_weight(), None, torch.float64)
    before = torch.get_num_threads()
    try:
        many = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            many.append(linear(x))
    finally:
        torch.set_num_threads(before)
    in_parts = torch.cat([linear(x[:17]), linear(x[17:])])
    assert all(torch.equal(y, in_parts) for y in many)
    assert len(runs) > 4


def test_some_units_have_the_numbers_that_they_have_among_all() -> None:
    x, linear = make_inputs(0.2), Linear(make_weight(1600), torch.randn(1600), torch.float64)
    units = torch.arange(300, 1400)
    assert torch.equal(linear.of_units(units)(x), linear(x)[:, units])
    assert linear.of_units(torch.arange(1600)) is linear


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_few_examples_take_no_copy_of_the_weight(n: int, has_bias: bool, runs: list[int]) -> None:
    x, weight = make_inputs(0.2, n), make_weight()
    bias = torch.randn(len(weight)) if has_bias else None
    linear = Linear(weight, bias, torch.float64)
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (linear(x) - truth).abs().max() < 1e-12
    assert not runs
    assert vars(linear).keys().isdisjoint({"weight", "columns"})


@pytest.mark.parametrize("worst", [float("inf"), float("nan")])
def test_nothing_is_left_out_where_it_would_be_zero_times_infinity(worst: float, runs: list[int]) -> None:
    x, weight = make_inputs(0.2), make_weight()
    x[2, 5], weight[7, 5] = 0.0, worst
    assert Linear(weight, None, torch.float64)(x)[2, 7].isnan()
    assert not runs


def test_infinite_inputs_are_active(runs: list[int]) -> None:
    x, weight = make_inputs(0.2), make_weight()
    x[1, 4], x[3, 4] = float("inf"), float("nan")
    y = Linear(weight, None, torch.float64)(x)
    assert runs
    assert y[1].isinf().all()
    assert y[3].isnan().all()


@pytest.mark.parametrize(
    ("share", "units", "weight_dtype", "dtype"),
    [
        (0.6, 1100, torch.float32, torch.float64),  # nothing to gain
        (0.2, 100, torch.float32, torch.float64),  # small
        (0.2, 1100, torch.float64, torch.float64),  # would lose digits
        (0.2, 1100, torch.float32, torch.float32),  # as torch computes it
    ],
)
def test_the_others_are_torchs_own(
    share: float, units: int, weight_dtype: torch.dtype, dtype: torch.dtype, runs: list[int]
) -> None:
    x, weight = make_inputs(share), make_weight(units).to(weight_dtype)
    assert torch.equal(Linear(weight, None, dtype)(x), F.linear(x.to(dtype), weight.to(dtype)))
    assert not runs

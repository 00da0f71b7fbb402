"""The compiled loops against plain float64 arithmetic, and against the operations that other devices take."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ablation.engine.carried import linear_relu
from ablation.engine.carried.representations import Block, Columns, Product
from ablation.engine.expm1 import expm1_sums
from ablation.engine.loss import loss_delta_and_touched, make_intact
from ablation.engine.threads import SMALL


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def relu_moves(base: Tensor, moves: Tensor) -> Tensor:
    return torch.relu(base.double() + moves.double()) - torch.relu(base.double())


def written_out(rows: list[tuple[Tensor, Tensor]], n_outputs: int) -> Tensor:
    columns, numbers = zip(*rows, strict=True)
    assert all(len(which.unique()) == len(which) for which in columns)
    return Columns(columns, numbers, n_outputs).dense().double()


# --- products and parts of a matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5, 7), (300, 257, 260)], ids=["small", "large"])
def test_product_in_every_layout(shape: tuple[int, int, int], generator: torch.Generator) -> None:
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)
    truth = a.double() @ b.double().T
    scale = a.double().norm(dim=1)[:, None] * b.double().norm(dim=1)
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            assert ((linear_relu.product(left, right) - truth).abs() <= 1e-6 * scale).all()
    assert ((linear_relu.product(a, b.flip(1)) - truth).abs() > 1e-3 * scale).any()  # the comparison sees an error


def test_parts_of_a_matrix(generator: torch.Generator) -> None:
    matrix = torch.randn(11, 13, generator=generator)
    rows, columns = torch.tensor([4, 0, 9, 3]), torch.tensor([12, 5, 0])
    assert torch.equal(linear_relu.picked(matrix, rows, columns), matrix[rows[:, None], columns])
    counted = torch.rand(3, 13, generator=generator) < 0.5
    truth = (matrix.double().square() @ counted.double().T).sqrt().T
    torch.testing.assert_close(linear_relu.lengths(matrix, counted), truth, rtol=1e-12, atol=0)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e-2, 0.3, 4.0])
def test_sums_over_classes(size: float, generator: torch.Generator) -> None:
    n_examples, n_classes = 3, 1000  # several runs of classes, and a part of one
    labels = torch.tensor([7, 999, 0])
    intact = make_intact(torch.randn(n_examples, n_classes, generator=generator, dtype=torch.float64), labels)
    examples = torch.randint(n_examples, (17,), generator=generator)
    dz = torch.randn(17, n_classes, generator=generator) * size
    sums, touched = expm1_sums(dz, intact.rest, labels, examples)

    def terms(of: Tensor) -> Tensor:
        return intact.rest[examples] * torch.expm1(dz.double() - dz.double().gather(1, of[examples, None]))

    truth, scale = terms(labels).sum(dim=1), terms(labels).abs().sum(dim=1)
    assert ((sums - truth).abs() <= 3e-7 * (1 + size) * scale).all()  # dz is rounded, and large numbers' exp grows it
    assert touched.all()
    assert ((sums - terms(labels.roll(1)).sum(dim=1)).abs() > 1e-3 * scale).any()  # another label is seen
    delta, _ = loss_delta_and_touched(intact, examples, dz)
    wide, _ = loss_delta_and_touched(intact, examples, dz.double())  # PyTorch's operations
    assert ((delta - wide).abs() <= 1e-6 * torch.maximum(scale, wide.abs())).all()


def test_touched_by_any_number_but_zero() -> None:
    dz = torch.zeros(4, 300)
    dz[1], dz[2, 299], dz[3, 0] = -0.0, 1e-40, -3.0
    rest, labels = torch.full((1, 300), 1 / 300), torch.tensor([5])
    _, touched = expm1_sums(dz, rest, labels, torch.zeros(4, dtype=torch.int64))
    assert touched.tolist() == [False, False, True, True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 88.5, 200.0, 3e38])
@pytest.mark.parametrize("place", [2, 5, 299], ids=["other", "label", "last"])
def test_what_is_not_finite_shows(value: float, place: int) -> None:
    """Pairs beyond the series take a difference of two losses in float64."""
    logits = torch.linspace(-2, 3, 300, dtype=torch.float64)[None]
    intact = make_intact(logits, torch.tensor([5]))
    dz = torch.full((1, 300), 1e-3)
    dz[0, place] = value
    delta, _ = loss_delta_and_touched(intact, torch.zeros(1, dtype=torch.int64), dz)
    truth, _ = loss_delta_and_touched(intact, torch.zeros(1, dtype=torch.int64), dz.double())
    torch.testing.assert_close(delta, truth, rtol=1e-6, atol=1e-6, equal_nan=True)


# --- a Linear and a ReLU ----------------------------------------------------------------------------------------------


def run_case(generator: torch.Generator, *, size: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A matrix with a part of a tile, runs that some ablations share, and the dense truth of dy."""
    n_outputs, n_inputs, n_lanes, n_examples, run = 141, 35, 23, 4, 5
    matrix = torch.randn(n_outputs, n_inputs, generator=generator)
    first = torch.randint(n_inputs // run, (n_lanes,), generator=generator) * run
    numbers = torch.randn(n_lanes, n_examples, run, generator=generator) * size
    numbers *= torch.rand(numbers.shape, generator=generator) < 0.6
    numbers[3] = 0
    base = torch.randn(n_examples, n_outputs, generator=generator)
    base[0, 5] = 0
    moves = Block(1, first, numbers, n_inputs).dense().double() @ matrix.double().T
    return matrix, first, numbers, base, moves.view(n_lanes, n_examples, n_outputs)


def column_case(
    generator: torch.Generator, *, size: float = 0.3
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor]:
    n_outputs, n_inputs, n_lanes, n_examples = 300, 90, 70, 3
    matrix = torch.randn(n_outputs, n_inputs, generator=generator)
    columns = tuple(torch.randperm(n_inputs, generator=generator)[:n] for n in (40, 1, 77))
    sizes = torch.rand(n_lanes, 1, generator=generator).pow(4) * size  # a few ablations move much more than others
    numbers = tuple(torch.randn(n_lanes, len(which), generator=generator) * sizes for which in columns)
    base = torch.randn(n_examples, n_outputs, generator=generator)
    base[1, 5] = 0
    return matrix, columns, numbers, base, Columns(columns, numbers, n_inputs).dense().double() @ matrix.double().T


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.3, 30.0])
@pytest.mark.parametrize("kind", ["run", "columns"])
def test_behind_a_relu(kind: str, size: float, generator: torch.Generator) -> None:
    if kind == "run":
        matrix, first, numbers, base, moves = run_case(generator, size=size)
        rows = linear_relu.run_rows(matrix, first, numbers, base)
    else:
        matrix, columns, parts, base, moves = column_case(generator, size=size)
        rows = linear_relu.column_rows(matrix, columns, parts, base)
    got, truth = written_out(rows, matrix.shape[0]), relu_moves(base, moves)
    assert ((got - truth).abs() <= 1e-6 * moves.abs().amax()).all()
    opened = (truth != 0) & (base <= 0)
    assert bool(opened.any()) == (size > 0)
    assert torch.equal((got != 0) & (base <= 0), opened)  # a closed unit that opens is never left out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_way_of_other_devices(dtype: torch.dtype, generator: torch.Generator) -> None:
    """`Product.relu` takes the loops for a Linear's matrix in float32, and PyTorch's operations for others."""
    matrix, first, numbers, base, _ = run_case(generator)
    block = Block(1, first, numbers.to(dtype), matrix.shape[1])
    once = Product(block, matrix.T.to(dtype)).relu(base.double())
    other = Product(block, matrix.T.contiguous().to(dtype)).relu(base.double())
    torch.testing.assert_close(once.dense(), other.dense(), rtol=1e-4, atol=1e-6)
    behind = torch.randn(19, len(matrix), generator=generator).to(dtype)
    twice = Product(once, behind.T).relu(base[:, :19].double())
    others = Product(other, behind.T.contiguous()).relu(base[:, :19].double())
    torch.testing.assert_close(twice.dense(), others.dense(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Product(once, behind.T).dense(), Product(other, behind.T.contiguous()).dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("weights", "moves"), [(1e-24, 1), (1, 1e-24), (1e20, 1), (1e22, 1e-22), (1e-22, 1e22)])
def test_no_opening_is_lost_to_squares(
    weights: float, moves: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The bound on what can open a unit squares numbers; tiny ones vanish and large ones overflow in float32."""
    power = 1 if dtype == torch.float32 else 8  # the same in float64
    matrix, columns, parts, base, _ = column_case(generator)
    matrix, base = matrix.to(dtype) * weights**power, base.to(dtype) * weights**power * moves**power
    parts = tuple(part.to(dtype) * moves**power for part in parts)
    base[2, ::2] = 0  # whatever comes opens it
    for which in (0, 2):
        idle = torch.ones(90, dtype=torch.bool).index_fill(0, columns[which], False)
        own = matrix.masked_fill(idle, torch.finfo(dtype).max / 1e3)  # what takes no part
        given = Columns((columns[which],), (parts[which],), 90)
        truth = relu_moves(base[which], parts[which].double() @ own[:, columns[which]].T.double())
        scale = truth.abs().amax()
        for layout in (own.T, own.T.contiguous()):
            got = Product(given, layout).relu(base[None, which].double()).dense()[:, 0].double()
            assert ((got - truth).abs() <= 1e-6 * scale).all()
            assert torch.equal((got != 0) & (base[which] <= 0), (truth != 0) & (base[which] <= 0))


def test_the_default_type_of_torch_does_not_matter(generator: torch.Generator) -> None:
    matrix, first, numbers, base, _ = run_case(generator)
    _, columns, parts, _, _ = column_case(generator)
    other = torch.randn(300, 90, generator=generator), torch.randn(3, 300, generator=generator)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        rows = linear_relu.run_rows(matrix, first, numbers, base) + linear_relu.column_rows(
            other[0], columns, parts, other[1]
        )
    finally:
        torch.set_default_dtype(before)
    assert all(moves.dtype == torch.float32 for _, moves in rows)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_behind_a_relu_what_is_not_finite_shows(value: float, generator: torch.Generator) -> None:
    matrix, first, numbers, base, _ = run_case(generator)
    numbers[7, 2, 1] = value
    got = written_out(linear_relu.run_rows(matrix, first, numbers, base), len(matrix))
    assert not got[7, 2].isfinite().all()
    assert got[:7].isfinite().all()
    matrix, columns, parts, base, _ = column_case(generator)
    parts[2][7, 1] = value
    got = written_out(linear_relu.column_rows(matrix, columns, parts, base), len(matrix))
    assert not got[7, 2].isfinite().all()
    assert got[:7].isfinite().all()
    for dtype in (torch.float32, torch.float64):  # PyTorch's operations
        given = Columns(columns, tuple(part.to(dtype) for part in parts), matrix.shape[1])
        got = Product(given, matrix.T.to(dtype).contiguous()).relu(base.double()).dense()
        assert not got[7, 2].isfinite().all()
        assert got[:7].isfinite().all()
        assert got[:7].any()


# --- threads ----------------------------------------------------------------------------------------------------------


def test_same_bytes_on_any_number_of_threads(threads: Callable[[int], None], generator: torch.Generator) -> None:
    matrix = torch.randn(2100, 2000, generator=generator)
    first = torch.randint(200, (1024,), generator=generator) * 10
    numbers = torch.randn(1024, 2, 10, generator=generator) * 0.1
    base = torch.randn(2, 2100, generator=generator)
    labels, examples = torch.tensor([1, 2]), torch.randint(2, (1024,), generator=generator)
    dz, rest = torch.randn(1024, 4200, generator=generator), torch.rand(2, 4200, generator=generator)
    columns = (torch.arange(0, 2000, 2), torch.arange(1, 2000, 2))
    few = torch.randn(1024, 1000, generator=generator) * torch.rand(1024, 1, generator=generator).pow(4)
    results = []
    for n in (1, 2, 3):
        threads(n)
        rows = linear_relu.run_rows(matrix, first, numbers, base)
        rows += linear_relu.column_rows(matrix, columns, (few, few.flip(0)), 30 * base)
        sums, touched = expm1_sums(dz, rest, labels, examples)
        part = linear_relu.picked(matrix, torch.arange(2099, -1, -1), torch.arange(2000))
        lengths = linear_relu.lengths(matrix, torch.ones(1, 2000, dtype=torch.bool))
        results.append([*(each for row in rows for each in row), sums, touched, part, lengths])
    assert min(dz.numel(), part.numel(), 1024 * base.numel()) > SMALL  # or one thread would do it all
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

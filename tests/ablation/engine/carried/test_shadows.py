"""Views, writes and forms: what is known of one tensor is known of all that share its memory, and stays in its form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablation.engine.carried.representations import Block, Columns, Product
from ablation.engine.rerun import Rerun
from tests.ablation.engine.carried.carrying import (
    N,
    carry_through,
    compute_again,
    draw,
    largest_error,
    make_block,
    make_carry,
    make_dense,
    written_out,
)
from tests.ablation.engine.exact import check_exact, make, make_data

SHAPE = (3, 4, 6, 2)

# --- views ------------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x.view(x.shape),
    "flatten": lambda x: x.flatten(1),
    "flatten-inner": lambda x: x.flatten(2),
    "flatten-all": lambda x: x.view(-1),
    "unflatten": lambda x: x.view(3, 2, 2, 6, 2),
    "unflatten-inner": lambda x: x.view(3, 4, 3, 2, 2),
    "mix": lambda x: x.view(6, 2, 12),
    "transpose": lambda x: x.transpose(1, 3),
    "permute": lambda x: x.permute(2, 0, 3, 1),
    "flatten-then-transpose": lambda x: x.flatten(2).transpose(1, 2),
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "split": lambda x: x.split([1, 3], dim=1)[0],
    "select": lambda x: x[:, 2],
    "select-example": lambda x: x[1],
    "select-inner": lambda x: x[:, :, 3],
    "slice": lambda x: x[1:, 1:3, ::2],
    "every-other": lambda x: x[:, ::2],
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:, :, :1].squeeze(2),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
    "expand-in-front": lambda x: x.expand(7, *x.shape),
    "as-strided": lambda x: x.as_strided((5, 4), (3, 1), 7),
    "diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "unfold-channels": lambda x: x.unfold(1, 2, 1),
    "movedim": lambda x: x.movedim(1, -1),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "windows": lambda x: x.view(3, 4, 3, 2, 1, 2).permute(0, 2, 4, 3, 5, 1),
    "detach": lambda x: x.detach(),
}

NOT_OF_CHANNELS_LAST = {"flatten", "flatten-all", "mix"}


def forms(x: Tensor) -> dict[str, Tensor | Block]:
    return {"dense": make_dense(x), **{f"block along {axis}": make_block(x, axis) for axis in range(x.dim())}}


def long_block(x: Tensor) -> Block:
    """A run of two units, as a grouped convolution gives."""
    shape = [N, *x.shape]
    shape[2] = 2
    return Block(1, torch.arange(N) % 2 * 2, draw(*shape), x.shape[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels-last"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_tensor_is_the_same_view_of_its_delta(name: str, layout: torch.memory_format) -> None:
    view = VIEWS[name]
    x = draw(*SHAPE).to(memory_format=layout)
    if name in NOT_OF_CHANNELS_LAST and layout == torch.channels_last:
        pytest.skip(f"{name} is no view of channels_last: PyTorch copies, or refuses")
    for how, move in {**forms(x), "run of two": long_block(x)}.items():
        carry = make_carry()
        carry.shadows.put(x, move)
        delta = carry.shadows.delta(view(x))
        assert delta is not None
        truth = torch.stack([view(_laid_out_as(x, each)) for each in written_out(move)])
        assert torch.equal(delta, truth), f"{how}: differs by {(delta - truth).abs().max():.3g}"
        form = carry.shadows.representation(view(x))
        assert form is None or torch.equal(form.dense(), truth), f"{how}: its {type(form).__name__} is another"


def _laid_out_as(x: Tensor, numbers: Tensor) -> Tensor:
    same = torch.empty_like(x)
    return same.copy_(numbers)


def test_unknown_tensors_have_no_delta() -> None:
    carry = make_carry()
    x, y = draw(*SHAPE), draw(*SHAPE)
    carry.shadows.put(x, make_dense(x))
    assert carry.shadows.delta(y) is None
    assert carry.shadows.representation(y) is None
    assert not carry.shadows.moves(y[1:])
    assert carry.shadows.moves(x[1:])


def test_a_shadow_goes_with_its_tensor() -> None:
    """Another tensor on the same memory later is not taken for it."""
    carry = make_carry()
    for k in range(50):
        x = draw(*SHAPE)
        assert not carry.shadows.moves(x), f"tensor {k} is new"
        carry.shadows.put(x, make_dense(x))
        del x
    assert len(carry.shadows._held) <= 2


# --- writes -----------------------------------------------------------------------------------------------------------


def _write_under_view(x: Tensor) -> list[Tensor]:
    view = x[:, 1]
    view.mul_(2)
    return [x + 0, view + 0]


def _older_view_after_write(x: Tensor) -> list[Tensor]:
    view, flat = x[:, 1:3], x.flatten(2)
    kept = view * 3
    x.exp_()
    return [view + 0, flat * 1, kept + 0, x + 0]


def _write_between_views(x: Tensor) -> list[Tensor]:
    first, second = x.chunk(2, dim=1)
    first += second
    second.sub_(first)
    return [x + 0, first + 0, second + 0]


def _write_still_values(x: Tensor) -> list[Tensor]:
    x[:, 0] = 7.0
    x[:, 1].zero_()
    return [x + 0]


def _write_into_still(x: Tensor) -> list[Tensor]:
    own = torch.ones(3, 4, 6, 2, dtype=x.dtype)
    view = own[:, 2]
    own[:, 1:3] = x[:, :2]
    own[0].add_(x[1])
    return [own + 0, view + 0]


def _write_transposed(x: Tensor) -> list[Tensor]:
    x.transpose(1, 2).add_(torch.ones(6, 4, 2, dtype=x.dtype)).mul_(x.transpose(1, 2))
    return [x + 0]


def _write_by_index(x: Tensor) -> list[Tensor]:
    own = torch.zeros(3, 4, 6, 2, dtype=x.dtype)
    own[torch.tensor([2, 0])] = x[:2]
    own.index_add_(1, torch.tensor([1, 1]), x[:, :2])
    return [own + 0]


def _write_onto_itself(x: Tensor) -> list[Tensor]:
    torch.mul(x, x.flip(1), out=x)
    return [x + 0, x[:, 1] + 0]


def _swap(x: Tensor) -> list[Tensor]:
    kept = x[:, 0].clone()
    x[:, 0] = x[:, 1]
    x[:, 1] = kept
    return [x + 0]


def _replaced(x: Tensor) -> list[Tensor]:
    view = x[:, 1]
    x.copy_(draw(3, 4, 6, 2, seed=8))
    return [x + 0, view + 0]


def _write_bits_of_a_sum(x: Tensor) -> list[Tensor]:
    total = torch.zeros(3, 6, 2, dtype=x.dtype)
    for part in x.unbind(1):
        total += part
        part.relu_()
    return [total, x + 0]


WRITES = {function.__name__.strip("_"): function for function in (
    _write_under_view, _older_view_after_write, _write_between_views, _write_still_values, _write_into_still,
    _write_transposed, _write_by_index, _write_onto_itself, _swap, _replaced, _write_bits_of_a_sum,
)}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels-last"])
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_under_one_name_is_seen_under_all(name: str, layout: torch.memory_format) -> None:
    def function(x: Tensor) -> Any:
        return WRITES[name](x.clone())

    x = draw(*SHAPE).to(memory_format=layout)
    for how, move in forms(x).items():
        for k, (carried, truth) in enumerate(
            zip(carry_through(function, (x,), {0: move}), compute_again(function, (x,), {0: move}), strict=True)
        ):
            error = largest_error(carried, truth, 1.0)
            assert error <= 1e-14, f"{name}, {how}, result {k}: error {error:.2g}"


# --- forms that last --------------------------------------------------------------------------------------------------

KEEPERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu": (F.relu, 1),
    "batch-norm": (lambda x: F.batch_norm(x, draw(4), draw(4).abs()), 1),
    "flatten": (lambda x: F.relu(x).flatten(1), 1),
    "flatten-inner": (lambda x: x.flatten(2) * 2, 1),
    "mean": (lambda x: x.mean((2, 3)), 1),
    "mean-kept": (lambda x: x.mean((2, 3), keepdim=True), 1),
    "mean-then-flatten": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), 1),
    "channels-last": (lambda x: F.relu(x.contiguous(memory_format=torch.channels_last)), 1),
    "tokens": (lambda x: F.gelu(x.flatten(2).transpose(1, 2)), 2),
    "max-pool": (lambda x: F.max_pool2d(x, 2), 1),
    "gate": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), 1),
    "residual": (lambda x: draw(3, 4, 6, 2, seed=5) + x, 1),
    "cat": (lambda x: torch.cat([draw(3, 3, 6, 2), x], 1), 1),
    "pad": (lambda x: F.pad(x, (1, 1)), 1),
    "in-place": (lambda x: F.relu(x.clone(), inplace=True), 1),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels-last"])
@pytest.mark.parametrize("name", KEEPERS)
def test_one_unit_stays_one_unit(name: str, layout: torch.memory_format) -> None:
    """Through what treats units apart a block stays a block; else the work that it saves would be lost unnoticed."""
    function, axis = KEEPERS[name]
    x = draw(*SHAPE).to(memory_format=layout)
    if name == "flatten" and layout == torch.channels_last:
        pytest.skip("units lie apart in channels_last: flattened they are no run")
    block = make_block(x, 1)
    carry = make_carry()
    carry.shadows.put(x, block)
    with torch.no_grad(), carry:
        result = function(x)
    form = carry.shadows.representation(result)
    assert isinstance(form, Block), f"{name}: a {type(form).__name__}"
    assert form.axis == axis
    error = largest_error(form.dense(), compute_again(function, (x,), {0: block})[0])
    assert error <= 1e-13, f"{name}: error {error:.2g}"


def test_columns_and_products_are_what_they_stand_for() -> None:
    columns = Columns(
        tuple(torch.tensor(each, dtype=torch.int64) for each in ([0, 2], [], [1])),
        (draw(N, 2), draw(N, 0), draw(N, 1, seed=3)),
        4,
    )
    matrix = draw(4, 6)
    block = make_block(draw(3, 4), 1)
    for factor in (columns, block):
        product = Product(factor, matrix)
        truth = factor.dense() @ matrix
        torch.testing.assert_close(product.dense(), truth, rtol=1e-13, atol=1e-13)
        turned = Product(factor, matrix.T.contiguous().T)  # as a Linear's weight lies
        for shift in (-30.0, -1.0, 0.0, 30.0):  # nothing can open, some, half, all
            x = draw(3, 6, seed=7) + shift
            opened = F.relu(x + truth) - F.relu(x)
            for each in (product, turned):
                behind = each.relu(x)
                torch.testing.assert_close(behind.dense(), opened, rtol=1e-12, atol=1e-14)
                for row, units in enumerate(behind.columns):
                    missed = torch.ones(6, dtype=torch.bool).index_fill_(0, units, False)
                    assert (x[row] + truth[:, row] <= 0)[:, missed].all() or not opened[:, row, missed].any()
        carry = make_carry()
        x = draw(3, 6)
        carry.shadows.put(x, product)
        assert carry.shadows.representation(x) is product
        torch.testing.assert_close(carry.shadows.delta(x.view(9, 2)), truth.view(N, 9, 2), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(carry.shadows.delta(x.T), truth.mT, rtol=1e-13, atol=1e-13)


# --- decisions by a number that an ablation changes -------------------------------------------------------------------


class Decides(nn.Module):
    """A network that looks at its own activations to decide how to go on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Linear(5, 4)
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        if self.how == "branch":
            return torch.cat([(self.left if (row[0] > row[1]).item() else self.right)(row[None]) for row in h])
        if self.how == "number":
            return torch.stack([self.left(row) * (1 + row.max().item()) for row in h])
        if self.how == "argmax":
            return self.left(h) + h.gather(1, h.argmax(1, keepdim=True)) * torch.arange(3).to(h)
        if self.how == "index":
            return self.left(h) + self.right.weight.T[h.argmax(1)]
        if self.how == "mask":
            return self.left(torch.where(h > 0.1, h, 2 * h.flip(1)))
        if self.how == "masked-select":
            return self.left(torch.stack([torch.stack([row[row > 0].sum()] * 4) for row in h]))
        if self.how == "sort":
            return self.left(h.gather(1, h.sort(dim=1).indices))
        if self.how == "topk":
            values, indices = h.topk(2, dim=1)
            return self.left(torch.zeros_like(h).scatter(1, indices, values))
        if self.how == "sort-unread":
            return self.left(h.sort(dim=1).values)
        return self.left(h.cumsum(1).to(torch.int64).to(h) + h)


DECISIONS = ("branch", "number", "argmax", "index", "mask", "masked-select", "sort", "topk", "round")


def count_single_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sites that are run one by one from now on."""
    runs: list[int] = []
    one = Rerun.one

    def counted(self: Rerun, row: int, *args: Any, **options: Any) -> Any:
        runs.append(row)
        return one(self, row, *args, **options)

    monkeypatch.setattr(Rerun, "one", counted)
    return runs


@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("how", DECISIONS)
def test_decisions_are_taken_again_site_by_site(how: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_single_runs(monkeypatch)
    model = make(6, lambda: Decides(how))
    x, y = make_data((9, 5), 3)
    check_exact(model, "layer.weight", x, y, precision, lanes=7)
    assert runs, f"{how}: an ablation changes the decision, and nobody noticed"
    # The rest of the network decides nothing.
    runs.clear()
    check_exact(model, "left.weight", x, y, precision, lanes=7)
    assert not runs


def test_an_index_that_nobody_reads_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_single_runs(monkeypatch)
    model = make(6, lambda: Decides("sort-unread"))
    x, y = make_data((9, 5), 3)
    check_exact(model, "layer.weight", x, y, "float64", lanes=7)
    assert not runs


def test_a_decision_that_no_ablation_changes_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_single_runs(monkeypatch)
    model = make(6, lambda: Decides("branch"))
    with torch.no_grad():
        model.layer.bias.fill_(50.0)
    x, y = make_data((9, 5), 3)
    check_exact(model, "layer.weight", x, y, "float64", lanes=7)
    assert not runs


def test_a_copy_of_the_target_may_be_written_to() -> None:
    """A network that clips its weights in every forward pass."""

    class Clipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.layer.weight * 1.0
            weight.clamp_(-0.2, 0.2)
            return self.out(torch.relu(F.linear(x, weight)))

    x, y = make_data((9, 5), 3)
    check_exact(make(6, Clipping), "layer.weight", x, y, "float64", lanes=7)


def test_the_mode_ends_with_its_block() -> None:
    carry = make_carry()
    x = draw(3, 4)
    carry.shadows.put(x, make_dense(x))
    with carry:
        inside = x * 2
    outside = x * 2
    assert carry.shadows.moves(inside)
    assert not carry.shadows.moves(outside)
    assert torch.equal(inside, outside)

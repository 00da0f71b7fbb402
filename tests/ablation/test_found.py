"""The caller's model is left as it was found, or refused; and calls from several threads wait for each other."""

import copy
import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablation
from ablation.errors import ModelError
from ablation.found import left_alone

N_CLASSES = 3


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(9, (n, 5), generator=generator), torch.randint(N_CLASSES, (n,), generator=generator)


class Words(nn.Module):
    """An embedding that is renormalised in place by every forward pass."""

    def __init__(self, size: float = 3.0) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6, max_norm=1.0)
        self.out = nn.Linear(6, N_CLASSES)
        self.words.weight.data.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(x)).mean(dim=1))


class Plain(nn.Module):
    """An embedding and a head, with places for what a forward pass may leave behind."""

    def __init__(self, leave: Callable[["Plain", Tensor], Any]) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.out = nn.Linear(6, N_CLASSES)
        self.register_buffer("seen", torch.zeros(6))
        self.kept = torch.ones(3)
        self.cache: dict[str, Tensor] = {}
        self.listed: list[Tensor] = []
        self.last: Tensor | None = None
        self.leave = leave

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x).mean(dim=1)
        self.leave(self, y)
        return self.out(torch.tanh(y))


def digest(model: nn.Module) -> str:
    """A hash of all numbers of a model, with where they lie."""
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(f"{name} {tensor.data_ptr()}".encode() + tensor.numpy().tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("layer", ["words", "out"])
def test_a_forward_pass_that_renormalises_its_weight_is_refused_and_undone(layer: str, precision: str) -> None:
    model = Words()
    before = digest(model)
    with pytest.raises(ModelError, match=r"changes words.weight \(of Embedding\).*set max_norm=None"):
        ablation.ablate(model, layer, {"test": data()}, precision=precision, progress=False)
    assert digest(model) == before


def test_a_large_model_is_restored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ablation.found.COPIED_BYTES", 0)
    model = Words()
    before = digest(model)
    with pytest.raises(ModelError, match=r"changes words.weight"):
        ablation.ablate(model, "out", {"test": data()}, progress=False)
    assert digest(model) == before


def test_a_write_that_changes_nothing_is_no_fault() -> None:
    model = Words(size=0.01)
    before = digest(model)
    table = ablation.ablate(model, "out", {"test": data()}, progress=False)
    assert digest(model) == before
    free = copy.deepcopy(model)
    free.words.max_norm = None
    expected = ablation.ablate(free, "out", {"test": data()}, progress=False)
    np.testing.assert_array_equal(table.columns["utility_test"], expected.columns["utility_test"])


def later(model: Plain, y: Tensor) -> None:
    """Overwrites a weight once many examples have been seen."""
    model.n_calls = getattr(model, "n_calls", 0) + 1
    if model.n_calls > 5:
        model.out.weight.data[0, 0] = 7.0
        with torch.no_grad():
            model.words.weight[0, 0] += 1e-3


def test_a_change_in_a_later_pass_is_refused_and_undone() -> None:
    model = Plain(later)
    before = digest(model)
    with pytest.raises(ModelError):
        ablation.ablate(model, "out", {"test": data()}, batch_size=8, verify=0, progress=False)
    assert digest(model) == before


LEFT: dict[str, Callable[[Plain, Tensor], Any]] = {
    "buffer": lambda model, y: model.seen.add_(y.float().mean(0)),
    "buffer-by-data": lambda model, y: setattr(model.seen, "data", y.float().mean(0)),
    "new-buffer": lambda model, y: setattr(model, "seen", y.float().mean(0)),
    "attribute": lambda model, y: setattr(model, "last", y),
    "new-attribute": lambda model, y: setattr(model, "newest", y),
    "written-attribute": lambda model, y: model.kept.add_(1),
    "dict": lambda model, y: model.cache.update(last=y),
    "list": lambda model, y: model.listed.append(y),
}


@pytest.mark.parametrize("leave", LEFT.values(), ids=LEFT)
def test_what_a_forward_pass_leaves_behind_is_taken_away(leave: Callable[[Plain, Tensor], Any]) -> None:
    model = Plain(leave)
    before, seen, cache, listed = digest(model), model.seen, model.cache, model.listed
    ablation.ablate(model, "out", {"test": data()}, sites=2, progress=False)
    assert digest(model) == before
    assert model.seen is seen
    assert model.cache is cache
    assert model.listed is listed
    assert (cache, listed, model.last, hasattr(model, "newest")) == ({}, [], None, False)
    assert model.kept.tolist() == [1.0] * 3


def test_what_is_shared_stays_shared() -> None:
    model = Plain(lambda model, y: model.seen.add_(1))
    model.register_buffer("again", model.seen)
    model.register_buffer("memory", model.out.bias.data)
    ablation.ablate(model, "out", {"test": data()}, sites=2, progress=False)
    assert model.again.data_ptr() == model.seen.data_ptr()
    assert model.memory.data_ptr() == model.out.bias.data_ptr()


def test_it_is_left_alone_after_an_error_too() -> None:
    model = Plain(LEFT["buffer"])
    before, state = digest(model), torch.get_rng_state()
    with suppress(KeyError), left_alone(model):
        model(data()[0])
        torch.rand(3)
        raise KeyError
    assert digest(model) == before
    assert torch.equal(state, torch.get_rng_state())


def test_threads_on_one_model_and_on_models_that_share_a_module_give_what_one_gives() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, N_CLASSES))
    twin = nn.Sequential(*model[:3], nn.Linear(7, N_CLASSES))
    inputs = torch.randn(60, 6)
    calls = [
        (each, layer, engine)
        for each, layer in ((model, "0"), (model, "2"), (twin, "0"), (model, "0"))
        for engine in ("finite", "rerun")
    ]

    def call(each: nn.Module, layer: str, engine: str) -> np.ndarray:
        splits = {"test": (inputs, data(60)[1])}
        table = ablation.ablate(each, layer, splits, sites=6, engine=engine, progress=False)
        return table.columns["utility_test"]

    expected = [call(*each) for each in calls]
    before, found = digest(model), [None] * len(calls)
    errors: list[Exception] = []

    def work(place: int) -> None:
        try:
            found[place] = call(*calls[place])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert digest(model) == before

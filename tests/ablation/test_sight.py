"""What torch doesn't see is found, and takes a path that doesn't need to see it: no utility 0 for want of a look."""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablation
from ablation.errors import ModelError, SpecError
from ablation.layers import describe_model
from ablation.sight import check_in_sight, find_unseen
from tests.cases import make_cases
from tests.compare import utility_error

D, N_CLASSES = 6, 4


class ByNumpy(torch.autograd.Function):
    """A function of its own whose forward pass is NumPy's."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy()))


def by_thread(x: Tensor) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(torch.tanh(x)))
    thread.start()
    thread.join()
    return results[0]


def by_memory(x: Tensor) -> Tensor:
    """Computes like an extension that is given addresses: torch sees neither the reads nor the writes."""
    x, y = x.contiguous(), torch.empty_like(x)
    kind = ctypes.c_double if x.dtype == torch.float64 else ctypes.c_float
    read, write = ((kind * x.numel()).from_address(each.data_ptr()) for each in (x, y))
    for place in range(len(read)):
        write[place] = np.tanh(read[place])
    return y


def in_place(x: Tensor) -> Tensor:
    """Writes over a result of torch's own through its memory."""
    y = torch.relu(x)
    kind = ctypes.c_double if y.dtype == torch.float64 else ctypes.c_float
    memory = (kind * y.numel()).from_address(y.data_ptr())
    for place in range(len(memory)):
        memory[place] = memory[place] ** 2
    return y


def in_part(x: Tensor) -> Tensor:
    """Only a part of the sum goes another way."""
    return torch.tanh(x) + 0.1 * torch.from_numpy(np.asarray(x) ** 2)


def branch(x: Tensor) -> Tensor:
    """Takes a way that NumPy chooses for each example."""
    return x * torch.tensor(np.where(np.array(x[:, 0].tolist()) > 0, 2.0, 0.5), dtype=x.dtype)[:, None]


def pool(x: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as threads:
        return torch.cat([*threads.map(torch.tanh, x.split(3, dim=1))], dim=1)


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "function": ByNumpy.apply,
    "numpy": lambda x: torch.from_numpy(np.tanh(x.numpy())),
    "tolist": lambda x: torch.tensor([[v * v for v in row] for row in x.tolist()], dtype=x.dtype),
    "dlpack": lambda x: torch.from_numpy(np.tanh(np.from_dlpack(x))),
    "thread": by_thread,
    "pool": pool,
    "memory": by_memory,
    "in-place": in_place,
    "in-part": in_part,
    "branch": branch,
}


class Net(nn.Module):
    """A Linear, a function that may be out of sight, and a head."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.out = nn.Linear(D, N_CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.first(x)))


class OwnWeight(Net):
    """Its weight itself goes through NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        scaled = torch.from_numpy(np.exp(self.first.weight.detach().numpy()))
        return self.out(F.gelu(F.linear(x, scaled.to(x.dtype) if x.dtype != scaled.dtype else scaled)))


def make(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return build().eval()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, D, generator=generator), torch.randint(N_CLASSES, (20,), generator=generator)


def truth_in_place(model: nn.Module, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-example deltas, and whether a logit moved, of the plain model with each weight overwritten in memory."""
    inputs, labels = data()
    flat = model.first.weight.data.view(-1)
    deltas, moved = [], []
    with torch.no_grad():
        intact = model(inputs)
        for index in indices:
            kept = flat[index].item()
            flat[index] = 0.0
            logits = model(inputs)
            flat[index] = kept
            before, after = (F.cross_entropy(each.double(), labels, reduction="none") for each in (intact, logits))
            deltas.append((after - before).numpy())
            moved.append(int((logits != intact).any(dim=1).sum()))
    return np.stack(deltas), np.array(moved)


@pytest.mark.parametrize("name", [*UNSEEN, "own-weight"])
def test_what_gets_out_of_sight_is_run_again_and_right_without_a_proof(name: str) -> None:
    model = make(lambda: OwnWeight(torch.tanh) if name == "own-weight" else Net(UNSEEN[name]))
    table = ablation.ablate(model, "first", {"test": data()}, sites=8, verify=0, progress=False)
    assert table.about["plan"]["path"] == "rerun"
    truth, moved = truth_in_place(model, table.columns["index"])
    assert utility_error(table.columns["utility_test"], truth, "mixed") < 1e-4
    assert (table.columns["touched_test"] >= moved).all()
    assert moved.any()


def test_with_a_proof_too_and_by_the_reference() -> None:
    model = make(lambda: Net(ByNumpy.apply))
    truth = None
    for engine in ("auto", "reference"):
        table = ablation.ablate(model, "first", {"test": data()}, sites=5, engine=engine, progress=False)
        truth, _ = truth_in_place(model, table.columns["index"])
        assert utility_error(table.columns["utility_test"], truth, "mixed") < 1e-4


def test_a_path_that_would_not_see_is_refused_with_those_that_do() -> None:
    with pytest.raises(
        SpecError, match=r"engine: got 'finite'; allowed: auto, rerun, reference .* out of torch's sight"
    ):
        ablation.ablate(make(lambda: Net(ByNumpy.apply)), "first", {"test": data()}, engine="finite", progress=False)


def test_layers_behind_it_keep_their_path() -> None:
    facts = describe_model("net", make(lambda: Net(ByNumpy.apply)), data()[0][:2])
    assert {layer.parameter: layer.path for layer in facts.layers} == {
        "first.weight": "rerun", "first.bias": "rerun", "out.weight": "direct", "out.bias": "direct",
    }  # fmt: skip


def test_it_is_noticed_where_only_the_job_s_own_examples_take_that_way() -> None:
    def late(x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.numpy())) if float(x.sum()) > 1e3 else torch.tanh(x)

    model, inputs = make(lambda: Net(late)), data()[0]
    check_in_sight(model, "first.weight", inputs[:2])
    with pytest.raises(ModelError, match=r"reads its numbers by numpy\(\).*Use engine='rerun'"):
        check_in_sight(model, "first.weight", 1e6 * inputs[:2].abs() * model.first.weight.sum(0).sign())


class Cached(Net):
    """Prepares something in its first run, and counts its runs."""

    table: Tensor | None = None
    n_runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_runs += 1
        if self.table is None:
            self.table = torch.from_numpy(np.linspace(0.5, 1.5, D)).to(torch.float32)
        return super().forward(x * self.table)


def by_row(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([function(row) for row in x])


SEEN: dict[str, Callable[[], nn.Module]] = {
    "item": lambda: Net(lambda x: by_row(x, lambda row: row * max(1.0, row.max().item()))),
    "branch": lambda: Net(lambda x: by_row(x, lambda row: torch.tanh(row) if row.sum() > 0 else torch.sin(row))),
    "mask": lambda: Net(lambda x: x.masked_fill(x < 0, 0.1) + torch.zeros_like(x).index_add(1, torch.arange(D), x)),
    "count": lambda: Net(lambda x: by_row(x, lambda row: row / (1 + len(torch.nonzero(row > 0))))),
    "empty": lambda: Net(lambda x: torch.empty_like(x).copy_(x).mul_(torch.tensor(2.0))),
    "constant": lambda: Net(lambda x: torch.tanh(x) + torch.from_numpy(np.arange(D, dtype=np.float32))),
    "cache": lambda: Cached(torch.tanh),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_stays_in_sight_keeps_its_path(name: str) -> None:
    model = make(SEEN[name])
    table = ablation.ablate(model, "first", {"test": data()}, sites=4, engine="finite", progress=False)
    truth, _ = truth_in_place(model, table.columns["index"])
    assert utility_error(table.columns["utility_test"], truth, "mixed") < 1e-4


def test_nothing_in_the_model_zoo_is_out_of_sight() -> None:
    for case in make_cases():
        assert find_unseen(case.model, [case.parameter], case.inputs[:2]) is None, case

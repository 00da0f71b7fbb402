"""Examples that are not the same each time are refused, wherever in the split they are and however rare it is."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

import ablation
from ablation.errors import DataError

N = 300


class Pictured(Dataset):
    """Labelled noise; subclasses change what is read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(N, 1, 2, 4, generator=generator)
        self.labels = torch.randint(3, (N,), generator=generator)
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.threads.add(threading.get_ident())
        return self.changed(self.inputs[index], index), int(self.labels[index])

    def changed(self, picture: Tensor, index: int) -> Tensor:
        return picture


class Flipped(Pictured):
    """Mirrors a picture with a probability of 0.1, drawn by torch, numpy, Python or itself."""

    def __init__(self, draw: str = "torch", first: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.first = first
        self.own = np.random.default_rng(seed)
        self.draw = {
            "own": self.own.random,
            "torch": lambda: float(torch.rand(())),
            "numpy": np.random.random,
            "python": random.random,
        }[draw]

    def changed(self, picture: Tensor, index: int) -> Tensor:
        return picture.flip(2) if index >= self.first and self.draw() < 0.1 else picture


class Counting(Pictured):
    """Its examples depend on how many have been read before."""

    def changed(self, picture: Tensor, index: int) -> Tensor:
        self.n_read = getattr(self, "n_read", 0) + 1
        return picture * (1 + self.n_read % 2)


class OneBuffer(Pictured):
    """Gives every example in one and the same memory, so that only a batch's last example is right."""

    buffer = torch.zeros(1, 2, 4)

    def changed(self, picture: Tensor, index: int) -> Tensor:
        return self.buffer.copy_(picture)


class OtherLabels(Pictured):
    """Draws its labels."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index)[0], int(torch.randint(3, ()))


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def run(dataset: object, **options: object) -> object:
    return ablation.ablate(model(), "1", {"test": dataset}, sites=2, verify=0, progress=False, **options)


@pytest.mark.parametrize(
    "dataset",
    [Flipped(), Flipped("numpy"), Flipped("python"), Flipped(first=N // 2), Counting(), OneBuffer(), OtherLabels()],
    ids=["torch", "numpy", "python", "later-ones", "counting", "one-buffer", "labels"],
)
def test_examples_that_change_are_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"example \d+ differs between two readings"):
        run(dataset)


def test_a_collate_function_that_draws_is_refused() -> None:
    def collate(examples: list) -> list:
        inputs, labels = default_collate(examples)
        return [inputs + 0.01 * torch.rand(len(inputs), 1, 1, 1), labels]

    with pytest.raises(DataError, match="differs between two readings"):
        run(DataLoader(Pictured(), collate_fn=collate))


def test_rare_flips_are_found_in_every_one_of_many_runs() -> None:
    for seed in range(40):
        with pytest.raises(DataError, match="differs between two readings"):
            run(Flipped("own", first=N // 3, seed=seed))


class ChangesLate(Pictured):
    """Is the same until so many examples have been read."""

    n_read, n_same = 0, 2 * 64 + 40

    def changed(self, picture: Tensor, index: int) -> Tensor:
        self.n_read += 1
        return picture + 0.1 * self.n_read * (self.n_read > self.n_same)


def test_examples_are_read_once_more_while_the_job_runs() -> None:
    with pytest.raises(DataError, match="differs between two readings"):
        run(ChangesLate(), batch_size=32)


def test_the_example_is_named_as_the_data_set_counts_it() -> None:
    kept = [250, 260, 270, 280]
    with pytest.raises(DataError, match=r"example (250|260|270|280) differs between two readings"):
        run(Subset(Counting(), kept))


def test_fixed_examples_pass_and_one_thread_reads_them() -> None:
    dataset, network = Pictured(), model()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ablation.ablate(network, "1", {"test": dataset}, sites=2, progress=False)
    assert dataset.threads == {threading.get_ident()}
    assert torch.equal(before, torch.get_rng_state())

"""What is refused, and that the message says which module or example and why."""

import pytest
import torch
from torch import Tensor, nn

from ablation import baseline
from ablation.errors import DataError, ModelError


class Centred(nn.Module):
    """Its logits depend on the batch mates."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.out = nn.Linear(3, 4)
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        z = self.out(x)
        return z - self.strength * z.mean(dim=0)


class Noisy(nn.Module):
    """Its logits are random."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) + 0.01 * torch.randn(len(x), 4)


def test_batch_mates_are_noticed() -> None:
    inputs = torch.randn(12, 3)
    baseline.check_composition(Centred(0.0), inputs)
    with pytest.raises(ModelError, match="another batch composition"):
        baseline.check_composition(Centred(0.1), inputs)


def test_randomness_is_noticed() -> None:
    with pytest.raises(ModelError, match="run twice on the same batch"):
        baseline.check_composition(Noisy(), torch.randn(12, 3))


def test_one_example_is_enough() -> None:
    baseline.check_composition(nn.Linear(3, 4), torch.randn(1, 3))


def test_batch_norm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ModelError, match=r"1 \(BatchNorm1d\) has no running statistics"):
        baseline.check_model(model)
    baseline.check_model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def test_labels() -> None:
    baseline.check_labels(torch.tensor([0, 4]), 5)
    with pytest.raises(DataError, match="example 1 has label 5; allowed: 0 to 4"):
        baseline.check_labels(torch.tensor([0, 5]), 5)
    with pytest.raises(DataError, match="no soft labels"):
        baseline.check_labels(torch.rand(3, 5), 5)
    with pytest.raises(DataError, match="float32"):
        baseline.check_labels(torch.rand(3), 5)


def test_logits() -> None:
    baseline.check_logits(torch.zeros(3, 5), 3)
    with pytest.raises(ModelError, match=r"\(3, 5, 2\)"):
        baseline.check_logits(torch.zeros(3, 5, 2), 3)
    with pytest.raises(ModelError, match="tuple"):
        baseline.check_logits((torch.zeros(3, 5),), 3)
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    with pytest.raises(DataError, match="example 1 gives NaN or infinite logits"):
        baseline.check_logits(logits, 3)

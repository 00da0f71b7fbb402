"""Losses other than plain cross-entropy, each beside what PyTorch computes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ablation.loss import CrossEntropy, Loss


@dataclass(frozen=True)
class LossCase:
    """A loss as the engine takes it, for models of so many classes, and the truth about it in plain PyTorch."""

    name: str
    loss: Loss
    values: Callable[[Tensor, Tensor], Tensor] = field(repr=False)

    def __str__(self) -> str:
        return self.name


class Focal:
    """Focal loss, (1 - p_y)^2 times the cross-entropy: an object of a user's, with nothing but its values."""

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Each example's loss."""
        loss = F.cross_entropy(logits, labels, reduction="none")
        return (1 - (-loss).exp()) ** 2 * loss


WEIGHTS = (0.7, 2.5, 0.0, 1.0, 0.3)  # one class counts nothing


def with_options(smoothing: float, weights: tuple[float, ...] | None) -> LossCase:
    """Cross-entropy with these options, next to torch.nn.CrossEntropyLoss."""
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    torchs = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing, reduction="none")
    return LossCase(f"smoothing-{smoothing}{'-weights' * bool(weights)}", CrossEntropy(smoothing, weights), torchs)


def make_losses(n_classes: int) -> list[LossCase]:
    """Every loss, in a fixed order, for a model of so many classes."""
    weights = WEIGHTS[:n_classes]
    options = ((0.1, None), (0.5, None), (0.0, weights), (0.1, weights), (0.5, weights))
    return [*(with_options(*each) for each in options), LossCase("focal", Focal(), Focal().values)]


NAMES = [str(case) for case in make_losses(5)]


def loss_of(name: str, n_classes: int) -> LossCase:
    """The loss of this name."""
    return next(case for case in make_losses(n_classes) if case.name == name)

"""An independent brute force, and what "equal" means: the scales and bounds of docs/02-exactness.md.

Nothing of the package is used to compute the truth here: plain PyTorch on a float64 copy of the model.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Replacement = float | Callable[[float], float]  # a number, or what a weight is replaced by


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Each example's plain cross-entropy."""
    return F.cross_entropy(logits, labels, reduction="none")


def brute_force(
    model: nn.Module,
    parameter: str,
    indices: Any,
    inputs: Tensor,
    labels: Tensor,
    value: Replacement = 0.0,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> np.ndarray:
    """Per-example loss deltas (sites, examples) of a float64 copy of the model, weight by weight."""
    intact, *ablated = _logits_of_each(model, parameter, indices, inputs, value)
    before = loss(intact, labels)
    return torch.stack([loss(logits, labels) - before for logits in ablated]).numpy()


def count_moved(model: nn.Module, parameter: str, indices: Any, inputs: Tensor, value: Replacement = 0.0) -> np.ndarray:
    """For each weight, on how many examples any float64 logit of plain PyTorch moves."""
    intact, *ablated = _logits_of_each(model, parameter, indices, inputs, value)
    return np.array([int((logits != intact).any(dim=1).sum()) for logits in ablated])


def _logits_of_each(model: nn.Module, parameter: str, indices: Any, inputs: Tensor, value: Replacement) -> list[Tensor]:
    """The float64 logits of the intact model, then with each weight replaced in turn."""
    model = copy.deepcopy(model).double().eval()
    weights = model.get_parameter(parameter).data
    with torch.no_grad():
        every = [_logits(model, inputs)]
        for index in indices:
            place = np.unravel_index(index, weights.shape)
            kept = weights[place].item()
            weights[place] = value(kept) if callable(value) else value
            every.append(_logits(model, inputs))
            weights[place] = kept
    return every


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    output = model(inputs.double())
    return output if isinstance(output, Tensor) else output.logits


def utility_error(utility: np.ndarray, truth: np.ndarray, precision: str, loss: float = 1.0) -> float:
    """The largest error of a utility against per-example true deltas, in the units that bound it.

    mixed: max(mean_n |delta_n|, 0.1 of its rms over sites), the scale of model rounding, since the prefix is float32.
    float64: mean_n |delta_n|, beyond 4e-15 (1 + mean loss) nats absolute.
    """
    spread = np.abs(truth).mean(axis=1)
    difference = np.abs(utility - truth.mean(axis=1))
    if precision == "float64":
        difference = np.maximum(difference - 4e-15 * (1 + loss), 0)
        scale = spread
    else:
        scale = np.maximum(spread, 0.1 * np.sqrt((spread**2).mean()))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(difference == 0, 0, difference / scale).max())


BOUND = {"mixed": 1e-4, "float64": 1e-9}

"""An independent brute force, and what "equal" means: the scales and bounds of DESIGN.md section 2.

Nothing of the package is used to compute the truth here: plain PyTorch on a float64 copy of the model.
"""

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def brute_force(
    model: nn.Module, parameter: str, indices: Any, inputs: Tensor, labels: Tensor, value: float = 0.0
) -> np.ndarray:
    """Per-example loss deltas (sites, examples) of a float64 copy of the model, weight by weight."""
    model = copy.deepcopy(model).double().eval()
    weights = model.get_parameter(parameter).data
    rows = []
    with torch.no_grad():
        loss = _losses(model, inputs, labels)
        for index in indices:
            place = np.unravel_index(index, weights.shape)
            kept = weights[place].item()
            weights[place] = value
            rows.append(_losses(model, inputs, labels) - loss)
            weights[place] = kept
    return torch.stack(rows).numpy()


def count_moved(
    model: nn.Module, parameter: str, indices: Any, inputs: Tensor, labels: Tensor, value: float = 0.0
) -> np.ndarray:
    """For each weight, on how many examples any float64 logit of plain PyTorch moves."""
    model = copy.deepcopy(model).double().eval()
    weights = model.get_parameter(parameter).data
    counts = []
    with torch.no_grad():
        before = _logits(model, inputs)
        for index in indices:
            place = np.unravel_index(index, weights.shape)
            kept = weights[place].item()
            weights[place] = value
            counts.append(int((_logits(model, inputs) != before).any(dim=1).sum()))
            weights[place] = kept
    return np.array(counts)


def _losses(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_logits(model, inputs), labels, reduction="none")


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

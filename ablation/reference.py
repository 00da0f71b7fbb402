"""The truth: set the weight, run the network, subtract the loss per example, in float64. Slow, and easy to believe.

In: a model, a parameter, sites, a batch. Out: per-example loss deltas. Every faster path is tested against this file,
and every job checks itself against it (`proof.py`).
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from torch import Tensor

from ablation.errors import ModelError
from ablation.precision import as_found, in_own_precision, run, run_with
from ablation.sites import Sites


def reference_deltas(
    model: torch.nn.Module, parameter: str, sites: Sites, inputs: Any, labels: Int64[Tensor, " examples"]
) -> Float64[Tensor, "sites examples"]:
    """Each example's loss with the weight replaced, minus its loss with the network intact, in nats.

    `delta[a, n] = l_n(w_a := r_a) - l_n(w_a)` with l the cross-entropy; positive: the weight helps on example n.
    The network before `parameter` runs in the model's own precision, everything from there on in float64.
    Pass the model and inputs in float64 (`in_float64`) and the whole of it is float64.

    Numerics: a difference of two float64 losses, so right to about 2e-16 of the loss, absolutely.
    Source: Elsayed & Mahmood, arXiv 2404.00781, Eq. 1 (true utility); SNIP, arXiv 1810.02340, Eq. 4.
    """
    weights = model.get_parameter(parameter).detach().double().clone(memory_format=torch.contiguous_format)
    with as_found(model):
        loss = _loss(run_with(model, parameter, weights, inputs), labels)
        rows = []
        for index, replacement in zip(sites.indices.tolist(), sites.replacements.tolist(), strict=True):
            weight = weights.view(-1)[index].item()
            weights.view(-1)[index] = replacement
            ablated_loss = _loss(run_with(model, parameter, weights, inputs), labels)
            weights.view(-1)[index] = weight
            rows.append(ablated_loss - loss)
    return torch.stack(rows) if rows else loss.new_zeros(0, len(labels))


def _loss(logits: Tensor, labels: Int64[Tensor, " examples"]) -> Float64[Tensor, " examples"]:
    """Each example's cross-entropy; logits that do not depend on the target may still be float32."""
    return F.cross_entropy(logits.double(), labels, reduction="none")


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy of the model; the caller's own stays as it is."""
    try:
        return copy.deepcopy(model).double()
    except Exception as error:
        raise ModelError(
            f"the model can't be copied ({type(error).__name__}: {error}), which a float64 reference needs; allowed: "
            "models that copy.deepcopy takes, or verify=0 in precision='mixed'."
        ) from error


def intact_logits(model: torch.nn.Module, inputs: Tensor) -> Any:
    """The logits of the network as it is, in its own precision (or whatever else it returns)."""
    with as_found(model), in_own_precision(model):
        return run(model, inputs)

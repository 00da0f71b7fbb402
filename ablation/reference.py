"""The truth: set the weight, run the network, subtract the loss per example, in float64. Slow, and easy to believe.

In: a model, a parameter, sites, a batch. Out: per-example loss deltas. Every faster path is tested against this file,
and every job checks itself against it (`proof.py`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from ablation.errors import ModelError
from ablation.loss import CROSS_ENTROPY, Loss, loss_values
from ablation.precision import FromTargetOn, Lifts, as_found, in_own_precision, run, run_with
from ablation.sharing import converted, tied
from ablation.sites import Sites


@dataclass(frozen=True)
class Truth:
    """What brute force says of each site and example: loss delta in nats, did any logit move, is the answer right."""

    delta: Float64[Tensor, "sites examples"]
    touched: Bool[Tensor, "sites examples"]
    correct: Bool[Tensor, "sites examples"]


def run_reference(
    model: torch.nn.Module,
    parameter: str,
    sites: Sites,
    inputs: Any,
    labels: Int64[Tensor, " examples"],
    loss: Loss = CROSS_ENTROPY,
) -> Truth:
    """Each example's loss with the weight replaced, minus its loss with the network intact, in nats.

    `delta[a, n] = l_n(w_a := r_a) - l_n(w_a)` with l the loss; positive: the weight helps on example n.
    The network before `parameter` runs in the model's own precision, everything from there on in float64.
    Pass the model and inputs in float64 (`in_float64`) and the whole of it is float64.

    Numerics: a difference of two float64 losses, so right to about 2e-16 of the loss, absolutely.
    Source: Elsayed & Mahmood, arXiv 2404.00781, Eq. 1 (true utility); SNIP, arXiv 1810.02340, Eq. 4.
    """
    weights = model.get_parameter(parameter).detach()
    weights = weights.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    n = len(labels)
    delta = torch.zeros(len(sites), n, dtype=torch.float64, device=labels.device)
    touched, correct = torch.zeros_like(delta, dtype=torch.bool), torch.zeros_like(delta, dtype=torch.bool)
    lifts = Lifts()  # what comes after the target, in float64: once for all runs

    def run_ablated() -> Tensor:
        return run_with(model, parameter, weights, inputs, mode=FromTargetOn(weights, lifts))

    with tied(model), as_found(model):
        logits = run_ablated()  # where they do not depend on the target they may still be float32
        intact = loss_values(loss, logits, labels)
        for row, (index, replacement) in enumerate(
            zip(sites.indices.tolist(), sites.replacements.tolist(), strict=True)
        ):
            weight = weights.view(-1)[index].item()
            weights.view(-1)[index] = replacement
            ablated = run_ablated()
            weights.view(-1)[index] = weight
            delta[row] = loss_values(loss, ablated, labels) - intact
            touched[row] = (ablated != logits).any(dim=1)
            correct[row] = ablated.argmax(dim=1) == labels
    return Truth(delta, touched, correct)


def reference_deltas(
    model: torch.nn.Module,
    parameter: str,
    sites: Sites,
    inputs: Any,
    labels: Int64[Tensor, " examples"],
    loss: Loss = CROSS_ENTROPY,
) -> Float64[Tensor, "sites examples"]:
    """The deltas of `run_reference` alone."""
    return run_reference(model, parameter, sites, inputs, labels, loss).delta


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy of the model; the caller's own stays as it is."""
    try:
        return converted(model, torch.nn.Module.double, is_copied=True)
    except Exception as error:
        raise ModelError(
            f"the model can't be copied ({type(error).__name__}: {error}), which a float64 reference needs; allowed: "
            "models that copy.deepcopy takes, or verify=0 in precision='mixed'."
        ) from error


def intact_logits(model: torch.nn.Module, inputs: Tensor) -> Any:
    """The logits of the network as it is, in its own precision (or whatever else it returns)."""
    with as_found(model), in_own_precision(model):
        return run(model, inputs)

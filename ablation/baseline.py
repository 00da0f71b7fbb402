"""The intact network: is it one that can be measured exactly? Refusals and the determinism check.

In: a model, a batch. Out: nothing, or an error that says what is wrong with which module or example.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ablation.errors import DataError, ExampleError, ModelError, SpecError, say_cause
from ablation.intake import check_module, say_tensor
from ablation.loss import Loss, loss_values
from ablation.precision import FromTargetOn, as_found, run_with
from ablation.reference import intact_logits

# Largest difference of a logit between two batch compositions, relative to 1 + the largest logit.
# Kernels round differently at different batch sizes (seen: up to 1e-5 in float32); batch mates that matter do more.
COMPOSITION_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
LOSS_TOLERANCE = 1e-12  # of a loss between two batch compositions, relative to 1 + the largest: float64's own rounding


def check_model(model: torch.nn.Module) -> None:
    """Refuse models whose loss on one example depends on its batch mates even in eval mode.

    Raises:
        ModelError: a normalisation layer has no running statistics, or `check_module` refuses the model.
    """
    check_module(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"{name} ({type(module).__name__}) has no running statistics, so the loss on one example depends on "
                "its batch mates; train it with track_running_stats=True, or replace it by a normalisation per example."
            )


def check_labels(labels: Tensor, n_classes: int) -> None:
    """Refuse labels that are not class numbers of this model.

    Raises:
        DataError: the labels' type or shape is wrong. ExampleError: one is outside 0..n_classes-1.
    """
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; allowed: one whole number per example "
            "(no soft labels, no one-hot rows)."
        )
    outside = ((labels < 0) | (labels >= n_classes)).nonzero().flatten().tolist()
    if outside:
        given = int(labels[outside[0]])
        raise ExampleError(outside[0], f"has label {given}; allowed: 0 to {n_classes - 1}, the model's classes.")


def check_logits(logits: Any, n_examples: int) -> None:
    """Refuse outputs that are not finite logits of shape (examples, classes).

    Raises:
        ModelError: another shape or type of output.
        ExampleError: NaN or infinite logits.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.layout is not torch.strided:
        raise ModelError(
            f"the model returned {_say_output(logits)}; allowed: logits, or an object with `.logits`. Wrap it in a "
            "module whose forward returns the logits alone, as dense floating-point numbers."
        )
    if logits.dim() != 2 or logits.shape[0] != n_examples or not logits.shape[1]:
        raise ModelError(
            f"the model returned shape {tuple(logits.shape)} for {n_examples} examples; allowed: (examples, classes). "
            "Wrap it in a module whose forward returns one row of logits per example."
        )
    bad = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ExampleError(bad[0], "gives NaN or infinite logits; check its input and the weights.")


def _say_output(output: Any) -> str:
    """Describe what a model returned instead of logits."""
    if isinstance(output, Tensor):
        return f"a tensor, {say_tensor(output)}" + ("" if output.layout is torch.strided else f", {output.layout}")
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(repr(key) for key in [*output][:5]) or 'nothing'}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def check_loss(loss: Loss, logits: Float[Tensor, "examples classes"], labels: Int64[Tensor, " examples"]) -> None:
    """Refuse a loss that is not finite, or whose value on one example depends on its batch mates.

    Raises:
        SpecError: the values differ by more than `LOSS_TOLERANCE` in another batch composition.
        ExampleError: the loss of an example is NaN or infinite.
    """
    values = loss_values(loss, logits, labels)
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ExampleError(bad[0], "has a NaN or infinite loss; check the loss and the example's label.")
    cut = max(1, len(labels) // 3)
    turned = logits.flip(0), labels.flip(0)
    parts = [slice(0, cut), slice(cut, None)] if len(labels) > 1 else [slice(None)]
    composed = torch.cat([loss_values(loss, turned[0][part], turned[1][part]) for part in parts]).flip(0)
    worst = (composed - values).abs().max().item()
    if not worst <= LOSS_TOLERANCE * (1 + values.abs().max().item()):
        raise SpecError(
            "loss",
            f"{type(loss).__name__}, whose values differ by {worst:.3g} in another batch composition",
            "a loss of each example that is a fixed function of its own logits and label",
            "Look for a mean over the batch, or for randomness.",
        )


def check_repeatable(first: Tensor, again: Tensor) -> None:
    """Refuse data that is different each time it is read, such as randomly augmented images.

    `first` are the first examples of a split, `again` its first batch, read later.

    Raises:
        DataError: they differ.
    """
    if not torch.equal(first, again[: len(first)]):
        raise DataError(
            "the first examples differ between two readings; every example must be the same each time. Leave out "
            "random augmentation (use the transform of evaluation)."
        )


def check_composition(model: torch.nn.Module, inputs: Tensor) -> None:
    """Run one batch as it is and again in another composition: reversed, in two unequal parts.

    Raises:
        ModelError: the logits differ by more than `COMPOSITION_TOLERANCE`.
    """
    cut = max(1, len(inputs) // 3)
    turned = inputs.flip(0)
    parts = [part for part in (turned[:cut], turned[cut:]) if len(part)]
    with as_found(model):  # restores the random state, which is set to differ from run to run
        logits = _logits(model, inputs)
        torch.manual_seed(1)
        again = _logits(model, inputs)
        torch.manual_seed(2)
        composed = torch.cat([_logits(model, part) for part in parts]).flip(0)
    advice = "Each example's loss must be a fixed function of it; look for randomness or for statistics over the batch."
    tolerance = COMPOSITION_TOLERANCE[logits.dtype]
    check_agreement(again, logits, "when run twice on the same batch", tolerance, advice)
    check_agreement(composed, logits, "when run in another batch composition", tolerance, advice)


def check_agreement(
    logits: Float[Tensor, "examples classes"],
    expected: Float[Tensor, "examples classes"],
    when: str,
    tolerance: float,
    advice: str = "Such a model can't be measured; please report it.",
) -> None:
    """Compare two runs of the intact network that must be the same.

    Raises:
        ModelError: they differ by more than `tolerance` of 1 + the largest logit.
    """
    worst = (logits - expected).abs().max().item()
    allowed = tolerance * (1 + expected.abs().max().item())
    if not worst <= allowed:
        raise ModelError(f"the model's logits differ by {worst:.3g} {when} (allowed: {allowed:.3g}). {advice}")


def check_used(model: torch.nn.Module, parameter: str, inputs: Tensor) -> None:
    """Refuse a parameter that the model reads in a way that replacing it from outside does not reach.

    A parameter that is truly not used is fine: its utility is 0.

    Raises:
        ModelError: no call of the forward pass was given the parameter, and yet its numbers change the logits; or the
            network can't be continued in float64 from the parameter on.
    """
    mode = FromTargetOn(model.get_parameter(parameter).detach().double())
    with as_found(model):
        try:
            run_with(model, parameter, mode.target, inputs, mode=mode)
        except Exception as error:
            raise ModelError(
                f"the model can't be continued in float64 from {parameter} on ({say_cause(error)}). "
                "Use precision='float64', which runs all of it in float64, or choose another layer."
            ) from error
        if mode.seen:
            return
        spoiled = copy.deepcopy(model)
        spoiled.get_parameter(parameter).fill_(float("nan"))
        if not torch.equal(intact_logits(spoiled, inputs), intact_logits(model, inputs)):
            raise ModelError(
                f"{parameter} is used in a way that can't be replaced from outside (a copy of it kept by a compiled or "
                "caching module); allowed: parameters that forward reads from the module. Choose another layer."
            )


def _logits(model: torch.nn.Module, inputs: Tensor) -> Float[Tensor, "examples classes"]:
    try:
        logits = intact_logits(model, inputs)
    except Exception as error:
        raise ModelError(
            f"the model fails on {len(inputs)} examples ({say_cause(error)}); it must take batches of any "
            "size, of the split's examples as they come."
        ) from error
    check_logits(logits, len(inputs))
    return logits

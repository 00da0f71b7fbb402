"""The intact network: is it one that can be measured exactly? Refusals and the determinism check.

In: a model, a batch. Out: nothing, or an error that says what is wrong with which module or example.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ablation.errors import DataError, ExampleError, ModelError, SpecError, say_cause
from ablation.found import Writes, is_same, write
from ablation.intake import check_module, say_tensor
from ablation.loss import Loss, loss_values
from ablation.precision import FromTargetOn, as_found, run_with
from ablation.reference import intact_logits
from ablation.sharing import holders_of, interval

# Largest difference of a logit between two batch compositions, relative to 1 + the largest logit.
# Kernels round differently at different batch sizes (seen: up to 1e-5 in float32); batch mates that matter do more.
COMPOSITION_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
N_DRAWN = 65_521  # a prime: random numbers that are repeated over a parameter, since drawing all takes seconds
N_OVERWRITTEN = 4  # examples on which a parameter is overwritten in place
OVERWRITTEN_TOLERANCE = 1e-5  # of logits with a parameter replaced, beside 100 times the rounding of the intact ones
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

    `first` and `again` are readings of the same examples, inputs or labels; of the longer one, only its beginning.

    Raises:
        ExampleError: they differ; the message says at which example.
    """
    n = min(len(first), len(again))
    for position in range(n):
        if not is_same(first[position], again[position]):
            raise ExampleError(
                position,
                "differs between two readings; every example must be the same each time, in whatever order it is read. "
                "Leave out random augmentation (use the transform of evaluation), and whatever the data set keeps from "
                "one example to the next.",
            )


def check_composition(
    model: torch.nn.Module, inputs: Tensor, parameter: str | None = None, writes: Writes | None = None
) -> None:
    """Run one batch as it is and again in another composition: reversed, in two unequal parts.

    `writes` keeps what the model writes to. Reads of the `parameter` are looked at, too.

    Raises:
        ModelError: the logits differ by more than `COMPOSITION_TOLERANCE`, or the model reads the parameter's memory
            by another name than the model's own.
    """
    cut = max(1, len(inputs) // 3)
    turned = inputs.flip(0)
    parts = [part for part in (turned[:cut], turned[cut:]) if len(part)]
    with as_found(model):  # restores the random state, which is set to differ from run to run
        with writes or nullcontext():
            logits = _logits(model, inputs)
        torch.manual_seed(1)
        reads = _Reads(model, parameter) if parameter is not None else None
        with reads or nullcontext():
            again = _logits(model, inputs)
        torch.manual_seed(2)
        composed = torch.cat([_logits(model, part) for part in parts]).flip(0)
    advice = "Each example's loss must be a fixed function of it; look for randomness or for statistics over the batch."
    tolerance = COMPOSITION_TOLERANCE[logits.dtype]
    check_agreement(again, logits, "when run twice on the same batch", tolerance, advice)
    check_agreement(composed, logits, "when run in another batch composition", tolerance, advice)
    if reads is not None and reads.is_foreign:
        raise _out_of_reach(str(parameter))


def check_reads(model: torch.nn.Module, parameter: str, inputs: Tensor) -> None:
    """Refuse a parameter whose memory the model reads by another name than its own, in one run of the model.

    Raises:
        ModelError: it does, so that a copy of the model in float64 would have other numbers there.
    """
    reads = _Reads(model, parameter)
    with reads:
        intact_logits(model, inputs)
    if reads.is_foreign:
        raise _out_of_reach(parameter)


class _Reads(TorchFunctionMode):
    """Notices while active whether a call is given a parameter's memory in a tensor that no known place holds."""

    def __init__(self, model: torch.nn.Module, parameter: str) -> None:
        super().__init__()
        own = model.get_parameter(parameter)
        held = [holder.tensor for _, holder, _ in holders_of(model, own)]
        self.known = {id(tensor): tensor for tensor in (own, *held)}  # by id, kept alive
        self.device, self.memory = own.device, interval(own)
        self.is_foreign = False

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call and look at its arguments; what it makes of known tensors is known."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        meant = [tensor for tensor in given if self._is_inside(tensor)]
        self.is_foreign = self.is_foreign or any(id(tensor) not in self.known for tensor in meant)
        result = call(*args, **(kwargs or {}))
        for leaf in tree_leaves(result) if meant else ():
            if isinstance(leaf, Tensor) and self._is_inside(leaf):
                self.known[id(leaf)] = leaf
        return result

    def _is_inside(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or tensor.device != self.device:
            return False
        try:
            address = tensor.data_ptr()
        except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
            return False
        return self.memory[0] <= address < self.memory[1]


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


def check_used(model: torch.nn.Module, parameter: str, inputs: Tensor, *, needs_sight: bool = True) -> None:
    """Refuse a parameter that the model reads in a way that replacing it from outside does not reach.

    The parameter is replaced by other numbers from outside, and overwritten by them where it lies in memory: both runs
    must give the same logits. A parameter that is truly not used is fine: its utility is 0.

    `needs_sight`: the path must also see by which call the parameter is first read, as all but `reference` do.

    Raises:
        ModelError: the two runs differ; or no call of the forward pass was given the parameter, and yet its numbers
            change the logits; or the network can't be continued in float64 from the parameter on.
    """
    own = model.get_parameter(parameter)
    mode = FromTargetOn(own.detach().double().contiguous())
    with as_found(model):
        try:
            run_with(model, parameter, mode.target, inputs, mode=mode)
        except Exception as error:
            raise ModelError(
                f"the model can't be continued in float64 from {parameter} on ({say_cause(error)}). "
                "Use precision='float64', which runs all of it in float64, or choose another layer."
            ) from error
        few = inputs[:N_OVERWRITTEN]
        kept, other = own.detach().clone(), make_other(own.detach())
        intact = intact_logits(model, few), run_with(model, parameter, kept.double().contiguous(), few)
        try:
            write(own, other)
            overwritten = intact_logits(model, few)
        except Exception:  # a model that checks its weights; the proof remains
            return
        finally:
            write(own, kept)
        replaced = run_with(model, parameter, other.double().contiguous(), few)
    rounding = (intact[0] - intact[1]).abs().max() / (1 + intact[0].abs().max())
    allowed = (1 + overwritten.abs().max()) * (OVERWRITTEN_TOLERANCE + 100 * rounding)
    is_reached = is_same(replaced.isfinite(), overwritten.isfinite()) and not bool(
        ((replaced - overwritten).abs() > allowed).any()
    )
    if not is_reached or (needs_sight and not mode.seen and not is_same(overwritten, intact[0])):
        raise _out_of_reach(parameter)


def make_other(own: Tensor) -> Tensor:
    """Numbers of the same size as a parameter's, and all of them far from it: what depends on it changes."""
    n = own.numel()
    drawn = torch.randn(min(n, N_DRAWN), generator=torch.Generator().manual_seed(0)).to(own.device, own.dtype)
    noise = drawn.repeat(-(-n // len(drawn)))[:n].view(own.shape) if n else torch.zeros_like(own)
    size = float(own.square().mean(dtype=torch.float32).sqrt()) if n else 0.0
    return noise.mul_(0.5 * (size + 0.01)).sub_(own, alpha=1.25)


def _out_of_reach(parameter: str) -> ModelError:
    return ModelError(
        f"{parameter} is used in a way that can't be replaced from outside (a copy of it kept by a compiled or "
        "caching module, its memory under a name that the model doesn't hold, or another thread); allowed: parameters "
        "that forward reads from the module. Choose another layer."
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

"""The loss that is measured: one number for each example, from its logits and its label.

In: a loss from the job spec, or an object of the caller's. Out: an object with `values`, the loss in its plain form,
which `reference.py`, `proof.py` and the tests use and nothing else. What the engine needs beyond that is in
`engine/loss.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ablation.errors import SpecError
from ablation.spec import FORMS, CrossEntropySpec, LossObject, LossSpec, check_cross_entropy


@runtime_checkable
class Loss(Protocol):
    """A loss: `values` is all that it must define.

    A loss of the form `sum_c a_c (logsumexp(z) - z_c)`, whose soft label a depends on the label alone, may also
    define `soft_labels` (`HasSoftLabels`). Its changes are then computed without cancellation. The changes of any other
    loss are differences of two float64 values.
    """

    def values(self, logits: Float64[Tensor, "examples classes"], labels: Int64[Tensor, " examples"]) -> Tensor:
        """Each example's loss (examples), float64, from its own logits and label alone."""
        ...


@runtime_checkable
class HasSoftLabels(Protocol):
    """A cross-entropy against a soft label, which depends on the label alone."""

    def values(self, logits: Float64[Tensor, "examples classes"], labels: Int64[Tensor, " examples"]) -> Tensor:
        """Each example's loss, as in `Loss`."""
        ...

    def soft_labels(self, labels: Int64[Tensor, " examples"], n_classes: int) -> Float64[Tensor, "examples classes"]:
        """Each example's a_c >= 0 such that its loss is sum_c a_c (logsumexp(z) - z_c)."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy in nats, as `torch.nn.functional.cross_entropy` defines it for integer labels.

    With label smoothing s, class weights w and C classes, the loss of an example of class y is

        sum_c a_c (-log p_c),   a_c = w_c ((1 - s) [c = y] + s / C)

    Utilities are plain means of it over examples. torch's weighted mean divides by the sum of the labels' class weights
    instead of N, which is another factor for all weights of a split.

    Args:
        label_smoothing: at least 0, less than 1.
        class_weights: one finite number of at least 0 for each class, not all 0; None: all 1.

    Raises:
        SpecError: an argument is not possible.
    """

    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        checked = self.spec
        object.__setattr__(self, "label_smoothing", checked.label_smoothing)
        object.__setattr__(self, "class_weights", checked.class_weights)

    @property
    def spec(self) -> CrossEntropySpec:
        """The field `loss` of the job spec that says the same."""
        return check_cross_entropy({"label_smoothing": self.label_smoothing, "class_weights": self.class_weights})

    def values(
        self, logits: Float[Tensor, "examples classes"], labels: Int64[Tensor, " examples"]
    ) -> Float64[Tensor, " examples"]:
        """Each example's loss in nats."""
        weight = self._weights()
        return F.cross_entropy(
            logits.double(),
            labels,
            weight=None if weight is None else weight.to(logits.device),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def soft_labels(self, labels: Int64[Tensor, " examples"], n_classes: int) -> Float64[Tensor, "examples classes"]:
        """Each example's a_c, as above."""
        one_hot = F.one_hot(labels, n_classes).double()
        smoothed = (1 - self.label_smoothing) * one_hot + self.label_smoothing / n_classes
        weight = self._weights()
        return smoothed if weight is None else smoothed * weight.to(labels.device)

    def _weights(self) -> Float64[Tensor, " classes"] | None:
        return None if self.class_weights is None else torch.tensor(self.class_weights, dtype=torch.float64)


CROSS_ENTROPY = CrossEntropy()


def is_plain(loss: Loss) -> bool:
    """Whether it is cross-entropy without smoothing and weights: the series and the compiled loops know no other."""
    return type(loss) is CrossEntropy and loss.spec.is_plain


def make_loss(spec: LossSpec) -> CrossEntropy:
    """The loss that a job spec describes.

    Raises:
        SpecError: it is an object that only the caller of `ablation.ablate` has.
    """
    if isinstance(spec, LossObject):
        raise SpecError("loss", {"object": spec.object}, FORMS["loss"], "Objects are for ablation.ablate alone.")
    return CROSS_ENTROPY if spec == "cross_entropy" else CrossEntropy(spec.label_smoothing, spec.class_weights)


def read_loss(given: Any) -> tuple[Any, Loss | None]:
    """What `ablation.ablate` was given: the field of the job spec, and the object where the spec can't describe it.

    Raises:
        SpecError: it is no loss, or a torch.nn.CrossEntropyLoss that means something else than a mean over examples.
    """
    if type(given) is CrossEntropy:
        return given.spec.model_dump(), None
    if type(given) is torch.nn.CrossEntropyLoss:
        return _of_torch(given).spec.model_dump(), None
    if isinstance(given, str):
        return given, None
    if isinstance(given, Mapping):
        return dict(given), None
    if isinstance(given, Loss) and not isinstance(given, type):
        return {"object": type(given).__name__}, given
    raise SpecError(
        "loss",
        given,
        '"cross_entropy", its options as a dict, a torch.nn.CrossEntropyLoss, or an object with values(logits, labels)',
    )


def _of_torch(given: torch.nn.CrossEntropyLoss) -> CrossEntropy:
    """Convert torch's loss; its `reduction` may be mean or none, since a utility is the plain mean over examples."""
    if given.reduction == "sum":
        advice = "A utility is a mean over examples; multiply it by their number for a sum."
        raise SpecError("loss.reduction", given.reduction, "'mean' or 'none'", advice)
    if given.ignore_index >= 0:
        advice = "Leave examples of that class out of the data."
        raise SpecError("loss.ignore_index", given.ignore_index, "a negative number, which no label is", advice)
    weights = None if given.weight is None else given.weight.detach().double().tolist()
    return CrossEntropy(given.label_smoothing, weights)


def loss_values(
    loss: Loss, logits: Float[Tensor, "examples classes"], labels: Int64[Tensor, " examples"]
) -> Float64[Tensor, " examples"]:
    """Each example's loss in its plain form, from float64 logits.

    Raises:
        SpecError: a loss of the caller's does not give one float64 number per example.
    """
    values = loss.values(logits.double(), labels)
    if not isinstance(values, Tensor) or values.dtype != torch.float64 or values.shape != labels.shape:
        what = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise SpecError(
            "loss",
            f"{type(loss).__name__}, whose values(logits, labels) gave {what} for {len(labels)} examples",
            f"a float64 tensor of shape ({len(labels)},): one number per example, not reduced",
        )
    return values

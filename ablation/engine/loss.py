"""The change of a loss from a change of logits: of cross-entropy without cancellation.

With p = softmax(z), y the label, and q = p with entry y set to 0 (never 1 - p_y):

    delta_l = log1p( sum_c q_c expm1(dz_c - dz_y) )

exactly, since l = log sum_c exp(z_c - z_y). The uncentred form log1p(sum_c p_c expm1(dz_c)) - dz_y loses everything
for confident examples: its error grows as 1 / (1 - p_y). Centred on the largest logit instead of the label, two terms
cancel by 1 / p_m where the network is wrong and unsure (docs/decisions/0011). Here a small delta stays as accurate as
its dz.

A loss with a soft label a that depends on the label alone (label smoothing, class weights),
l = A logsumexp(z) - sum_c a_c z_c with A = sum_c a_c, changes by

    delta_l = A log1p( sum_c q_c expm1(u_c) ) - sum_c a_c u_c,   u_c = dz_c - dz_r

for any class r, with q the softmax whose entry r is set to 0. With r the class of the largest a_c the two terms
cancel only where the network is at its optimum, p_c = a_c / A, and the change is truly that small; both are float64.

Any other loss is taken in its plain form, twice. The series and the compiled loops are for plain cross-entropy.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from ablation.engine.compiled import is_ready
from ablation.engine.expm1 import expm1_sums
from ablation.loss import CROSS_ENTROPY, HasSoftLabels, Loss, is_plain, loss_values

# Above this |sum|, log1p of it gains nothing over a difference of two log-sum-exps, and near -1 it loses.
LARGE = 0.5


@dataclass(frozen=True)
class SoftLabels:
    """Each example's soft label, for a loss of the form A logsumexp(z) - sum_c a_c z_c."""

    a: Float64[Tensor, "examples classes"]
    total: Float64[Tensor, " examples"]  # A
    centre: Int64[Tensor, " examples"]  # r: the class of the largest a_c
    rest: Float64[Tensor, "examples classes"]  # q: the softmax with entry r set to 0


@dataclass(frozen=True)
class Intact:
    """What the loss change needs of the intact network, once per batch."""

    logits: Float[Tensor, "examples classes"]
    labels: Int64[Tensor, " examples"]
    top: Int64[Tensor, " examples"]
    rest: Float[Tensor, "examples classes"]  # q: the softmax with the label's entry set to 0, as precise as the deltas
    loss: Float[Tensor, " examples"]
    function: Loss = CROSS_ENTROPY
    is_plain: bool = True  # plain cross-entropy: what the series and the compiled loops take
    soft_labels: SoftLabels | None = None  # where `function` is not plain, but of that form

    @property
    def correct(self) -> Bool[Tensor, " examples"]:
        """Whether the top-1 answer is right."""
        return self.top == self.labels


def make_intact(
    logits: Float[Tensor, "examples classes"],
    labels: Int64[Tensor, " examples"],
    delta_dtype: torch.dtype = torch.float64,
    function: Loss = CROSS_ENTROPY,
) -> Intact:
    """Softmax, top-1 answer and loss of each example: loss = log1p(sum of the others' p_c / p_m) + (z_m - z_y)."""
    top = logits.argmax(dim=1)
    shifted = logits - logits.gather(1, top[:, None])
    others = shifted.exp().scatter(1, top[:, None], 0.0).sum(dim=1)  # sum of p_c / p_m over the classes beside the top
    softmax = shifted.exp() / (1 + others)[:, None]
    rest = softmax.scatter(1, labels[:, None], 0.0).to(delta_dtype)
    if is_plain(function):
        loss = torch.log1p(others) - shifted.gather(1, labels[:, None])[:, 0]
        return Intact(logits, labels, top, rest, loss)
    loss = loss_values(function, logits, labels)
    soft_labels = _make_soft_labels(function, softmax, labels) if isinstance(function, HasSoftLabels) else None
    return Intact(logits, labels, top, rest, loss, function, is_plain=False, soft_labels=soft_labels)


def _make_soft_labels(
    function: HasSoftLabels, softmax: Float[Tensor, "examples classes"], labels: Int64[Tensor, " examples"]
) -> SoftLabels:
    a = function.soft_labels(labels, softmax.shape[1])
    centre = a.argmax(dim=1)
    return SoftLabels(a, a.sum(dim=1), centre, softmax.double().scatter(1, centre[:, None], 0.0))


def loss_delta(
    intact: Intact, examples: Int64[Tensor, " pairs"], dz: Float[Tensor, "pairs classes"]
) -> Float[Tensor, " pairs"]:
    """Each pair's change of loss when the logits of example `examples[k]` change by `dz[k]`, in nats, as float64.

    Numerics: relative error about that of dz (float32: 1e-6 of sum_c q_c |dz_c - dz_y|), for any confidence; with
    soft labels, of sum_c (A q_c + a_c) |dz_c - dz_r|. A loss without either form: 2e-16 of the loss, absolutely.
    """
    return loss_delta_and_touched(intact, examples, dz)[0]


def loss_delta_and_touched(
    intact: Intact, examples: Int64[Tensor, " pairs"], dz: Float[Tensor, "pairs classes"]
) -> tuple[Float[Tensor, " pairs"], Bool[Tensor, " pairs"]]:
    """Loss delta of each pair as `loss_delta`, and whether any logit's delta is nonzero."""
    if not intact.is_plain:
        touched = (dz != 0).any(dim=1)
        return _general_delta(intact, examples, dz).masked_fill_(~touched, 0.0), touched
    if is_ready(dz):
        moved, touched = expm1_sums(dz, intact.rest, intact.labels, examples)
    else:
        touched = (dz != 0).any(dim=1)
        # index_select and in-place products: this is where the time goes. Differences first, then float32.
        centred = (dz - dz.gather(1, intact.labels[examples, None])).to(intact.rest.dtype)
        moved = intact.rest.index_select(0, examples).mul_(centred.expm1_()).sum(dim=1).double()
    delta = torch.log1p(moved)
    _replace_large(delta, moved, intact, examples, dz)
    return delta, touched


def _general_delta(
    intact: Intact, examples: Int64[Tensor, " pairs"], dz: Float[Tensor, "pairs classes"]
) -> Float64[Tensor, " pairs"]:
    """The change of a loss that is not plain cross-entropy: by its soft labels, or else as a difference."""
    if intact.soft_labels is None:
        return _difference(intact, examples, dz)
    soft = intact.soft_labels
    centred = dz.double()
    centred = centred - centred.gather(1, soft.centre[examples, None])
    linear = soft.a.index_select(0, examples).mul_(centred).sum(dim=1)
    moved = soft.rest.index_select(0, examples).mul_(centred.expm1_()).sum(dim=1)
    delta = soft.total[examples] * torch.log1p(moved) - linear
    _replace_large(delta, moved, intact, examples, dz)
    return delta


def _replace_large(
    delta: Float64[Tensor, " pairs"],
    moved: Float64[Tensor, " pairs"],
    intact: Intact,
    examples: Int64[Tensor, " pairs"],
    dz: Float[Tensor, "pairs classes"],
) -> None:
    """Where the argument of log1p is large, take the difference of two losses instead, which is accurate there."""
    large = (~(moved.abs() <= LARGE)).nonzero().flatten()  # NaN and infinity count as large
    if len(large):
        delta[large] = _difference(intact, examples[large], dz[large])


def _difference(
    intact: Intact, examples: Int64[Tensor, " pairs"], dz: Float[Tensor, "pairs classes"]
) -> Float64[Tensor, " pairs"]:
    """The change as a difference of two losses in float64: exact to about 2e-16 of the loss."""
    ablated = loss_values(intact.function, intact.logits[examples].double() + dz.double(), intact.labels[examples])
    return ablated - intact.loss[examples].double()


def is_correct(
    intact: Intact, examples: Int64[Tensor, " pairs"], dz: Float[Tensor, "pairs classes"]
) -> Bool[Tensor, " pairs"]:
    """Whether the top-1 answer is right after the change."""
    return (intact.logits[examples] + dz).argmax(dim=1) == intact.labels[examples]

"""The change of cross-entropy from a change of logits, without cancellation.

With p = softmax(z), y the label, and q = p with entry y set to 0 (never 1 - p_y):

    delta_l = log1p( sum_c q_c expm1(dz_c - dz_y) )

exactly, since l = log sum_c exp(z_c - z_y). The uncentred form log1p(sum_c p_c expm1(dz_c)) - dz_y loses everything
for confident examples: its error grows as 1 / (1 - p_y). Centred on the largest logit instead of the label, two terms
cancel by 1 / p_m where the network is wrong and unsure (docs/decisions/0011). Here a small delta stays as accurate as
its dz.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ablation.engine.compiled import is_ready
from ablation.engine.expm1 import expm1_sums

# Above this |sum|, log1p of it gains nothing over a difference of two log-sum-exps, and near -1 it loses.
LARGE = 0.5


@dataclass(frozen=True)
class Intact:
    """What the loss change needs of the intact network, once per batch."""

    logits: Float[Tensor, "examples classes"]
    labels: Int64[Tensor, " examples"]
    top: Int64[Tensor, " examples"]
    rest: Float[Tensor, "examples classes"]  # q: the softmax with the label's entry set to 0, as precise as the deltas
    loss: Float[Tensor, " examples"]

    @property
    def correct(self) -> Bool[Tensor, " examples"]:
        """Whether the top-1 answer is right."""
        return self.top == self.labels


def make_intact(
    logits: Float[Tensor, "examples classes"],
    labels: Int64[Tensor, " examples"],
    delta_dtype: torch.dtype = torch.float64,
) -> Intact:
    """Softmax, top-1 answer and loss of each example: loss = log1p(sum of the others' p_c / p_m) + (z_m - z_y)."""
    top = logits.argmax(dim=1)
    shifted = logits - logits.gather(1, top[:, None])
    others = shifted.exp().scatter(1, top[:, None], 0.0).sum(dim=1)  # sum of p_c / p_m over the classes beside the top
    loss = torch.log1p(others) - shifted.gather(1, labels[:, None])[:, 0]
    rest = (shifted.exp() / (1 + others)[:, None]).scatter(1, labels[:, None], 0.0).to(delta_dtype)
    return Intact(logits, labels, top, rest, loss)


def loss_delta(
    intact: Intact, examples: Int64[Tensor, " pairs"], dz: Float[Tensor, "pairs classes"]
) -> Float[Tensor, " pairs"]:
    """Each pair's change of loss when the logits of example `examples[k]` change by `dz[k]`, in nats, as float64.

    Numerics: relative error about that of dz (float32: 1e-6 of sum_c q_c |dz_c - dz_y|), for any confidence.
    """
    return loss_delta_and_touched(intact, examples, dz)[0]


def loss_delta_and_touched(
    intact: Intact, examples: Int64[Tensor, " pairs"], dz: Float[Tensor, "pairs classes"]
) -> tuple[Float[Tensor, " pairs"], Bool[Tensor, " pairs"]]:
    """The same, and whether any logit's delta is nonzero."""
    if is_ready(dz):
        moved, touched = expm1_sums(dz, intact.rest, intact.labels, examples)
    else:
        touched = (dz != 0).any(dim=1)
        # index_select and in-place products: this is where the time goes. Differences first, then float32.
        centred = (dz - dz.gather(1, intact.labels[examples, None])).to(intact.rest.dtype)
        moved = intact.rest.index_select(0, examples).mul_(centred.expm1_()).sum(dim=1).double()
    delta = torch.log1p(moved)
    large = (~(moved.abs() <= LARGE)).nonzero().flatten()  # NaN and infinity count as large
    if len(large):
        delta[large] = _large_delta(intact, examples[large], dz[large])
    return delta, touched


def _large_delta(
    intact: Intact, examples: Int64[Tensor, " pairs"], dz: Float[Tensor, "pairs classes"]
) -> Float[Tensor, " pairs"]:
    """The same as a difference of two losses in float64: accurate where the change is not small."""
    logits, labels = intact.logits[examples].double(), intact.labels[examples]
    ablated = torch.nn.functional.cross_entropy(logits + dz.double(), labels, reduction="none")
    return ablated - intact.loss[examples].double()


def is_correct(
    intact: Intact, examples: Int64[Tensor, " pairs"], dz: Float[Tensor, "pairs classes"]
) -> Bool[Tensor, " pairs"]:
    """Whether the top-1 answer is right after the change."""
    return (intact.logits[examples] + dz).argmax(dim=1) == intact.labels[examples]

"""The per-example deltas of some sites on one batch: what every path yields, and what is summed up."""

from dataclasses import dataclass

from jaxtyping import Bool, Float64
from torch import Tensor

HUGE_STEP = (
    100.0  # replacement minus weight: beyond it deltas are float64; in float32 they could drown what they add to
)
VALUES_AT_ONCE = 1 << 19  # (pair, class) numbers scored together: stays in the cache


@dataclass(frozen=True)
class Deltas:
    """Rows of the table against the examples of one batch.

    `touched`: any logit's delta is nonzero. `correct`: the top-1 answer with the weight replaced is right.
    """

    rows: slice
    delta: Float64[Tensor, "sites examples"]
    touched: Bool[Tensor, "sites examples"]
    correct: Bool[Tensor, "sites examples"]

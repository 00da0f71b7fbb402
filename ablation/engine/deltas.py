"""The results of a path for one batch: per-example deltas of some sites, or response functions that add up their own
sums, for so many sites that their deltas are never stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from ablation.engine.loss import Intact
from ablation.plan import HUGE_STEP as HUGE_STEP

VALUES_AT_ONCE = 1 << 19  # (pair, class) values scored together, few enough to stay in the processor's cache


@dataclass(frozen=True)
class Deltas:
    """Deltas of some rows of the table on the examples of one batch.

    `touched`: any logit's delta is nonzero. `correct`: the top-1 answer with the weight replaced is right.
    """

    rows: slice
    delta: Float64[Tensor, "sites examples"]
    touched: Bool[Tensor, "sites examples"]
    correct: Bool[Tensor, "sites examples"]


class Runs(NamedTuple):
    """Where a batch is cut: runs of examples of one class. The compiled loops take it as it is."""

    ends: np.ndarray  # int64: the example behind each run
    closes: np.ndarray  # bool: whether the run is its class's last
    per_class: int  # the examples of a class; 0 where classes don't count, and the batch is one run


def make_runs(n_examples: int, n_before: int, per_class: int | None) -> Runs:
    """Make the runs of a batch after `n_before` examples; a single run where the split is not `per_class`."""
    if not per_class:
        return Runs(np.array([n_examples]), np.array([False]), 0)
    ends = np.arange(per_class - n_before % per_class, n_examples + per_class, per_class)
    return Runs(np.minimum(ends, n_examples), ends <= n_examples, per_class)


@runtime_checkable
class Responses(Protocol):
    """The response functions of one batch, which add up sums over its examples for all rows of the table."""

    @property
    def n_units(self) -> int:
        """Number of units that have functions here."""
        ...

    @property
    def rows(self) -> slice:
        """The rows of the table that these functions cover: all of the shard's."""
        ...

    def add(self, sums: dict[str, Any], runs: Runs, bounds: Any) -> None:
        """Add this batch's sums to `sums`, arrays of shape (sites,), and its error bounds to `bounds` (units,).

        `sums` has `delta` and, where wanted, `delta_squared` and `touched`; for runs of classes also `class_delta` and
        `class_delta_squared`, the sums over the class under way, and `within`, the variance of complete classes.
        """
        ...

    def of_examples(self, chosen: np.ndarray) -> "Responses":
        """The response functions of some of the examples."""
        ...

    def joined(self, others: Sequence[Any]) -> "Responses":
        """The response functions of these examples, followed by those of `others`."""
        ...

    def deltas_of(self, rows: Int64[np.ndarray, " rows"], intact: Intact) -> Deltas:
        """Per-example deltas of some rows of the table."""
        ...


@runtime_checkable
class DeviceResponses(Responses, Protocol):
    """Response functions whose sums are tensors on their device; those of others are arrays on the host."""

    @property
    def device(self) -> torch.device:
        """Device of the sums."""
        ...

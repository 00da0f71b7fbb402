"""What every path yields of one batch, and what is summed up: the per-example deltas of some sites; or functions that
sum themselves up, for so many sites that their deltas are never held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from ablation.engine.loss import Intact
from ablation.plan import HUGE_STEP as HUGE_STEP

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


@dataclass(frozen=True)
class Runs:
    """Where a batch is cut: runs of examples of one class, of which some are the class's last."""

    ends: np.ndarray
    closes: np.ndarray
    per_class: int


def make_runs(n_examples: int, n_before: int, per_class: int | None) -> Runs:
    """The runs of a batch that comes after `n_before` examples; one run where the split is not `per_class`."""
    if not per_class:
        return Runs(np.array([n_examples]), np.array([False]), 0)
    ends = np.arange(per_class - n_before % per_class, n_examples + per_class, per_class)
    return Runs(np.minimum(ends, n_examples), ends <= n_examples, per_class)


@runtime_checkable
class Responses(Protocol):
    """The response functions of one batch, ready to be summed over its examples for all rows of the table."""

    @property
    def n_units(self) -> int:
        """How many units' functions these are."""
        ...

    @property
    def rows(self) -> slice:
        """Of the table: all of the shard's."""
        ...

    def add(self, sums: dict[str, Any], runs: Runs, bounds: Any) -> None:
        """Add the sums over the batch to those given, each (sites): `delta` and, where wanted, `delta_squared`,
        `touched`; for runs of classes `open`, `open_squared` and `within`. bounds (units): what the series left out."""
        ...

    def of_examples(self, chosen: np.ndarray) -> "Responses":
        """Of some of the examples."""
        ...

    def joined(self, others: Sequence[Any]) -> "Responses":
        """Of these examples, and then of those of other such responses."""
        ...

    def deltas_of(self, rows: Int64[np.ndarray, " rows"], intact: Intact) -> Deltas:
        """Example by example, of some rows of the table."""
        ...


@runtime_checkable
class DeviceResponses(Responses, Protocol):
    """Such whose sums are tensors on their device; those of others are arrays on the host."""

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        ...

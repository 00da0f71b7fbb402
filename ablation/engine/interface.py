"""The interface of paths: a `Setup` is what a path is made from, an `EnginePath` what it can do; and of statistics.

The paths themselves are listed in `paths.py`; `deltas.py` has their results.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ablation.cache import Activations
from ablation.engine.deltas import HUGE_STEP, Deltas, Responses
from ablation.engine.loss import Intact
from ablation.loss import CROSS_ENTROPY, Loss
from ablation.sites import Sites


@dataclass(frozen=True, eq=False)
class Setup:
    """The model, the weights with their replacements, and how their deltas are computed.

    `top1`: whether paths also compute top-1 answers. `lanes`: the number of sites that the path `finite` carries at
    once. `activations`: the cache of the layer's input, shared by jobs and shards; None: no cache. `loss`: the loss
    whose change is computed.
    """

    model: torch.nn.Module
    parameter: str
    sites: Sites
    precision: str = "mixed"
    top1: bool = False
    lanes: int = 1
    activations: Activations | None = None
    loss: Loss = CROSS_ENTROPY

    @property
    def base_dtype(self) -> torch.dtype:
        """The type of the intact network's numbers from the layer on."""
        return torch.float32 if self.precision == "float32" else torch.float64

    @property
    def delta_dtype(self) -> torch.dtype:
        """The type of the deltas: float32, unless the precision is `float64` or a weight changes by a large step."""
        is_huge = len(self.sites) > 0 and bool(self.sites.steps.abs().max() > HUGE_STEP)
        return torch.float64 if self.precision == "float64" or is_huge else torch.float32


@runtime_checkable
class EnginePath(Protocol):
    """One way to compute the deltas; it holds what does not change from batch to batch."""

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas | Responses]]:
        """Run one batch; returns the intact network's results, and deltas of all sites or their response functions."""
        ...


@runtime_checkable
class HasPrefix(Protocol):
    """A path that needs nothing of a batch but the layer's input, which it can take from the cache."""

    def keep_prefix(self, inputs: Tensor) -> None:
        """Compute the layer's input and put it into the cache, if there is room."""
        ...


@runtime_checkable
class Statistic(Protocol):
    """A sum over examples at every site that criteria need; the table of statistics is in `batches.py`."""

    def add(self, sums: Float64[Tensor, " sites"], inputs: Tensor, labels: Int64[Tensor, " examples"]) -> None:
        """Add the sum over the examples of one batch to `sums`."""
        ...

    def check(self, any_touched: bool) -> None:
        """Refuse sums over a shard that can't be right; `any_touched`: whether any weight has moved any logit."""
        ...

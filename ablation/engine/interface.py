"""What every path is made from, and what it can do: a `Setup` goes in, an `EnginePath` comes out.

Which paths there are is told in `paths.py`; what they yield batch by batch, in `deltas.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from ablation.cache import Activations
from ablation.engine.deltas import HUGE_STEP, Deltas, Responses
from ablation.engine.loss import Intact
from ablation.loss import CROSS_ENTROPY, Loss
from ablation.sites import Sites


@dataclass(frozen=True, eq=False)
class Setup:
    """Which weights of which model are replaced by what, and how the deltas are to be computed.

    `top1`: the paths also say whether the top-1 answer is right. `lanes`: how many sites the path `finite` carries at
    once. `activations`: where what comes before the layer is kept between jobs and shards; None: nowhere. `loss`: whose
    change is computed.
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
        steps = self.sites.replacements - self.sites.weights
        is_huge = len(self.sites) > 0 and bool(steps.abs().max() > HUGE_STEP)
        return torch.float64 if self.precision == "float64" or is_huge else torch.float32


@runtime_checkable
class EnginePath(Protocol):
    """One way to get the deltas; holds what does not change from batch to batch."""

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas | Responses]]:
        """One batch: the intact network, and the deltas of all sites; or functions that sum them up."""
        ...


@runtime_checkable
class HasPrefix(Protocol):
    """A path whose only use for a batch is what comes before the layer, and that finds this in the cache."""

    def keep_prefix(self, inputs: Tensor) -> None:
        """Put what comes before the layer into the cache, if there is room."""
        ...

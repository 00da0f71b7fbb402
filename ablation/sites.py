"""Which weights are ablated: the list of sites, in the order of the table's rows, and what each is replaced by.

In: the spec's `sites` and `value`, and the parameter tensor. Out: frozen `Sites` in float64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ablation.spec import Constant, CountOfSites, SiteIndices, SitesSpec, ValueSpec


@dataclass(frozen=True)
class Sites:
    """Sites of one parameter: flat index, intact weight, and the number that replaces it."""

    indices: Int64[Tensor, " sites"]
    weights: Float64[Tensor, " sites"]
    replacements: Float64[Tensor, " sites"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> "Sites":
        return Sites(self.indices[rows], self.weights[rows], self.replacements[rows])


def draw_indices(asked: SitesSpec, n_weights: int) -> Int64[np.ndarray, " sites"]:
    """The flat indices asked for: all of them, those listed, or a uniform draw without replacement, sorted."""
    if asked == "all":
        return np.arange(n_weights, dtype=np.int64)
    if isinstance(asked, SiteIndices):
        return np.asarray(asked.indices, dtype=np.int64)
    assert isinstance(asked, CountOfSites)
    drawn = np.random.default_rng(asked.seed).choice(n_weights, size=asked.count, replace=False, shuffle=False)
    return np.sort(drawn).astype(np.int64)


def make_sites(parameter: Tensor, indices: Int64[np.ndarray, " sites"], value: ValueSpec) -> Sites:
    """The sites at `indices` of `parameter`, with what the spec's `value` replaces each of them by."""
    flat_indices = torch.from_numpy(indices).to(parameter.device)
    weights = parameter.detach().reshape(-1)[flat_indices].double()
    constant = value.constant if isinstance(value, Constant) else 0.0
    return Sites(flat_indices, weights, torch.full_like(weights, constant))

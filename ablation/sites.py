"""Which weights are ablated: the list of sites, in the order of the table's rows, and what each is replaced by.

In: the spec's `sites` and `value`, and the parameter tensor. Out: frozen `Sites` in float64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped
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

    def listed(self) -> "Sites":
        """Sites with contiguous lists in memory, which are cheap to index repeatedly."""
        return Sites(self.indices, self.weights, self.replacements.contiguous())

    def pick(self, rows: Int64[np.ndarray, " rows"]) -> "Sites":
        """The sites of these rows."""
        picked = torch.from_numpy(rows).to(self.indices.device)
        return Sites(self.indices[picked], self.weights[picked], self.replacements[picked])


class EveryWeight(Sites):
    """All weights from one flat index to before another, all replaced by one number.

    The three lists take 24 bytes a site. Here they are made each time they are asked for, so ask for those of a slice.
    """

    flat: Shaped[Tensor, " weights"]
    first: int
    last: int
    constant: float

    def __init__(self, flat: Shaped[Tensor, " weights"], first: int, last: int, constant: float) -> None:
        vars(self).update(flat=flat, first=first, last=last, constant=constant)  # frozen, as all sites are

    @property
    def indices(self) -> Int64[Tensor, " sites"]:
        """Flat indices."""
        return torch.arange(self.first, self.last, device=self.flat.device)

    @property
    def own(self) -> Shaped[Tensor, " sites"]:
        """Intact weights in the parameter's own precision: a view of it."""
        return self.flat[self.first : self.last]

    @property
    def weights(self) -> Float64[Tensor, " sites"]:
        """Intact weights."""
        return self.own.double()

    @property
    def replacements(self) -> Float64[Tensor, " sites"]:
        """What replaces them."""
        return torch.full((1,), self.constant, dtype=torch.float64, device=self.flat.device).expand(len(self))

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, rows: slice) -> "Sites":
        first, last, step = rows.indices(len(self))
        if step != 1:
            return super().__getitem__(rows)
        return EveryWeight(self.flat, self.first + first, self.first + max(first, last), self.constant)

    def pick(self, rows: Int64[np.ndarray, " rows"]) -> "Sites":
        """The sites of these rows."""
        picked = torch.from_numpy(rows).to(self.flat.device) + self.first
        weights = self.flat[picked].double()
        return Sites(picked, weights, torch.full_like(weights, self.constant))


def list_sites(parameter: Tensor, asked: SitesSpec, value: ValueSpec) -> Sites:
    """The sites of `parameter` that a spec asks for; of a whole layer without a list of them."""
    if asked == "all":
        constant = value.constant if isinstance(value, Constant) else 0.0
        return EveryWeight(parameter.detach().reshape(-1), 0, parameter.numel(), constant)
    return make_sites(parameter, draw_indices(asked, parameter.numel()), value)


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

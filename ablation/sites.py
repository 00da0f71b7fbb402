"""Which weights are ablated: the list of sites, in the order of the table's rows, and what each is replaced by.

In: the spec's `sites` and `value`, and the parameter tensor. Out: frozen `Sites` in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, Shaped
from torch import Tensor

from ablation.spec import Constant, CountOfSites, Scale, SiteIndices, SitesSpec, ValueSpec

BLOCK = 1 << 16  # sites whose numbers are made together: they stay in the cache


def replace_weights(
    weights: Float64[Tensor, " sites"],
    value: ValueSpec,
    parameter: Shaped[Tensor, "*shape"],
    indices: Int64[Tensor, " sites"] | slice,
) -> Float64[Tensor, " sites"]:
    """Return the numbers that a spec's `value` replaces weights by: a new value is one more case here.

    Args:
        weights: the intact weights of the sites.
        value: the field `value` of the job spec.
        parameter: the whole parameter, for values that depend on other weights, such as the mean of a row.
        indices: flat indices of the sites in the parameter; a slice where they are consecutive.

    Numerics: float64; infinite where the product with a scale overflows.
    """
    match value:
        case Constant(constant=constant):
            return torch.full_like(weights, constant + 0.0)  # -0.0 becomes 0.0
        case Scale(scale=scale):
            return weights * scale
        case "zero":
            return torch.zeros_like(weights)
        case "flip_sign":
            return -weights
        case _:
            assert_never(value)


def is_always_finite(value: ValueSpec) -> bool:
    """Whether the replacement is a finite number whatever the weight is."""
    return value == "zero" or isinstance(value, Constant)


@dataclass(frozen=True)
class Sites:
    """Sites of one parameter: flat index, intact weight, and the number that replaces it.

    A replacement that is not a finite number can't be run: the weight itself stands in its place, and the site is
    marked as `not_finite`. So replacements are finite wherever weights are.
    """

    indices: Int64[Tensor, " sites"]
    weights: Float64[Tensor, " sites"]
    replacements: Float64[Tensor, " sites"]
    not_finite: Bool[Tensor, " sites"]

    @property
    def steps(self) -> Float64[Tensor, " sites"]:
        """Replacement minus weight; 0.0 where the two are equal, for zeros of either sign."""
        return self.replacements - self.weights

    def steps_float32(self) -> Float32[Tensor, " sites"]:
        """The steps rounded to float32. Only a block of the lists in float64 is there at any time."""
        steps = torch.empty(len(self), dtype=torch.float32, device=self.indices[:0].device)
        for rows in self.blocks():
            steps[rows] = self[rows].steps
        return steps

    def blocks(self) -> Iterator[slice]:
        """All rows, some at a time."""
        return (slice(first, min(first + BLOCK, len(self))) for first in range(0, len(self), BLOCK))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> "Sites":
        return Sites(self.indices[rows], self.weights[rows], self.replacements[rows], self.not_finite[rows])

    def listed(self) -> "Sites":
        """Sites with contiguous lists in memory, which are cheap to index repeatedly."""
        return Sites(self.indices, self.weights, self.replacements, self.not_finite)

    def pick(self, rows: Int64[np.ndarray, " rows"]) -> "Sites":
        """The sites of these rows."""
        picked = torch.from_numpy(rows).to(self.indices.device)
        return Sites(self.indices[picked], self.weights[picked], self.replacements[picked], self.not_finite[picked])


class EveryWeight(Sites):
    """All weights from one flat index to before another, each replaced by what a spec's `value` says.

    The lists take 25 bytes a site. Here they are made each time they are asked for, so ask for those of a slice.
    """

    parameter: Shaped[Tensor, "*shape"]
    first: int
    last: int
    value: ValueSpec

    def __init__(self, parameter: Shaped[Tensor, "*shape"], first: int, last: int, value: ValueSpec) -> None:
        vars(self).update(parameter=parameter, first=first, last=last, value=value)  # frozen, as all sites are

    @property
    def flat(self) -> Shaped[Tensor, " weights"]:
        """All weights of the parameter, in the order of their flat indices."""
        return self.parameter.reshape(-1)

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
        """The numbers that replace them."""
        return self._replace(self.weights)[0]

    @property
    def steps(self) -> Float64[Tensor, " sites"]:
        """Replacement minus weight; 0.0 where the two are equal, for zeros of either sign."""
        weights = self.weights
        return self._replace(weights)[0].sub_(weights)

    @property
    def not_finite(self) -> Bool[Tensor, " sites"]:
        """Whether the value gives no finite number, for each weight."""
        return self._replace(self.weights)[1]

    def _replace(self, weights: Float64[Tensor, " sites"]) -> tuple[Tensor, Tensor]:
        return _replace(weights, self.value, self.parameter, slice(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, rows: slice) -> "Sites":
        first, last, step = rows.indices(len(self))
        if step != 1:
            return super().__getitem__(rows)
        return EveryWeight(self.parameter, self.first + first, self.first + max(first, last), self.value)

    def pick(self, rows: Int64[np.ndarray, " rows"]) -> "Sites":
        """The sites of these rows."""
        picked = torch.from_numpy(rows).to(self.flat.device) + self.first
        return _make(picked, self.parameter, self.value)


def _make(indices: Int64[Tensor, " sites"], parameter: Shaped[Tensor, "*shape"], value: ValueSpec) -> Sites:
    """Make the list of these sites, with the number that a spec's `value` replaces each of them by."""
    weights = parameter.reshape(-1)[indices].double()
    return Sites(indices, weights, *_replace(weights, value, parameter, indices))


def _replace(
    weights: Float64[Tensor, " sites"],
    value: ValueSpec,
    parameter: Shaped[Tensor, "*shape"],
    indices: Int64[Tensor, " sites"] | slice,
) -> tuple[Float64[Tensor, " sites"], Bool[Tensor, " sites"]]:
    """Return the replacements, with the weight itself where there is no finite one, and which these are.

    Adding 0.0 turns -0.0 into 0.0: the step of a zero is 0.0 whichever its sign, and scale 0 gives the bytes of zero.
    """
    replacements = replace_weights(weights, value, parameter, indices)
    if is_always_finite(value):
        return replacements, torch.zeros_like(weights, dtype=torch.bool)
    not_finite = replacements.add_(0.0).isfinite().logical_not_()
    if not_finite.any():
        replacements[not_finite] = weights[not_finite]
    return replacements, not_finite


def find_not_finite(sites: Sites) -> Bool[np.ndarray, " sites"] | None:
    """Which sites have no finite replacement; None where each has one."""
    if isinstance(sites, EveryWeight) and is_always_finite(sites.value):
        return None
    not_finite = np.concatenate([sites[rows].not_finite.cpu().numpy() for rows in sites.blocks()])
    return not_finite if not_finite.any() else None


def list_sites(parameter: Tensor, asked: SitesSpec, value: ValueSpec) -> Sites:
    """The sites of `parameter` that a spec asks for; of a whole layer without a list of them."""
    if asked == "all":
        return EveryWeight(parameter.detach().contiguous(), 0, parameter.numel(), value)
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
    return _make(flat_indices, parameter.detach(), value)

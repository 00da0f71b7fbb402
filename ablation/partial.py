"""Raw sums over one shard's examples, and how those of all shards are put together.

In: per-example deltas, already summed over one batch. Out: a `PartialSums`, which the table is made from.
Sums are float64, counts int32 (a split has fewer than 2^31 examples); all are added in a fixed order, so the same plan
gives the same bytes. What a job does not ask for is None and takes no room: 28 bytes a site are usual.
Torch-free: partials travel through Redis.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, Int64


@dataclass(frozen=True)
class PartialSums:
    """Sums over the examples of one shard, per site; and over the same examples of the intact network.

    `proof` is the sum of the deltas over the plan's proof examples alone: it ties the table to the proof. None where no
    site is proved.
    `within` is the part of the stratified variance that closed classes have given so far:
    sum over classes h of n_h / (n_h - 1) * (S2_h - S_h^2 / n_h). None for splits that are not `per_class`.
    `broken`, `fixed`: None where the job does not ask for `top1`.
    `left_out`: what response functions' series have left out of any site's `delta` at most, in nats; NaN: not known.
    `statistics`: the sums that the job's criteria need, by their names in `criteria.py`; none where it asks for none.
    """

    n_examples: int
    n_correct: int
    loss: float
    delta: Float64[np.ndarray, " sites"]
    delta_squared: Float64[np.ndarray, " sites"]
    touched: Int32[np.ndarray, " sites"]
    proof: Float64[np.ndarray, " sites"] | None = None
    within: Float64[np.ndarray, " sites"] | None = None
    broken: Int32[np.ndarray, " sites"] | None = None
    fixed: Int32[np.ndarray, " sites"] | None = None
    left_out: float = 0.0
    statistics: Mapping[str, Float64[np.ndarray, " sites"]] = field(default_factory=dict)


TOTALS = ("n_examples", "n_correct", "loss", "left_out")
PER_SITE = tuple(each.name for each in fields(PartialSums) if each.name not in (*TOTALS, "statistics"))


def held(partial: PartialSums) -> dict[str, np.ndarray]:
    """The arrays that this partial has, its statistics among them."""
    arrays = {name: getattr(partial, name) for name in PER_SITE}
    return {name: values for name, values in arrays.items() if values is not None} | dict(partial.statistics)


def make_partial(totals: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> PartialSums:
    """The partial with these totals and arrays, as `held` gives them; arrays that are no fields are statistics."""
    own: dict[str, Any] = {name: values for name, values in arrays.items() if name in PER_SITE}
    statistics = {name: values for name, values in arrays.items() if name not in PER_SITE}
    return PartialSums(**totals, **own, statistics=statistics)


def take_rows(partial: PartialSums, rows: Int64[np.ndarray, " rows"]) -> PartialSums:
    """The sums of some of the sites."""
    totals = {name: getattr(partial, name) for name in TOTALS}
    return make_partial(totals, {name: values[rows] for name, values in held(partial).items()})


class Gathered:
    """The sums of all sites over all examples, into which partials are added one at a time.

    Partials of the same sites (disjoint examples) are merged: added up, in the order in which they come. Partials of
    disjoint sites (the same examples) are joined: each is put into its rows. A partial that has all sites may be
    changed by this.
    """

    def __init__(self, n_sites: int) -> None:
        self.n_sites = n_sites
        self.totals: dict[tuple[int, int], tuple[int, int, float, float]] = {}  # by block of sites
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, sites: tuple[int, int], partial: PartialSums) -> None:
        """Add the sums over more examples for the rows from the first of `sites` to before the last.

        Raises:
            ValueError: the partial has another number of sites, or other fields than those before it.
        """
        arrays, rows = held(partial), slice(*sites)
        if partial.delta.size != rows.stop - rows.start:
            raise ValueError(f"got a partial of {partial.delta.size} sites for the rows {rows.start} to {rows.stop}")
        if not self.totals and partial.delta.size == self.n_sites:  # all there is of one shard: nothing to copy
            self.arrays = {name: values if values.flags.writeable else values.copy() for name, values in arrays.items()}
            self.totals[sites] = (partial.n_examples, partial.n_correct, partial.loss, partial.left_out)
            return
        if not self.totals:
            self.arrays = {name: np.zeros(self.n_sites, values.dtype) for name, values in arrays.items()}
        if arrays.keys() != self.arrays.keys():
            raise ValueError(f"partials of one job have the same fields: got {[*self.arrays]} and {[*arrays]}")
        more = (partial.n_examples, partial.n_correct, partial.loss, partial.left_out)
        before = self.totals.get(sites)
        if before is None:  # as it is: -0.0 + 0.0 would lose its sign
            for name, values in arrays.items():
                self.arrays[name][rows] = values
            self.totals[sites] = more
            return
        for name, values in arrays.items():
            self.arrays[name][rows] += values
        self.totals[sites] = (before[0] + more[0], before[1] + more[1], before[2] + more[2], before[3] + more[3])

    def block(self, sites: tuple[int, int]) -> PartialSums:
        """What has been added so far for these rows; its arrays are those of the running sums themselves."""
        n_examples, n_correct, loss, left_out = self.totals[sites]
        totals = {"n_examples": n_examples, "n_correct": n_correct, "loss": loss, "left_out": left_out}
        return make_partial(totals, {name: values[slice(*sites)] for name, values in self.arrays.items()})

    def finish(self) -> PartialSums:
        """The sums over all examples that were added, for all sites.

        Raises:
            ValueError: some sites have been summed over more examples than others.
        """
        counts = [n for n, *_ in self.totals.values()]
        if len({*counts}) != 1:
            raise ValueError(f"join takes partials of the same examples: got {counts} of them")
        n_examples, n_correct, loss, _ = next(iter(self.totals.values()))
        left_out = max(each[3] for each in self.totals.values())
        totals = {"n_examples": n_examples, "n_correct": n_correct, "loss": loss, "left_out": left_out}
        return make_partial(totals, self.arrays)

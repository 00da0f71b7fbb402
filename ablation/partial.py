"""Raw sums over one shard's examples: zero, add, merge, join.

In: per-example deltas, already summed over one batch. Out: a `PartialSums`, which the table is made from.
Everything is float64 or int64 and added in a fixed order, so the same plan gives the same bytes.
Torch-free: partials travel through Redis.
"""

from dataclasses import dataclass, fields
from functools import reduce

import numpy as np
from jaxtyping import Float64, Int64


@dataclass(frozen=True)
class PartialSums:
    """Sums over the examples of one shard, per site; and over the same examples of the intact network.

    `within` is the part of the stratified variance that closed classes have given so far:
    sum over classes h of n_h / (n_h - 1) * (S2_h - S_h^2 / n_h); zeros for splits that are not `per_class`.
    `proof` is the sum of the deltas over the plan's proof examples alone: it ties the table to the proof.
    """

    n_examples: int
    n_correct: int
    loss: float
    delta: Float64[np.ndarray, " sites"]
    delta_squared: Float64[np.ndarray, " sites"]
    within: Float64[np.ndarray, " sites"]
    proof: Float64[np.ndarray, " sites"]
    touched: Int64[np.ndarray, " sites"]
    broken: Int64[np.ndarray, " sites"]
    fixed: Int64[np.ndarray, " sites"]


TOTALS = ("n_examples", "n_correct", "loss")
PER_SITE = tuple(field.name for field in fields(PartialSums) if field.name not in TOTALS)
_COUNTS = ("touched", "broken", "fixed")


def zero(n_sites: int) -> PartialSums:
    """The sums over no examples."""
    arrays = {name: np.zeros(n_sites, np.int64 if name in _COUNTS else np.float64) for name in PER_SITE}
    return PartialSums(n_examples=0, n_correct=0, loss=0.0, **arrays)


def add(a: PartialSums, b: PartialSums) -> PartialSums:
    """The sums over both sets of examples, for the same sites."""
    if a.delta.shape != b.delta.shape:
        raise ValueError(f"merge takes partials of the same sites: got {a.delta.size} and {b.delta.size}")
    return PartialSums(**{f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(PartialSums)})


def merge(partials: list[PartialSums]) -> PartialSums:
    """Same sites, disjoint examples: add, in the order given."""
    return reduce(add, partials)


def join(partials: list[PartialSums]) -> PartialSums:
    """Disjoint sites, same examples: concatenate, in the order given."""
    first = partials[0]
    if any(part.n_examples != first.n_examples for part in partials):
        counts = [part.n_examples for part in partials]
        raise ValueError(f"join takes partials of the same examples: got {counts} of them")
    arrays = {name: np.concatenate([getattr(part, name) for part in partials]) for name in PER_SITE}
    return PartialSums(n_examples=first.n_examples, n_correct=first.n_correct, loss=first.loss, **arrays)

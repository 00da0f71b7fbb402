"""Partials and tables from raw per-example deltas, computed the long way: what the fast sums must agree with."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np

from ablation.partial import Gathered, PartialSums
from ablation.table import ImportanceTable, make_table

LOSS = 0.25  # of every intact example
PROOF = {
    "n_sites": 8, "n_examples": 64, "arithmetic_error": 3.2e-7, "arithmetic_bound": 1e-4, "model_rounding_median": 1e-6,
    "model_rounding_p99": 1e-5, "sum_error": 1e-6, "sum_bound": 1e-2,
}  # fmt: skip


def heavy_deltas(n_sites: int, n_examples: int, seed: int = 0, share_dead: float = 0.6) -> np.ndarray:
    """Deltas (sites, examples) as real layers give them: heavy tails over sites, most sites and pairs exactly 0."""
    random = np.random.default_rng(seed)
    size = 1e-7 * np.exp(2 * random.standard_normal(n_sites)) * (random.random(n_sites) >= share_dead)
    moved = random.random((n_sites, n_examples)) < 0.3
    return size[:, None] * (random.standard_normal((n_sites, n_examples)) + 0.3) * moved


def sums_of(deltas: np.ndarray, per_class: int | None = None) -> PartialSums:
    """One partial over all examples; with `per_class`, they come in blocks of one class of that length."""
    n_sites, n_examples = deltas.shape
    within = None if per_class is None else np.zeros(n_sites)
    if per_class is not None and per_class > 1:
        within = (per_class * deltas.reshape(n_sites, -1, per_class).var(axis=2, ddof=1)).sum(axis=1)
    return PartialSums(
        n_examples=n_examples,
        n_correct=n_examples - n_examples // 10,
        loss=LOSS * n_examples,
        delta=deltas.sum(axis=1),
        delta_squared=(deltas**2).sum(axis=1),
        within=within,
        proof=deltas[:, ::7].sum(axis=1),
        touched=(deltas != 0).sum(axis=1, dtype=np.int32),
        broken=(deltas > 1e-6).sum(axis=1, dtype=np.int32),
        fixed=(deltas < -1e-6).sum(axis=1, dtype=np.int32),
    )


def merged(partials: Sequence[PartialSums]) -> PartialSums:
    """Partials of the same sites, put together in this order."""
    n_sites = partials[0].delta.size
    gathered = Gathered(n_sites)
    for partial in partials:
        gathered.add((0, n_sites), deepcopy(partial))  # the first one's arrays become those of the result
    return gathered.finish()


def joined(partials: Sequence[PartialSums]) -> PartialSums:
    """Partials of the same examples, each for the sites after those of the one before it."""
    ends = np.cumsum([0, *(partial.delta.size for partial in partials)]).tolist()
    gathered = Gathered(ends[-1])
    for sites, partial in zip(pairwise(ends), partials, strict=True):
        gathered.add(sites, deepcopy(partial))
    return gathered.finish()


def table_of(
    splits: Mapping[str, np.ndarray | PartialSums],
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    indices: np.ndarray | None = None,
    every_weight: bool = False,
    shape: tuple[int, ...] = (97, 89),
    per_class: Mapping[str, int | None] | None = None,
    top1: bool = False,
    criteria: Sequence[str] = (),
    not_finite: np.ndarray | None = None,
    proof: Any = PROOF,
) -> ImportanceTable:
    """A table of these deltas, made by `make_table`."""
    sums = {name: part if isinstance(part, PartialSums) else sums_of(part) for name, part in splits.items()}
    n_sites = len(next(iter(sums.values())).delta)
    weights = np.random.default_rng(9).standard_normal(n_sites) if weights is None else np.asarray(weights, float)
    baseline = {
        name: {
            "n_examples": s.n_examples,
            "loss": s.loss / s.n_examples,
            "accuracy": s.n_correct / s.n_examples,
            "series_bound": 0.0,
        }
        for name, s in sums.items()
    }
    return make_table(
        indices=None if every_weight else np.arange(n_sites) * 2 + 1 if indices is None else indices,
        shape=shape,
        weights=weights,
        replacements=np.zeros(n_sites),
        splits=sums,
        per_class=dict.fromkeys(sums) if per_class is None else per_class,
        top1=top1,
        criteria=criteria,
        not_finite=not_finite,
        about={
            "spec": {"layer": "fc2", "criteria": [*criteria]},
            "plan": {
                "parameter": "fc2.weight",
                "path": "direct",
                "precision": "mixed",
                "shape": list(shape),
                "n_classes": 10,
            },
            "baseline": baseline,
            "proof": proof,
            "n_not_finite": 0 if not_finite is None else int(not_finite.sum()),
            "seconds": 3.25,
            "versions": {},
        },
    )

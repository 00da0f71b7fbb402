"""How a job is cut: spec, shapes and counts -> shards, with what it will cost.

The plan freezes everything that changes bits: path, batch size, shard grid, threads per worker, precision.
It is a pure function of its arguments and a fixed cost table; nothing here looks at the machine.
Torch-free: the API plans.
"""

import math
from typing import Literal

import numpy as np
from pydantic import Field

from ablation.catalog import LayerFacts, ModelFacts
from ablation.errors import SpecError
from ablation.spec import CountOfSites, JobSpec, PerClass, Precision, Record, SiteIndices, SplitSpec

Path = Literal["direct", "rerun", "reference"]
ENGINES = ("auto", "direct", "rerun", "reference")

# The fixed cost table: flops per second and thread. Rough on purpose: it sets the cut and the estimate, not the result.
FLOPS_PER_S = {"float32": 40e9, "float64": 20e9}
PAIRS_PER_S = 0.4e6  # (site, example) pairs of 1,000 classes scored by the direct path, per second and thread
CALL_S = 2e-3  # fixed cost of one run of the model's remainder, whatever its size

SHARD_S = 60.0  # a shard aims at this many seconds
MAX_SITES_PER_SHARD = 1 << 20
MAX_BATCH = 256
BATCH_VALUES = 1 << 24  # numbers that one batch of inputs may hold
PROOF_EXAMPLES = 64
BYTES_PER_SITE = 40  # of a partial: five float64 or int64 a site


class SplitPlan(Record):
    """One split: how many examples, and whether they come in blocks of one class."""

    name: str
    n_examples: int
    per_class: int | None = Field(default=None, description="length of the one-class blocks that the split is sorted in")


class Shard(Record):
    """One unit of work: these examples (positions in the split's fixed order) for these sites (rows of the table)."""

    id: str
    split: str
    examples: tuple[int, int] = Field(strict=False, description="first and one past the last position")
    sites: tuple[int, int] = Field(strict=False, description="first and one past the last row")


class ProofPlan(Record):
    """Which examples the proof goes over (positions in each split's order), for how many sites."""

    n_sites: int
    examples: dict[str, tuple[int, ...]] = Field(strict=False)


class Estimate(Record):
    """What the job will cost, by the fixed cost table."""

    n_examples: int
    passes: float = Field(description="in evaluation passes: flops of the job / flops of one plain pass")
    seconds: float
    memory_bytes: int
    redis_bytes: int


class Plan(Record):
    """The whole cut of a job."""

    parameter: str
    kind: str
    shape: tuple[int, ...] = Field(strict=False)
    n_sites: int
    path: Path
    precision: Precision
    batch_size: int
    threads: int
    splits: tuple[SplitPlan, ...] = Field(strict=False)
    shards: tuple[Shard, ...] = Field(strict=False)
    proof: ProofPlan
    estimate: Estimate


class SplitCounts(Record):
    """How many examples a split of a data set has, in all and per class (where that is known)."""

    n_examples: int
    n_per_class: tuple[int, ...] | None = Field(default=None, strict=False)


def count_asked(split: str, asked: SplitSpec, counts: SplitCounts) -> SplitPlan:
    """How many examples of a split were asked for.

    Raises:
        SpecError: more than there are; the message says how many there are.
    """
    if asked == "all":
        return SplitPlan(name=split, n_examples=counts.n_examples)
    if isinstance(asked, PerClass):
        if counts.n_per_class is None:
            raise SpecError(f"data.{split}.per_class", asked.per_class, "'all' or a count: this data has no class counts")
        fewest = min(counts.n_per_class)
        if asked.per_class > fewest:
            where = counts.n_per_class.index(fewest)
            raise SpecError(
                f"data.{split}.per_class", asked.per_class, f"1 to {fewest}, the examples of class {where} in this split"
            )
        return SplitPlan(
            name=split, n_examples=asked.per_class * len(counts.n_per_class), per_class=asked.per_class
        )
    if asked.count > counts.n_examples:
        raise SpecError(f"data.{split}.count", asked.count, f"1 to {counts.n_examples}, the examples of this split")
    return SplitPlan(name=split, n_examples=asked.count)


def count_sites(spec: JobSpec, layer: LayerFacts) -> int:
    """How many sites were asked for.

    Raises:
        SpecError: more than the layer has weights, or an index outside of it.
    """
    n = layer.n_weights
    if spec.sites == "all":
        return n
    if isinstance(spec.sites, CountOfSites):
        if spec.sites.count > n:
            raise SpecError("sites.count", spec.sites.count, f"1 to {n}, the weights of {layer.name}")
        return spec.sites.count
    assert isinstance(spec.sites, SiteIndices)
    worst = max(spec.sites.indices)
    if worst >= n:
        raise SpecError("sites.indices", worst, f"0 to {n - 1}, the flat indices of {layer.name}")
    return len(spec.sites.indices)

"""How a job is cut: spec, shapes and counts -> shards, with what it will cost.

The plan freezes everything that changes bits: path, batch size, shard grid, threads per worker, precision.
It is a pure function of its arguments and a fixed cost table; nothing here looks at the machine.
Torch-free: the API plans.
"""

import math
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ablation.catalog import (
    NOTHING,
    LayerFacts,
    ModelFacts,
    Registered,
    SplitCounts,
    find_checkpoint,
    find_layer,
    model_facts,
    split_counts,
)
from ablation.errors import SpecError
from ablation.folders import Folders
from ablation.spec import CountOfSites, JobSpec, PerClass, Precision, Record, SiteIndices, SplitSpec

Path = Literal["direct", "finite", "rerun", "reference"]
ENGINES = ("auto", "direct", "finite", "rerun", "reference")

# The fixed cost table. Rough on purpose: it sets the cut and the estimate, never the result.
FLOPS_PER_S = {"float32": 40e9, "float64": 20e9}  # per thread
CALL_S = 2e-3  # one run of the rest of a model, beside its flops
PAIR_S = 25e-9  # one (site, example) pair in the direct path: finding out whether it moves, per thread
VALUE_S = 2e-9  # one number of a delta carried through one operation, per thread
REPLAY_S = 2e-2  # one run of the rest of a model with deltas, beside its flops
CLASS_S = 1.2e-9  # and one class of it
PAIR_CLASS_S = 0.1 * CLASS_S  # the same, times the share of pairs that move

SHARD_S = 60.0  # a shard aims at this many seconds
MAX_SHARDS = 4096  # of one split
MAX_SITES_PER_SHARD = 1 << 20
MAX_BATCH = 256
BATCH_VALUES = 1 << 24  # numbers that one batch of inputs may hold
MAX_LANES = 1024  # sites carried at once
LANE_VALUES = 1 << 26  # numbers that their deltas may have at the widest place: 256 MB in float32
LANE_FLOPS = 5e11  # of one run with deltas: some seconds, after which a job can be cancelled
PROOF_EXAMPLES = 64
PROOF_SHARE = 0.1  # of the job's cost, at most
BYTES_PER_SITE = 56  # of a partial: seven float64 or int64 a site
BYTES_PER_ROW = 120  # of the table
WORKSPACE_BYTES = 300 << 20  # what the engine takes beside model and batch


class SplitPlan(Record):
    """One split: how many examples, and whether they come in blocks of one class."""

    name: str
    n_examples: int
    per_class: int | None = Field(
        default=None, description="length of the one-class blocks that the split is sorted in"
    )


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
    n_classes: int
    n_sites: int
    path: Path
    precision: Precision
    batch_size: int
    lanes: int = Field(description="sites whose deltas are carried at once; 1 where each is run by itself")
    threads: int
    splits: tuple[SplitPlan, ...] = Field(strict=False)
    shards: tuple[Shard, ...] = Field(strict=False)
    proof: ProofPlan
    estimate: Estimate


def count_asked(split: str, asked: SplitSpec, counts: SplitCounts) -> SplitPlan:
    """How many examples of a split were asked for.

    Raises:
        SpecError: more than there are; the message says how many there are.
    """
    if asked == "all":
        return SplitPlan(name=split, n_examples=counts.n_examples)
    if isinstance(asked, PerClass):
        if counts.n_per_class is None:
            raise SpecError(
                f"data.{split}.per_class", asked.per_class, "'all' or a count: this data has no class counts"
            )
        present = [n for n in counts.n_per_class if n]  # of ImageNet's classes, an operator may have only some
        fewest = min(present)
        if asked.per_class > fewest:
            where = counts.n_per_class.index(fewest)
            raise SpecError(
                f"data.{split}.per_class",
                asked.per_class,
                f"1 to {fewest}, the examples of class {where} in this split",
            )
        return SplitPlan(name=split, n_examples=asked.per_class * len(present), per_class=asked.per_class)
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


def plan_spec(
    spec: JobSpec,
    folders: Folders,
    registered: Registered = NOTHING,
    *,
    counts: dict[str, SplitCounts] | None = None,
    **options: Any,
) -> Plan | None:
    """The plan of a job whose model and data are named; None where only opening the data tells how much there is.

    `counts` of data that has been opened; `options` as in `make_plan`.

    Raises:
        SpecError: something that it names is not there, or it asks for more than there is.
    """
    facts = model_facts(spec.model.name, registered)
    find_checkpoint(spec.model.weights, facts.weights, folders)
    count_sites(spec, find_layer(facts, spec.layer))
    counts = counts or split_counts(spec.data, folders, registered)
    return None if counts is None else make_plan(spec, facts, counts, **options)


def make_plan(
    spec: JobSpec,
    facts: ModelFacts,
    counts: dict[str, SplitCounts],
    *,
    threads: int,
    shard_s: float = SHARD_S,
    engine: str = "auto",
    batch_size: int | None = None,
) -> Plan:
    """The cut of a job: which path, which shards, which examples the proof goes over, and what it will cost.

    Raises:
        SpecError: the model has no such layer, or more sites or examples were asked for than there are.
    """
    layer = find_layer(facts, spec.layer)
    path = _choose_path(layer, engine)
    n_sites = count_sites(spec, layer)
    splits = tuple(count_asked(name, asked, counts[name]) for name, asked in spec.data.splits.items())
    lanes, batch_size = _choose_lanes(facts, layer, path, n_sites, batch_size)
    seconds = {
        split.name: _estimate_s(split, facts, layer, path, n_sites, batch_size, lanes, threads) for split in splits
    }
    shards = tuple(
        shard for split in splits for shard in _cut(split, n_sites, batch_size, seconds[split.name] / shard_s)
    )
    return Plan(
        parameter=layer.parameter,
        kind=layer.kind,
        shape=layer.shape,
        n_classes=facts.n_classes,
        n_sites=n_sites,
        path=path,
        precision=spec.precision,
        batch_size=batch_size,
        lanes=lanes,
        threads=threads,
        splits=splits,
        shards=shards,
        proof=_plan_proof(shards, min(spec.verify, n_sites), sum(seconds.values()), facts, threads),
        estimate=_estimate(splits, shards, facts, layer, n_sites, batch_size, lanes, threads, sum(seconds.values())),
    )


def _choose_path(layer: LayerFacts, engine: str) -> Path:
    if engine not in ENGINES:
        raise SpecError("engine", engine, f"one of {', '.join(ENGINES)}")
    if engine == "direct" and layer.path != "direct":
        raise SpecError(
            "engine",
            engine,
            "auto, finite, rerun or reference for this layer",
            f"{layer.name} is not part of a classifier head.",
        )
    return layer.path if engine == "auto" else engine  # type: ignore[return-value]


def _choose_batch_size(facts: ModelFacts) -> int:
    """The largest power of two up to MAX_BATCH whose inputs stay small."""
    fits = max(1, BATCH_VALUES // max(1, math.prod(facts.input_shape)))
    return min(MAX_BATCH, 1 << (fits.bit_length() - 1))


def _choose_lanes(
    facts: ModelFacts, layer: LayerFacts, path: Path, n_sites: int, batch_size: int | None
) -> tuple[int, int]:
    """How many sites at once on how many examples: as many pairs as their deltas fit, sites before examples.

    Many sites share one run of the intact network, and one look at which of its units are active.
    """
    largest = batch_size or _choose_batch_size(facts)
    if path != "finite":
        return 1, largest
    n_pairs = max(1, min(LANE_VALUES // max(1, layer.widest_spread), int(LANE_FLOPS / max(1, layer.flops_spread))))
    lanes = max(1, min(n_sites, MAX_LANES, n_pairs // (batch_size or 1)))
    return lanes, batch_size or min(largest, 1 << (max(1, n_pairs // lanes).bit_length() - 1))


def _pass_s(facts: ModelFacts, threads: int) -> float:
    """One example of one plain float32 pass."""
    return max(facts.flops, 1e6) / (FLOPS_PER_S["float32"] * threads)


def _estimate_s(
    split: SplitPlan,
    facts: ModelFacts,
    layer: LayerFacts,
    path: Path,
    n_sites: int,
    batch_size: int,
    lanes: int,
    threads: int,
) -> float:
    """Seconds for one split by the fixed cost table."""
    n, n_batches = split.n_examples, math.ceil(split.n_examples / batch_size)
    base_s = n * (_pass_s(facts, threads) + layer.flops_after / (FLOPS_PER_S["float64"] * threads))
    if path == "direct":
        return base_s + n * n_sites * (PAIR_S + PAIR_CLASS_S * facts.n_classes) / threads
    if path == "finite":
        n_replays = math.ceil(n_sites / lanes)
        replay_s = n * layer.flops_after / (FLOPS_PER_S["float64"] * threads) + n_batches * REPLAY_S
        pair_s = layer.flops_spread / FLOPS_PER_S["float32"] + layer.values_spread * VALUE_S + PAIR_S
        return base_s + n_replays * replay_s + n * n_sites * (pair_s + facts.n_classes * CLASS_S) / threads
    flops = layer.flops_after if path == "rerun" else facts.flops
    run_s = n * flops / (FLOPS_PER_S["float64"] * threads) + n_batches * CALL_S
    return base_s + n_sites * run_s


def _cut(split: SplitPlan, n_sites: int, batch_size: int, n_wanted: float) -> list[Shard]:
    """About `n_wanted` shards: along the examples first, so that each pays its prefix once; along the sites if need be.

    Blocks of one class are never cut: their variance is closed within one shard.
    """
    unit = split.per_class * max(1, batch_size // split.per_class) if split.per_class else batch_size
    n_units = math.ceil(split.n_examples / unit)
    n_wanted = min(math.ceil(n_wanted), MAX_SHARDS)
    n_site_blocks = max(math.ceil(n_sites / MAX_SITES_PER_SHARD), min(n_sites, math.ceil(n_wanted / n_units)))
    examples = _intervals(split.n_examples, unit * math.ceil(n_units / max(1, min(n_units, n_wanted))))
    sites = _intervals(n_sites, math.ceil(n_sites / n_site_blocks))
    return [
        Shard(id=f"{split.name}-{e}-{s}", split=split.name, examples=block, sites=rows)
        for s, rows in enumerate(sites)
        for e, block in enumerate(examples)
    ]


def _intervals(n: int, length: int) -> list[tuple[int, int]]:
    return [(start, min(start + length, n)) for start in range(0, n, length)]


def _plan_proof(shards: tuple[Shard, ...], n_sites: int, seconds: float, facts: ModelFacts, threads: int) -> ProofPlan:
    """Examples for the proof, drawn from every shard: as many as the job's cost allows, but at least one of each."""
    if not n_sites:
        return ProofPlan(n_sites=0, examples={})
    blocks = sorted({(shard.split, *shard.examples) for shard in shards})
    n_all = sum(last - first for _, first, last in blocks)
    one_s = 2 * (n_sites + 1) * facts.flops / (FLOPS_PER_S["float64"] * threads)
    n_wanted = min(PROOF_EXAMPLES, max(8, int(PROOF_SHARE * seconds / max(one_s, 1e-9))))
    random = np.random.default_rng(0)
    examples: dict[str, tuple[int, ...]] = {}
    for split, first, last in blocks:
        n = min(last - first, max(1, n_wanted * (last - first) // n_all))
        drawn = np.sort(random.choice(np.arange(first, last), size=n, replace=False))
        examples[split] = examples.get(split, ()) + tuple(int(position) for position in drawn)
    return ProofPlan(n_sites=n_sites, examples=examples)


def _estimate(
    splits: tuple[SplitPlan, ...],
    shards: tuple[Shard, ...],
    facts: ModelFacts,
    layer: LayerFacts,
    n_sites: int,
    batch_size: int,
    lanes: int,
    threads: int,
    seconds: float,
) -> Estimate:
    n_examples = sum(split.n_examples for split in splits)
    n_parameters = sum(each.n_weights for each in facts.layers)
    deltas_bytes = 12 * lanes * batch_size * layer.widest_spread if lanes > 1 else 0
    return Estimate(
        n_examples=n_examples,
        passes=seconds / (n_examples * _pass_s(facts, threads)),
        seconds=seconds,
        memory_bytes=12 * n_parameters
        + 12 * batch_size * facts.widest
        + deltas_bytes
        + WORKSPACE_BYTES
        + n_sites * BYTES_PER_ROW,
        redis_bytes=sum(shard.sites[1] - shard.sites[0] for shard in shards) * BYTES_PER_SITE + n_sites * BYTES_PER_ROW,
    )

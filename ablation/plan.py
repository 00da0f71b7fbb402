"""How a job is cut: spec, shapes and counts -> shards, with what it will cost.

The plan freezes everything that changes bits: path, batch size, shard grid, threads per worker, precision.
It is a pure function of its arguments and a fixed cost table; nothing here looks at the machine.
Torch-free: the API plans.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, assert_never, get_args

import numpy as np
from pydantic import Field

from ablation.cost import PREPARE_S, Path, carried_flops, gradient_s, pass_s, proof_s, split_s
from ablation.criteria import find_statistics
from ablation.errors import SpecError
from ablation.inputs.catalog import (
    NOTHING,
    LayerFacts,
    ModelFacts,
    Registered,
    SplitCounts,
    dataset_names,
    find_layer,
    model_facts,
    split_counts,
)
from ablation.inputs.classes import ModelClasses, Numbering, number_classes
from ablation.inputs.folders import Folders
from ablation.inputs.images import SPLIT_FOLDERS
from ablation.inputs.weights import Weights, find_weights, with_head
from ablation.machine import Machine
from ablation.spec import (
    FORMS,
    Constant,
    CountOfSites,
    CrossEntropySpec,
    DataSpec,
    JobSpec,
    LossObject,
    PerClass,
    Precision,
    Record,
    Scale,
    SiteIndices,
    SplitSpec,
    ValueSpec,
)

Engine = Literal["auto", Path]
ENGINES: tuple[str, ...] = get_args(Engine)

DENSE = 40  # a row's response functions cost as much as this part of its weights one by one

HUGE_STEP = 100.0  # replacement minus weight: beyond it deltas are float64, for in float32 they could drown the rest
CLOSE = f"with a constant of at most {HUGE_STEP:g} or a scale of {1 - HUGE_STEP:g} to {1 + HUGE_STEP:g}"

SHARD_S = 60.0  # a shard aims at this many seconds
N_SHARED, SHARED_S = 8, 2.0  # a job that is shorter is cut, too, so that workers share it: into so many, each this long
MAX_SHARDS = 4096  # of one split
MAX_SITES_PER_SHARD = 1 << 20
MAX_BATCH = 256
BATCH_VALUES = 1 << 24  # numbers that one batch of inputs may hold
MAX_LANES = 1024  # sites carried at once
LANE_VALUES = 1 << 26  # numbers that their deltas may have at the widest place: 256 MB in float32
LANE_FLOPS = 5e11  # of one run with deltas: some seconds, after which a job can be cancelled
GRADIENT_VALUES = 1 << 26  # numbers that a backward pass keeps at once: 512 MB in float64
GRADIENT_BYTES = 16  # a number that it keeps: itself, and what is made on the way back
PROOF_EXAMPLES = 64
PROVED_AT_ONCE = 4  # and no fewer: products of 8 rows take less time than those of 5, 6 or 7
PROOF_SHARE = 0.05  # of the job's cost, at most: it is one worker's, while the others wait
PARTIAL_BYTES = 64 << 20  # of a shard of whole rows: what the merge holds beside the totals
FORM_BYTES = 1 << 10  # and what its form takes, as it goes to Redis
FEWEST_SHARDS = 2  # of whole rows of one split, so that two workers share them
WORKING_BYTES = 56  # a row, of what the merge, the proof's choice and the summary take beside sums and table
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
    """What the job will cost: seconds by the fixed cost table, at the pace of the machine where that is known."""

    n_examples: int
    passes: float = Field(description="in evaluation passes: flops of the job / flops of one plain pass")
    seconds: float
    memory_bytes: int
    redis_bytes: int


class InputsPlan(Record):
    """What the job is of, in words: which weights, how pictures become inputs, how classes were matched."""

    weights: str
    preprocessing: str | None = None
    classes: dict[str, str] = Field(default={}, description="by split; empty until the data has been opened")
    notes: tuple[str, ...] = Field(default=(), strict=False, description="what was done to the files")


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
    n_halved: int = Field(default=0, description="how often what is carried at once was halved, for want of memory")
    lanes: int = Field(description="sites whose deltas are carried at once; 1 where each is run by itself")
    gradient_batch_size: int | None = Field(
        default=None, description="examples that a backward pass takes at once; null: no criterion needs gradients"
    )
    threads: int
    inputs: InputsPlan | None = Field(default=None, description="null: model and data are in memory")
    splits: tuple[SplitPlan, ...] = Field(strict=False)
    shards: tuple[Shard, ...] = Field(strict=False)
    proof: ProofPlan
    estimate: Estimate

    def find_split(self, name: str) -> SplitPlan:
        """The plan of the split of this name, which must be one of the job's."""
        return next(split for split in self.splits if split.name == name)


@dataclass(frozen=True)
class PlanOptions:
    """How a job is to be cut, beside what its spec asks for.

    `threads` of a worker decide the last bits of the results. A shard aims at `shard_s` seconds. `engine` is a path, or
    "auto"; `batch_size` None leaves it to the plan. `is_shared`: several processes may run the job, so it is cut for
    them. `is_kept`: finished shards are kept, so that a job that was interrupted goes on from there. What is carried at
    once is halved `n_halved` times, and more often where it would not fit into the memory of the `machine`; its
    pace changes the estimate alone.
    """

    threads: int
    shard_s: float = SHARD_S
    engine: str = "auto"
    batch_size: int | None = None
    is_shared: bool = True
    is_kept: bool = False
    n_halved: int = 0
    machine: Machine = field(default_factory=Machine)


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


def _check_weights(spec: JobSpec, n_classes: int) -> None:
    weights = spec.loss.class_weights if isinstance(spec.loss, CrossEntropySpec) else None
    if weights is not None and len(weights) != n_classes:
        allowed = f"{n_classes} numbers, one for each class of the model"
        raise SpecError("loss.class_weights", f"{len(weights)} numbers", allowed)


def plan_spec(
    spec: JobSpec,
    folders: Folders,
    options: PlanOptions,
    registered: Registered = NOTHING,
    counts: dict[str, SplitCounts] | None = None,
) -> Plan | None:
    """The plan of a job whose model and data are named; None where only opening the data tells how much there is.

    `counts`: how many examples each split has, where its data has been opened.

    Raises:
        SpecError: something that it names is not there, or it asks for more than there is.
    """
    if isinstance(spec.loss, LossObject):
        raise SpecError("loss", {"object": spec.loss.object}, FORMS["loss"], "Objects are for ablation.ablate alone.")
    facts = model_facts(spec.model.name, registered)
    weights = find_weights(spec.model.weights, facts, folders, spec.model.seed)
    facts = with_head(facts, weights.classes.n)
    _check_weights(spec, facts.n_classes)
    count_sites(spec, find_layer(facts, spec.layer))
    counts = counts or split_counts(spec.data, folders, registered)
    if counts is None:
        return None
    numberings = {split: number_split(spec.data, each.classes, weights.classes) for split, each in counts.items()}
    plan = make_plan(spec, facts, counts, options)
    return plan.model_copy(update={"inputs": describe_inputs(weights, numberings)})


def number_split(data: DataSpec, names: tuple[str, ...] | None, model: ModelClasses) -> Numbering:
    """The model's class for each class of one split, whose names are those of the data set.

    Raises:
        SpecError: they don't match.
    """
    are_folders = data.name in SPLIT_FOLDERS
    are_published = not are_folders and data.name in dataset_names()
    return number_classes(names, model, given=data.classes, are_folders=are_folders, are_published=are_published)


def describe_inputs(weights: Weights, numberings: Mapping[str, Numbering]) -> InputsPlan:
    """What a job is of, in words."""
    return InputsPlan(
        weights=weights.text,
        preprocessing=weights.preprocessing,
        classes={split: numbering.text for split, numbering in numberings.items()},
        notes=weights.notes,
    )


def make_plan(spec: JobSpec, facts: ModelFacts, counts: dict[str, SplitCounts], options: PlanOptions) -> Plan:
    """The cut of a job: which path, which shards, which examples the proof goes over, and what it will cost.

    Raises:
        SpecError: the model has no such layer, more sites or examples were asked for than there are, or it takes more
            memory than there is.
    """
    limit_bytes = options.machine.memory_bytes
    plan = _cut_job(spec, facts, counts, options)
    while plan.estimate.memory_bytes > limit_bytes:
        if options.batch_size or plan.batch_size == plan.lanes == 1:
            raise SpecError(
                "sites",
                f"{plan.n_sites} sites in batches of {plan.batch_size} examples",
                f"what takes at most {limit_bytes} bytes of memory; this takes about {plan.estimate.memory_bytes}",
                "Ask for fewer sites, or use a machine with more memory.",
            )
        plan = _cut_job(spec, facts, counts, replace(options, n_halved=plan.n_halved + 1))
    return plan


@dataclass(frozen=True)
class _Work:
    """What is to be computed, and how; not yet cut into shards."""

    spec: JobSpec
    facts: ModelFacts
    layer: LayerFacts
    path: Path
    n_sites: int
    splits: tuple[SplitPlan, ...]
    batch_size: int
    lanes: int
    gradient_batch_size: int | None
    threads: int

    @property
    def is_by_rows(self) -> bool:
        """Whether its shards are whole rows of a Linear over all examples of a split."""
        return self.path == "response" and self.spec.sites == "all" and len(self.layer.shape) == 2

    def split_s(self, split: SplitPlan) -> float:
        """Seconds that all sites take on one split, but for gradients that every shard of rows computes anew."""
        seconds = split_s(
            split.n_examples, self.facts, self.layer, self.path,
            n_sites=self.n_sites, batch_size=self.batch_size, lanes=self.lanes, threads=self.threads,
        )  # fmt: skip
        return seconds if self.is_by_rows else seconds + self.gradient_s(split.n_examples)

    def gradient_s(self, n_examples: int) -> float:
        """Seconds that the gradients take that criteria need."""
        return gradient_s(n_examples, self.facts, self.layer, self.threads) if self.gradient_batch_size else 0.0

    def shards_s(self, shards: tuple[Shard, ...]) -> float:
        """Seconds that all shards take; each block of sites computes the gradients of its examples anew."""
        again = [shard.examples for shard in shards if self.is_by_rows or shard.sites[0]]
        once = sum(self.split_s(split) for split in self.splits)
        return once + self.gradient_s(sum(last - first for first, last in again))

    def proof_s(self, n_examples: int, n_sites: int) -> float:
        """Seconds that a proof of so many sites takes on so many examples."""
        return proof_s(n_examples, len(self.splits), n_sites, self.facts, self.layer, self.threads)


def _cut_job(spec: JobSpec, facts: ModelFacts, counts: dict[str, SplitCounts], options: PlanOptions) -> Plan:
    layer = find_layer(facts, spec.layer)
    _check_weights(spec, facts.n_classes)
    n_sites = count_sites(spec, layer)
    path = _choose_path(spec, layer, n_sites, options.engine)
    splits = tuple(count_asked(name, asked, counts[name]) for name, asked in spec.data.splits.items())
    lanes, batch_size = _choose_lanes(facts, layer, path, n_sites, options)
    at_once = _choose_gradient_batch_size(spec, facts, layer, batch_size, options.n_halved)
    work = _Work(spec, facts, layer, path, n_sites, splits, batch_size, lanes, at_once, options.threads)
    shards = tuple(shard for split in splits for shard in _cut_split(work, split, options))
    proof = _plan_proof(work, shards)
    return Plan(
        parameter=layer.parameter,
        kind=layer.kind,
        shape=layer.shape,
        n_classes=facts.n_classes,
        n_sites=n_sites,
        path=path,
        precision=spec.precision,
        batch_size=batch_size,
        n_halved=options.n_halved,
        lanes=lanes,
        gradient_batch_size=at_once,
        threads=options.threads,
        splits=splits,
        shards=shards,
        proof=proof,
        estimate=_estimate(work, shards, proof, options.machine.pace),
    )


def possible_paths(layer: LayerFacts, *, is_whole: bool, is_plain: bool = True) -> tuple[Path, ...]:
    """The paths that a job can take on a layer, from the fastest to the slowest where many weights are asked for.

    `is_whole`: all weights are asked for. `is_plain`: float32 deltas are enough, no top-1 answers are asked for, and
    the loss is cross-entropy without label smoothing and class weights.
    """
    if layer.path == "rerun":  # what it changes gets out of torch's sight: only runs of the model itself are exact
        return ("rerun", "reference")
    is_convolution = len(layer.shape) > 2  # its loops have float32 deltas alone, and no top-1 answers
    has_head = layer.path == "direct" and not is_convolution
    fast: tuple[Path, ...] = ()
    if layer.response and is_plain and (has_head or is_whole):
        fast += ("response",)
    if layer.path == "direct" and (is_plain or not is_convolution):
        fast += ("direct",)
    return (*fast, "finite", "rerun", "reference")


def _choose_path(spec: JobSpec, layer: LayerFacts, n_sites: int, engine: str) -> Path:
    """Choose the path: `engine` if it is possible, else the fastest; `response` only for many weights of a layer."""
    if engine not in ENGINES:
        raise SpecError("engine", engine, f"one of {', '.join(ENGINES)}")
    is_close = _usual_step(spec.value) <= HUGE_STEP
    is_plain = spec.precision != "float64" and not spec.top1 and is_close and spec.has_plain_loss
    paths = possible_paths(layer, is_whole=spec.sites == "all", is_plain=is_plain)
    if engine == "auto":
        is_dense = spec.sites == "all" or n_sites * DENSE >= layer.n_weights
        return next(path for path in paths if path != "response" or is_dense)
    if engine in paths:
        return engine
    conditions = (
        f"only in 'mixed' or 'float32', without top1, {CLOSE}, and with cross-entropy without label smoothing and "
        "class weights"
    )
    if layer.path == "rerun":
        why = (
            f"What {layer.name} changes gets out of torch's sight (by NumPy, another thread or the like), so that only "
            "runs of the model itself are exact."
        )
    elif engine == "response":
        why = f"The engine 'response' takes all weights of a layer with response functions, {conditions}."
    elif layer.path != "direct":
        why = f"{layer.name} is not part of a classifier head, which the engine 'direct' is for."
    else:
        why = f"The engine 'direct' takes {layer.name} {conditions}."
    raise SpecError("engine", engine, f"{', '.join(('auto', *paths))} for this job", why)


def _usual_step(value: ValueSpec) -> float:
    """About |replacement - weight| for weights of at most 1, since the plan does not know the weights.

    `replace_weights` of `sites.py` makes the numbers themselves.
    """
    match value:
        case Constant(constant=constant):
            return abs(constant)
        case Scale(scale=scale):
            return abs(scale - 1)
        case "zero":
            return 1.0
        case "flip_sign":
            return 2.0
        case _:
            assert_never(value)


def _choose_batch_size(facts: ModelFacts) -> int:
    """The largest power of two up to MAX_BATCH whose inputs stay small."""
    fits = max(1, BATCH_VALUES // max(1, math.prod(facts.input_shape)))
    return min(MAX_BATCH, 1 << (fits.bit_length() - 1))


def _choose_lanes(
    facts: ModelFacts, layer: LayerFacts, path: Path, n_sites: int, options: PlanOptions
) -> tuple[int, int]:
    """How many sites at once on how many examples: as many pairs as their deltas fit, sites before examples.

    Many sites share one run of the intact network, and one look at which of its units are active.
    """
    batch_size, n_halved = options.batch_size, options.n_halved
    if path == "response" and len(layer.shape) == 2:  # every batch fetches the sums of all weights once
        return 1, batch_size or max(1, MAX_BATCH >> n_halved)
    if path != "finite":
        return 1, batch_size or max(1, _choose_batch_size(facts) >> n_halved)
    n_pairs = max(1, min(LANE_VALUES // max(1, layer.widest_spread), int(LANE_FLOPS / max(1, carried_flops(layer)))))
    lanes = max(1, min(n_sites, MAX_LANES, n_pairs // (batch_size or 1)))
    if batch_size:
        return max(1, lanes >> n_halved), batch_size
    whole = min(_choose_batch_size(facts), 1 << ((n_pairs // lanes).bit_length() - 1))
    return max(1, lanes >> max(0, n_halved - whole.bit_length() + 1)), max(1, whole >> n_halved)  # examples, then sites


def _choose_gradient_batch_size(
    spec: JobSpec, facts: ModelFacts, layer: LayerFacts, batch_size: int, n_halved: int
) -> int | None:
    """Choose how many examples a backward pass takes at once; None where no criterion needs gradients."""
    if "gradient" not in find_statistics(spec.criteria):
        return None
    fits = GRADIENT_VALUES // _gradient_values(facts, layer)
    return max(1, min(batch_size, fits >> n_halved))


def _gradient_values(facts: ModelFacts, layer: LayerFacts) -> int:
    """About how many numbers per example a backward pass to this layer keeps."""
    return max(1, layer.values_after + layer.values_spread + 2 * facts.widest)


def _cut_split(work: _Work, split: SplitPlan, options: PlanOptions) -> list[Shard]:
    """Cut one split into shards: by units for all weights of a Linear, else by examples and sites."""
    layer, n_sites = work.layer, work.n_sites
    n_wanted = work.split_s(split) / options.shard_s
    if options.is_shared:
        n_wanted = max(n_wanted, min(N_SHARED, int(work.split_s(split) / SHARED_S)))
    most_sites = PARTIAL_BYTES // _partial_bytes(split, work.spec)
    is_whole = work.path == "response" and work.spec.sites == "all"
    if work.is_by_rows:
        if options.is_shared:
            return _cut_rows(split, layer, n_wanted, most_sites)
        n_wanted = n_wanted if options.is_kept else 1  # each further one adds up the sums of all weights once more
        return _cut(split, n_sites, work.batch_size, n_wanted, n_sites, row=n_sites)
    if not is_whole:
        return _cut(split, n_sites, work.batch_size, n_wanted, MAX_SITES_PER_SHARD, row=1)
    row = math.prod(layer.shape[1:])
    most_sites = max(1, most_sites // row) * row if options.is_shared else n_sites
    return _cut(split, n_sites, work.batch_size, n_wanted, most_sites, row)


def _cut(split: SplitPlan, n_sites: int, batch_size: int, n_wanted: float, most_sites: int, row: int) -> list[Shard]:
    """About `n_wanted` shards: along the examples first, so that each pays its prefix once; along the sites if need be.

    Blocks of one class are never cut: their variance is closed within one shard. Nor are rows of so many sites.
    """
    unit = split.per_class * max(1, batch_size // split.per_class) if split.per_class else batch_size
    n_units = math.ceil(split.n_examples / unit)
    n_wanted = min(math.ceil(n_wanted), MAX_SHARDS)
    n_rows = n_sites // row
    n_site_blocks = max(math.ceil(n_sites / most_sites), min(n_rows, math.ceil(n_wanted / n_units)))
    examples = _intervals(split.n_examples, unit * math.ceil(n_units / max(1, min(n_units, n_wanted))))
    sites = _intervals(n_sites, math.ceil(n_rows / n_site_blocks) * row)
    return [
        Shard(id=f"{split.name}-{e}-{s}", split=split.name, examples=block, sites=rows)
        for s, rows in enumerate(sites)
        for e, block in enumerate(examples)
    ]


def _cut_rows(split: SplitPlan, layer: LayerFacts, n_wanted: float, most_sites: int) -> list[Shard]:
    """About `n_wanted` shards of whole units, each over all examples of the split, and of `most_sites` or one unit.

    So a partial is small, and nothing is ever added up but within a shard. What comes before the layer is needed by
    all of them: the first ones fill the cache together (`run.py`).
    """
    n_units, fan_in = layer.shape[0], math.prod(layer.shape[1:])
    fewest = max(FEWEST_SHARDS, math.ceil(n_units / max(1, most_sites // fan_in)))
    n_shards = min(n_units, max(fewest, min(math.ceil(n_wanted), MAX_SHARDS)))
    blocks = _intervals(n_units, math.ceil(n_units / n_shards))
    return [
        Shard(
            id=f"{split.name}-0-{s}",
            split=split.name,
            examples=(0, split.n_examples),
            sites=(first * fan_in, last * fan_in),
        )
        for s, (first, last) in enumerate(blocks)
    ]


def _partial_bytes(split: SplitPlan, spec: JobSpec) -> int:
    """What a partial holds a site; `partial.py` has the fields."""
    statistics = find_statistics(spec.criteria)
    return 20 + 8 * (spec.verify > 0) + 8 * bool(split.per_class) + 8 * spec.top1 + 8 * len(statistics)


def _row_bytes(splits: tuple[SplitPlan, ...], spec: JobSpec) -> int:
    """What the store holds of one row of the table: what `table.Rows` keeps, of a float32 model."""
    return 8 * (spec.sites != "all") + 4 + len(splits) * (20 + 8 * spec.top1 + 8 * len(spec.criteria))


def _intervals(n: int, length: int) -> list[tuple[int, int]]:
    return [(start, min(start + length, n)) for start in range(0, n, length)]


def _plan_proof(work: _Work, shards: tuple[Shard, ...]) -> ProofPlan:
    """Examples for the proof, drawn from every shard: as many as the job's cost allows, but at least one of each."""
    n_sites = min(work.spec.verify, work.n_sites)
    if not n_sites:
        return ProofPlan(n_sites=0, examples={})
    seconds = work.shards_s(shards)
    blocks = sorted({(shard.split, *shard.examples) for shard in shards})
    n_all = sum(last - first for _, first, last in blocks)
    paid = (
        n
        for n in range(PROVED_AT_ONCE, PROOF_EXAMPLES + 1, PROVED_AT_ONCE)
        if work.proof_s(n, n_sites) <= PROOF_SHARE * seconds
    )
    n_wanted = max(paid, default=PROVED_AT_ONCE)
    random = np.random.default_rng(0)
    examples: dict[str, tuple[int, ...]] = {}
    for split, first, last in blocks:
        n = min(last - first, max(1, n_wanted * (last - first) // n_all))
        drawn = np.sort(random.choice(np.arange(first, last), size=n, replace=False))
        examples[split] = examples.get(split, ()) + tuple(int(position) for position in drawn)
    return ProofPlan(n_sites=n_sites, examples=examples)


def _estimate(work: _Work, shards: tuple[Shard, ...], proof: ProofPlan, pace: float) -> Estimate:
    n_examples = sum(split.n_examples for split in work.splits)
    n_proved = sum(len(examples) for examples in proof.examples.values())
    seconds = PREPARE_S + work.shards_s(shards) + work.proof_s(n_proved, proof.n_sites)
    n_parameters = sum(each.n_weights for each in work.facts.layers)
    sum_bytes = {split.name: _partial_bytes(split, work.spec) for split in work.splits}
    row_bytes = _row_bytes(work.splits, work.spec)
    carried_bytes = 0
    if work.path == "finite":  # deltas, and the products of the intact network in float64
        carried_bytes = work.batch_size * (12 * work.lanes * work.layer.widest_spread + 8 * work.layer.values_after)
    gradient_bytes = 0
    if work.gradient_batch_size:  # what is kept for the way back, and the layer in float64 with its gradient
        values = work.gradient_batch_size * _gradient_values(work.facts, work.layer)
        gradient_bytes = GRADIENT_BYTES * values + 24 * work.layer.n_weights
    return Estimate(
        n_examples=n_examples,
        passes=(seconds - PREPARE_S) / (n_examples * pass_s(work.facts, work.threads)),
        seconds=seconds / pace,
        memory_bytes=12 * n_parameters
        + 12 * work.batch_size * work.facts.widest
        + carried_bytes
        + gradient_bytes
        + WORKSPACE_BYTES
        + work.n_sites * (sum(sum_bytes.values()) + row_bytes + WORKING_BYTES),
        redis_bytes=sum((shard.sites[1] - shard.sites[0]) * sum_bytes[shard.split] for shard in shards)
        + work.n_sites * row_bytes
        + (len(shards) + 1) * FORM_BYTES,
    )

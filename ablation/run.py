"""The whole walk on one screen, without a queue.

    JobSpec -> sites -> Plan -> shards -> PartialSums -> merge/join -> ImportanceTable

In: a spec and folders (`run_spec`), or a model and data already loaded (`Job`). Out: an `ImportanceTable`.
The service does the same with `run_shard` in many workers and `finish_job` in one of them.
"""

import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ablation import baseline
from ablation.cache import Activations, Notes, find_next, find_start, hash_of, make_known
from ablation.devices import find_device, freed_memory_kept, is_out_of_memory
from ablation.engine.batches import run_batches
from ablation.engine.interface import EnginePath, HasPrefix, Setup
from ablation.engine.paths import open_path
from ablation.errors import DataError, ExampleError, ModelError, OutOfMemory, as_given, shorten
from ablation.inputs.catalog import SplitCounts, find_root, model_names
from ablation.inputs.data import draw_examples, labels_of, load_batches, load_data, name_example, tell_apart
from ablation.inputs.folders import Folders
from ablation.inputs.models import load_model
from ablation.layers import registered_here
from ablation.machine import find_memory, measure_pace
from ablation.partial import Gathered, PartialSums
from ablation.plan import SHARD_S, Plan, Shard, plan_spec
from ablation.precision import fit
from ablation.proof import choose_rows, compare, make_proof, rms
from ablation.reference import in_float64
from ablation.sites import EveryWeight, Sites, list_sites
from ablation.spec import JobSpec, PerClass
from ablation.table import ImportanceTable, make_table

MAX_CANDIDATES = 1 << 20  # rows that the proof chooses from; of a larger table,
N_CANDIDATES = 1 << 12  # so many of the touched ones, drawn, beside the largest
FILL_SHARE = 0.5  # of a shard's progress, where all of its activations are missing
N_CHECKED = 32  # examples at the beginning of a split that the model is checked on


@dataclass(frozen=True)
class Split:
    """One split, ready to be read: a data set and which of its examples, in the split's fixed order."""

    dataset: Dataset[Any]
    indices: np.ndarray
    collate: Callable[[list[Any]], Any] | None = None


@dataclass(frozen=True)
class Job:
    """A planned job with its model and data loaded."""

    spec: JobSpec
    plan: Plan
    model: torch.nn.Module
    splits: dict[str, Split]
    device: torch.device
    activations: Activations | None = None
    found: dict[str, str] = field(default_factory=dict)  # hashes of what was opened: the same for all who work on it
    name: str = field(default_factory=lambda: secrets.token_hex(8))  # of this run: whose shards leave each other notes

    @property
    def sites(self) -> Sites:
        """All sites of the job, in the order of the table's rows."""
        return list_sites(self.model.get_parameter(self.plan.parameter), self.spec.sites, self.spec.value)


def load_job(spec: JobSpec, plan: Plan, folders: Folders, *, device: str | None = None, name: str | None = None) -> Job:
    """Read the model and the data that a spec names. Processes that share a job give it the same `name`."""
    where = find_device(device)
    model, transform = load_model(spec.model.name, spec.model.weights, spec.model.seed, folders=folders)
    splits = {}
    for split, dataset in open_splits(spec, folders, transform).items():
        labels = labels_of(dataset) if plan_of(plan, split).per_class else None
        splits[split] = Split(dataset, draw_examples(spec.data.splits[split], labels, len(dataset)))
    job = make_job(spec, plan, model.to(where), splits)
    found = {"torch": torch.__version__, "model": hash_of(job.model.state_dict().values())}
    found |= {name: hash_of(tell_apart(split.dataset, split.indices)) for name, split in splits.items()}
    activations = _activations_of(job, found["model"], folders)
    return replace(job, activations=activations, found=found, name=name or job.name)


def _activations_of(job: Job, model: str, folders: Folders) -> Activations | None:
    """The activations that earlier jobs on the same prefix have left; None where none are kept. `model`: its hash.

    Of a registered model only the weights can be told apart, and not its code: its activations are not kept.
    """
    if not folders.cache_bytes or job.spec.model.name not in model_names():
        return None
    about = hash_of(
        [
            *(version("weight-ablation"), torch.__version__, platform.machine(), job.device.type),
            *(job.spec.model.name, model, job.plan.parameter, job.plan.path, job.plan.precision, str(job.plan.threads)),
        ]
    )
    n_examples = sum(split.n_examples for split in job.plan.splits)
    return Activations(folders.cache / "activations", folders.cache_bytes, about, n_examples)


def open_splits(spec: JobSpec, folders: Folders, transform: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """The data set of every split that a spec asks for."""
    root = find_root(spec.data, folders, registered_here())
    with as_given({"data.root": spec.data.root}):
        return {name: load_data(spec.data.name, root, name, transform) for name in spec.data.splits}


def count_splits(spec: JobSpec, folders: Folders) -> dict[str, SplitCounts]:
    """How many examples each split has, by opening it; per class only where that is asked for."""
    counts = {}
    for name, dataset in open_splits(spec, folders).items():
        by_class = isinstance(spec.data.splits[name], PerClass)
        n_per_class = tuple(np.bincount(labels_of(dataset)).tolist()) if by_class else None
        counts[name] = SplitCounts(n_examples=len(dataset), n_per_class=n_per_class)
    return counts


def plan_here(spec: JobSpec, folders: Folders, **options: Any) -> Plan:
    """The plan of a job on what is built in or registered in this Python environment; `options` as in `make_plan`.

    Raises:
        SpecError: something that it names is not there, or it asks for more than there is.
    """
    registered = registered_here()
    plan = plan_spec(spec, folders, registered, **options)
    return plan or cast(Plan, plan_spec(spec, folders, registered, counts=count_splits(spec, folders), **options))


def make_job(spec: JobSpec, plan: Plan, model: torch.nn.Module, splits: dict[str, Split]) -> Job:
    """A job on a model and data that are there already; in `float64` precision the model is copied.

    Raises:
        ModelError: the model can't be measured exactly, or its layer is not the one that was planned.
    """
    baseline.check_model(model)
    shape = tuple(model.get_parameter(plan.parameter).shape)
    if shape != plan.shape:
        raise ModelError(f"{plan.parameter} has shape {shape} with these weights; the plan was made for {plan.shape}.")
    model = in_float64(model) if spec.precision == "float64" else model
    return Job(spec, plan, model, splits, model.get_parameter(plan.parameter).device)


def plan_of(plan: Plan, split: str) -> Any:
    """The plan of one split."""
    return next(part for part in plan.splits if part.name == split)


def run_shard(job: Job, shard: Shard, *, on_batch: Callable[[float], None] = lambda fraction: None) -> PartialSums:
    """The sums over one shard's examples for one shard's sites.

    `on_batch` is called with the fraction of the shard that is done; it may raise to cancel.
    """
    first, last = shard.examples
    rows = slice(*shard.sites)
    n_sites = rows.stop - rows.start
    positions = np.arange(first, last)
    with threads_of(job.plan), freed_memory_kept(), example_of(job.splits[shard.split], np.arange(last)):
        example = next(read(job, shard.split, positions[:2]))[0]
        if first == 0 and rows.start == 0:
            n_checked = min(N_CHECKED, max(2, job.plan.batch_size))  # with one alone, no batch mates would be seen
            inputs = torch.cat([batch for batch, _ in read(job, shard.split, positions[:n_checked])])
            baseline.check_repeatable(example, inputs)
            on_batch(0.0)
            baseline.check_composition(job.model, inputs)
            on_batch(0.0)
            if job.plan.path not in ("direct", "response"):  # whose own look at the model has found the parameter
                baseline.check_used(job.model, job.plan.parameter, inputs)
            on_batch(0.0)
        path = open_engine(job, job.sites[rows], example)
        filled, batches = 0.0, read(job, shard.split, positions)
        if isinstance(path, HasPrefix) and (notes := notes_of(job, shard)):
            filled = FILL_SHARE * len(notes.missing()) / len(notes.batches)
            fill(job, shard, path, notes, lambda part: on_batch(filled * part))
            batches = read_noted(job, shard, notes)
        return run_batches(
            path,
            job.model,
            batches,
            n_sites=n_sites,
            first_example=first,
            per_class=plan_of(job.plan, shard.split).per_class,
            proof_examples=frozenset(job.plan.proof.examples.get(shard.split, ())),
            device=job.device,
            on_step=lambda examples, sites: on_batch(
                filled
                + (1 - filled)
                * (examples + sites / n_sites * min(job.plan.batch_size, last - first - examples))
                / (last - first)
            ),
            proof=bool(job.plan.proof.n_sites),
            top1=job.spec.top1,
        )


def notes_of(job: Job, shard: Shard) -> Notes | None:
    """The notes of the shards that need this shard's examples too; None where no other does, or nothing is kept."""
    if job.activations is None or len(sharing(job.plan, shard)) == 1:
        return None
    first, last = shard.examples
    starts = range(first, last, job.plan.batch_size)
    batches = tuple((start, min(last, start + job.plan.batch_size)) for start in starts)
    return Notes(job.activations, f"{job.name} {shard.split}", batches)


def sharing(plan: Plan, shard: Shard) -> list[str]:
    """The shards with the same examples."""
    return [other.id for other in plan.shards if (other.split, other.examples) == (shard.split, shard.examples)]


def fill(job: Job, shard: Shard, path: HasPrefix, notes: Notes, on_batch: Callable[[float], None]) -> None:
    """Let the cache have what comes before the layer for every batch of the shard, with whoever else is at it.

    `on_batch` is called with the fraction of the batches that are there. Stops where nothing is kept: there is no room.
    """
    n_batches = len(notes.batches)
    batch = find_start(sharing(job.plan, shard).index(shard.id), n_batches)
    own: set[int] = set()  # not done again, even if they are gone already
    while missing := [batch for batch in notes.missing() if batch not in own]:
        batch = find_next(missing, batch)
        for inputs, labels in read(job, shard.split, np.arange(notes.batches[batch][0], shard.examples[1])):
            if batch in own or notes.has(batch):
                break
            address = notes.activations.address(inputs)
            if not notes.activations.has(address):
                path.keep_prefix(inputs)
                if not notes.activations.has(address):
                    return
            notes.put(batch, address, labels)
            own.add(batch)
            missing.remove(batch)
            on_batch(1 - len(missing) / n_batches)
            batch += 1
    on_batch(1.0)


def read_noted(job: Job, shard: Shard, notes: Notes) -> Iterator[tuple[Tensor, Tensor]]:
    """The shard's batches in order; where the record of one is known and there, the batch itself is not read.

    But for the first, on which the path is compared with the model itself.
    """
    for batch, (first, last) in enumerate(notes.batches):
        known = notes.get(batch) if batch else None
        if known is not None and notes.activations.hold(known[0]):
            yield make_known(known[0], last - first), known[1].to(job.device)
        else:
            notes.activations.held.clear()
            yield from read(job, shard.split, np.arange(first, last))
    notes.activations.held.clear()


def open_engine(job: Job, sites: Sites, example: Tensor) -> EnginePath:
    """The plan's path for these sites."""
    plan = job.plan
    sites = sites if plan.path == "response" else sites.listed()
    setup = Setup(job.model, plan.parameter, sites, plan.precision, job.spec.top1, plan.lanes, job.activations)
    return open_path(plan.path, setup, example)


def read(job: Job, split: str, positions: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a split's examples by their positions in its fixed order, on the job's device, labels checked."""
    part = job.splits[split]
    done = 0
    for inputs, labels in load_batches(
        part.dataset,
        part.indices[positions],
        job.plan.batch_size,
        collate=part.collate,
        pin_memory=job.device.type == "cuda",
    ):
        with example_of(part, positions[done:]):
            baseline.check_labels(labels, job.plan.n_classes)
        done += len(labels)
        yield fit(inputs, job.model), labels.to(job.device, torch.int64)


@contextmanager
def example_of(split: Split, positions: np.ndarray) -> Iterator[None]:
    """Let errors about an example, which say where it is among `positions`, name it as the data set does."""
    try:
        yield
    except ExampleError as error:
        index = int(split.indices[positions[error.position]])
        raise DataError(f"{name_example(split.dataset, index)} {error.what}") from None


def finish_job(job: Job, partials: Iterable[PartialSums], *, seconds: float) -> ImportanceTable:
    """Merge and join the partials (in the order of the plan's shards), prove, and make the table.

    Raises:
        ProofError: the table does not agree with the reference.
    """
    return make_result(job, gather_totals(job.plan, partials), seconds=seconds)


def make_result(job: Job, totals: dict[str, PartialSums], *, seconds: float) -> ImportanceTable:
    """The table of every split's sums, proved.

    Raises:
        ProofError: the table does not agree with the reference.
    """
    with threads_of(job.plan):
        proof = run_proof(job, totals) if job.plan.proof.n_sites else None
    for shard in {(shard.split, shard.examples): shard for shard in job.plan.shards}.values():
        if notes := notes_of(job, shard):
            notes.drop()
    sites = job.sites
    about = {
        "spec": job.spec.model_dump(mode="json"),
        "plan": job.plan.model_dump(mode="json", exclude={"shards"}),
        "baseline": {name: _baseline(total) for name, total in totals.items()},
        "proof": proof,
        "n_not_finite": 0,
        "seconds": seconds,
        "versions": {
            "torch": torch.__version__, "torchvision": version("torchvision"), "python": platform.python_version()
        },
    }  # fmt: skip
    return make_table(
        indices=None if isinstance(sites, EveryWeight) else sites.indices.cpu().numpy(),
        shape=job.plan.shape,
        weights=sites.weights.cpu().numpy(),
        splits=totals,
        per_class={split.name: split.per_class for split in job.plan.splits},
        top1=job.spec.top1,
        not_finite=None,
        about=about,
    )


def gather_totals(plan: Plan, partials: Iterable[PartialSums]) -> dict[str, PartialSums]:
    """All examples and all sites of every split, from the partials one at a time."""
    gathered = {split.name: Gathered(plan.n_sites) for split in plan.splits}
    for shard, partial in zip(plan.shards, partials, strict=True):
        gathered[shard.split].add(shard.sites, partial)
    return {name: split.finish() for name, split in gathered.items()}


def _baseline(total: PartialSums) -> dict[str, Any]:
    n, scale = total.n_examples, 0.01 * rms(total.delta)
    bound = total.left_out / scale if total.left_out else 0.0
    return {
        "n_examples": n,
        "loss": total.loss / n,
        "accuracy": total.n_correct / n,
        "series_bound": bound if np.isfinite(bound) else None,
    }


def run_proof(job: Job, totals: dict[str, PartialSums]) -> dict[str, Any]:
    """The job's own check: chosen sites through the reference, on the plan's proof examples of every split."""
    chosen = choose_proved(totals, job.plan.proof.n_sites)
    sites = job.sites.pick(chosen)
    job = replace(job, activations=None)  # computed anew here
    compared = {}
    for name, total in totals.items():
        positions = np.asarray(job.plan.proof.examples[name])
        example = next(read(job, name, positions[:2]))[0]
        compared[name] = compare(
            open_engine(job, sites, example),
            job.model,
            job.plan.parameter,
            sites,
            read(job, name, positions),
            sums=take_proof(total, chosen),
            utility_rms=rms(total.delta / total.n_examples),
            loss=total.loss / total.n_examples,
        )
    return make_proof(compared, job.plan.precision)


def choose_proved(totals: dict[str, PartialSums], n_sites: int) -> np.ndarray:
    """The rows to prove; of a large table chosen among those with the largest utilities and some of the touched."""
    n_rows = len(next(iter(totals.values())).delta)
    rows = np.arange(n_rows) if n_rows <= MAX_CANDIDATES else choose_candidates(totals, n_sites)
    utility = np.stack([total.delta[rows] / total.n_examples for total in totals.values()])
    touched = np.stack([total.touched[rows].astype(np.int64) for total in totals.values()])
    return rows[choose_rows(utility, touched, n_sites)]


def choose_candidates(totals: dict[str, PartialSums], n_sites: int) -> np.ndarray:
    """Some rows of a large table, sorted: the `n_sites` largest of each split, and a draw of all and of the touched."""
    random = np.random.default_rng(0)
    n_rows = len(next(iter(totals.values())).delta)
    chosen = [random.integers(0, n_rows, n_sites)]
    for total in totals.values():
        chosen.append(np.argpartition(np.nan_to_num(np.abs(total.delta)), -n_sites)[-n_sites:])
        touched = np.flatnonzero(total.touched)
        if len(touched):
            chosen.append(touched[random.integers(0, len(touched), N_CANDIDATES)])
    return np.unique(np.concatenate(chosen))


def take_proof(total: PartialSums, rows: np.ndarray) -> np.ndarray:
    """The sums over the proof's examples alone."""
    assert total.proof is not None  # of a job that is proved
    return total.proof[rows]


@contextmanager
def threads_of(plan: Plan) -> Iterator[None]:
    """As many threads as the plan froze, since they change bits; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_job(job: Job, *, on_progress: Callable[[float], None] = lambda fraction: None) -> ImportanceTable:
    """Every shard in turn, then the table. `on_progress` gets the fraction of the job that is done."""
    started = time.monotonic()
    shards = job.plan.shards
    sizes = [float(np.diff(shard.examples)[0] * np.diff(shard.sites)[0]) for shard in shards]

    def run(k: int) -> PartialSums:
        return run_shard(
            job,
            shards[k],
            on_batch=lambda part: on_progress((sum(sizes[:k]) + part * sizes[k]) / sum(sizes)),
        )

    totals = gather_totals(job.plan, map(run, range(len(shards))))  # one partial at a time is there
    return make_result(job, totals, seconds=time.monotonic() - started)


def run_smaller(
    make: Callable[[int], Job],
    *,
    may_halve: bool,
    on_progress: Callable[[float], None] = lambda fraction: None,
    on_smaller: Callable[[Plan], None] = lambda plan: None,
) -> ImportanceTable:
    """Run the job that `make` gives; where memory runs out, the one with half of that carried at once, and so on.

    Args:
        make: the job whose plan is halved so many times (`make_plan`).
        may_halve: false where the user has said how much to carry.
        on_progress: as in `run_job`.
        on_smaller: called with each plan after the first.

    Raises:
        OutOfMemory: what is left takes too much, too.
    """
    n_halved = 0
    while True:
        job = make(n_halved)
        if n_halved:
            on_smaller(job.plan)
        try:
            return run_job(job, on_progress=on_progress)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not may_halve:
                raise OutOfMemory(
                    f"memory ran out in batches of {job.plan.batch_size} ({shorten(str(error))}). Choose a smaller "
                    "batch size, or leave it to the plan."
                ) from error
            n_halved = halve(job.plan, error)


def halve(plan: Plan, error: Exception) -> int:
    """How often the next plan is halved, since memory ran out with this one.

    Raises:
        OutOfMemory: one example and one site at a time it carries already.
    """
    if plan.batch_size == plan.lanes == 1:
        raise OutOfMemory(
            f"memory ran out even one example at a time ({shorten(str(error))}). Ask for fewer sites, or use a machine "
            "with more memory."
        ) from error
    return plan.n_halved + 1


def run_spec(
    spec: JobSpec,
    folders: Folders,
    *,
    device: str | None = None,
    engine: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    shard_s: float = SHARD_S,
    on_progress: Callable[[float, str], None] = lambda fraction, what: None,
) -> ImportanceTable:
    """Load, plan and run a job in this process."""
    on_progress(0.0, "reading the model and the data")
    options: dict[str, Any] = {"threads": threads or torch.get_num_threads(), "shard_s": shard_s, "engine": engine}
    options |= {"pace": measure_pace(), "memory_bytes": find_memory()}

    def make(n_halved: int) -> Job:
        plan = plan_here(spec, folders, batch_size=batch_size, is_shared=False, n_halved=n_halved, **options)
        return load_job(spec, plan, folders, device=device)

    return run_smaller(
        make,
        may_halve=batch_size is None,
        on_progress=lambda part: on_progress(
            part, "examples x sites" if part < 1 else "checking against the reference"
        ),
        on_smaller=lambda plan: on_progress(0.0, f"memory ran out: again, in batches of {plan.batch_size}"),
    )

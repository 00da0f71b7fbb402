"""The whole walk on one screen, without a queue.

    JobSpec -> sites -> Plan -> shards -> PartialSums -> merge/join -> ImportanceTable

In: a spec and folders (`run_spec`), or a model and data already loaded (`Job`). Out: an `ImportanceTable`.
The service does the same with `run_shard` in many workers and `finish_job` in one of them.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ablation import baseline
from ablation.cache import Activations, hash_of
from ablation.catalog import SplitCounts, find_root, model_names
from ablation.data import draw_examples, labels_of, load_batches, load_data, name_example
from ablation.devices import find_device, freed_memory_kept
from ablation.engine import open_path, run_batches
from ablation.errors import DataError, ExampleError, ModelError, as_given
from ablation.folders import Folders
from ablation.layers import registered_here
from ablation.models import load_model
from ablation.partial import PartialSums, join, merge
from ablation.plan import SHARD_S, Plan, Shard, plan_spec
from ablation.precision import fit
from ablation.proof import choose_rows, compare, make_proof, rms
from ablation.reference import in_float64
from ablation.sites import Sites, draw_indices, make_sites
from ablation.spec import JobSpec, PerClass
from ablation.table import ImportanceTable, make_table

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

    @property
    def sites(self) -> Sites:
        """All sites of the job, in the order of the table's rows."""
        return make_sites(
            self.model.get_parameter(self.plan.parameter),
            draw_indices(self.spec.sites, int(np.prod(self.plan.shape))),
            self.spec.value,
        )


def load_job(spec: JobSpec, plan: Plan, folders: Folders, *, device: str | None = None) -> Job:
    """Read the model and the data that a spec names."""
    where = find_device(device)
    model, transform = load_model(spec.model.name, spec.model.weights, spec.model.seed, folders=folders)
    splits = {}
    for name, dataset in open_splits(spec, folders, transform).items():
        labels = labels_of(dataset) if plan_of(plan, name).per_class else None
        splits[name] = Split(dataset, draw_examples(spec.data.splits[name], labels, len(dataset)))
    job = make_job(spec, plan, model.to(where), splits)
    return replace(job, activations=_activations_of(job, folders))


def _activations_of(job: Job, folders: Folders) -> Activations | None:
    """The activations that earlier jobs on the same prefix have left; None where none are kept.

    Of a registered model only the weights can be told apart, and not its code: its activations are not kept.
    """
    if not folders.cache_bytes or job.spec.model.name not in model_names():
        return None
    about = hash_of(
        [
            *(version("weight-ablation"), torch.__version__, platform.machine(), job.device.type),
            *(job.spec.model.name, job.plan.parameter, job.plan.path, job.plan.precision, str(job.plan.threads)),
            *job.model.state_dict().values(),
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
            batches = [batch for batch, _ in read(job, shard.split, positions[:N_CHECKED])]
            inputs = torch.cat(batches)
            baseline.check_repeatable(example, inputs)
            on_batch(0.0)
            baseline.check_composition(job.model, inputs)
            on_batch(0.0)
            if job.plan.path != "direct":  # whose own look at the model has found the parameter
                baseline.check_used(job.model, job.plan.parameter, inputs)
            on_batch(0.0)
        return run_batches(
            open_engine(job, job.sites[rows], example),
            job.model,
            read(job, shard.split, positions),
            n_sites=n_sites,
            first_example=first,
            per_class=plan_of(job.plan, shard.split).per_class,
            proof_examples=frozenset(job.plan.proof.examples.get(shard.split, ())),
            device=job.device,
            on_step=lambda examples, sites: on_batch(
                (examples + sites / n_sites * min(job.plan.batch_size, last - first - examples)) / (last - first)
            ),
        )


def open_engine(job: Job, sites: Sites, example: Tensor) -> Any:
    """The plan's path for these sites."""
    plan = job.plan
    return open_path(
        plan.path,
        job.model,
        plan.parameter,
        sites,
        example,
        precision=plan.precision,
        top1=job.spec.top1,
        lanes=plan.lanes,
        activations=job.activations,
    )


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


def finish_job(job: Job, partials: Sequence[PartialSums], *, seconds: float) -> ImportanceTable:
    """Merge and join the partials (in the order of the plan's shards), prove, and make the table.

    Raises:
        ProofError: the table does not agree with the reference.
    """
    totals = {name: _total(job.plan, partials, name) for name in job.splits}
    with threads_of(job.plan):
        proof = run_proof(job, totals) if job.plan.proof.n_sites else None
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
        indices=sites.indices.cpu().numpy(),
        shape=job.plan.shape,
        weights=sites.weights.cpu().numpy(),
        splits=totals,
        per_class={split.name: split.per_class for split in job.plan.splits},
        top1=job.spec.top1,
        not_finite=None,
        about=about,
    )


def _total(plan: Plan, partials: Sequence[PartialSums], split: str) -> PartialSums:
    """All examples and all sites of one split: merged along the examples, then joined along the sites."""
    blocks: dict[tuple[int, int], list[PartialSums]] = {}
    for shard, partial in zip(plan.shards, partials, strict=True):
        if shard.split == split:
            blocks.setdefault(shard.sites, []).append(partial)
    return join([merge(parts) for parts in blocks.values()])


def _baseline(total: PartialSums) -> dict[str, Any]:
    n = total.n_examples
    return {"n_examples": n, "loss": total.loss / n, "accuracy": total.n_correct / n}


def run_proof(job: Job, totals: dict[str, PartialSums]) -> dict[str, Any]:
    """The job's own check: chosen sites through the reference, on the plan's proof examples of every split."""
    utility = np.stack([total.delta / total.n_examples for total in totals.values()])
    touched = np.stack([total.touched for total in totals.values()])
    chosen = choose_rows(utility, touched, job.plan.proof.n_sites)
    everything = job.sites
    job = replace(job, activations=None)  # computed anew here
    sites = Sites(everything.indices[chosen], everything.weights[chosen], everything.replacements[chosen])
    compared = {}
    for row, (name, total) in enumerate(totals.items()):
        positions = np.asarray(job.plan.proof.examples[name])
        example = next(read(job, name, positions[:2]))[0]
        compared[name] = compare(
            open_engine(job, sites, example),
            job.model,
            job.plan.parameter,
            sites,
            read(job, name, positions),
            sums=total.proof[chosen],
            utility_rms=rms(utility[row]),
            loss=total.loss / total.n_examples,
        )
    return make_proof(compared, job.plan.precision)


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
    partials: list[PartialSums] = []

    def on_batch(part: float) -> None:
        k = len(partials)
        on_progress((sum(sizes[:k]) + part * sizes[k]) / sum(sizes))

    for shard in shards:
        partials.append(run_shard(job, shard, on_batch=on_batch))
    return finish_job(job, partials, seconds=time.monotonic() - started)


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
    threads = threads or torch.get_num_threads()
    plan = plan_here(spec, folders, threads=threads, shard_s=shard_s, engine=engine, batch_size=batch_size)
    job = load_job(spec, plan, folders, device=device)

    def on_fraction(fraction: float) -> None:
        on_progress(fraction, "examples x sites" if fraction < 1 else "checking against the reference")

    return run_job(job, on_progress=on_fraction)

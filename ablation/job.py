"""A job with its model and data loaded: what a spec and a plan name, opened.

In: a spec, a plan and folders (`load_job`), or a model and data that are there already (`make_job`). Out: a `Job`.
Not here: how a job is cut (`plan.py`), how it is run (`shard.py`, `run.py`).
"""

import platform
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ablation import baseline
from ablation.cache import Activations, hash_of
from ablation.devices import find_device, name_hardware
from ablation.errors import DataError, ModelError, as_given
from ablation.inputs.catalog import SplitCounts, dataset_facts, find_root, model_names
from ablation.inputs.classes import published_classes
from ablation.inputs.data import (
    LEFT_OUT,
    ImageFiles,
    Pictures,
    Relabelled,
    classes_of,
    describe_bad,
    draw_examples,
    draw_readable,
    find_bad_pictures,
    labels_of,
    load_batches,
    load_data,
    name_example,
    say_pictures,
    tell_apart,
)
from ablation.inputs.folders import Folders
from ablation.inputs.models import name_weights_file, open_model
from ablation.layers import registered_here
from ablation.loss import CROSS_ENTROPY, Loss, make_loss
from ablation.plan import InputsPlan, Plan, PlanOptions, describe_inputs, number_split, plan_spec
from ablation.reference import in_float64
from ablation.sharing import check_alone, converted, holders_of
from ablation.sites import Sites, list_sites
from ablation.spec import DataSpec, JobSpec, LossObject, PerClass

PACKAGES = ("weight-ablation", "torch", "torchvision", "numpy", "numba", "pillow")  # whose versions can change bits
MOST_LISTED = 1000  # examples that were skipped, of one split
N_FINGERPRINT = 64  # examples of a pair of tensors that go into their fingerprint


@dataclass(frozen=True)
class Split:
    """One split, ready to be read: a data set and which of its examples, in the split's fixed order."""

    dataset: Dataset[Any]
    indices: np.ndarray
    collate: Callable[[list[Any]], Any] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)  # examples that can't be read: name -> reason


@dataclass(frozen=True)
class Begin:
    """When a job was begun (ISO 8601, in UTC), and by which command, where one was typed."""

    date: str | None = None
    command: str | None = None


def say_date(moment: datetime) -> str:
    """The moment in UTC, as ISO 8601 writes it: 2026-11-30T12:00:00Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Job:
    """A planned job with its model and data loaded."""

    spec: JobSpec
    plan: Plan
    model: torch.nn.Module
    splits: dict[str, Split]
    device: torch.device
    loss: Loss = CROSS_ENTROPY
    activations: Activations | None = None
    inputs: InputsPlan | None = None  # what model and data are, in words; None: they were in memory
    warnings: tuple[str, ...] = ()  # of what was opened
    found: dict[str, str] = field(default_factory=dict)  # hashes of what was opened; all who share the job have these
    name: str = field(default_factory=lambda: secrets.token_hex(8))  # shards of one name share notes
    begin: Begin = Begin()
    weights_file: str | None = None  # name of the file that the weights are from, where there is one

    @property
    def sites(self) -> Sites:
        """All sites of the job, in the order of the table's rows."""
        return list_sites(self.model.get_parameter(self.plan.parameter), self.spec.sites, self.spec.value)


def load_job(
    spec: JobSpec,
    plan: Plan,
    folders: Folders,
    *,
    device: str | None = None,
    name: str | None = None,
    begin: Begin = Begin(),  # it is frozen
) -> Job:
    """Read the model and the data that a spec names. Processes that share a job give it the same `name`."""
    where = find_device(device)
    opened = open_model(spec.model.name, spec.model.weights, spec.model.seed, folders=folders)
    classes = replace(opened.weights.classes, n=plan.n_classes)
    splits, numberings = {}, {}
    for split, dataset in open_splits(spec, folders, opened.transform).items():
        numberings[split] = number_split(spec.data, class_names_of(spec.data, dataset), classes)
        splits[split] = relabel(draw_split(spec, split, dataset), numberings[split].numbers)
    found = {"torch": torch.__version__, "model": hash_model(opened.module)}
    found |= {name: hash_of(tell_apart(split.dataset, split.indices)) for name, split in splits.items()}
    job = make_job(spec, plan, converted(opened.module, lambda own: own.to(where)), splits)
    return replace(
        job,
        activations=_activations_of(job, found["model"], folders),
        inputs=describe_inputs(opened.weights, numberings),
        found=found,
        name=name or job.name,
        begin=begin,
        weights_file=name_weights_file(spec.model.name, spec.model.weights),
    )


def relabel(split: Split, numbers: Mapping[int, int] | None) -> Split:
    """The split with the model's class numbers in place of its own labels; None: they are the same."""
    return split if numbers is None else replace(split, dataset=Relabelled(split.dataset, numbers))


def class_names_of(data: DataSpec, dataset: Any) -> tuple[str, ...] | None:
    """Names of the classes of an open data set: those that it lists, or those of the published one."""
    facts = dataset_facts(data.name, registered_here())
    return classes_of(dataset) or (published_classes(data.name, facts.n_classes) if facts.n_classes else None)


def say_inputs(job: Job, doubts: Sequence[str] = ()) -> dict[str, Any]:
    """What the job is of, in words, and what was noticed in its files, for the result. Headers of pictures are read.

    `doubts` are warnings beside those of what was opened.
    """
    told = job.inputs.model_dump(mode="json") if job.inputs else {"weights": None, "preprocessing": None, "classes": {}}
    notes = list(told.get("notes", ()))
    for name, split in job.splits.items():
        notes += [f"{name}: {said}" for said in say_pictures(split.dataset, split.indices)]
    return told | {"notes": notes, "warnings": [*job.warnings, *doubts]}


def _activations_of(job: Job, model: str, folders: Folders) -> Activations | None:
    """The activations that earlier jobs on the same prefix have left; None where none are kept. `model` is its hash.

    Those of a registered model are not kept: its weights can be told from others, but its code can not.
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
        return {
            name: load_data(spec.data.name, root, name, transform, exif=spec.data.exif) for name in spec.data.splits
        }


def count_splits(spec: JobSpec, folders: Folders) -> dict[str, SplitCounts]:
    """How many examples each split has, by opening it; per class only where that is asked for."""
    counts = {}
    for name, dataset in open_splits(spec, folders).items():
        usable: Any = slice(None)
        n_examples = len(dataset)
        if spec.data.bad_images == "skip":
            _, bad = _draw_readable(spec, name, dataset)
            usable = np.setdiff1d(np.arange(n_examples), np.fromiter(bad, np.int64))
            n_examples = len(usable)
        by_class = isinstance(spec.data.splits[name], PerClass)
        n_per_class = tuple(np.bincount(_labels_unread(dataset)[usable]).tolist()) if by_class else None
        names = class_names_of(spec.data, dataset)
        counts[name] = SplitCounts(n_examples=n_examples, n_per_class=n_per_class, classes=names)
    return counts


def _labels_unread(dataset: Any) -> np.ndarray:
    """Labels of all examples; of picture files without opening any, since it may be a bad one."""
    return np.asarray(dataset.targets, np.int64) if isinstance(dataset, ImageFiles) else labels_of(dataset)


def draw_split(spec: JobSpec, name: str, dataset: Any) -> Split:
    """The examples of one split that the spec asks for, without bad pictures where it says that they are skipped."""
    if spec.data.bad_images == "skip":
        indices, bad = _draw_readable(spec, name, dataset)
        return Split(dataset, indices, skipped={name_example(dataset, index): bad[index] for index in sorted(bad)})
    asked = spec.data.splits[name]
    labels = labels_of(dataset) if isinstance(asked, PerClass) else None
    return Split(dataset, draw_examples(asked, labels, len(dataset)))


def _draw_readable(spec: JobSpec, name: str, dataset: Any) -> tuple[np.ndarray, dict[int, str]]:
    asked = spec.data.splits[name]
    labels = _labels_unread(dataset) if isinstance(asked, PerClass) else None
    return draw_readable(dataset, asked, labels, is_full=spec.data.check_images == "full")


def check_pictures(job: Job, on_progress: Callable[[float], None] = lambda fraction: None) -> None:
    """Check the picture files of all splits before the work; where bad ones are skipped, that has been done already.

    Raises:
        DataError: some can't be read; the message names the first of them.
    """
    if job.spec.data.bad_images == "skip":
        return
    is_full = job.spec.data.check_images == "full"
    for name, split in job.splits.items():
        bad = find_bad_pictures(split.dataset, split.indices, is_full=is_full, on_progress=on_progress)
        if bad:
            which = describe_bad(split.dataset, bad)
            raise DataError(
                f"{len(bad):,} of the {len(split.indices):,} pictures of the {name} split can't be read: {which}. "
                f'Replace what is bad, or leave it out with {LEFT_OUT} (in a job spec: "bad_images": "skip" in data).'
            )


def plan_here(spec: JobSpec, folders: Folders, options: PlanOptions) -> Plan:
    """The plan of a job on what is built in or registered in this Python environment.

    Raises:
        SpecError: something that it names is not there, or it asks for more than there is.
    """
    registered = registered_here()
    plan = plan_spec(spec, folders, options, registered)
    return plan or cast(Plan, plan_spec(spec, folders, options, registered, count_splits(spec, folders)))


def make_job(
    spec: JobSpec, plan: Plan, model: torch.nn.Module, splits: dict[str, Split], loss: Loss | None = None
) -> Job:
    """A job on a model and data that are there already; in `float64` precision the model is copied.

    `loss` is the object where the spec has only the name of its class.

    Raises:
        ModelError: the model can't be measured exactly, or its layer is not the one that was planned.
    """
    baseline.check_model(model)
    if plan.n_classes < 2 and not isinstance(spec.loss, LossObject):
        raise ModelError(
            "the model returns one logit per example, whose cross-entropy is always 0; allowed: two or more classes. "
            "Wrap a classifier with one logit z in a module that returns torch.cat([-z / 2, z / 2], 1)."
        )
    own = model.get_parameter(plan.parameter)
    check_alone(own, plan.parameter)
    holders_of(model, own)
    shape = tuple(own.shape)
    if shape != plan.shape:
        raise ModelError(f"{plan.parameter} has shape {shape} with these weights; the plan was made for {plan.shape}.")
    model = in_float64(model) if spec.precision == "float64" else model
    where = model.get_parameter(plan.parameter).device
    return Job(spec, plan, model, splits, where, loss or make_loss(spec.loss))


def hash_model(model: torch.nn.Module) -> str:
    """Hash of all numbers of the model's state, in their order and dtype; of sparse tensors as dense ones."""
    tensors = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    return hash_of(value if value.layout is torch.strided else value.to_dense() for value in tensors)


def fingerprint(split: Split) -> str:
    """Hash by which the examples of a split are told from others, without reading them all.

    Pictures and files as `tell_apart` says; a pair of tensors by its labels and examples spaced evenly; any other data
    set by its first and its last example.
    """
    dataset, indices = split.dataset, split.indices
    if isinstance(dataset, Pictures | ImageFiles):
        return hash_of(tell_apart(dataset, indices))
    parts: list[str | Tensor] = [str(len(indices)), torch.from_numpy(np.ascontiguousarray(indices))]
    if type(dataset) is TensorDataset and split.collate is None:
        spaced = np.unique(np.linspace(0, len(indices) - 1, N_FINGERPRINT).astype(np.int64))
        rows = torch.from_numpy(np.ascontiguousarray(indices[spaced]))
        return hash_of([*parts, *(tensor[rows] for tensor in dataset.tensors), dataset.tensors[-1]])
    for batch in load_batches(dataset, indices[[0, -1]], 1, n_workers=0, collate=split.collate):
        parts += batch
    return hash_of(parts)


def find_hashes(model: torch.nn.Module, splits: Mapping[str, Split]) -> dict[str, str]:
    """The hashes of a model and data that were there already, without those that can't be made."""
    makers: dict[str, Callable[[], str]] = {"model": partial(hash_model, model)}
    makers |= {name: partial(fingerprint, split) for name, split in splits.items()}
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception:  # a module or a data set of the user's own may raise anything; the numbers are there already
            continue
    return found


def find_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def describe_job(job: Job) -> dict[str, Any]:
    """What a job is of, beside its spec and its plan: all that it takes to do it again, as plain JSON.

    `model`: its name, its class, the weights that were asked for, the name of the file that they are from, and the hash
    of its numbers. `data`: name, and of each split the class of the data set, how many examples were used of how many,
    a fingerprint, and how many were skipped since they can't be read, with a list of the first of them. `device`: its
    name and the hardware. `date`, `command`: when it was begun, and by what was typed.
    A hash is BLAKE2b of 32 bytes, in hexadecimal digits; null where it is not known.
    """
    asked = job.spec.model
    return {
        "model": {
            "name": asked.name,
            "kind": type(job.model).__name__,
            "weights": asked.weights,
            "file": job.weights_file,
            "hash": job.found.get("model"),
        },
        "data": {
            "name": job.spec.data.name,
            "splits": {
                name: {
                    "kind": type(split.dataset).__name__,
                    "n_examples": len(split.indices),
                    "n_available": len(split.dataset),  # type: ignore[arg-type]
                    "fingerprint": job.found.get(name),
                    "n_skipped": len(split.skipped),
                    "skipped": dict([*split.skipped.items()][:MOST_LISTED]),
                }
                for name, split in job.splits.items()
            },
        },
        "device": {"name": str(job.device), "hardware": name_hardware(job.device)},
        "versions": find_versions(),
        "date": job.begin.date,
        "command": job.begin.command,
    }

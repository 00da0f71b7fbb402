"""A job with its model and data loaded: what a spec and a plan name, opened.

In: a spec, a plan and folders (`load_job`), or a model and data that are there already (`make_job`). Out: a `Job`.
Not here: how a job is cut (`plan.py`), how it is run (`shard.py`, `run.py`).
"""

import platform
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from ablation import baseline
from ablation.cache import Activations, hash_of
from ablation.devices import find_device
from ablation.errors import ModelError, as_given
from ablation.inputs.catalog import SplitCounts, find_root, model_names
from ablation.inputs.data import draw_examples, labels_of, load_data, tell_apart
from ablation.inputs.folders import Folders
from ablation.inputs.models import load_model
from ablation.layers import registered_here
from ablation.loss import CROSS_ENTROPY, Loss, make_loss
from ablation.plan import Plan, PlanOptions, plan_spec
from ablation.reference import in_float64
from ablation.sites import Sites, list_sites
from ablation.spec import JobSpec, LossObject, PerClass


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
    loss: Loss = CROSS_ENTROPY
    activations: Activations | None = None
    found: dict[str, str] = field(default_factory=dict)  # hashes of what was opened; all who share the job have these
    name: str = field(default_factory=lambda: secrets.token_hex(8))  # shards of one name share notes

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
        labels = labels_of(dataset) if plan.find_split(split).per_class else None
        splits[split] = Split(dataset, draw_examples(spec.data.splits[split], labels, len(dataset)))
    job = make_job(spec, plan, model.to(where), splits)
    found = {"torch": torch.__version__, "model": hash_of(job.model.state_dict().values())}
    found |= {name: hash_of(tell_apart(split.dataset, split.indices)) for name, split in splits.items()}
    activations = _activations_of(job, found["model"], folders)
    return replace(job, activations=activations, found=found, name=name or job.name)


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
        return {name: load_data(spec.data.name, root, name, transform) for name in spec.data.splits}


def count_splits(spec: JobSpec, folders: Folders) -> dict[str, SplitCounts]:
    """How many examples each split has, by opening it; per class only where that is asked for."""
    counts = {}
    for name, dataset in open_splits(spec, folders).items():
        by_class = isinstance(spec.data.splits[name], PerClass)
        n_per_class = tuple(np.bincount(labels_of(dataset)).tolist()) if by_class else None
        counts[name] = SplitCounts(n_examples=len(dataset), n_per_class=n_per_class)
    return counts


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
    shape = tuple(model.get_parameter(plan.parameter).shape)
    if shape != plan.shape:
        raise ModelError(f"{plan.parameter} has shape {shape} with these weights; the plan was made for {plan.shape}.")
    model = in_float64(model) if spec.precision == "float64" else model
    where = model.get_parameter(plan.parameter).device
    return Job(spec, plan, model, splits, where, loss or make_loss(spec.loss))

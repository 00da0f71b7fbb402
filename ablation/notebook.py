"""What a notebook user types: `ablate` on a model and data that they already have, and the table it returns.

In: any PyTorch model and data. Out: a `Table`, which is an `ImportanceTable` with the verbs people reach for.
"""

import numbers
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ablation import baseline
from ablation.devices import find_device
from ablation.errors import DataError, ModelError, SpecError
from ablation.export import write_all, write_csv, write_parquet, write_whole
from ablation.found import Unchanged, Writes, in_turn, left_alone
from ablation.inputs.catalog import ModelFacts, find_layer
from ablation.inputs.checkpoints import say_some
from ablation.inputs.classes import listed_classes
from ablation.inputs.data import Relabelled, as_dataset, classes_of, load_batches
from ablation.job import Begin, Job, Split, find_hashes, make_job, say_date
from ablation.layers import describe_model
from ablation.loss import Loss, read_loss
from ablation.machine import Machine, find_memory
from ablation.memory import run_smaller
from ablation.plan import Plan, PlanOptions, SplitCounts, make_plan
from ablation.plots import make_figure
from ablation.precision import fit
from ablation.reference import intact_logits
from ablation.results import BESIDE, describe_csv, read_results
from ablation.run import run_job
from ablation.sharing import converted, tied
from ablation.spec import FORMS, SPLITS, JobSpec, make_spec
from ablation.statistics import make_summary
from ablation.table import ImportanceTable


class Table(ImportanceTable):
    """One row per site, in the order of the sites; `columns` and `about` as in `ImportanceTable`."""

    def to_csv(self, path: str | Path, *, about: bool = False) -> None:
        """Write the CSV, whole or not at all; `about`: and beside it, as `NAME.csv-metadata.json`, what it is of.

        A CSV has the numbers alone: `open_results` takes one with that file beside it.

        Raises:
            WriteError: it can't be written.
        """
        path = Path(path)
        files = {path: lambda stream: write_csv(self, stream)}
        if about:
            files[path.with_name(path.name + BESIDE)] = _writer(describe_csv(path.name, self))
        write_all(files)

    def to_parquet(self, path: str | Path) -> None:
        """Write the same columns as a Parquet file, whole or not at all; its metadata has `about`.

        Raises:
            WriteError: it can't be written.
        """
        write_whole(Path(path), lambda stream: write_parquet(self, stream))

    def to_pandas(self) -> pd.DataFrame:
        """The columns of the CSV as a data frame."""
        return pd.DataFrame(dict(self.columns))

    def summary(self) -> dict[str, Any]:
        """Baselines, correlations, counts and the proof's errors, as plain JSON."""
        return make_summary(self)

    def plot(self) -> Figure:
        """Importance against magnitude, and train against test."""
        return make_figure(self)


def _writer(text: bytes) -> Callable[[BinaryIO], None]:
    def write(stream: BinaryIO) -> None:
        stream.write(text)

    return write


@in_turn
@torch.inference_mode(False)  # tensors made under it keep no version, which caches go by
def ablate(
    model: torch.nn.Module,
    layer: str,
    splits: Mapping[str, Any],
    sites: int | str | Sequence[int] | np.ndarray | torch.Tensor = "all",
    *,
    seed: int = 0,
    value: str | float | Mapping[str, float] = "zero",
    device: str | torch.device | None = None,
    precision: str = "mixed",
    engine: str = "auto",
    batch_size: int | None = None,
    verify: int = 8,
    top1: bool = False,
    criteria: Sequence[str] = (),
    loss: str | Mapping[str, Any] | torch.nn.CrossEntropyLoss | Loss = "cross_entropy",
    progress: bool = True,
) -> Table:
    """The exact change of the mean loss when single weights of a layer are replaced, one at a time.

    For weight w, replacement r and a split of N examples with cross-entropy l in nats, in eval mode:

        utility(w) = (1/N) sum_n [ l_n(w := r) - l_n(w) ]        positive: the weight helps

    The network before the layer runs once per batch; from the layer on, finite differences of the loss are computed
    per example and summed in float64. The model is left as it was found. One thread of a process at a time is inside
    `ablate`; calls from other threads wait for it.

    Args:
        model: any module, in any mode, whose output is logits (examples, classes) or has `.logits`.
        layer: a module's name (its `weight`) or a parameter's full name.
        splits: `train` and/or `test`, each a map-style Dataset, a DataLoader, or a pair of tensors (inputs, labels).
            Labels are class numbers of the model; a Dataset that lists other `classes` is a warning in the summary.
        sites: how many to draw uniformly without replacement from `seed`; `"all"`; or flat indices into the parameter.
        seed: of the draw.
        value: what replaces each weight w: `"zero"`; `"flip_sign"` (-w); a number, which is the same for all; or
            `{"scale": s}` (s w). A site whose replacement is not a finite number is not run: its utility and stderr are
            NaN, and `touched` counts all examples.
        device: where to compute; default: where the model is.
        precision: `"mixed"`, `"float32"` or `"float64"`.
        engine: `"auto"`, `"direct"`, `"response"`, `"finite"`, `"rerun"` or `"reference"`.
        batch_size: examples per batch; default: by the plan.
        verify: how many sites to prove against the reference; 0: no proof.
        top1: also count `broken` and `fixed` examples.
        criteria: names of cheap criteria to compute beside, a column of each split: `"taylor1"`, the utility that the
            gradient g of the mean loss predicts to first order, g (r - w). A prediction is not exact.
        loss: `"cross_entropy"`; that with options, as a dict (`{"name": "cross_entropy", "label_smoothing": 0.1,
            "class_weights": [...]}`) or as a `torch.nn.CrossEntropyLoss`; or an object with `values(logits, labels)`
            that gives each example's loss (`ablation.loss.Loss`). Utilities are plain means over the examples, also
            where torch would divide by the sum of the class weights.
        progress: show a progress bar.

    Returns:
        One row per site: `index`, coordinates, `weight`, `magnitude`, and per split `utility`, `stderr`, `touched`;
        then, where asked, per split `broken` and `fixed`, and the criteria.

    Raises:
        SpecError: an argument is not possible. ModelError, DataError: this model or data can't be measured exactly.
        ProofError: the result does not agree with the reference.

    Numerics: per-example deltas, summed in float64; relative error of a utility below 1e-4 in `mixed` (checked by the
    job itself), 1e-9 of the mean |delta| in `float64`.

    Example:
        >>> import torch, ablation
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(50, 4), torch.randint(3, (50,))
        >>> table = ablation.ablate(model, "0", {"test": data}, progress=False)
        >>> truth = ablation.ablate(model, "0", {"test": data}, engine="reference", progress=False)
        >>> bool(abs(table.columns["utility_test"] - truth.columns["utility_test"]).max() < 1e-6)
        True
    """
    begin = Begin(date=say_date(datetime.now(UTC)))
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module.")
    read = {name: _make_split(name, splits[name]) for name in _check_names(splits)}
    of_loss, loss_object = read_loss(loss)
    spec = make_spec(
        {
            "model": {"name": "in memory"},
            "layer": layer,
            "data": {"name": "in memory", **dict.fromkeys(read, "all")},
            "sites": _ask_sites(sites, _whole(seed)),
            "value": _ask_value(value),
            "precision": precision,
            "verify": _whole(verify),
            "top1": top1,
            "criteria": tuple(criteria),
            "loss": of_loss,
        }
    )
    options = PlanOptions(
        torch.get_num_threads(),
        engine=engine,
        batch_size=_check_size(_whole(batch_size)),
        is_shared=False,
        machine=Machine(memory_bytes=find_memory()),
    )
    work = _on_device(model, device)
    with left_alone(work), tied(work):
        facts = _describe(work, next(iter(read.values())), spec)
        counts = {name: SplitCounts(n_examples=len(split.indices)) for name, split in read.items()}

        def cut(n_halved: int) -> Plan:
            return make_plan(spec, facts, counts, replace(options, n_halved=n_halved))

        plan = cut(0)
        warnings = compare_classes(model, read, facts.n_classes)
        columns = (TextColumn("ablating {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True, console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task(f"{plan.n_sites} weights of {layer} ({plan.path})", total=1.0)

            def make(n_halved: int) -> Job:
                job = make_job(spec, cut(n_halved), work, read, loss_object)
                return replace(job, begin=begin, warnings=warnings)

            table = run_smaller(
                make,
                lambda job: run_job(job, on_progress=lambda fraction: bar.update(task, completed=fraction)),
                may_halve=batch_size is None,
            )
        return Table(columns=table.columns, about=_with_hashes(table.about, find_hashes(work, read)))


def open_results(path: str | os.PathLike[str]) -> Table:
    """The table of a job that has been run before, from the files that it left.

    Args:
        path: a folder that `ablation run --out` (or `submit`, `demo`) wrote; `utility.parquet` or `utility.csv` in it;
            a Parquet file from anywhere, which says by itself what it is of; or a CSV that `to_csv` wrote with
            `about=True`.

    Returns:
        One row per site: the columns and `about` of the table that was written, with the same types and bits, so that
        `summary`, `plot` and `to_csv` give what they gave then. In `about`, NaN and infinite numbers are None.

    Raises:
        SpecError: there are no results at this path, or what is there does not belong together.

    Example:
        >>> import tempfile, torch, ablation
        >>> data = torch.randn(50, 4), torch.randint(3, (50,))
        >>> table = ablation.ablate(torch.nn.Linear(4, 3), "weight", {"test": data}, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table.to_parquet(f"{folder}/linear.parquet")
        ...     again = ablation.open_results(f"{folder}/linear.parquet")
        >>> again.about["model"]["hash"] == table.about["model"]["hash"]
        True
    """
    rows, about = read_results(Path(path).expanduser())
    return Table(columns=rows, about=about)


def _with_hashes(about: Mapping[str, Any], found: Mapping[str, str]) -> dict[str, Any]:
    """What a table is about, with the hashes of the caller's model and data."""
    splits = {name: {**split, "fingerprint": found.get(name)} for name, split in about["data"]["splits"].items()}
    model = {**about["model"], "hash": found.get("model")}
    return {**about, "model": model, "data": {**about["data"], "splits": splits}}


def _check_names(splits: Mapping[str, Any]) -> list[str]:
    if not isinstance(splits, Mapping) or not splits or not set(splits) <= set(SPLITS):
        given = sorted(splits) if isinstance(splits, Mapping) else type(splits).__name__
        raise SpecError("splits", given, "a mapping with 'train', 'test' or both", "For example {'test': test_set}.")
    return [name for name in SPLITS if name in splits]


def _make_split(name: str, given: Any) -> Split:
    dataset, indices, collate = as_dataset(given)
    indices = np.arange(len(dataset)) if indices is None else indices  # type: ignore[arg-type]
    if not len(indices):
        raise DataError(f"the {name} split has no examples; give at least one.")
    return Split(dataset, indices, collate)


def _ask_sites(sites: Any, seed: Any) -> Any:
    """The form of the job spec for what was given: a count, a word, or flat indices."""
    if isinstance(_whole(sites), int):
        return {"count": _whole(sites), "seed": seed}
    if isinstance(sites, str):
        return sites
    listed = np.asarray(sites.cpu() if isinstance(sites, torch.Tensor) else sites)
    if listed.ndim != 1 or not np.issubdtype(listed.dtype, np.integer):
        given = f"{type(sites).__name__} of type {listed.dtype} and shape {listed.shape}" if listed.ndim else sites
        raise SpecError("sites", given, "a count, 'all', or a sequence of distinct flat indices (whole numbers)")
    return {"indices": listed.tolist()}


def _ask_value(value: Any) -> Any:
    """The form of the job spec for what was given: numbers of any library as floats."""
    if _is_number(value):
        return {"constant": float(value)}
    if isinstance(value, Mapping):
        return {name: float(number) if _is_number(number) else number for name, number in value.items()}
    return value


def _whole(number: Any) -> Any:
    """A whole number of any library as an int; anything else, True and False among it, as it is."""
    if isinstance(number, bool | np.bool_ | torch.Tensor):
        return number
    try:
        return operator.index(number)
    except TypeError:
        return number


def _is_number(value: Any) -> bool:
    """Whether float() takes the value for what it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        float(value)
    except OverflowError:
        raise SpecError("value", "a number beyond float64", FORMS["value"], "Numbers have to be finite.") from None
    return True


def _on_device(model: torch.nn.Module, device: Any) -> torch.nn.Module:
    """The model itself where it is on the device already (or none is asked for), else a copy there."""
    parameters = list(model.parameters())
    if not parameters:
        raise ModelError("the model has no parameters, so there is no weight to ablate.")
    if device is None:
        return model
    where = find_device(device)
    return model if where == parameters[0].device else converted(model, lambda own: own.to(where), is_copied=True)


def _check_size(batch_size: int | None) -> int | None:
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise SpecError("batch_size", batch_size, "a whole number of at least 1, or None")
    return batch_size


def compare_classes(model: torch.nn.Module, splits: Mapping[str, Split], n_classes: int) -> tuple[str, ...]:
    """Warnings about data sets that list other classes than the model has; their labels are taken as they are."""
    found, of_model = [], listed_classes(model)
    for name, split in splits.items():
        names = classes_of(split.dataset)
        if names is None or isinstance(split.dataset, Relabelled):
            continue
        if len(names) != n_classes:
            found.append(
                f"{name}: the data set lists {len(names):,} classes ({say_some(names)}), the model has {n_classes:,}; "
                "its labels were taken for the model's first classes. Check that they are the model's class numbers"
            )
        elif of_model is not None and len(of_model) == n_classes and set(of_model) == set(names) and of_model != names:
            found.append(
                f"{name}: the data set lists the model's classes in another order; its labels were taken as they are"
            )
    return tuple(found)


def _describe(model: torch.nn.Module, split: Split, spec: JobSpec) -> ModelFacts:
    """The facts of the caller's model, from a look at its first examples."""
    baseline.check_model(model)
    inputs, labels = next(load_batches(split.dataset, split.indices[:2], 2, collate=split.collate))
    inputs = fit(inputs, model)
    unchanged, writes = Unchanged(model), Writes(model)
    try:
        with writes:
            logits = intact_logits(model, inputs)
    finally:
        unchanged.check(writes)
    baseline.check_logits(logits, len(labels))
    facts = describe_model("in memory", model, inputs, layer=spec.layer)
    if spec.precision == "float64":  # it will be copied
        baseline.check_reads(model, find_layer(facts, spec.layer).parameter, inputs)
    return facts

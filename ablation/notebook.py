"""What a notebook user types: `ablate` on a model and data that they already have, and the table it returns.

In: any PyTorch model and data. Out: a `Table`, which is an `ImportanceTable` with the verbs people reach for.
"""

import copy
import html
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ablation import baseline
from ablation.devices import find_device
from ablation.errors import DataError, NoColumn, SpecError, nearest
from ablation.export import ROWS_AT_A_TIME, write_all, write_csv, write_parquet, write_whole
from ablation.found import Unchanged, Writes, in_turn, left_alone
from ablation.inputs.catalog import ModelFacts, find_layer
from ablation.inputs.checkpoints import say_some
from ablation.inputs.classes import listed_classes
from ablation.inputs.data import Relabelled, as_dataset, classes_of, load_batches
from ablation.intake import copying_told, failures_told, find_name, look_at, run_plainly, take_model, unexpected_told
from ablation.job import Begin, Job, Split, find_hashes, make_job, say_date
from ablation.layers import describe_model
from ablation.loss import Loss, read_loss
from ablation.machine import Machine, find_memory
from ablation.memory import run_smaller
from ablation.plan import Engine, Plan, PlanOptions, SplitCounts, make_plan
from ablation.plots import make_figure
from ablation.precision import fit
from ablation.results import BESIDE, describe_csv, read_results
from ablation.run import run_job
from ablation.sharing import converted, tied
from ablation.spec import FORMS, SPLITS, JobSpec, Precision, make_spec
from ablation.statistics import Summary, make_summary
from ablation.table import ImportanceTable, cut_rows

ROWS_SHOWN = 5  # of a printed table


class Table(ImportanceTable):
    """One row per site, in the order of the sites; `columns` and `about` as in `ImportanceTable`.

    `table["utility_test"]` is a column as an array, `table[k]` row k as a dict; `len(table)` counts the rows and
    iterating gives them; `name in table` asks for a column. It prints as the summary and the first rows.
    """

    def __getitem__(self, which: str | int) -> Any:
        """A column by its name, or a row by its number (from the end where that is negative).

        Raises:
            NoColumn: there is no such column or row; this is a KeyError, too.
        """
        if isinstance(which, str):
            if which not in self.columns:
                raise NoColumn(
                    "table", which, f"one of the columns {', '.join(self.columns)}", nearest(which, self.columns)
                )
            return self.columns[which]
        number, n_rows = _whole(which), len(self)
        if isinstance(number, bool) or not isinstance(number, int) or not -n_rows <= number < n_rows:
            raise NoColumn("table", which, f"the name of a column, or a row's number from 0 to {n_rows - 1}")
        first = number % n_rows
        return {name: values[0].item() for name, values in cut_rows(self.columns, slice(first, first + 1)).items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Rows from the first to the last, each as a dict."""
        for first in range(0, len(self), ROWS_AT_A_TIME):
            block = cut_rows(self.columns, slice(first, first + ROWS_AT_A_TIME))
            for row in zip(*(values.tolist() for values in block.values()), strict=True):
                yield dict(zip(block, row, strict=True))

    def __contains__(self, name: object) -> bool:
        """Whether there is a column of this name."""
        return name in self.columns

    def __repr__(self) -> str:
        """The summary as the command line prints it, and the first rows."""
        return f"{self.summary()}\n\n{self._first_rows().to_string(index=False)}\n{self._say_rest()}"

    def _repr_html_(self) -> str:
        """The summary and the first rows as a notebook shows them."""
        rows = self._first_rows().to_html(index=False, border=0)
        return f"<pre>{html.escape(str(self.summary()))}</pre>\n{rows}\n<p>{self._say_rest()}</p>"

    def _first_rows(self) -> pd.DataFrame:
        return pd.DataFrame(cut_rows(self.columns, slice(0, ROWS_SHOWN)))

    def _say_rest(self) -> str:
        shown = min(ROWS_SHOWN, len(self))
        return f"[{shown:,} of {len(self):,} rows x {len(self.columns)} columns]"

    def mask(
        self,
        *,
        k: int | None = None,
        share: float | None = None,
        by: str | None = None,
        largest: bool = True,
    ) -> Bool[torch.Tensor, "*shape"]:
        """A boolean mask of the parameter's shape: true at the weights with the largest (or smallest) numbers.

        Args:
            k: how many weights to choose.
            share: which part of the table's rows to choose, from 0 to 1, instead of a number.
            by: the column to choose by; default: `utility_test`, or `utility_train` where there is no test split.
            largest: whether to choose the largest numbers of that column, or the smallest.

        Returns:
            A tensor on the CPU. It is false at weights that have no row, and at those that were not run. Rows with
            equal numbers are chosen in their order.

        Raises:
            SpecError: neither or both of `k` and `share` are given, or there are not so many rows that were run.

        In torch a mask of 1 keeps a weight and a mask of 0 prunes it (`torch.nn.utils.prune.custom_from_mask`). So
        `mask(share=0.1)` keeps the tenth that helps the most, and `~mask(share=0.9, largest=False)` prunes the nine
        tenths that help the least. These differ where the table has not all weights: the second keeps the others.

        Example:
            >>> import torch, ablation
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            >>> data = torch.randn(50, 4), torch.randint(3, (50,))
            >>> table = ablation.ablate(model, "0", {"test": data}, progress=False)
            >>> least = table.mask(k=5, by="utility_test", largest=False)
            >>> least.shape, int(least.sum())
            (torch.Size([8, 4]), 5)
        """
        name = by or next(f"utility_{split}" for split in reversed(SPLITS) if f"utility_{split}" in self.columns)
        numbers = np.asarray(self[name], dtype=np.float64)
        run = np.flatnonzero(~np.isnan(numbers))
        chosen = run[np.argsort(-numbers[run] if largest else numbers[run], kind="stable")]
        mask = torch.zeros(tuple(self.about["plan"]["shape"]), dtype=torch.bool)
        rows = chosen[: _count_chosen(k, share, len(self), len(run))]
        mask.view(-1)[torch.from_numpy(self.columns["index"][rows])] = True
        return mask

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

    def summary(self) -> Summary:
        """Baselines, correlations, counts and the proof's errors: a dict, plain JSON, that prints as the command line.

        It is computed once, which takes some seconds for a whole layer of millions of weights.
        """
        return copy.deepcopy(self._summary)

    @cached_property
    def _summary(self) -> Summary:
        return Summary(make_summary(self))

    def plot(self) -> Figure:
        """Importance against magnitude, and train against test."""
        return make_figure(self)


def _writer(text: bytes) -> Callable[[BinaryIO], None]:
    def write(stream: BinaryIO) -> None:
        stream.write(text)

    return write


@in_turn
@torch.inference_mode(False)  # tensors made under it keep no version, which caches go by
@unexpected_told()
@run_plainly()
def ablate(
    model: torch.nn.Module,
    layer: str,
    splits: Mapping[str, Any],
    sites: int | Literal["all"] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | torch.Tensor = "all",
    *,
    seed: int = 0,
    value: Literal["zero", "flip_sign"] | float | Mapping[str, float] = "zero",
    device: str | int | torch.device | None = None,
    precision: Precision = "mixed",
    engine: Engine = "auto",
    batch_size: int | None = None,
    verify: int = 8,
    top1: bool = False,
    criteria: str | Sequence[str] = (),
    loss: Literal["cross_entropy"] | Mapping[str, Any] | torch.nn.CrossEntropyLoss | Loss = "cross_entropy",
    progress: bool = True,
) -> Table:
    """The exact change of the mean loss when single weights of a layer are replaced, one at a time.

    For weight w, replacement r and a split of N examples with cross-entropy l in nats, in eval mode:

        utility(w) = (1/N) sum_n [ l_n(w := r) - l_n(w) ]        positive: the weight helps

    The network before the layer runs once per batch; from the layer on, finite differences of the loss are computed
    per example and summed in float64. The model is left as it was found. One thread of a process at a time is inside
    `ablate`; calls from other threads wait for it.

    Args:
        model: any module, in any mode, whose output is logits (examples, classes) or has `.logits`. What
            `torch.compile` or DataParallel have wrapped is measured as it is written.
        layer: a module's name (its `weight`) or a parameter's full name, with or without what wrappers put into it
            (`_orig_mod.`, `module.`).
        splits: `train` and/or `test`, each a map-style Dataset, a DataLoader, or a pair (inputs, labels) of tensors or
            arrays. Inputs of whole numbers stay whole; real ones get the model's precision. Labels are class numbers of
            the model; a Dataset that lists other `classes` is a warning in the summary.
        sites: how many to draw uniformly without replacement from `seed`; `"all"`; flat indices into the parameter;
            coordinates, as a list of tuples, an array (n, axes) or what `np.nonzero` gives; or a boolean mask of the
            parameter's shape, which is taken in the order of the flat indices.
        seed: of the draw, where `sites` is a count.
        value: what replaces each weight w: `"zero"`; `"flip_sign"` (-w); a number, which is the same for all; or
            `{"scale": s}` (s w). A site whose replacement is not a finite number is not run: its utility and stderr are
            NaN, and `touched` counts all examples.
        device: where to compute; default: where the model is.
        precision: `"mixed"`, `"float32"` or `"float64"`.
        engine: `"auto"`, `"direct"`, `"response"`, `"finite"`, `"rerun"` or `"reference"`.
        batch_size: examples per batch; default: by the plan.
        verify: how many sites to prove against the reference; 0: no proof.
        top1: also count `broken` and `fixed` examples.
        criteria: one or more names of cheap criteria to compute beside, a column of each split: `"taylor1"`, the
            utility that the gradient g of the mean loss predicts to first order, g (r - w). A prediction is not exact.
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
    own = take_model(model)
    read = {name: _make_split(name, splits[name]) for name in _check_names(splits)}
    of_loss, loss_object = read_loss(loss)
    spec = make_spec(
        {
            "model": {"name": "in memory"},
            "layer": (name := find_name(model, own, layer)),
            "data": {"name": "in memory", **dict.fromkeys(read, "all")},
            "sites": _ask_sites(sites, _whole(seed), _shape_of(own, name)),
            "value": _ask_value(value),
            "precision": precision,
            "verify": _whole(verify),
            "top1": top1,
            "criteria": _listed(criteria),
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
    work = _on_device(own, device)
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


def _count_chosen(k: Any, share: Any, n_rows: int, n_run: int) -> int:
    """How many rows `k` or `share` asks for."""
    if (k is None) == (share is None):
        given = {"k": k, "share": share}
        raise SpecError("mask", given, "k, a number of weights, or share, a part of the rows; one of the two")
    if share is not None:
        if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 <= float(share) <= 1:
            raise SpecError("mask.share", share, "a number from 0 to 1")
        k = round(float(share) * n_rows)
    count = _whole(k)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= n_run:
        allowed = f"0 to {n_run}, the rows of the table" + (" that were run" if n_run < n_rows else "")
        raise SpecError("mask.k" if share is None else "mask.share", k if share is None else share, allowed)
    return count


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


def _listed(criteria: Any) -> Any:
    """A single name as a list of one, and none as an empty list."""
    if criteria is None:
        return ()
    return (criteria,) if isinstance(criteria, str) else tuple(criteria) if isinstance(criteria, Iterable) else criteria


def _shape_of(model: torch.nn.Module, layer: Any) -> tuple[int, ...] | None:
    """The shape of a layer's parameter; None where there is no such layer, which is refused later."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = parameters.get(f"{layer}.weight", parameters.get(layer)) if isinstance(layer, str) else None
    return None if found is None else tuple(found.shape)


def _ask_sites(sites: Any, seed: Any, shape: tuple[int, ...] | None) -> Any:
    """The form of the job spec for what was given: a count, a word, flat indices, coordinates or a mask.

    `shape` is that of the layer's parameter, where the layer is known.
    """
    if isinstance(_whole(sites), int):
        return {"count": _whole(sites), "seed": seed}
    if isinstance(sites, str):
        return sites
    listed = _as_array(sites)
    if listed is not None and shape is not None and listed.dtype == bool:
        return {"indices": _from_mask(listed, shape)}
    if listed is not None and np.issubdtype(listed.dtype, np.integer) and listed.ndim == 1:
        return {"indices": listed.tolist()}
    if listed is not None and np.issubdtype(listed.dtype, np.integer) and listed.ndim == 2 and shape is not None:
        return {"indices": _from_coordinates(listed, shape)}
    if listed is None or not listed.ndim:
        raise SpecError("sites", sites, _SITES)
    raise SpecError("sites", f"{type(sites).__name__} of type {listed.dtype} and shape {listed.shape}", _SITES)


_SITES = (
    "a count, 'all', distinct flat indices (whole numbers), a list of coordinates, or a boolean mask of the "
    "parameter's shape"
)


def _as_array(sites: Any) -> np.ndarray | None:
    """The sites as an array: what `np.nonzero` gives with one row per site; None where they are no array."""
    try:
        if isinstance(sites, tuple) and sites and all(isinstance(axis, np.ndarray | torch.Tensor) for axis in sites):
            return np.stack([_on_host(axis) for axis in sites], axis=1)
        return np.asarray(_on_host(sites))
    except (TypeError, ValueError, RuntimeError):  # rows of different lengths; a tensor without numbers
        return None


def _on_host(sites: Any) -> Any:
    return sites.detach().cpu().numpy() if isinstance(sites, torch.Tensor) else sites


def _from_mask(mask: np.ndarray, shape: tuple[int, ...]) -> list[int]:
    """The flat indices at which a mask is true."""
    if mask.shape != shape:
        raise SpecError("sites", f"a boolean mask of shape {mask.shape}", f"one of the parameter's shape {shape}")
    if not mask.any():
        raise SpecError("sites", "a boolean mask without a true entry", "one that is true for at least one weight")
    indices: list[int] = np.flatnonzero(mask).tolist()
    return indices


def _from_coordinates(coordinates: np.ndarray, shape: tuple[int, ...]) -> list[int]:
    """The flat indices of weights at these coordinates, one row each."""
    allowed = f"coordinates in a parameter of shape {shape}: {len(shape)} whole numbers from 0 on for each weight"
    if not len(coordinates) or coordinates.shape[1] != len(shape):
        raise SpecError("sites", f"coordinates of shape {coordinates.shape}", allowed)
    outside = ((coordinates < 0) | (coordinates >= np.asarray(shape))).any(axis=1)
    if outside.any():
        raise SpecError("sites", coordinates[outside][0].tolist(), allowed)
    indices = np.ravel_multi_index(tuple(coordinates.astype(np.int64).T), shape)
    flat: list[int] = indices.tolist()
    if len(set(flat)) != len(flat):
        twice = next(place for place, index in enumerate(flat) if index in flat[:place])
        raise SpecError("sites", coordinates[twice].tolist(), f"distinct {allowed}", "It is given twice.")
    return flat


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
    if device is None:
        return model
    where = find_device(device)
    if where == next(model.parameters()).device:
        return model
    with copying_told():
        return converted(model, lambda own: own.to(where), is_copied=True)


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
            logits = look_at(model, inputs)
    finally:
        unchanged.check(writes)
    baseline.check_logits(logits, len(labels))
    with failures_told(model, lambda: f"the first {len(inputs)} examples", inputs, everything=True):
        facts = describe_model("in memory", model, inputs, layer=spec.layer)
    if spec.precision == "float64":  # it will be copied
        baseline.check_reads(model, find_layer(facts, spec.layer).parameter, inputs)
    return facts

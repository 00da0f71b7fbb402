"""The result table: one row per site, with utility and magnitude, and facts about the whole job.

In: sites and merged partials. Out: a frozen `ImportanceTable`. Statistics, plots and export read it and nothing else.
Torch-free: the API streams tables.

A whole layer has millions of rows. Only the numbers that can't be computed are stored (`Rows`: 24 bytes per row with
one split, instead of 64); code that reads a whole table does so a slice at a time (`cut_rows`).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from ablation.criteria import Criterion, find_criteria
from ablation.partial import PartialSums

ABOUT = "about"  # its name where it is written: in a summary, and in the metadata of a Parquet file

COORDINATES = {  # by the rank of the parameter tensor
    1: ("out",),
    2: ("out", "in"),
    3: ("out", "in", "k"),
    4: ("out", "in", "kh", "kw"),
    5: ("out", "in", "kd", "kh", "kw"),
}


Columns = Mapping[str, np.ndarray]


class Rows(Mapping[str, np.ndarray]):
    """The columns of some rows, most of which are computed at each access.

    `kept` holds the weight, in float32 where that loses nothing, and the measured columns, counts in int32. Where the
    rows are not consecutive weights (`first` is the flat index of the first of them), `kept` has their `index`, too.
    Columns are returned as float64 or int64.
    """

    def __init__(self, kept: Columns, shape: tuple[int, ...], first: int | None) -> None:
        self.kept, self.shape, self.first = kept, shape, first
        self.coordinates = coordinate_names(shape)
        measured = [name for name in kept if name not in ("index", "weight")]
        self.names = ("index", *self.coordinates, "weight", "magnitude", *measured)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.kept["weight"])

    def __getitem__(self, name: str) -> np.ndarray:
        if name == "index":
            if self.first is None:
                return _widen(self.kept["index"])
            return np.arange(self.first, self.first + self.n_rows, dtype=np.int64)
        if name in self.coordinates:
            return np.unravel_index(self["index"], self.shape)[self.coordinates.index(name)]
        return np.abs(_widen(self.kept["weight"])) if name == "magnitude" else _widen(self.kept[name])

    def cut(self, rows: slice) -> "Rows":
        """Columns of a slice of these rows."""
        first = self.first if self.first is None else self.first + rows.indices(self.n_rows)[0]
        return Rows({name: values[rows] for name, values in self.kept.items()}, self.shape, first)


def _widen(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64, copy=False)


def coordinate_names(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the coordinates in a tensor of this shape; a scalar parameter has none."""
    return COORDINATES.get(len(shape), tuple(f"axis{axis}" for axis in range(len(shape))))


def make_rows(columns: Columns, shape: tuple[int, ...]) -> Rows:
    """The rows whose columns, all of them, were read from a file; `shape` is of the parameter tensor.

    Raises:
        ValueError: these are not the columns of rows of such a tensor, in their order.
    """
    index = columns["index"]
    is_whole = len(index) == math.prod(shape) and bool((index == np.arange(len(index))).all())
    kept = {} if is_whole else {"index": index}
    kept["weight"] = _narrow(columns["weight"])
    followed = {"index", "weight", "magnitude", *coordinate_names(shape)}
    for name in [name for name in columns if name not in followed]:
        kept[name] = columns[name] if columns[name].dtype.kind == "f" else columns[name].astype(np.int32)
    rows = Rows(kept, shape, 0 if is_whole else None)
    if [*rows] != [*columns]:
        raise ValueError(f"a parameter of shape {shape} has the columns {', '.join(rows)}")
    return rows


def count_rows(columns: Columns) -> int:
    """Number of rows of these columns."""
    return columns.n_rows if isinstance(columns, Rows) else len(next(iter(columns.values())))


def cut_rows(columns: Columns, rows: slice) -> dict[str, np.ndarray]:
    """All columns of a slice of rows, as arrays."""
    if isinstance(columns, Rows):
        return dict(columns.cut(rows))
    return {name: values[rows] for name, values in columns.items()}


@dataclass(frozen=True)
class ImportanceTable:
    """The columns in the order of docs/01-quantity.md, and `about`, which describes the job and its results as a whole.

    `about` is plain JSON: `spec`, `plan` (without its shards), `inputs` (in words: `weights`, `preprocessing`,
    `classes` {split: how they were matched}, `notes` on files, `warnings`), `baseline` {split: {n_examples, loss,
    accuracy, series_bound}}, `proof` (or None where no site was to be proved), `n_not_finite` (sites whose replacement
    was not finite), `seconds`, `versions`; and what it takes to do it again, as `job.describe_job` has it: `model`,
    `data`, `device`, `date`, `command`.
    """

    columns: Columns
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return count_rows(self.columns)


def encode_json(value: Any) -> str:
    """Encode as JSON, with null for NaN and infinity, which JSON doesn't have."""
    return json.dumps(as_plain(value), allow_nan=False)


def as_plain(value: Any) -> Any:
    """Replace every number that is NaN or infinite by None, and tuples by lists, as they come back from JSON."""
    if isinstance(value, Mapping):
        return {name: as_plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_table(
    *,
    indices: Int64[np.ndarray, " sites"] | None,
    shape: tuple[int, ...],
    weights: Float[np.ndarray, " sites"],
    replacements: Float64[np.ndarray, " sites"] | None,
    splits: Mapping[str, PartialSums],
    per_class: Mapping[str, int | None],
    top1: bool,
    criteria: Iterable[str] = (),
    not_finite: Bool[np.ndarray, " sites"] | None,
    about: Mapping[str, Any],
) -> ImportanceTable:
    """Make the table: one row per site, with its place, weight, and the effect of its ablation on each split's loss.

    For N examples with loss deltas d_n (ablated minus intact, in nats), S = sum d_n and S2 = sum d_n^2:

        utility = S / N                                    positive: the weight helps
        stderr  = sqrt(max(0, S2 - S^2/N) / (N (N-1)))     see `standard_error` for `per_class`

    Args:
        indices: flat indices into the parameter tensor, in the order of the rows; None: every weight in its order.
        shape: of the parameter tensor.
        weights: intact values.
        replacements: what they were replaced by; None where no criteria are asked for, which alone need them.
        splits: merged and joined sums, in column order.
        per_class: length of the one-class blocks that a split was drawn in, None where it was not.
        top1: whether to add the columns `broken_*` and `fixed_*`.
        criteria: names of the criteria whose columns to add, which come last, split by split.
        not_finite: sites whose replacement is not a finite number, so that they were not run: their utility, stderr
            and criteria are NaN, all examples count as touched, and none as broken or fixed. None: there are none.
        about: stored in the table as it is.

    Numerics: float64 throughout; the sums are taken as they are, nothing is summed here.
    """
    kept = {"weight": _narrow(weights)} if indices is None else {"index": indices, "weight": _narrow(weights)}
    counts: dict[str, np.ndarray] = {}
    for split, sums in splits.items():
        kept |= _measured(split, sums, per_class[split], not_finite)
        if top1:
            assert sums.broken is not None
            assert sums.fixed is not None
            counts |= {f"broken_{split}": sums.broken, f"fixed_{split}": sums.fixed}
    asked, of_criteria = find_criteria(criteria), {}
    for split, sums in splits.items():
        for criterion in asked:
            assert replacements is not None
            column = _predict(criterion, weights.astype(np.float64, copy=False), replacements, sums, not_finite)
            of_criteria[f"{criterion.name}_{split}"] = column
    first = 0 if indices is None else None
    return ImportanceTable(columns=Rows(kept | counts | of_criteria, shape, first), about=about)


def _predict(
    criterion: Criterion,
    weights: Float64[np.ndarray, " sites"],
    replacements: Float64[np.ndarray, " sites"],
    sums: PartialSums,
    not_finite: Bool[np.ndarray, " sites"] | None,
) -> Float64[np.ndarray, " sites"]:
    """One column of a criterion; NaN for sites that were not run, and where the criterion is no finite number."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        column = criterion.column(weights, replacements, sums.statistics, sums.n_examples)
    known = np.isfinite(column)
    if not_finite is not None:
        known &= ~not_finite
    return np.where(known, column + 0.0, np.nan)  # -0.0 becomes 0.0


def _narrow(weights: Float[np.ndarray, " sites"]) -> Float[np.ndarray, " sites"]:
    """Convert to float32 if that changes no number; else return the numbers as they are."""
    with np.errstate(over="ignore"):
        narrow = weights.astype(np.float32)
    return narrow if np.array_equal(narrow, weights, equal_nan=True) else weights.astype(np.float64)


def _measured(
    split: str, sums: PartialSums, per_class: int | None, not_finite: Bool[np.ndarray, " sites"] | None
) -> dict[str, np.ndarray]:
    """The columns of one split."""
    utility, stderr, touched = sums.delta / sums.n_examples, standard_error(sums, per_class), sums.touched
    if not_finite is not None:
        utility, stderr = np.where(not_finite, np.nan, utility), np.where(not_finite, np.nan, stderr)
        touched = np.where(not_finite, sums.n_examples, touched)
    return {f"utility_{split}": utility, f"stderr_{split}": stderr, f"touched_{split}": touched}


def standard_error(sums: PartialSums, per_class: int | None) -> Float64[np.ndarray, " sites"]:
    """Standard error of the utility as an estimate of the mean over the population that the examples were drawn from.

    For N examples drawn at random, the sample variance s^2 = (S2 - S^2/N) / (N-1) gives

        stderr = sqrt(s^2 / N) = sqrt((S2 - S^2/N) / (N (N-1)))          NaN at N = 1.

    `per_class` splits hold the same number k of every class: a stratified sample with proportional allocation
    (W. G. Cochran, Sampling Techniques, 3rd ed. 1977, chapter 5). The strata are the classes h, with n_h = k of the
    N examples and weight W_h = n_h / N. The mean is sum_h W_h mean_h, whose terms are independent, so

        var = sum_h W_h^2 s_h^2 / n_h                      with s_h^2 = (S2_h - S_h^2/n_h) / (n_h - 1)
            = (1/N^2) sum_h n_h s_h^2
            = (1/N^2) sum_h n_h / (n_h - 1) (S2_h - S_h^2/n_h)  =  within / N^2

        stderr = sqrt(within) / N                                         NaN at k = 1.

    Differences between classes are not sampling noise here, so this is usually smaller than the unstratified formula.
    There is no finite population correction: a data set is itself a sample of what the network will meet, so a split
    that is used as a whole still has a standard error.

    Where squares of deltas are too large for float64 (deltas beyond 1e154), it is NaN: not known.

    Numerics: S2 - S^2/N cancels where all deltas are nearly equal; the result is then rounding, at most about 1e-8 of
    the utility (the root of float64's 1e-16), and never negative. It is not set to 0: the true value is as small.
    """
    n = sums.n_examples
    if per_class is not None:
        assert sums.within is not None
        return np.sqrt(sums.within) / n if per_class > 1 else np.full_like(sums.delta, np.nan)
    if n == 1:
        return np.full_like(sums.delta, np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.maximum(0.0, sums.delta_squared - sums.delta * sums.delta / n) / (n * (n - 1)))

"""The final rows: one per site, importance beside magnitude; and what is known of the whole job.

In: sites and merged partials. Out: a frozen `ImportanceTable`. Statistics, plots and export read it and nothing else.
Torch-free: the API streams tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from ablation.partial import PartialSums

COORDINATES = {  # by the rank of the parameter tensor
    1: ("out",),
    2: ("out", "in"),
    3: ("out", "in", "k"),
    4: ("out", "in", "kh", "kw"),
    5: ("out", "in", "kd", "kh", "kw"),
}


@dataclass(frozen=True)
class ImportanceTable:
    """Columns in the order of DESIGN.md section 4, and `about`: what the job was and what it found as a whole.

    `about` is plain JSON: `spec`, `plan` (without its shards), `baseline` {split: {n_examples, loss, accuracy}},
    `proof` (or None where verify = 0), `n_not_finite` (sites whose replacement was not finite), `seconds`, `versions`.
    """

    columns: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.columns["index"])


def make_table(
    *,
    indices: Int64[np.ndarray, " sites"],
    shape: tuple[int, ...],
    weights: Float64[np.ndarray, " sites"],
    splits: Mapping[str, PartialSums],
    per_class: Mapping[str, int | None],
    top1: bool,
    not_finite: Bool[np.ndarray, " sites"] | None,
    about: Mapping[str, Any],
) -> ImportanceTable:
    """One row per site: where it is, how big it is, and what ablating it does to each split's loss.

    For N examples with loss deltas d_n (ablated minus intact, in nats), S = sum d_n and S2 = sum d_n^2:

        utility = S / N                                    positive: the weight helps
        stderr  = sqrt(max(0, S2 - S^2/N) / (N (N-1)))     of that mean; see `standard_error` for `per_class` splits

    Args:
        indices: flat indices into the parameter tensor, in the order of the rows.
        shape: of the parameter tensor.
        weights: intact values.
        splits: merged and joined sums, in column order.
        per_class: length of the one-class blocks that a split was drawn in, None where it was not.
        top1: whether the columns `broken_*` and `fixed_*` were asked for.
        not_finite: sites whose replacement is not a finite number, so that they were not run: their utility and
            stderr are NaN and all examples count as touched.
        about: goes into the table as it is.

    Numerics: float64 throughout; the sums are taken as they are, nothing is summed here.
    """
    columns = {"index": indices, **_coordinates(indices, shape), "weight": weights, "magnitude": np.abs(weights)}
    counts: dict[str, np.ndarray] = {}
    for split, sums in splits.items():
        columns |= _measured(split, sums, per_class[split], not_finite)
        counts |= {f"broken_{split}": sums.broken, f"fixed_{split}": sums.fixed}
    return ImportanceTable(columns=columns | counts if top1 else columns, about=about)


def _coordinates(indices: Int64[np.ndarray, " sites"], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The flat indices as places in the tensor; a scalar parameter has none."""
    names = COORDINATES.get(len(shape), tuple(f"axis{axis}" for axis in range(len(shape))))
    return dict(zip(names, np.unravel_index(indices, shape or (1,)), strict=False))


def _measured(
    split: str, sums: PartialSums, per_class: int | None, not_finite: Bool[np.ndarray, " sites"] | None
) -> dict[str, np.ndarray]:
    """One split's columns."""
    utility, stderr, touched = sums.delta / sums.n_examples, standard_error(sums, per_class), sums.touched
    if not_finite is not None:
        utility, stderr = np.where(not_finite, np.nan, utility), np.where(not_finite, np.nan, stderr)
        touched = np.where(not_finite, sums.n_examples, touched)
    return {f"utility_{split}": utility, f"stderr_{split}": stderr, f"touched_{split}": touched}


def standard_error(sums: PartialSums, per_class: int | None) -> Float64[np.ndarray, " sites"]:
    """The standard error of the utility as an estimate of the mean over the population the examples were drawn from.

    For N examples drawn at random, the sample variance s^2 = (S2 - S^2/N) / (N-1) gives

        stderr = sqrt(s^2 / N) = sqrt((S2 - S^2/N) / (N (N-1)))          NaN at N = 1.

    `per_class` splits hold the same number k of every class: a stratified sample with proportional allocation
    (W. G. Cochran, Sampling Techniques, 3rd ed. 1977, chapter 5). The strata are the classes h, with n_h = k of the
    N examples and weight W_h = n_h / N. The mean is sum_h W_h mean_h, whose terms are independent, so

        var = sum_h W_h^2 s_h^2 / n_h                      with s_h^2 = (S2_h - S_h^2/n_h) / (n_h - 1)
            = (1/N^2) sum_h n_h s_h^2
            = (1/N^2) sum_h n_h / (n_h - 1) (S2_h - S_h^2/n_h)  =  within / N^2

        stderr = sqrt(within) / N                                         NaN at k = 1.

    What classes differ by is no noise here, so this is usually smaller than the unstratified formula.
    No finite population correction: a data set is itself a sample of what the network will meet, so a split that was
    used whole still has a standard error.

    Numerics: S2 - S^2/N cancels where all deltas are nearly equal; what is left is then rounding, at most about
    1e-8 of the utility (the root of float64's 1e-16), and never negative. It is not zeroed: the true value is as small.
    """
    n = sums.n_examples
    if per_class is not None:
        return np.sqrt(sums.within) / n if per_class > 1 else np.full_like(sums.within, np.nan)
    if n == 1:
        return np.full_like(sums.delta, np.nan)
    return np.sqrt(np.maximum(0.0, sums.delta_squared - sums.delta * sums.delta / n) / (n * (n - 1)))

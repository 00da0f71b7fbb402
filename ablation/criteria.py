"""Which cheap criteria can stand beside the truth? The registry: one column a split, from sums that shards bring along.

A criterion predicts a weight's utility, or ranks weights, from less than what ablating them takes. It registers a name,
the statistics that it needs and a formula. Its column then reaches the table, CSV, Parquet, the store, the API and the
summary, and its name every door, without a change anywhere else; docs/09-add-a-criterion.md says how.

In: nothing. Out: `CRITERIA` and `STATISTICS`, in the order of their columns. Torch-free: the API knows the names too.
Not here: how a statistic is computed (`engine/gradients.py`), how a column is made of its sums (`table.py`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

# A column from (weights, replacements, statistics by name, number of examples); arrays are (sites), in float64.
Formula = Callable[
    [
        Float64[np.ndarray, " sites"],
        Float64[np.ndarray, " sites"],
        Mapping[str, Float64[np.ndarray, " sites"]],
        int,
    ],
    Float64[np.ndarray, " sites"],
]

# What criteria are computed from, with what it is. Each is one float64 sum over examples at every site: so the partials
# of a split's shards merge by adding, and those of other sites are joined, as every other sum is.
STATISTICS = {"gradient": "sum over examples of dl_n/dw, the derivative of each example's loss by the weight, in nats"}


@dataclass(frozen=True)
class Criterion:
    """One cheap criterion: its name, which its columns begin with, and how they are computed.

    Args:
        name: lower-case letters and digits; the columns are `NAME_train` and `NAME_test`.
        description: what a user reads of it.
        needs: names of `STATISTICS`; empty where weights and replacements are enough.
        column: the formula, (sites); it must not change its arguments. What it gives that is no finite number becomes
            NaN, an empty field.
    """

    name: str
    description: str
    needs: tuple[str, ...]
    column: Formula


def predict_taylor1(
    weights: Float64[np.ndarray, " sites"],
    replacements: Float64[np.ndarray, " sites"],
    statistics: Mapping[str, Float64[np.ndarray, " sites"]],
    n_examples: int,
) -> Float64[np.ndarray, " sites"]:
    """The utility that a Taylor series of the loss around the weight predicts, to first order, in nats.

    For weight w, replacement r and N examples with losses l_n:

        taylor1 = g (r - w)    with g = (1/N) sum_n dl_n/dw;    -g w for r = 0;    positive: the weight helps

    This is the signed first-order term of the loss change that Molchanov et al., arXiv 1611.06440 (of feature maps, in
    absolute value) and LeCun, Denker and Solla, Optimal Brain Damage, 1990 (who drop it, at a minimum) begin with.
    It is a prediction of the utility, neither exact nor an estimate with an error bar: how far it is off depends on how
    the loss curves between w and r.

    Numerics: float64; g is as accurate as the sum of gradients.
    """
    predicted = replacements - weights
    predicted *= statistics["gradient"]
    predicted /= n_examples
    return predicted


TAYLOR1 = Criterion("taylor1", "predicted utility g (r - w), to first order", ("gradient",), predict_taylor1)

# Every criterion that a job can ask for, by its name, in the order of their columns.
CRITERIA: dict[str, Criterion] = {criterion.name: criterion for criterion in (TAYLOR1,)}


def find_criteria(names: Iterable[str]) -> list[Criterion]:
    """The criteria of these names, in the order of their columns, whatever order they were asked for in."""
    asked = {*names}
    return [criterion for name, criterion in CRITERIA.items() if name in asked]


def find_statistics(names: Iterable[str]) -> list[str]:
    """Which statistics the criteria of these names need, each once, in the order of `STATISTICS`."""
    needed = {need for criterion in find_criteria(names) for need in criterion.needs}
    return [statistic for statistic in STATISTICS if statistic in needed]

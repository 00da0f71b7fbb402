"""Records that the compiled loops take: a batch, the network behind the target, one unit's part of it, and sums.

All are named tuples, which Numba takes as arguments. None of them copies an array.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ablation.engine.compiled import kernel
from ablation.engine.responses.loops.activations import Function


class Batch(NamedTuple):
    """The intact network on one batch: arrays on the host, or tensors on a device.

    Examples are the first axis of every field, but for `y`, where units are the first and examples the second.
    """

    x: Any  # (examples, inputs) or (examples, inputs, height, width), float32: what the target takes
    y: Any  # (units, examples) or (channels, examples, positions), float64: the target's output, before the function
    q: Any  # (examples, classes), float32: softmax, 0 for the label
    z: Any  # (examples, classes), float64: logits
    labels: Any  # (examples), int64
    second: Any = None  # (examples, units of the second Linear), float64: its output, where two Linears follow

    def of_examples(self, chosen: Any) -> "Batch":
        """The record of some of the examples, by their positions."""
        return self._map(lambda values: values[chosen], lambda y: y[:, chosen])

    def joined(self, others: Sequence["Batch"]) -> "Batch":
        """The record of these examples followed by those of `others`."""

        def join(name: str, axis: int) -> Any:
            parts = [getattr(batch, name) for batch in (self, *others)]
            if parts[0] is None:
                return None
            return torch.cat(parts, axis) if isinstance(parts[0], Tensor) else np.concatenate(parts, axis)

        return Batch(**{name: join(name, int(name == "y")) for name in self._fields})

    def _map(self, by_example: Any, by_unit: Any) -> "Batch":
        made: dict[str, Any] = {}
        for name, values in self._asdict().items():
            if values is not None:
                picked = (by_unit if name == "y" else by_example)(values)
                made[name] = picked.contiguous() if isinstance(picked, Tensor) else np.ascontiguousarray(picked)
        return Batch(**made)


class Follows(NamedTuple):
    """The network behind the target: a function and the last Linear, or the loss where each unit is a logit."""

    columns: np.ndarray  # (units, classes), float32: the last Linear's weight, transposed; (1, 1) where `is_logit`
    is_logit: bool
    function: Function


class Column(NamedTuple):
    """The network behind one unit: the function and the unit's column of the last Linear."""

    values: np.ndarray  # (classes), float32
    range: float  # max - min of the values, float32: no |v_c - v_label| is larger; 1 where the unit is a logit
    unit: int
    is_logit: bool
    function: Function


class Sums(NamedTuple):
    """Sums over examples that loops add to, one for each weight: (units, inputs), or one tile of them."""

    delta: np.ndarray  # of the loss deltas, ablated minus intact, in nats
    delta_squared: np.ndarray
    touched: np.ndarray  # int32: the examples on which any logit moves
    class_delta: np.ndarray  # of the class that has begun, as `delta`; empty where classes don't count
    class_delta_squared: np.ndarray
    within: np.ndarray  # n/(n-1) times the squared deviations from their class's mean, of the classes that are complete
    bounds: np.ndarray  # (units): what the series have left out at most, in nats


@kernel
def column_of(follows, unit):
    """The network behind one unit, and whether any logit depends on the unit."""
    values = follows.columns[0 if follows.is_logit else unit]
    width = np.float32(1) if follows.is_logit else values.max() - values.min()
    column = Column(values, width, unit, follows.is_logit, follows.function)
    return column, follows.is_logit or values.any()


# --- float32 sums over a few examples, float64 sums over all ----------------------------------------------------------


@kernel
def flush(narrow, wide):
    """Add float32 sums to float64 sums, and set them to 0."""
    for j in range(narrow.shape[0]):
        wide[j] += np.float64(narrow[j])
        narrow[j] = 0


@kernel
def add_sums(sums, total, squared):
    """Add the sums of F, in the first half of `sums`, and of F^2, in the second, for one tile."""
    half = sums.shape[0] // 2
    for j in range(total.shape[0]):
        total[j] += sums[j]
        squared[j] += sums[half + j]


@kernel
def close_class(total, squared, within, n):
    """Add n/(n-1) (S2 - S^2/n) of a class that is complete, and begin the next."""
    for j in range(total.shape[0]):
        if n > 1:
            within[j] += n / (n - 1) * max(0.0, squared[j] - total[j] * total[j] / n)
        total[j] = squared[j] = 0.0


@kernel
def add_run(wide, own, runs, k):
    """Add the sums of run number k to a tile's, and close its class where that ends with the run."""
    add_sums(wide, own.delta, own.delta_squared)
    if runs.per_class:
        add_sums(wide, own.class_delta, own.class_delta_squared)
        if runs.closes[k]:
            close_class(own.class_delta, own.class_delta_squared, own.within, runs.per_class)

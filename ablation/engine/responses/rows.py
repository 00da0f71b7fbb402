"""Whole rows of a classifier head: all weights of a unit at once, by its response functions.

All weights of unit i share the examples' functions F_{n,i}(d) of one number (docs/03-engine.md): a few moments per
(example, unit) give a polynomial, and each (weight, example) pair costs a multiply, a max and that polynomial. The
loops (`loops/rows.py`) form the sums over examples, so no delta of a single pair is held.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ablation.engine.deltas import Deltas, Responses, Runs, make_runs
from ablation.engine.interface import Setup
from ablation.engine.loss import Intact, make_intact
from ablation.engine.responses.arrays import NO_SUMS, Loops, look_up_inputs, open_loops
from ablation.engine.responses.by_unit import ByUnit, sort_by_unit
from ablation.engine.responses.head import OpenHead
from ablation.engine.responses.loops.records import Batch, Sums
from ablation.engine.responses.loops.rows import Inputs
from ablation.engine.responses.way import Head
from ablation.engine.threads import run_ranges
from ablation.errors import ModelError
from ablation.sites import EveryWeight

FEW_SITES = 64  # such as those of a job's proof, whose deltas are wanted one by one
BLOCK_WEIGHTS = 1 << 16  # whose sums are formed together: they stay in the cache


@dataclass(frozen=True)
class RowResponses:
    """The response functions of a head on one batch, unit by unit."""

    loops: Loops
    batch: Batch
    by_unit: ByUnit

    @cached_property
    def inputs(self) -> Inputs:
        """Properties of the batch's inputs that the loops look up."""
        return look_up_inputs(self.batch.x)

    @property
    def n_units(self) -> int:
        """Number of units whose weights the sites are."""
        return len(self.by_unit.units)

    @property
    def rows(self) -> slice:
        """The rows of the table: all of the shard's."""
        return slice(0, len(self.by_unit.sites))

    def add(self, sums: dict[str, np.ndarray], runs: Runs, bounds: np.ndarray) -> None:
        """Add the sums over the batch to `sums`, each (sites), and what the series left out to `bounds` (units)."""

        def run(first: int, last: int) -> None:
            at_once = max(1, BLOCK_WEIGHTS // self.by_unit.n_inputs)
            for begin in range(first, last, at_once):
                self._add_block(slice(begin, min(begin + at_once, last)), sums, runs, bounds)

        run_ranges(run, self.n_units)

    def _add_block(self, block: slice, sums: dict[str, np.ndarray], runs: Runs, bounds: np.ndarray) -> None:
        steps, places = self.by_unit.steps(block)
        rows = self.by_unit.rows(block)

        def taken(name: str, dtype: type = np.float64) -> np.ndarray:
            if name not in sums:
                return np.zeros(steps.shape, dtype)
            if places is None:
                return sums[name][rows].reshape(steps.shape)
            values = np.zeros(steps.shape, sums[name].dtype)
            values[places] = sums[name][rows]
            return values

        of_class = {
            name: taken(name) if runs.per_class else NO_SUMS
            for name in ("class_delta", "class_delta_squared", "within")
        }
        of_all = {name: taken(name) for name in ("delta", "delta_squared")} | {"touched": taken("touched", np.int32)}
        own = Sums(**of_all, **of_class, bounds=bounds[block])
        batch = self.batch._replace(y=self.batch.y[block])
        self.loops.add_rows(self.by_unit.units[block], steps, batch, self.inputs, runs, own)
        if places is not None:
            for name in sums.keys() & set(own._fields):
                sums[name][rows] = getattr(own, name)[places]

    def of_examples(self, chosen: np.ndarray) -> "RowResponses":
        """The response functions of some of the examples."""
        return replace(self, batch=self.batch.of_examples(chosen))

    def joined(self, others: Sequence["RowResponses"]) -> "RowResponses":
        """The response functions of these examples followed by those of `others`."""
        return replace(self, batch=self.batch.joined([other.batch for other in others]))

    def deltas_of(self, rows: Int64[np.ndarray, " rows"], intact: Intact) -> Deltas:
        """The deltas of some rows of the table, example by example, by the same loops."""
        by_unit = sort_by_unit(self.by_unit.sites.pick(rows), self.by_unit.n_inputs)
        own = np.searchsorted(self.by_unit.units, by_unit.units)
        return replace(self, by_unit=by_unit, batch=self.batch._replace(y=self.batch.y[own])).as_deltas(intact)

    def as_deltas(self, intact: Intact) -> Deltas:
        """The deltas of all sites, example by example: for a few sites."""
        shape = len(self.by_unit.sites), len(self.batch.labels)
        delta, touched = np.zeros(shape), np.zeros(shape, bool)
        for n in range(shape[1]):
            sums: dict[str, np.ndarray] = {"delta": np.zeros(shape[0]), "touched": np.zeros(shape[0], np.int32)}
            self.of_examples(np.array([n])).add(sums, make_runs(1, 0, None), np.zeros(self.n_units))
            delta[:, n], touched[:, n] = sums["delta"], sums["touched"] > 0
        where = intact.labels.device
        moved = torch.from_numpy(touched).to(where)
        return Deltas(slice(0, shape[0]), torch.from_numpy(delta).to(where), moved, intact.correct.expand(shape))


def can_launch() -> bool:
    """Whether Triton is installed, which not every build of torch comes with, and can launch kernels."""
    if find_spec("triton") is None:
        return False
    from ablation.engine.responses.loops import triton_rows

    return triton_rows.can_launch()


class HeadRows:
    """The path `response` of one job with a head: the model, the head, and the sites by unit."""

    def __init__(self, setup: Setup, head: Head) -> None:
        target = setup.model.get_parameter(head.weight)
        self.by_unit = sort_by_unit(setup.sites, target.shape[1])
        self.units = torch.from_numpy(self.by_unit.units).to(target.device)
        self.open_head = OpenHead(setup.model, head, setup.base_dtype, setup.activations, self.units)
        loops = open_loops(self.open_head)
        if loops is None or head.is_bias or setup.precision == "float64" or setup.top1:
            raise ModelError(
                "engine='response' is for the weights of a Linear -> ReLU (or another function that it knows) -> "
                "Linear head, or of the last Linear, in 'mixed' or 'float32', without top1; use engine='direct'."
            )
        self.loops = loops
        self.on_device = self.units.is_cuda and (head.is_relu or not head.functions) and can_launch()

    def keep_prefix(self, inputs: Tensor) -> None:
        """Put what other shards need of this batch into the cache."""
        self.open_head.run(inputs)

    @cached_property
    def device_head(self) -> Any:
        """The head on the device."""
        from ablation.engine.responses.gpu_rows import open_device_head

        return open_device_head(self.open_head, self.by_unit)

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Responses | Deltas]]:
        """One batch: the intact network, and its response functions; of a few sites (a job's proof) their deltas."""
        batch = self.open_head.run(inputs)
        intact = make_intact(batch.logits, labels, torch.float32)
        responses: Any
        if self.on_device:
            responses = self.device_head.of_batch(intact, batch)
        else:
            responses = RowResponses(self.loops, self.loops.of_batch(intact, batch), self.by_unit)
        if isinstance(self.by_unit.sites, EveryWeight) or len(self.by_unit.sites) > FEW_SITES:
            return intact, iter([responses])
        return intact, iter([responses.as_deltas(intact)])

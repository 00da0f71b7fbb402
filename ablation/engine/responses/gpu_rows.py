"""Whole rows of a classifier head on a CUDA device: as `rows.py` on the host, with sums that stay on the device.

For heads whose function is ReLU or none. The kernels are in `triton_rows.py`; this file is read only where there is
such a device, since not every torch comes with Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from ablation.engine.deltas import Deltas, Runs
from ablation.engine.loss import Intact
from ablation.engine.responses.by_unit import ByUnit, sort_by_unit
from ablation.engine.responses.head import HeadBatch, OpenHead
from ablation.engine.responses.loops.records import Batch
from ablation.engine.responses.loops.triton_rows import Columns, add_rows

DELTAS_AT_ONCE = 1 << 25  # (weight of the chosen units, example)
SUMMED = ("delta", "delta_squared", "touched", "class_delta", "class_delta_squared", "within")


@dataclass(frozen=True)
class Steps:
    """The steps r - w of whole rows, 0 for weights that are no sites; and the sites' places in them."""

    values: Float32[Tensor, "units inputs"]
    places: tuple[Tensor, Tensor] | None  # in the table's order; None: the sites are whole rows, one after the other


def make_steps(by_unit: ByUnit, device: torch.device) -> Steps:
    """The steps of some sites."""
    shape = len(by_unit.units), by_unit.n_inputs
    sites = by_unit.sites
    steps = sites.steps_float32().to(device)
    if by_unit.order is None:
        return Steps(steps.view(shape), None)
    indices = sites.indices.to(device)
    units = torch.from_numpy(by_unit.units).to(device)
    places = torch.searchsorted(units, indices // by_unit.n_inputs), indices % by_unit.n_inputs
    return Steps(torch.zeros(shape, device=device).index_put_(places, steps), places)


@dataclass(frozen=True)
class DeviceHead:
    """The part of a head that is the same for every batch."""

    columns: Columns
    steps: Steps
    by_unit: ByUnit

    def of_batch(self, intact: Intact, batch: HeadBatch) -> "DeviceRows":
        """The response functions of one batch; y in `batch` is that of the sites' units."""
        record = Batch(
            x=batch.x.float().contiguous(),
            y=batch.y.double().T.contiguous(),
            q=intact.rest.float().contiguous(),
            z=intact.logits.double().contiguous(),
            labels=intact.labels,
        )
        return DeviceRows(self, record)


def open_device_head(head: OpenHead, by_unit: ByUnit) -> DeviceHead:
    """A head whose numbers are on the device."""
    units = torch.from_numpy(by_unit.units).to(head.target.device)
    last = None if head.last is None else head.last.given.float().T[units].contiguous()
    columns = Columns(units, last, head.head.is_relu)
    return DeviceHead(columns, make_steps(by_unit, units.device), by_unit)


@dataclass(frozen=True)
class DeviceRows:
    """The response functions of a head on one batch, whose sums are tensors on its device."""

    head: DeviceHead
    batch: Batch

    @property
    def device(self) -> torch.device:
        """The device that holds the sums."""
        return self.batch.y.device

    @property
    def n_units(self) -> int:
        """Number of units whose weights the sites are."""
        return len(self.batch.y)

    @property
    def rows(self) -> slice:
        """The rows of the table: all of the shard's."""
        return slice(0, len(self.head.by_unit.sites))

    def add(self, sums: dict[str, Tensor], runs: Runs, bounds: Float64[Tensor, " units"]) -> None:
        """Add the sums over the batch to `sums`, each (sites), and what the series left out to `bounds` (units)."""
        steps, places = self.head.steps.values, self.head.steps.places
        given = {name: sums[name] for name in SUMMED if name in sums}
        if places is None:
            own = {name: values.view(steps.shape) for name, values in given.items()}
        else:
            own = {name: values.new_zeros(steps.shape).index_put_(places, values) for name, values in given.items()}
        add_rows(self.head.columns, steps, self.batch, runs, own, bounds)
        if places is not None:
            for name, values in given.items():
                values.copy_(own[name][places])

    def of_examples(self, chosen: np.ndarray) -> "DeviceRows":
        """The response functions of some of the examples."""
        return replace(self, batch=self.batch.of_examples(torch.from_numpy(chosen).to(self.device)))

    def joined(self, others: Sequence["DeviceRows"]) -> "DeviceRows":
        """The response functions of these examples followed by those of `others`."""
        return replace(self, batch=self.batch.joined([other.batch for other in others]))

    def deltas_of(self, rows: Int64[np.ndarray, " rows"], intact: Intact) -> Deltas:
        """The deltas of some rows of the table, example by example, by the same loops."""
        before = self.head.by_unit
        by_unit = sort_by_unit(before.sites.pick(rows), before.n_inputs)
        own = torch.from_numpy(np.searchsorted(before.units, by_unit.units)).to(self.device)
        head = DeviceHead(self.head.columns.pick(own), make_steps(by_unit, self.device), by_unit)
        return replace(self, head=head, batch=self.batch._replace(y=self.batch.y[own])).as_deltas(intact)

    def as_deltas(self, intact: Intact) -> Deltas:
        """The deltas of all sites, example by example: for a few sites, listed."""
        parts = max(1, DELTAS_AT_ONCE // self.head.steps.values.numel())
        examples = np.arange(self.batch.y.shape[1])
        deltas = [self.of_examples(examples[n : n + parts])._deltas() for n in range(0, len(examples), parts)]
        delta, touched = (torch.cat(each, dim=1) for each in zip(*deltas, strict=True))
        return Deltas(self.rows, delta, touched, intact.correct.expand(delta.shape))

    def _deltas(self) -> tuple[Tensor, Tensor]:
        steps, places = self.head.steps.values, self.head.steps.places
        assert places is not None, "the sites are listed"
        n = self.batch.y.shape[1]
        by_run = self.batch.y.new_zeros(len(steps), n, steps.shape[1])
        runs = Runs(np.arange(1, n + 1), np.zeros(n, bool), 0)  # each example by itself
        sums = {"delta": self.batch.y.new_zeros(steps.shape), "by_run": by_run}
        add_rows(self.head.columns, steps, self.batch, runs, sums, self.batch.y.new_zeros(len(steps)))
        unit, inputs = places
        return by_run[unit, :, inputs], self._touched(unit, steps[places], self.batch.x[:, inputs].T)

    def _touched(self, unit: Tensor, steps: Float32[Tensor, " sites"], x: Float32[Tensor, "sites examples"]) -> Tensor:
        """Whether input and unit are active, or the input activates the unit."""
        moved = (x != 0) & (steps != 0)[:, None] & self.head.columns.reaches_logits[unit, None]
        if not self.head.columns.has_relu:
            return moved
        return moved & ((self.batch.y[unit] > 0) | (steps[:, None] * x > (-self.batch.y[unit]).float()))

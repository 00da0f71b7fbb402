"""Whole rows one Linear deeper: Linear -> ReLU -> Linear -> ReLU -> Linear -> cross-entropy (AlexNet's and VGG's fc1).

In: a batch. Out: the intact network, and its response functions, which are piecewise (`piecewise.py`): their sums over
the batch for all weights of some units.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ablation.engine.deltas import Deltas, Responses, Runs
from ablation.engine.interface import Setup
from ablation.engine.loss import Intact, make_intact
from ablation.engine.responses.head import catch_input, make_linear
from ablation.engine.responses.loops import piecewise
from ablation.engine.responses.loops.records import Batch, close_class
from ablation.engine.responses.sparse_linear import Linear
from ablation.engine.responses.way import DeepHead
from ablation.errors import ModelError
from ablation.sites import EveryWeight, Sites


@dataclass(frozen=True)
class DeepResponses:
    """The response functions of one batch, as `deltas.Responses` defines them."""

    columns: np.ndarray  # (units, second), float32: of the sites' units alone
    last: np.ndarray  # (second, classes), float32
    batch: Batch  # y: the target's output of the sites' units
    sites: EveryWeight

    @property
    def rows(self) -> slice:
        """The rows of the table: all of the shard's."""
        return slice(0, len(self.sites))

    @property
    def n_units(self) -> int:
        """Number of units whose weights the sites are."""
        return len(self.batch.y)

    def add(self, sums: dict[str, np.ndarray], runs: Runs, bounds: np.ndarray) -> None:
        """Add the sums over the batch to `sums`, each (sites), and what the series left out to `bounds` (units)."""
        change = self.sites.steps_float32().cpu().numpy().reshape(self.n_units, -1)
        target = piecewise.make_units(change, self.columns, self.last)
        own = {name: values.reshape(target.change.shape) for name, values in sums.items()}
        squares = own["delta_squared"] if "delta_squared" in own else np.zeros(target.change.shape)
        touched = own["touched"] if "touched" in own else np.zeros(target.change.shape, np.int32)
        first = 0
        for last, closes in zip(runs.ends.tolist(), runs.closes.tolist(), strict=True):
            some = self.batch.of_examples(np.arange(first, last))
            first = last
            if not runs.per_class:
                piecewise.add_rows(target, some, own["delta"], squares, touched, bounds)
                continue
            delta, squared = np.zeros(target.change.shape), np.zeros(target.change.shape)
            piecewise.add_rows(target, some, delta, squared, touched, bounds)
            for name, values in (
                ("delta", delta),
                ("delta_squared", squared),
                ("class_delta", delta),
                ("class_delta_squared", squared),
            ):
                own[name] += values
            if closes:
                flat = (own[name].reshape(-1) for name in ("class_delta", "class_delta_squared", "within"))
                close_class(*flat, runs.per_class)

    def of_examples(self, chosen: np.ndarray) -> "DeepResponses":
        """The response functions of some of the examples."""
        return replace(self, batch=self.batch.of_examples(chosen))

    def joined(self, others: Sequence["DeepResponses"]) -> "DeepResponses":
        """The response functions of these examples followed by those of `others`."""
        return replace(self, batch=self.batch.joined([other.batch for other in others]))

    def deltas_of(self, rows: Int64[np.ndarray, " rows"], intact: Intact) -> Deltas:
        """The deltas of some rows of the table, example by example."""
        first_unit = self.sites.first // self.batch.x.shape[1]
        return score_sites(self.sites.pick(rows), first_unit, self.columns, self.last, self.batch, intact)


def score_sites(
    sites: Sites,
    first_unit: int,
    columns: np.ndarray,
    last: np.ndarray,
    batch: Batch,
    intact: Intact,
) -> Deltas:
    """The deltas of listed sites, unit by unit; `columns` and `batch.y` have the units from `first_unit` on."""
    n_inputs = batch.x.shape[1]
    units, inputs = np.divmod(sites.indices.cpu().numpy(), n_inputs)
    steps = sites.steps_float32().cpu().numpy()
    delta, moved = np.zeros((len(sites), len(batch.labels))), np.zeros((len(sites), len(batch.labels)), bool)
    for unit in np.unique(units).tolist():
        own, place = np.flatnonzero(units == unit), unit - first_unit
        change = np.zeros((1, n_inputs), np.float32)
        change[0, inputs[own]] = steps[own]
        one = piecewise.make_units(change, columns[place : place + 1], last)
        some = batch._replace(y=batch.y[place : place + 1])
        chosen = np.stack([np.zeros(len(own), np.int64), inputs[own]], axis=1)
        sums, squares, touched = (np.zeros(change.shape, dtype) for dtype in (np.float64, np.float64, np.int32))
        delta[own], moved[own] = piecewise.add_rows(one, some, sums, squares, touched, np.zeros(1), chosen)
    deltas, touched_by = torch.from_numpy(delta), torch.from_numpy(moved)
    return Deltas(slice(0, len(sites)), deltas, touched_by, intact.correct.cpu().expand(delta.shape))


class ThreeLinears:
    """The path `response` of one job in front of two more Linears: the model, the Linears' weights, and the sites."""

    def __init__(self, setup: Setup, head: DeepHead) -> None:
        if setup.precision == "float64" or setup.top1:
            raise ModelError("engine='response' is for 'mixed' or 'float32', without top1; use engine='finite'.")
        self.model = setup.model
        self.sites = sites = setup.sites
        self.activations = setup.activations
        self.target = setup.model.get_parameter(head.linears[0][0])
        self.dtype = setup.base_dtype
        self.linears = [make_linear(setup.model, *names, self.dtype) for names in head.linears]
        first, last = 0, len(self.target)
        if isinstance(sites, EveryWeight):
            first, last = (flat // self.target.shape[1] for flat in (sites.first, sites.last))
        self.units = torch.arange(first, last)
        self.columns, self.last = self.linears[1].columns[first:last], self.linears[2].columns

    @cached_property
    def own(self) -> Linear:
        """The target Linear restricted to the units that the sites are in."""
        return self.linears[0].of_units(self.units)

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Responses | Deltas]]:
        """One batch: the intact network, and its response functions; of a few sites (a job's proof) their deltas."""
        x, first, second, logits = self._intact(inputs)
        intact = make_intact(logits, labels, torch.float32)
        batch = Batch(
            x=x.float().cpu().numpy(),
            y=first.double().T.contiguous().cpu().numpy(),
            q=intact.rest.float().cpu().numpy(),
            z=logits.double().cpu().numpy(),
            labels=labels.cpu().numpy(),
            second=second.double().cpu().numpy(),
        )
        if isinstance(self.sites, EveryWeight):
            return intact, iter([DeepResponses(self.columns, self.last, batch, self.sites)])
        return intact, iter([score_sites(self.sites, 0, self.columns, self.last, batch, intact)])

    def keep_prefix(self, inputs: Tensor) -> None:
        """Put what other shards need of this batch into the cache."""
        self._intact(inputs)

    def _intact(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x, y1 of the sites' units, y2 and the logits; all but y1 may come from the cache."""
        first, second, last = self.linears
        address = "" if self.activations is None else self.activations.address(inputs)
        kept = None if self.activations is None else self.activations.get(address)
        if kept is not None:
            return kept["x"], self.own(kept["x"]), kept["second"], kept["logits"]
        x = catch_input(self.model, self.target, inputs)
        y1 = first(x)
        y2 = second(y1.relu())
        logits = last(y2.relu())
        if self.activations is not None:
            record = {"x": x.clone(), "second": y2.clone(), "logits": logits.clone()}
            self.activations.put(address, record, len(inputs))
        return x, y1[:, self.units], y2, logits

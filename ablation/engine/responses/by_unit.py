"""The sites of a Linear's weight, sorted by the unit (row of the weight) that each of them moves."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64

from ablation.sites import EveryWeight, Sites


@dataclass(frozen=True)
class ByUnit:
    """The sites sorted by unit: the units, and where the sites of each of them begin."""

    sites: Sites
    units: Int64[np.ndarray, " units"]
    order: Int64[np.ndarray, " sites"] | None  # of the sites; None: they are whole rows, one after the other
    starts: Int64[np.ndarray, " units+1"]  # in that order
    n_inputs: int

    def steps(self, block: slice) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """The steps r - w of all weights of some units, 0 beside the sites; and the sites' places in them."""
        rows = slice(self.starts[block.start], self.starts[block.stop])
        shape = block.stop - block.start, self.n_inputs
        if self.order is None:
            return self._whole_steps[block], None
        sites = self.sites.pick(self.order[rows])
        indices = sites.indices.cpu().numpy()
        places = np.searchsorted(self.units[block], indices // self.n_inputs), indices % self.n_inputs
        steps = np.zeros(shape, np.float32)
        steps[places] = sites.steps_float32().cpu().numpy()
        return steps, places

    @cached_property
    def _whole_steps(self) -> np.ndarray:
        """The steps of whole rows, kept because every batch asks for them."""
        return self.sites.steps_float32().cpu().numpy().reshape(len(self.units), self.n_inputs)

    def rows(self, block: slice) -> slice | np.ndarray:
        """The rows of the table that hold the sites of some units."""
        rows = slice(self.starts[block.start], self.starts[block.stop])
        return rows if self.order is None else self.order[rows]


def sort_by_unit(sites: Sites, n_inputs: int) -> ByUnit:
    """Sort the sites of a Linear's weight (units, inputs) by unit."""
    if isinstance(sites, EveryWeight):
        units = np.arange(sites.first // n_inputs, sites.last // n_inputs)
        return ByUnit(sites, units, None, np.arange(len(units) + 1) * n_inputs, n_inputs)
    unit_of = sites.indices.cpu().numpy() // n_inputs
    order = np.argsort(unit_of, kind="stable")
    units, counts = np.unique(unit_of, return_counts=True)
    return ByUnit(sites, units, order, np.concatenate([[0], np.cumsum(counts)]), n_inputs)

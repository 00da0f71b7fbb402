"""The path `reference`: the brute force of `ablation.reference`, the whole network in float64, one site at a time."""

from collections.abc import Iterator

from jaxtyping import Int64
from torch import Tensor

from ablation.engine.deltas import Deltas
from ablation.engine.interface import Setup
from ablation.engine.loss import Intact, make_intact
from ablation.precision import fit
from ablation.reference import in_float64, intact_logits, run_reference


class Reference:
    """The brute force as a path: slower than all others, and the one that they are compared with."""

    def __init__(self, setup: Setup) -> None:
        self.model = in_float64(setup.model)
        self.parameter = setup.parameter
        self.sites = setup.sites
        self.loss = setup.loss

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas]]:
        """One batch: the intact network, and the deltas of one site after the other."""
        inputs = fit(inputs, self.model)
        intact = make_intact(intact_logits(self.model, inputs), labels, function=self.loss)
        return intact, self._deltas(intact, inputs)

    def _deltas(self, intact: Intact, inputs: Tensor) -> Iterator[Deltas]:
        for row in range(len(self.sites)):
            rows = slice(row, row + 1)
            truth = run_reference(self.model, self.parameter, self.sites[rows], inputs, intact.labels, self.loss)
            yield Deltas(rows, truth.delta, truth.touched, truth.correct)

"""The path `rerun`: the prefix once per batch, then the rest of the network again for every site of any target.

In: a batch. Out: the intact network's loss and, site by site, the per-example deltas.
The deltas come from the difference of the float64 logits by `loss.py`. Slow (one run of the rest per site and batch),
never an approximation.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ablation import baseline
from ablation.engine.deltas import Deltas
from ablation.engine.interface import Setup
from ablation.engine.loss import Intact, is_correct, loss_delta, make_intact
from ablation.engine.prefix import Prefix
from ablation.precision import FromTargetOn, Lifts, as_found, run_with


class Rerun:
    """The path `rerun` of one job: the model, its target parameter and the sites."""

    def __init__(self, setup: Setup) -> None:
        self.model = setup.model
        self.parameter = setup.parameter
        self.sites = setup.sites
        self.loss = setup.loss
        self.top1 = setup.top1
        self.activations = setup.activations
        intact = setup.model.get_parameter(setup.parameter).detach()
        self.weights = (intact if setup.precision == "float32" else intact.double()).clone(
            memory_format=torch.contiguous_format
        )
        self.prefix = Prefix(setup.model)
        self.lifts = Lifts()
        self.is_checked = False

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas]]:
        """One batch: the intact network, and the deltas of one site after the other."""
        logits = self.run_intact(inputs, self.mode())
        if not self.is_checked:
            again = self.run_rest(inputs, self.mode())
            baseline.check_agreement(again, logits, "with its prefix replayed", tolerance=1e-9)
            self.is_checked = True
        intact = make_intact(logits, labels, function=self.loss)
        return intact, self._deltas(intact, inputs)

    def mode(self) -> FromTargetOn:
        """A new mode that makes one run float64 from the target on."""
        return FromTargetOn(self.weights, self.lifts)

    def run_intact(self, inputs: Tensor, mode: FromTargetOn) -> Float[Tensor, "examples classes"]:
        """Return the intact logits of a new batch and remember its prefix."""
        with as_found(self.model):
            logits = self.prefix.first_run(lambda: self._run(inputs, mode), mode, inputs, self.activations)
        baseline.check_logits(logits, len(inputs))
        return logits

    def run_rest(self, inputs: Tensor, mode: FromTargetOn) -> Float[Tensor, "examples classes"]:
        """Return the logits again, with the prefix of the batch that ran last."""
        with as_found(self.model), self.prefix.replay():
            return self._run(inputs, mode)

    def _run(self, inputs: Tensor, mode: FromTargetOn) -> Any:
        return run_with(self.model, self.parameter, self.weights, inputs, mode=mode)

    def _deltas(self, intact: Intact, inputs: Tensor) -> Iterator[Deltas]:
        for row in range(len(self.sites)):
            yield self.one(row, intact, inputs)

    def one(self, row: int, intact: Intact, inputs: Tensor) -> Deltas:
        """Return the deltas of one site on the batch that ran last."""
        every = torch.arange(len(inputs), device=inputs.device)
        dz = self._logits(row, inputs) - intact.logits
        delta = loss_delta(intact, every, dz)
        touched = (dz != 0).any(dim=1)
        correct = is_correct(intact, every, dz) if self.top1 else intact.correct
        return Deltas(slice(row, row + 1), delta[None], touched[None], correct[None])

    def _logits(self, row: int, inputs: Tensor) -> Float[Tensor, "examples classes"]:
        """Return the logits with one weight replaced; the weights are restored even if the run fails."""
        flat, index = self.weights.view(-1), int(self.sites.indices[row])
        weight = flat[index].item()
        try:
            flat[index] = self.sites.replacements[row]
            return self.run_rest(inputs, self.mode())
        finally:
            flat[index] = weight

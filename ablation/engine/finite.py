"""Any target in any model, exactly, many sites at once: finite differences carried from the target to the logits.

In: a batch. Out: the intact network's loss, and the deltas of `lanes` sites at a time. The prefix is computed once per
batch and remembered; what comes after it runs once for every `lanes` sites, with their deltas beside it (`carry.py`,
`rules.py`, `products.py`). Where a model decides by a number that an ablation changes, those sites are run one by one
(`rerun.py`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablation import baseline
from ablation.engine.carry import Carry, NotCarriedError, Rule
from ablation.engine.deltas import HUGE_STEP, VALUES_AT_ONCE, Deltas
from ablation.engine.loss import Intact, is_correct, loss_delta, make_intact
from ablation.engine.prefix import Prefix
from ablation.engine.products import RULES
from ablation.engine.rerun import Rerun
from ablation.precision import FromTargetOn, Lifts, as_found, run_with
from ablation.sites import Sites


class Finite:
    """The path of one job: holds the model, its target parameter, the sites, and how many of them go at once."""

    def __init__(
        self, model: torch.nn.Module, parameter: str, sites: Sites, *, precision: str, top1: bool, lanes: int,
        rules: Mapping[Any, Rule] = RULES,
    ) -> None:  # fmt: skip
        self.model = model
        self.parameter = parameter
        self.sites = sites
        self.top1 = top1
        self.lanes = lanes
        self.rules = rules
        huge = len(sites) > 0 and bool((sites.replacements - sites.weights).abs().max() > HUGE_STEP)
        self.delta_dtype = torch.float64 if precision == "float64" or huge else torch.float32
        intact = model.get_parameter(parameter).detach()
        self.weights = (intact if precision == "float32" else intact.double()).clone(
            memory_format=torch.contiguous_format
        )
        self.prefix = Prefix(model)
        self.lifts = Lifts()
        self.one_by_one = Rerun(model, parameter, sites, precision=precision, top1=top1)

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas]]:
        """One batch: the intact network, and the deltas of `lanes` sites after the other."""
        mode = FromTargetOn(self.weights, self.lifts)
        with as_found(self.model), _plain_attention(), self.prefix.remember(mode):
            logits = run_with(self.model, self.parameter, self.weights, inputs, mode=mode)
        baseline.check_logits(logits, len(inputs))
        intact = make_intact(logits, labels)
        return intact, self._deltas(intact, inputs)

    def _deltas(self, intact: Intact, inputs: Tensor) -> Iterator[Deltas]:
        for first in range(0, len(self.sites), self.lanes):
            rows = slice(first, min(first + self.lanes, len(self.sites)))
            try:
                dz = self._carry(rows, intact, inputs)
            except NotCarriedError:
                yield from self._one_by_one(rows, intact, inputs)
            else:
                yield score(rows, intact, dz, top1=self.top1)

    def _carry(self, rows: slice, intact: Intact, inputs: Tensor) -> Float[Tensor, "sites examples classes"]:
        """The deltas of the logits."""
        carry = Carry(self.weights, self.sites[rows], self.rules, self.delta_dtype, self.lifts)
        with as_found(self.model), _plain_attention(), self.prefix.replay(), carry:
            logits = run_with(
                self.model, self.parameter, self.weights, inputs, mode=FromTargetOn(self.weights, self.lifts)
            )
        baseline.check_agreement(logits, intact.logits, "with its prefix replayed", tolerance=1e-9)
        with torch.no_grad():
            dz = carry.shadows.delta(logits)
        return logits.new_zeros(len(self.sites[rows]), *logits.shape) if dz is None else dz

    def _one_by_one(self, rows: slice, intact: Intact, inputs: Tensor) -> Iterator[Deltas]:
        """The same for a model whose way depends on the weight."""
        _, pieces = self.one_by_one.run(inputs, intact.labels)
        yield from (piece for piece in pieces if rows.start <= piece.rows.start < rows.stop)


def score(rows: slice, intact: Intact, dz: Float[Tensor, "sites examples classes"], *, top1: bool) -> Deltas:
    """The loss deltas of some sites, of the pairs that move alone, as many at once as stay in the cache."""
    touched = (dz != 0).any(dim=2)
    delta = torch.zeros(touched.shape, dtype=torch.float64, device=dz.device)
    correct = intact.correct.expand(touched.shape).clone()
    for pairs in touched.nonzero().split(max(1, VALUES_AT_ONCE // dz.shape[2])):
        row, example = pairs.unbind(1)
        moved = dz[row, example]
        delta[row, example] = loss_delta(intact, example, moved)
        if top1:
            correct[row, example] = is_correct(intact, example, moved)
    return Deltas(rows, delta, touched, correct)


def _plain_attention() -> Any:
    """Attention as the matrix products and the softmax that it is, which have rules, and not as one fused operation."""
    return sdpa_kernel(SDPBackend.MATH)

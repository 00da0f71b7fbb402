"""Any target in any model, exactly, many sites at once: finite differences carried from the target to the logits.

In: a batch. Out: the intact network's loss, and the deltas of `lanes` sites at a time. The prefix is computed once per
batch and remembered; what comes after it runs once for every `lanes` sites, with their deltas beside it (`dispatch.py`,
`rules.py`, `products.py`). Where the model branches on a number that an ablation changes, those sites run one by one
(`rerun.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablation import baseline
from ablation.engine.carried.dispatch import Carry, NotCarriedError, Rule
from ablation.engine.carried.products import RULES
from ablation.engine.carried.representations import Block, Columns, Product
from ablation.engine.carried.series import LossSeries
from ablation.engine.carried.tape import Player, Tape
from ablation.engine.compiled import is_ready
from ablation.engine.deltas import VALUES_AT_ONCE, Deltas
from ablation.engine.interface import Setup
from ablation.engine.loss import Intact, is_correct, loss_delta, loss_delta_and_touched, make_intact
from ablation.engine.rerun import Rerun
from ablation.sites import Sites, make_sites

PROBES = 8  # sites that are carried in float64 too, at the beginning of a shard
PROBE_BOUND = 2e-5  # in units of max(|u|, 0.01 rms u): a fifth of what the proof allows
MOMENTS_PAY = 8  # a pair's classes cost as much as the moments of one (unit, example) pair divided by this


class Finite:
    """The path `finite` of one job: the model, its target parameter, the sites, and how many are carried at once."""

    def __init__(self, setup: Setup, *, rules: Mapping[Any, Rule] = RULES) -> None:
        self.sites = setup.sites
        self.top1 = setup.top1
        self.lanes = setup.lanes
        self.rules = rules
        self.rest = Rerun(setup)
        self.is_probed = setup.precision == "float32"  # float32 promises no bound
        self.delta_dtype = setup.delta_dtype
        self.response: tuple[int, LossSeries] | None = None  # for the sites from this row on
        self.without_rule: set[str] = set()  # operations that the general rule was used for

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas]]:
        """One batch: the intact network, and the deltas of `lanes` sites after the other."""
        mode = self.rest.mode()
        tape = Tape(mode)
        with _plain_attention(), tape:
            logits = self.rest.run_intact(inputs, mode)
        intact = make_intact(logits, labels, function=self.rest.loss)
        return intact, self._deltas(intact, inputs, tape)

    def _deltas(self, intact: Intact, inputs: Tensor, tape: Tape) -> Iterator[Deltas]:
        if not self.is_probed:
            self._probe(intact, inputs, tape)
        for first in range(0, len(self.sites), self.lanes):
            rows = slice(first, min(first + self.lanes, len(self.sites)))
            try:
                dz = self._logit_deltas(self.sites[rows], intact, inputs, tape)
            except NotCarriedError:
                for row in range(rows.start, rows.stop):
                    with _plain_attention():
                        one = self.rest.one(row, intact, inputs)
                    yield one
                continue
            yield self._score(rows, intact, dz)

    def _score(self, rows: slice, intact: Intact, dz: Tensor | Product) -> Deltas:
        has_series = intact.is_plain and not self.top1
        if has_series and isinstance(dz, Product) and isinstance(dz.factor, Block) and dz.factor.length == 1:
            return self._score_columns(rows, intact, dz.factor, dz.matrix)
        return score(rows, intact, dz, top1=self.top1)

    def _probe(self, intact: Intact, inputs: Tensor, tape: Tape) -> None:
        """Carry some sites in float64 too, and all of them from now on, if float32 gives other utilities.

        Through many layers float32 deltas gather rounding; where the examples' deltas nearly cancel, it shows.
        """
        self.is_probed = True
        if self.delta_dtype == torch.float64 or not len(self.sites):
            return
        some = self.sites[slice(0, None, max(1, len(self.sites) // PROBES))]
        utilities = []
        with suppress(NotCarriedError):
            for self.delta_dtype in (torch.float32, torch.float64):
                dz = self._logit_deltas(some, intact, inputs, tape)
                utilities.append(score(slice(0, len(some)), intact, dz, top1=False).delta.mean(dim=1))
            narrow, wide = utilities
            scale = torch.maximum(wide.abs(), 0.01 * wide.square().mean().sqrt())
            if not (narrow - wide).abs().le(PROBE_BOUND * scale).all():
                return
        self.delta_dtype = torch.float32

    def _logit_deltas(self, sites: Sites, intact: Intact, inputs: Tensor, tape: Tape) -> Tensor | Product:
        """The deltas (sites, examples, classes) of the logits, or the last Linear's product before it is computed.

        Raises:
            NotCarriedError: the model branches on a number that one of the ablations changes.
        """
        mode = self.rest.mode()
        carry = Carry(self.rest.weights, sites, self.rules, self.delta_dtype, self.rest.lifts, Player(tape, mode))
        with _plain_attention(), carry:
            logits = self.rest.run_rest(inputs, mode)
        self.without_rule |= carry.without_rule
        baseline.check_agreement(logits, intact.logits, "with its prefix replayed", tolerance=1e-9)
        if isinstance(product := carry.shadows.representation(logits), Product):
            return product
        dz = carry.shadows.delta(logits)
        return logits.new_zeros(carry.shadows.n, *logits.shape) if dz is None else dz

    @torch.no_grad()
    def _score_columns(
        self, rows: slice, intact: Intact, units: Block, matrix: Float[Tensor, "units classes"]
    ) -> Deltas:
        """The loss deltas where one unit before the last Linear moves: by a series, where its moments pay."""
        t = units.numbers[:, :, 0]
        own, unit = units.first.unique(return_inverse=True)
        if self.response is None or self.response[0] != rows.start:  # the same in every batch
            self.response = rows.start, LossSeries(matrix[own])
        response = self.response[1]
        touched = (t != 0) & response.is_live[unit, None]
        if int(touched.sum()) * MOMENTS_PAY < len(own) * t.shape[1]:
            return score(rows, intact, t[:, :, None] * response.columns[unit, None], top1=False)
        delta = response.loss_delta(intact, t, unit, touched)
        return Deltas(rows, delta, touched, intact.correct.expand(touched.shape))


@torch.no_grad()
def score(rows: slice, intact: Intact, dz: Tensor | Product, *, top1: bool) -> Deltas:
    """The loss deltas of some sites: example by example where the logits' deltas are not yet written out."""
    if isinstance(dz, Product) and isinstance(dz.factor, Columns):
        n_examples = len(dz.factor.columns)
        parts = [_score_pairs(intact, torch.tensor(k), dz.row(k), top1=top1) for k in range(n_examples)]
        return Deltas(rows, *(torch.stack(each, dim=1) for each in zip(*parts, strict=True)))
    dz = dz if isinstance(dz, Tensor) else dz.dense()
    examples = torch.arange(dz.shape[1], device=dz.device).expand(dz.shape[:2]).flatten()
    pairs = _score_pairs(intact, examples, dz.flatten(0, 1), top1=top1)
    return Deltas(rows, *(each.unflatten(0, dz.shape[:2]) for each in pairs))


def _score_pairs(
    intact: Intact, examples: Int64[Tensor, "*pairs"], dz: Float[Tensor, "pairs classes"], *, top1: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss delta, touched and correct; by PyTorch's operations of as many pairs at once as stay in the cache."""
    examples = examples.to(dz.device).expand(len(dz))
    at_once = max(1, VALUES_AT_ONCE // dz.shape[1])
    if is_ready(dz) and intact.is_plain:
        delta, touched = loss_delta_and_touched(intact, examples, dz)
    else:
        touched = (dz != 0).any(dim=1)
        delta = torch.zeros(len(dz), dtype=torch.float64, device=dz.device)
        for pairs in touched.nonzero()[:, 0].split(at_once):
            delta[pairs] = loss_delta(intact, examples[pairs], dz[pairs])
    correct = intact.correct[examples]
    if top1:
        for pairs in touched.nonzero()[:, 0].split(at_once):
            correct[pairs] = is_correct(intact, examples[pairs], dz[pairs])
    return delta, touched, correct


def operations_without_rule(model: torch.nn.Module, parameter: str, inputs: Tensor) -> list[str]:
    """The operations behind a parameter that have no rule of their own and so use the slow general one."""
    sites = make_sites(model.get_parameter(parameter), np.arange(1), "zero")
    finite = Finite(Setup(model, parameter, sites))
    _, pieces = finite.run(inputs, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device))
    list(pieces)
    return sorted(finite.without_rule)


def _plain_attention() -> Any:
    """Run attention as matrix products and a softmax, which have rules, instead of as one fused operation."""
    return sdpa_kernel(SDPBackend.MATH)

"""Classifier heads: Linear -> elementwise f -> at most one more Linear -> cross-entropy, many sites at once.

One weight w_ij moves one unit i, and only through d = (r - w_ij) x_j (docs/03-engine.md). So per (site, example):

    t  = f(y_i + d) - f(y_i)          one number; 0 for most pairs: x_j = 0, or a ReLU inactive before and after
    dz = t V[:, i]                    every logit, a scaled column of the last Linear

and the loss changes as `loss.py` says. Pairs with t = 0 are dropped before anything of size (classes) is touched.
On a CPU, in float32, with plain cross-entropy and a function that they know, compiled loops do it (`arrays.py`); else
matrix operations do.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ablation.engine.deltas import VALUES_AT_ONCE, Deltas
from ablation.engine.increments import relu_delta
from ablation.engine.interface import Setup
from ablation.engine.loss import Intact, is_correct, loss_delta, make_intact
from ablation.engine.responses.arrays import Loops, open_loops
from ablation.engine.responses.head import HeadBatch, OpenHead, activate
from ablation.engine.responses.loops.rows import Places
from ablation.engine.responses.way import Head
from ablation.loss import is_plain

PAIRS_AT_ONCE = 1 << 20  # (site, example) pairs looked at together: 8 MB a float64 matrix


class Direct:
    """The path `direct` of one job: the model, the head in the base's precision, and the sites."""

    def __init__(self, setup: Setup, head: Head) -> None:
        self.open_head = OpenHead(setup.model, head, setup.base_dtype, setup.activations)
        self.head = head
        self.loss = setup.loss
        self.sites = sites = setup.sites
        self.top1 = setup.top1
        self.delta_dtype = setup.delta_dtype
        self.step = sites.steps
        n_inputs = self.open_head.target.shape[1]
        self.unit = sites.indices if head.is_bias else sites.indices // n_inputs
        self.input = None if head.is_bias else sites.indices % n_inputs
        on_host = self.open_head.target.device.type == "cpu"
        fits = on_host and not self.top1 and self.delta_dtype == torch.float32 and is_plain(self.loss)
        self.loops = open_loops(self.open_head) if fits else None
        if self.loops is None and (last := self.open_head.last) is not None:
            self.columns = last.weight.T.contiguous()
            self.live = (last.weight != 0).any(dim=0)

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas]]:
        """One batch: the intact network, and the deltas of many sites at once."""
        batch = self.open_head.run(inputs)
        intact = make_intact(batch.logits, labels, self.delta_dtype, self.loss)
        if self.loops is not None:
            return intact, self._score(intact, batch, self.loops)
        x = batch.x.to(self.open_head.dtype)
        return intact, self._deltas(intact, x.T.contiguous(), batch.y.T.contiguous())

    def keep_prefix(self, inputs: Tensor) -> None:
        """Put what other shards need of this batch into the cache."""
        self.open_head.run(inputs)

    def _score(self, intact: Intact, batch: HeadBatch, loops: Loops) -> Iterator[Deltas]:
        """Compute the deltas by the compiled loops, which visit every pair once."""
        x = torch.ones(1, len(batch.x)) if self.input is None else batch.x.float().T.contiguous()
        record = loops.of_batch(intact, batch)
        at_once = max(1, PAIRS_AT_ONCE // len(batch.x))
        for first in range(0, len(self.sites), at_once):
            rows = slice(first, min(first + at_once, len(self.sites)))
            source = torch.zeros_like(self.unit[rows]) if self.input is None else self.input[rows]
            places = Places(*(each.numpy() for each in (self.step[rows], self.unit[rows], source)))
            delta, touched = loops.score_sites(places, x, record)
            yield Deltas(rows, delta, touched, intact.correct.expand(touched.shape))

    def _deltas(
        self, intact: Intact, x: Float[Tensor, "inputs examples"], y: Float[Tensor, "units examples"]
    ) -> Iterator[Deltas]:
        n_examples = x.shape[1]
        at_once = max(1, PAIRS_AT_ONCE // n_examples)
        for first in range(0, len(self.sites), at_once):
            rows = slice(first, min(first + at_once, len(self.sites)))
            t = self._unit_deltas(rows, x, y)
            moved = t != 0 if self.open_head.last is None else (t != 0) & self.live[self.unit[rows], None]
            delta = torch.zeros(t.shape, dtype=torch.float64, device=t.device)
            correct = intact.correct.expand(t.shape).clone()
            n_pairs = max(1, VALUES_AT_ONCE // intact.logits.shape[1])
            for pairs in moved.nonzero().split(n_pairs):
                row, example = pairs.unbind(1)
                dz = self._logit_deltas(t[row, example], self.unit[rows][row], intact)
                delta[row, example] = loss_delta(intact, example, dz)
                if self.top1:
                    correct[row, example] = is_correct(intact, example, dz)
            yield Deltas(rows, delta, moved, correct)

    def _unit_deltas(
        self, rows: slice, x: Float[Tensor, "inputs examples"], y: Float[Tensor, "units examples"]
    ) -> Float[Tensor, "sites examples"]:
        """t = f(y + d) - f(y); behind a smooth f a difference in float64, exact to 2e-16 of f(y)."""
        step = self.step[rows, None].to(x.dtype)
        d = step.expand(-1, x.shape[1]) if self.input is None else step * x[self.input[rows]]
        if not self.head.functions:
            return d
        y = y[self.unit[rows]]
        return relu_delta(y, d) if self.head.is_relu else activate(self.head, y + d) - activate(self.head, y)

    def _logit_deltas(
        self, t: Float[Tensor, " pairs"], unit: Int64[Tensor, " pairs"], intact: Intact
    ) -> Float[Tensor, "pairs classes"]:
        """dz = t V[:, i]; where the target is the last Linear, only logit i moves."""
        if self.open_head.last is not None:
            return self.columns.index_select(0, unit).mul_(t[:, None])
        dz = torch.zeros(len(t), intact.logits.shape[1], dtype=t.dtype, device=t.device)
        return dz.scatter_(1, unit[:, None], t[:, None])

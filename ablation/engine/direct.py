"""Classifier heads: Linear -> elementwise f -> at most one more Linear -> cross-entropy, many sites at once.

One weight w_ij moves one unit i, and only through d = (r - w_ij) x_j (DESIGN.md 3.3). So per (site, example):

    t  = f(y_i + d) - f(y_i)          one number; 0 for most pairs: x_j = 0, or a ReLU closed before and after
    dz = t V[:, i]                    every logit, a scaled column of the last Linear

and the loss changes as `loss.py` says. Pairs with t = 0 are dropped before anything of size (classes) is touched.
The prefix runs once per batch and stops at the target.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ablation.cache import Activations
from ablation.engine.deltas import HUGE_STEP, VALUES_AT_ONCE, Deltas
from ablation.engine.head import Head, activate, relu_delta
from ablation.engine.loss import Intact, is_correct, loss_delta, make_intact
from ablation.precision import as_found, in_own_precision, run
from ablation.sites import Sites

PAIRS_AT_ONCE = 1 << 20  # (site, example) pairs looked at together: 8 MB a float64 matrix


class _Caught(BaseException):
    """Not an error: the target was reached, nothing after it has to run."""


class _InputOf(TorchFunctionMode):
    """Stops the forward pass at the call that uses `target`, and keeps that call's input."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.input: Tensor | None = None

    def __torch_function__(
        self, call: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if call is F.linear and any(leaf is self.target for leaf in (*args, *kwargs.values())):
            self.input = args[0] if args else kwargs["input"]
            raise _Caught
        return call(*args, **kwargs)


class Direct:
    """The fast path of one job: holds the model, the head's numbers in the base's precision, and the sites."""

    def __init__(
        self, model: torch.nn.Module, head: Head, sites: Sites, *, precision: str, top1: bool,
        activations: Activations | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.head = head
        self.sites = sites
        self.top1 = top1
        self.activations = activations
        self.target = model.get_parameter(head.weight)
        base = torch.float32 if precision == "float32" else torch.float64
        huge = len(sites) > 0 and bool((sites.replacements - sites.weights).abs().max() > HUGE_STEP)
        self.delta_dtype = torch.float64 if precision == "float64" or huge else torch.float32
        self.weight = self.target.detach().to(base)
        self.bias = _get(model, head.bias, base)
        self.last_weight = _get(model, head.last[0], base) if head.last else None
        self.last_bias = _get(model, head.last[1], base) if head.last else None
        if self.last_weight is not None:
            self.columns = self.last_weight.T.contiguous()
            self.live = (self.last_weight != 0).any(dim=0)
        n_inputs = self.weight.shape[1]
        self.unit = sites.indices if head.is_bias else sites.indices // n_inputs
        self.input = None if head.is_bias else sites.indices % n_inputs
        self.step = sites.replacements - sites.weights

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas]]:
        """One batch: the intact network, and the deltas of many sites at once."""
        x = self.layer_input(inputs).to(self.weight.dtype)
        y = F.linear(x, self.weight, self.bias)
        logits = activate(self.head, y)
        if self.last_weight is not None:
            logits = F.linear(logits, self.last_weight, self.last_bias)
        intact = make_intact(logits, labels, self.delta_dtype)
        return intact, self._deltas(intact, x.T.contiguous(), y.T.contiguous())

    def layer_input(self, inputs: Tensor) -> Float[Tensor, "examples inputs"]:
        """What the model feeds to the target layer, now or in an earlier job on the same batch."""
        if self.activations is None:
            return self._layer_input(inputs)
        address = self.activations.address(inputs)
        kept = self.activations.get(address)
        if kept is None:
            kept = self._layer_input(inputs)
            self.activations.put(address, kept.clone(), len(inputs))
        return kept

    def _layer_input(self, inputs: Tensor) -> Float[Tensor, "examples inputs"]:
        mode = _InputOf(self.target)
        with as_found(self.model), in_own_precision(self.model), suppress(_Caught), mode:
            run(self.model, inputs)
        assert mode.input is not None, "the head was found by a forward pass that used the target"
        return mode.input

    def _deltas(
        self, intact: Intact, x: Float[Tensor, "inputs examples"], y: Float[Tensor, "units examples"]
    ) -> Iterator[Deltas]:
        n_examples = x.shape[1]
        at_once = max(1, PAIRS_AT_ONCE // n_examples)
        for first in range(0, len(self.sites), at_once):
            rows = slice(first, min(first + at_once, len(self.sites)))
            t = self._unit_deltas(rows, x, y)
            moved = t != 0 if self.last_weight is None else (t != 0) & self.live[self.unit[rows], None]
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
        """t: how much the unit behind f moves. A small smooth f(y+d) - f(y) in float64 is right to 2e-16 of f(y)."""
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
        if self.last_weight is not None:
            return self.columns.index_select(0, unit).mul_(t[:, None])
        dz = torch.zeros(len(t), intact.logits.shape[1], dtype=t.dtype, device=t.device)
        return dz.scatter_(1, unit[:, None], t[:, None])


def _get(model: torch.nn.Module, name: str | None, dtype: torch.dtype) -> Tensor | None:
    if name is None:
        return None
    owner, _, local = name.rpartition(".")
    return getattr(model.get_submodule(owner), local).detach().to(dtype)

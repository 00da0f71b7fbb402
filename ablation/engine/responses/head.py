"""The intact classifier head on batches: Linear -> elementwise f -> at most one more Linear.

In: a model, its `Head` and a batch. Out: the target's inputs, its units before f, and the logits. The prefix runs once
per batch and stops at the target; the head is computed in the base's precision.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ablation.cache import Activations
from ablation.engine.responses.sparse_linear import Linear
from ablation.engine.responses.way import Head
from ablation.precision import as_found, in_own_precision, run

PREFIX_EXAMPLES = 64  # that run through the prefix together: their activations are what takes memory


def activate(head: Head, y: Tensor) -> Tensor:
    """The head's elementwise functions, applied in order."""
    if head.is_relu:
        return F.relu(y)
    for function in head.functions:
        y = function(y)
    return y


@dataclass(frozen=True)
class HeadBatch:
    """The values that the intact head computes on one batch."""

    x: Float[Tensor, "examples inputs"]  # as the model computes it
    y: Float[Tensor, "examples units"]
    logits: Float[Tensor, "examples classes"]


class OpenHead:
    """A head with its model and its Linears in the base's precision; `units`: those whose y is computed, None: all."""

    def __init__(
        self, model: torch.nn.Module, head: Head, dtype: torch.dtype, activations: Activations | None = None,
        units: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.head = head
        self.dtype = dtype
        self.activations = activations
        self.target = model.get_parameter(head.weight)
        self.first = make_linear(model, head.weight, head.bias, dtype)
        self.last = None if head.last is None else make_linear(model, *head.last, dtype)
        self.units = units

    @cached_property
    def own(self) -> Linear:
        """The target Linear restricted to the units whose y is computed."""
        return self.first if self.units is None else self.first.of_units(self.units)

    def run(self, inputs: Tensor) -> HeadBatch:
        """The intact head on one batch.

        What comes before it, and the logits, may have been left in the cache by an earlier job on the same batch, or by
        another shard of this one.
        """
        address = "" if self.activations is None else self.activations.address(inputs)
        kept = None if self.activations is None else self.activations.get(address)
        if kept is not None:
            return HeadBatch(kept["x"], self.own(kept["x"]), kept["logits"])
        x = catch_input(self.model, self.target, inputs)
        y = self.first(x)
        logits = activate(self.head, y)
        if self.last is not None:
            logits = self.last(logits)
        if self.activations is not None:
            self.activations.put(address, {"x": x.clone(), "logits": logits.clone()}, len(inputs))
        return HeadBatch(x, y if self.units is None else y[:, self.units], logits)


def catch_input(model: torch.nn.Module, target: Tensor, inputs: Tensor) -> Float[Tensor, "examples inputs"]:
    """Return the input of the Linear that uses `target`; nothing after it runs, and large batches run in parts."""
    if len(inputs) > PREFIX_EXAMPLES:
        return torch.cat([catch_input(model, target, part) for part in inputs.split(PREFIX_EXAMPLES)])
    mode = _InputOf(target)
    with as_found(model), in_own_precision(model), suppress(_Caught), mode:
        run(model, inputs)
    assert mode.input is not None, "the head was found by a forward pass that used the target"
    return mode.input


class _Caught(BaseException):
    """Raised to end a forward pass that has reached the target; not an error."""


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


def make_linear(model: torch.nn.Module, weight: str, bias: str | None, dtype: torch.dtype) -> Linear:
    """A Linear of the model, by the names of its parameters or buffers."""
    return Linear(get_numbers(model, weight), None if bias is None else get_numbers(model, bias), dtype)


def get_numbers(model: torch.nn.Module, name: str) -> Tensor:
    """Return a parameter or a buffer by its name."""
    owner, _, local = name.rpartition(".")
    return getattr(model.get_submodule(owner), local).detach()

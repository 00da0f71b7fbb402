"""Whether a parameter's way to the loss is a classifier head: Linear -> elementwise f -> at most one more Linear.

In: the recorded calls of a forward pass. Out: a `Head`, or None where the way is any other; then a slower path runs.
An `OpenHead` runs the intact head on batches, in the base's precision; the prefix runs once per batch and stops at the
target.
"""

from collections.abc import Callable
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
from ablation.engine.calls import Call, Calls
from ablation.engine.responses.loops.activations import Function, find_function
from ablation.engine.responses.sparse_linear import Linear
from ablation.precision import as_found, in_own_precision, run

# Functions of one number applied to every entry, with no tensor argument beside it.
ELEMENTWISE = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_",
    "celu", "celu_", "gelu", "silu", "mish", "softplus", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish",
    "hardsigmoid", "logsigmoid", "softsign", "tanhshrink",
}  # fmt: skip
DROPOUT = {"dropout", "dropout_", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
SAME_SHAPE = {"flatten", "view", "reshape", "contiguous", "squeeze", "clone", "detach"}


@dataclass(frozen=True)
class Head:
    """target Linear -> `functions` -> `last` (the name of the last Linear's weight and bias; None: no more Linear)."""

    is_bias: bool
    weight: str
    bias: str | None
    functions: tuple[Callable[[Tensor], Tensor], ...]
    is_relu: bool
    function: Function | None  # the one that the compiled loops know, besides ReLU
    last: tuple[str, str | None] | None

    @property
    def is_known(self) -> bool:
        """Whether the compiled loops know what is between the Linears."""
        return self.is_relu or self.function is not None or not self.functions


def find_head(calls: Calls, parameter: str) -> Head | None:
    """The head that begins at `parameter`, if its way to the logits is one.

    Every value on the way must be used exactly once, and be two-dimensional (examples, features): a skip connection,
    a layer used twice, tied weights or features per token all lead elsewhere.
    """
    names = {value: name for name, value in calls.parameters.items()}
    way = list(calls.dependents(parameter))
    if not way or way[-1][0].outputs[:1] != (calls.logits,):
        return None
    functions: list[Call] = []
    linears: list[tuple[str, str | None]] = []
    value = calls.parameters[parameter]
    for call, through in way:
        if through != {value} or call.inputs.count(value) != 1 or len(call.outputs) != 1:
            return None
        if call.name == "linear":
            named = linear_parameters(call, names)
            if named is None or len(linears) == 2 or len(call.output_shapes[0]) != 2:
                return None
            if linears and value != call.inputs[0]:  # the target reaches the next Linear through its input only
                return None
            linears.append(named)
        elif not linears or (call.name not in SAME_SHAPE | DROPOUT and len(linears) == 2):
            return None
        elif call.name in ELEMENTWISE and len(call.inputs) == 1:
            functions.append(call)
        elif not keeps_values(call):
            return None
        value = call.outputs[0]
    first_weight, first_bias = linears[0]
    return Head(
        is_bias=parameter != first_weight,
        weight=first_weight,
        bias=first_bias,
        functions=tuple(_of_one_tensor(call) for call in functions),
        is_relu=len(functions) == 1 and functions[0].name in ("relu", "relu_"),
        function=known_function(functions[0]) if len(functions) == 1 else None,
        last=linears[1] if len(linears) == 2 else None,
    )


def linear_parameters(call: Call, names: dict[int, str]) -> tuple[str, str | None] | None:
    """The names of a Linear's weight and bias, if they are the model's own tensors."""
    if len(call.input_shapes[0]) != 2 or len(call.inputs) < 2 or any(value not in names for value in call.inputs[1:]):
        return None
    return names[call.inputs[1]], names[call.inputs[2]] if len(call.inputs) == 3 else None


def known_function(call: Call) -> Function | None:
    """The function besides ReLU that a call is, where the compiled loops know it."""
    return find_function(call.name, call.args, call.kwargs)


def keeps_values(call: Call) -> bool:
    """Whether a call gives back the numbers it was given: dropout in eval mode, another view of the same shape."""
    if call.name in DROPOUT:
        training = call.kwargs.get("training", call.args[2] if len(call.args) > 2 else True)
        return training is False
    return call.name in SAME_SHAPE and len(call.inputs) == 1 and call.input_shapes == call.output_shapes


def _of_one_tensor(call: Call) -> Callable[[Tensor], Tensor]:
    """The call as a function of its tensor alone, never in place."""

    def function(tensor: Tensor) -> Tensor:
        return call.function(tensor.clone(), *call.args[1:], **call.kwargs)

    return function


def activate(head: Head, y: Tensor) -> Tensor:
    """The head's elementwise functions, applied in order."""
    if head.is_relu:
        return F.relu(y)
    for function in head.functions:
        y = function(y)
    return y


AT_ONCE = 64  # examples before the head: their activations are what takes memory


@dataclass(frozen=True)
class HeadBatch:
    """What the intact head computes of one batch."""

    x: Float[Tensor, "examples inputs"]  # as the model computes it
    y: Float[Tensor, "examples units"]
    logits: Float[Tensor, "examples classes"]


class OpenHead:
    """A head with its model: its Linears in the base's precision. `units`: whose y are asked for; None: of all."""

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
        """The target, as far as it is asked for."""
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
    """What the model feeds to the Linear that uses `target`; nothing after it is run. Large batches go in parts."""
    if len(inputs) > AT_ONCE:
        return torch.cat([catch_input(model, target, part) for part in inputs.split(AT_ONCE)])
    mode = _InputOf(target)
    with as_found(model), in_own_precision(model), suppress(_Caught), mode:
        run(model, inputs)
    assert mode.input is not None, "the head was found by a forward pass that used the target"
    return mode.input


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


def make_linear(model: torch.nn.Module, weight: str, bias: str | None, dtype: torch.dtype) -> Linear:
    """A Linear of the model, by the names of its parameters or buffers."""
    return Linear(get_numbers(model, weight), None if bias is None else get_numbers(model, bias), dtype)


def get_numbers(model: torch.nn.Module, name: str) -> Tensor:
    """A parameter's numbers, or a buffer's."""
    owner, _, local = name.rpartition(".")
    return getattr(model.get_submodule(owner), local).detach()

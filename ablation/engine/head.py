"""Whether a parameter's way to the loss is a classifier head: Linear -> elementwise f -> at most one more Linear.

In: the recorded calls of a forward pass. Out: a `Head`, or None where the way is any other; then a slower path runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ablation.engine.calls import Call, Calls

# Functions of one number applied to every entry, with no tensor argument beside it.
ELEMENTWISE = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_",
    "celu", "celu_", "gelu", "silu", "mish", "softplus", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish",
    "hardsigmoid", "logsigmoid", "softsign", "tanhshrink",
}  # fmt: skip
_DROPOUT = {"dropout", "dropout_", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
_SAME_SHAPE = {"flatten", "view", "reshape", "contiguous", "squeeze", "clone", "detach"}


@dataclass(frozen=True)
class Head:
    """target Linear -> `functions` -> `last` (the name of the last Linear's weight and bias; None: no more Linear)."""

    is_bias: bool
    weight: str
    bias: str | None
    functions: tuple[Callable[[Tensor], Tensor], ...]
    is_relu: bool
    last: tuple[str, str | None] | None


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
            named = _linear_parameters(call, names)
            if named is None or len(linears) == 2 or len(call.output_shapes[0]) != 2:
                return None
            if linears and value != call.inputs[0]:  # the target reaches the next Linear through its input only
                return None
            linears.append(named)
        elif not linears or (call.name not in _SAME_SHAPE | _DROPOUT and len(linears) == 2):
            return None
        elif call.name in ELEMENTWISE and len(call.inputs) == 1:
            functions.append(call)
        elif not _keeps_values(call):
            return None
        value = call.outputs[0]
    first_weight, first_bias = linears[0]
    return Head(
        is_bias=parameter != first_weight,
        weight=first_weight,
        bias=first_bias,
        functions=tuple(_of_one_tensor(call) for call in functions),
        is_relu=len(functions) == 1 and functions[0].name in ("relu", "relu_"),
        last=linears[1] if len(linears) == 2 else None,
    )


def _linear_parameters(call: Call, names: dict[int, str]) -> tuple[str, str | None] | None:
    """The names of a Linear's weight and bias, if they are the model's own tensors."""
    if len(call.input_shapes[0]) != 2 or len(call.inputs) < 2 or any(value not in names for value in call.inputs[1:]):
        return None
    return names[call.inputs[1]], names[call.inputs[2]] if len(call.inputs) == 3 else None


def _keeps_values(call: Call) -> bool:
    if call.name in _DROPOUT:
        training = call.kwargs.get("training", call.args[2] if len(call.args) > 2 else True)
        return training is False
    return call.name in _SAME_SHAPE and len(call.inputs) == 1 and call.input_shapes == call.output_shapes


def _of_one_tensor(call: Call) -> Callable[[Tensor], Tensor]:
    """The call as a function of its tensor alone, never in place."""

    def function(tensor: Tensor) -> Tensor:
        return call.function(tensor.clone(), *call.args[1:], **call.kwargs)

    return function


def relu_delta(y: Tensor, d: Tensor) -> Tensor:
    """relu(y + d) - relu(y) without cancellation: max(d, -y) + min(y, 0)."""
    return torch.maximum(d, -y).add_(y.clamp(max=0))


def activate(head: Head, y: Tensor) -> Tensor:
    """The head's elementwise functions, applied in order."""
    if head.is_relu:
        return F.relu(y)
    for function in head.functions:
        y = function(y)
    return y

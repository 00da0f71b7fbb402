"""Straight ways from a parameter to the logits, and the three of them that response functions are made for.

A way is straight where every value that depends on the parameter is used exactly once: by one call, which makes one
value of it. A skip connection over the parameter, a layer used twice or tied weights lead elsewhere. Each call on the
way is of a kind, written as one letter, and a way is recognised by its letters:

    L  Linear on (examples, features); the first takes the parameter as its weight or bias, the others take the value
    C  convolution over two axes; only first, and the parameter is its weight
    r  ReLU                                  f  another elementwise function of one tensor
    s  the same numbers: dropout in eval mode, another view of the same shape
    b  a shift and a scale per channel, or a shift: BatchNorm in eval mode, a shortcut that is added
    c  other channels beside these: torch.cat along the channels
    m  the mean over all positions           v  (examples, channels, 1, 1) flattened to (examples, channels)

In: the recorded calls of a forward pass. Out: a `Head`, an `AveragedConvolution` or a `DeepHead`; None where the way is
any other, and a slower path runs.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ablation.engine.calls import Call, Calls
from ablation.engine.responses.loops.activations import IDENTITY, RELU, Function, find_function

# Functions of one number applied to every entry, with no tensor argument beside it.
ELEMENTWISE = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_",
    "celu", "celu_", "gelu", "silu", "mish", "softplus", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish",
    "hardsigmoid", "logsigmoid", "softsign", "tanhshrink",
}  # fmt: skip
RELUS = {"relu", "relu_"}
DROPOUT = {"dropout", "dropout_", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
SAME_SHAPE = {"flatten", "view", "reshape", "contiguous", "squeeze", "clone", "detach"}
_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}

_HEAD = re.compile("L[rfs]*(Ls*)?")
_DEEP_HEAD = re.compile("Ls*rs*Ls*rs*Ls*")
_AVERAGED = re.compile("C[bcs]*[rf]?[cs]*m[sv]*(L[sv]*)?")


@dataclass(frozen=True)
class Head:
    """A classifier head: target Linear -> elementwise functions -> at most one more Linear."""

    is_bias: bool
    weight: str
    bias: str | None
    functions: tuple[Callable[[Tensor], Tensor], ...]
    function: Function | None  # what `functions` are, where the compiled loops know it
    last: tuple[str, str | None] | None  # the last Linear's weight and bias; None: the target is the last

    @property
    def is_relu(self) -> bool:
        """Whether a ReLU and nothing else follows the target."""
        return self.function == Function(RELU)


@dataclass(frozen=True)
class AveragedConvolution:
    """A convolution whose channels are averaged: Conv -> (BatchNorm, + a shortcut, cat) -> f -> mean -> Linear.

    One weight moves one channel, and all that the last Linear receives of it is one number per example: with s the step
    times BatchNorm's scale and x_p the shifted input channel,

        t = mean_p [ f(y_p + s x_p) - f(y_p) ]           dz = t V[:, channel]

    f is ReLU, none, or another function that the compiled loops know.
    """

    weight: str
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    function: Function
    pool: int  # which of the calls behind the target takes the mean
    last: str | None  # the last Linear's weight; None: the means are the logits


@dataclass(frozen=True)
class DeepHead:
    """Three Linears with a ReLU between each two: the weight and bias of each, by name."""

    linears: tuple[tuple[str, str | None], ...]


def find_straight_way(calls: Calls, parameter: str) -> Head | AveragedConvolution | DeepHead | None:
    """The way from `parameter` to the logits, if it is one of those that response functions are made for."""
    return find_head(calls, parameter) or find_averaged(calls, parameter) or find_three_linears(calls, parameter)


def find_head(calls: Calls, parameter: str) -> Head | None:
    """The head that begins at `parameter`, a Linear's weight or bias, if its way to the logits is one."""
    way = _find_way(calls, parameter)
    if way is None or not _HEAD.fullmatch(way.kinds):
        return None
    functions = [call for kind, call in zip(way.kinds, way.calls, strict=True) if kind in "rf"]
    (weight, bias), *last = way.linears
    return Head(
        is_bias=way.calls[0].inputs.index(calls.parameters[parameter]) == 2,
        weight=weight,
        bias=bias,
        functions=tuple(_of_one_tensor(call) for call in functions),
        function=_known_function(functions),
        last=last[0] if last else None,
    )


def find_averaged(calls: Calls, parameter: str) -> AveragedConvolution | None:
    """The convolution whose weight `parameter` is, if its channels are averaged on the way to the logits."""
    way = _find_way(calls, parameter)
    if way is None or not _AVERAGED.fullmatch(way.kinds):
        return None
    function = _known_function([call for kind, call in zip(way.kinds, way.calls, strict=True) if kind in "rf"])
    if function is None:
        return None
    stride, padding, dilation = _conv_form(way.calls[0])
    return AveragedConvolution(
        weight=parameter,
        stride=stride,
        padding=padding,
        dilation=dilation,
        function=function,
        pool=way.kinds.index("m"),
        last=way.linears[0][0] if way.linears else None,
    )


def find_three_linears(calls: Calls, parameter: str) -> DeepHead | None:
    """The three Linears that begin at `parameter`, a weight, if that is its way to the logits."""
    way = _find_way(calls, parameter)
    if way is None or not _DEEP_HEAD.fullmatch(way.kinds) or way.calls[0].inputs[1] != calls.parameters[parameter]:
        return None
    return DeepHead(tuple(way.linears))


@dataclass(frozen=True)
class _Way:
    """A straight way: the letter of each call, the calls, and the names of its Linears' weights and biases."""

    kinds: str
    calls: tuple[Call, ...]
    linears: list[tuple[str, str | None]]


def _find_way(calls: Calls, parameter: str) -> _Way | None:
    """The way from a parameter to the logits, if it is straight and every call on it is of a known kind."""
    names = {value: name for name, value in calls.parameters.items()}
    way: list[Call] = []
    kinds, value = "", calls.parameters[parameter]
    for call, through in calls.dependents(parameter):
        if through != {value} or call.inputs.count(value) != 1 or len(call.outputs) != 1:
            return None
        kind = _kind_of(call, call.inputs.index(value), names) if way else _first_kind_of(call, value, names)
        if not kind:
            return None
        way.append(call)
        kinds += kind
        value = call.outputs[0]
    if value != calls.logits:
        return None
    linears = [_linear_parameters(call, names) for kind, call in zip(kinds, way, strict=True) if kind == "L"]
    return _Way(kinds, tuple(way), [named for named in linears if named is not None])


def _first_kind_of(call: Call, value: int, names: dict[int, str]) -> str:
    """The letter of the call that takes the parameter; empty where it is of no kind."""
    if call.name == "conv2d":
        return "C" if call.inputs[1] == value and _has_conv_form(call) else ""
    is_linear = call.name == "linear" and call.inputs[0] != value and _linear_parameters(call, names) is not None
    return "L" if is_linear else ""


def _kind_of(call: Call, place: int, names: dict[int, str]) -> str:
    """The letter of a call that takes the value as input number `place`; empty where it is of no kind."""
    is_alone = len(call.inputs) == 1
    if call.name == "linear":
        return "L" if place == 0 and _linear_parameters(call, names) is not None else ""
    if call.name in RELUS and is_alone:
        return "r"
    if call.name in ELEMENTWISE and is_alone:
        return "f"
    if _keeps_values(call):
        return "s"
    if _is_mean_over_positions(call):
        return "m"
    if call.name in SAME_SHAPE and is_alone and call.output_shapes[0] == call.input_shapes[0][:2]:
        return "v"
    if call.name == "cat" and call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0) == 1:
        return "c"
    return "b" if _shifts_and_scales(call, place) else ""


def _linear_parameters(call: Call, names: dict[int, str]) -> tuple[str, str | None] | None:
    """The names of a Linear's weight and bias, if its input has two axes and they are tensors of the model."""
    if len(call.input_shapes[0]) != 2 or len(call.inputs) < 2 or any(value not in names for value in call.inputs[1:]):
        return None
    return names[call.inputs[1]], names[call.inputs[2]] if len(call.inputs) == 3 else None


def _known_function(calls: list[Call]) -> Function | None:
    """The function that at most one call is, where the compiled loops know it."""
    if len(calls) > 1:
        return None
    return find_function(calls[0].name, calls[0].args, calls[0].kwargs) if calls else Function(IDENTITY)


def _keeps_values(call: Call) -> bool:
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


def _conv_arguments(call: Call) -> dict[str, Any]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | dict(zip(names, call.args, strict=False))
    return given | call.kwargs


def _has_conv_form(call: Call) -> bool:
    """Whether a convolution is over all channels of a batch, and its padding is given in numbers."""
    given = _conv_arguments(call)
    return given["groups"] == 1 and not isinstance(given["padding"], str) and len(call.output_shapes[0]) == 4


def _conv_form(call: Call) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding and dilation of a convolution, each down and right."""
    given = _conv_arguments(call)
    numbers = [given[name] for name in ("stride", "padding", "dilation")]
    stride, padding, dilation = ((each, each) if isinstance(each, int) else tuple(each) for each in numbers)
    return stride, padding, dilation


def _is_mean_over_positions(call: Call) -> bool:
    if call.name == "adaptive_avg_pool2d":
        return call.output_shapes[0][2:] == (1, 1)
    if call.name != "mean" or len(call.input_shapes[0]) != 4:
        return False
    axes = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else ())
    return isinstance(axes, list | tuple) and sorted(axis % 4 for axis in axes) == [2, 3]


def _shifts_and_scales(call: Call, place: int) -> bool:
    """Whether a call is BatchNorm in eval mode, or adds a shortcut of the same shape."""
    if call.name == "batch_norm":
        given = inspect.signature(F.batch_norm).bind(*call.args, **call.kwargs).arguments
        return place == 0 and not given.get("training", False)
    is_sum = call.name in _ADDITIONS and not call.kwargs
    return is_sum and len(call.inputs) == 2 and len(set(call.input_shapes)) == 1

"""Whether a convolution's way to the loss is a tail: Conv -> (BatchNorm, + a shortcut, cat) -> f -> mean -> Linear.

Then one weight moves one channel, and all that the last Linear hears of it is one number per example: with s the step
times BatchNorm's scale and x_p the shifted input channel (DESIGN.md 3.4),

    t = mean_p [ f(y_p + s x_p) - f(y_p) ]           dz = t V[:, channel]

f is ReLU, none, or another that the compiled loops know.

In: the recorded calls of a forward pass. Out: a `Tail`, or None where the way is any other. An `OpenTail` runs the
intact network on batches and keeps what the formula needs: float64 from the target on.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ablation.engine.calls import Call, Calls
from ablation.engine.responses.head import DROPOUT, SAME_SHAPE, keeps_values, linear_parameters
from ablation.engine.responses.loops.activations import Function, find_function
from ablation.precision import FromTargetOn, as_found, run_with

_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_RELUS = {"relu", "relu_"}


@dataclass(frozen=True)
class Tail:
    """A convolution's weight, its form, and what comes behind the mean: the last Linear's weight (None: the logits)."""

    weight: str
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    has_relu: bool
    function: Function | None  # in ReLU's place
    pool: int  # which of the calls behind the target takes the mean
    last: str | None


def find_tail(calls: Calls, parameter: str) -> Tail | None:
    """The tail that begins at `parameter`, a convolution's weight, if its way to the logits is one.

    Every value on the way must be used exactly once, but for shortcuts that don't depend on the parameter.
    """
    names = {value: name for name, value in calls.parameters.items()}
    way = list(calls.dependents(parameter))
    if not way or way[-1][0].outputs[:1] != (calls.logits,) or way[0][0].name != "conv2d":
        return None
    conv = _conv_form(way[0][0])
    if conv is None or way[0][0].inputs[1] != calls.parameters[parameter]:
        return None
    value, pool, has_relu, last = way[0][0].outputs[0], None, False, None
    function: Function | None = None
    for position, (call, through) in enumerate(way[1:], start=1):
        if through != {value} or call.inputs.count(value) != 1 or len(call.outputs) != 1:
            return None
        if pool is None and _is_mean_over_positions(call):
            pool = position
        elif pool is None and not has_relu and function is None and call.name in _RELUS:
            has_relu = True
        elif pool is None and not has_relu and function is None and (found := _known_function(call)) is not None:
            function = found
        elif pool is None and (
            _is_cat(call) or (not has_relu and function is None and _shifts_and_scales(call, value))
        ):
            pass
        elif pool is not None and call.name == "linear" and last is None and call.inputs[0] == value:
            named = linear_parameters(call, names)
            if named is None:
                return None
            last = named[0]
        elif not (call.name in DROPOUT and keeps_values(call)) and not _flattens(call, pool):
            return None
        value = call.outputs[0]
    return None if pool is None else Tail(parameter, *conv, has_relu, function, pool, last)


def _conv_form(call: Call) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | dict(zip(names, call.args, strict=False))
    given |= call.kwargs
    numbers = [given[name] for name in ("stride", "padding", "dilation")]
    if given["groups"] != 1 or any(isinstance(each, str) for each in numbers) or len(call.output_shapes[0]) != 4:
        return None
    stride, padding, dilation = ((each, each) if isinstance(each, int) else tuple(each) for each in numbers)
    return stride, padding, dilation


def _known_function(call: Call) -> Function | None:
    return find_function(call.name, call.args, call.kwargs) if len(call.inputs) == 1 else None


def _is_mean_over_positions(call: Call) -> bool:
    if call.name == "adaptive_avg_pool2d":
        return call.output_shapes[0][2:] == (1, 1)
    if call.name != "mean" or len(call.input_shapes[0]) != 4:
        return False
    axes = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else ())
    return isinstance(axes, list | tuple) and sorted(axis % 4 for axis in axes) == [2, 3]


def _shifts_and_scales(call: Call, value: int) -> bool:
    """BatchNorm in eval mode, or a shortcut that is added."""
    if call.name == "batch_norm":
        given = inspect.signature(F.batch_norm).bind(*call.args, **call.kwargs).arguments
        return call.inputs[0] == value and not given.get("training", False)
    is_sum = call.name in _ADDITIONS and not call.kwargs
    return is_sum and len(call.inputs) == 2 and len(set(call.input_shapes)) == 1


def _is_cat(call: Call) -> bool:
    """Other channels beside these."""
    return call.name == "cat" and call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0) == 1


def _flattens(call: Call, pool: int | None) -> bool:
    shape = call.input_shapes[0]
    return pool is not None and call.name in SAME_SHAPE and call.output_shapes[0] == shape[:2] and len(call.inputs) == 1


@dataclass(frozen=True)
class TailBatch:
    """What the intact network computes of one batch, as the tail needs it."""

    x: Float[Tensor, "examples inputs height width"]  # the convolution's input
    y: Float[Tensor, "examples channels positions"]  # before f: of the target's channels alone
    scale: Float[Tensor, " channels"]  # what BatchNorm multiplies them by
    first: int  # where they lie among the last Linear's inputs
    logits: Float[Tensor, "examples classes"]


class OpenTail:
    """A tail with its model."""

    def __init__(self, model: torch.nn.Module, tail: Tail, dtype: torch.dtype) -> None:
        self.model = model
        self.tail = tail
        self.weight = model.get_parameter(tail.weight).detach().to(dtype)

    def run(self, inputs: Tensor) -> TailBatch:
        """The intact network on one batch."""
        watch = _Watch(self.weight, self.tail)
        with as_found(self.model):
            logits = run_with(self.model, self.tail.weight, self.weight, inputs, mode=watch)
        assert watch.x is not None
        assert watch.y is not None
        return TailBatch(watch.x, watch.y, watch.scale, watch.first, logits)


class _Watch(FromTargetOn):
    """Follows the target's channels from call to call, and keeps what goes in on both ends."""

    def __init__(self, target: Tensor, tail: Tail) -> None:
        super().__init__(target)
        self.tail = tail
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        self.scale = target.new_ones(len(target))
        self.first = 0
        self._value: Tensor = target
        self._position = 0

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = getattr(call, "__name__", "")
        if not any(leaf is self._value for leaf in leaves) or name == "__get__":
            return super().__torch_function__(call, types, args, kwargs)
        is_pool = self._position == self.tail.pool
        if self._position == 0:
            self.x = leaves[0].clone()
        elif name == "batch_norm":
            given = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {})).arguments
            self._scale(given)
        elif name == "cat":
            self.first = 0
            for leaf in leaves[: [leaf is self._value for leaf in leaves].index(True)]:
                self.first += leaf.shape[1]
        elif self.y is None and (is_pool or name in _RELUS or find_function(name, args, kwargs or {}) is not None):
            self.y = self._value[:, self._own].flatten(2).clone()
        result = super().__torch_function__(call, types, args, kwargs)
        if isinstance(result, Tensor):
            self._value = result
            self._position += 1
        return result

    @property
    def _own(self) -> slice:
        """The target's channels among those of the value that is followed."""
        return slice(self.first, self.first + len(self.scale))

    def _scale(self, given: dict[str, Any]) -> None:
        own = self._own
        scale = (given["running_var"][own].to(self.scale.dtype) + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"][own].to(self.scale.dtype)
        self.scale = self.scale * scale

"""Records one forward pass call by call, to find out what a network does with its parameters.

In: a model and a small batch. Out: `Calls`, from which the path a parameter takes to the logits can be read.
Nothing is traced into a graph that has to run again; calls are only observed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ablation.precision import LOOKS, as_found, in_own_precision, run


@dataclass(frozen=True)
class Call:
    """One call of a torch function with its input and output values; a value is a tensor at one point in time."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    flops: float

    @property
    def name(self) -> str:
        """The function's own name."""
        return getattr(self.function, "__name__", "")


@dataclass
class Calls:
    """All calls of one forward pass, in order, and the values of the parameters, the buffers and the logits."""

    calls: list[Call] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    logits: int = -1
    n_examples: int = 0
    n_classes: int = 0

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole pass, per example."""
        return sum(call.flops for call in self.calls) / self.n_examples

    def dependents(self, parameter: str) -> Iterator[tuple[Call, set[int]]]:
        """The calls whose result depends on `parameter`, in order, each with those of its inputs that do."""
        reached = {self.parameters[parameter]}
        for call in self.calls:
            if through := reached.intersection(call.inputs):
                reached.update(call.outputs)
                yield call, through


class _Recorder(TorchFunctionMode):
    def __init__(self, parameters: dict[str, Tensor], count_flops: bool) -> None:
        super().__init__()
        self._count_flops = count_flops
        self.record = Calls()
        self._values: dict[int, int] = {}
        self._alive: list[Tensor] = []  # keeps ids valid, which are reused after a tensor is freed
        for name, tensor in parameters.items():
            self.record.parameters[name] = self.value(tensor)

    def value(self, tensor: Tensor) -> int:
        if id(tensor) not in self._values:
            self._new_value(tensor)
        return self._values[id(tensor)]

    def _new_value(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        self._values[id(tensor)] = len(self._alive)
        return len(self._alive)

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(call, "__name__", "")
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = tuple(self.value(tensor) for tensor in taken)
        flops = 0.0
        if self._count_flops:
            with FlopCounterMode(display=False) as counter:
                result = call(*args, **kwargs)
            flops = float(counter.get_total_flops())
        else:
            result = call(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not tensors and (name == "__get__" or name in LOOKS):
            return result
        self.record.calls.append(
            Call(
                call,
                args,
                kwargs,
                inputs,
                tuple(self._new_value(tensor) for tensor in tensors),
                tuple(tuple(tensor.shape) for tensor in taken),
                tuple(tuple(tensor.shape) for tensor in tensors),
                flops,
            )
        )
        return result


def record_calls(model: torch.nn.Module, inputs: Any, *, count_flops: bool = False) -> Calls:
    """Run the model once on `inputs` and record every call; with `count_flops` also its flops (slow at first use)."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    recorder = _Recorder(tensors, count_flops)
    with as_found(model), in_own_precision(model), recorder:
        logits = run(model, inputs)
    recorder.record.logits = recorder.value(logits)
    recorder.record.n_examples, recorder.record.n_classes = logits.shape[0], logits.shape[-1]
    return recorder.record

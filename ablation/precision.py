"""Float64 from the target parameter on: the part of the network before it runs as users run it.

A network is float32, its target parameter alone is float64. Every call that sees a float64 tensor is run in float64;
calls that don't, the prefix, stay as they are. So nothing needs to be traced or cut, and any PyTorch model works.

Not here: what is computed with it (`reference.py`, `engine/`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

_NARROWING = {"float", "to", "type", "type_as", "half", "bfloat16"}  # methods that would throw float64 away again


def _name(call: Callable[..., Any]) -> str:
    return getattr(call, "__name__", "")


def _writes_in_place(call: Callable[..., Any]) -> bool:
    name = _name(call)
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__")


class Float64Spreads(TorchFunctionMode):
    """While active, whatever depends on a float64 tensor is computed in float64, whatever the model casts it to."""

    def __init__(self) -> None:
        super().__init__()
        # A float32 tensor that was written to in place lives on in float64: id -> (the tensor, what it is now).
        self._successors: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call, in float64 if one of its tensors is."""
        kwargs = kwargs or {}
        if self._successors:
            args, kwargs = tree_map_only(Tensor, self._now, (args, kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._look_at(tensors)
        if not any(tensor.dtype == torch.float64 for tensor in tensors):
            return call(*args, **kwargs)
        if _name(call) in _NARROWING and args and args[0].dtype == torch.float64:
            result = call(*args, **kwargs)
            return args[0].to(result.device) if result.is_floating_point() else result
        if kwargs.get("dtype") in (torch.float32, torch.float16, torch.bfloat16):
            kwargs = {**kwargs, "dtype": torch.float64}
        lifted, lifted_kwargs = tree_map_only(Tensor, _lift, (args, kwargs))
        result = call(*lifted, **lifted_kwargs)
        if _writes_in_place(call) and args and lifted[0] is not args[0]:
            self._successors[id(args[0])] = (args[0], lifted[0])
        return result

    def _look_at(self, tensors: list[Tensor]) -> None:
        """What subclasses want to know of a call's tensors."""

    def _now(self, tensor: Tensor) -> Tensor:
        return self._successors[id(tensor)][1] if id(tensor) in self._successors else tensor


class FromTargetOn(Float64Spreads):
    """While active, whatever depends on `target` (a float64 tensor) is computed in float64.

    `seen` tells whether any call has used the target so far: everything before that is the prefix.
    """

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.seen = False

    def _look_at(self, tensors: list[Tensor]) -> None:
        self.seen = self.seen or any(tensor is self.target for tensor in tensors)


def in_own_precision(model: torch.nn.Module) -> AbstractContextManager[object]:
    """The mode in which a model runs as it is: a float64 one stays float64 even where its code casts to float32."""
    wide = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return Float64Spreads() if wide else nullcontext()


def _lift(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def as_found(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model in eval mode without gradients; afterwards its mode and torch's random state are as they were."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield model
    finally:
        for module, training in modes.items():
            module.training = training


def run_with(
    model: torch.nn.Module, parameter: str, tensor: Tensor, inputs: Any, *, mode: FromTargetOn | None = None
) -> Tensor:
    """The logits of `model` with `parameter` replaced by `tensor` for this one call, float64 from there on."""
    with mode or FromTargetOn(tensor):
        output = torch.func.functional_call(model, {parameter: tensor}, (inputs,))
        return logits_of(output)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, or its `.logits`."""
    return output if isinstance(output, Tensor) else output.logits

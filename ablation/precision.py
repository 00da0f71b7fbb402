"""Float64 from the target parameter on; the network before it runs as users run it.

A network is float32, its target parameter alone is float64. Every call that sees a float64 tensor is run in float64;
calls that don't, the prefix, stay as they are. So nothing needs to be traced or cut, and any PyTorch model works.

Not here: the computations that use it (`reference.py`, `engine/`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ablation.sharing import replaced

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NARROWING = {"float", "to", "type", "type_as", "half", "bfloat16"}  # methods that would convert float64 back


class Lifts:
    """Parameters in float64, each converted once however often it is requested, and the originals."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor, tuple[int, int]]] = {}
        self._narrow: dict[int, Tensor] = {}

    def lift(self, tensor: Tensor) -> Tensor:
        """The tensor in float64."""
        if not isinstance(tensor, torch.nn.Parameter) or tensor.dtype not in _NARROW:
            return _lift(tensor)
        own, wide, versions = self._held.get(id(tensor), (None, tensor, (0, 0)))
        if own is None or versions != (own._version, wide._version):
            wide = tensor.detach().double()
            self._held[id(tensor)] = (tensor, wide, (tensor._version, wide._version))
            self._narrow[wide.untyped_storage()._cdata] = tensor.detach()
        return wide

    def narrow(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert to a narrower type; a lifted parameter, or a view of it, becomes the original again."""
        own = self._narrow.get(tensor.untyped_storage()._cdata)
        if own is None or own.dtype != dtype or tensor.dtype == dtype:
            return tensor.to(dtype)
        return own.as_strided(tensor.shape, tensor.stride(), own.storage_offset() + tensor.storage_offset())


class Float64Spreads(TorchFunctionMode):
    """While active, whatever depends on a float64 tensor is computed in float64, whatever the model casts it to."""

    def __init__(self, lifts: Lifts | None = None) -> None:
        super().__init__()
        self.lifts = lifts or Lifts()

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call, in float64 if one of its tensors is float64."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not _looks(call):
            self._look_at(tensors)
        if not any(tensor.dtype == torch.float64 for tensor in tensors):
            return call(*args, **kwargs)
        if _name(call) in _NARROWING and args and args[0].dtype == torch.float64:
            result = call(*args, **kwargs)
            return args[0].to(result.device) if result.is_floating_point() else result
        for tensor in _written(call, args, kwargs):
            self._widen(tensor)
        args, kwargs = tree_map_only(
            torch.dtype, lambda dtype: torch.float64 if dtype in _NARROW else dtype, (args, kwargs)
        )
        args, kwargs = tree_map_only(Tensor, self.lifts.lift, (args, kwargs))
        return call(*args, **kwargs)

    def _look_at(self, tensors: list[Tensor]) -> None:
        """Hook for subclasses, called with a call's tensors."""

    def _widen(self, tensor: Tensor) -> None:
        """Convert a tensor that is about to be written to, under all its names; for a view, its base, too."""
        base = tensor if tensor._base is None else tensor._base
        if base.dtype not in _NARROW:
            return
        base.data = base.double()
        if base is not tensor:
            tensor.data = base.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


# Methods that read a tensor's metadata and not its numbers, such as attributes and questions about its memory.
LOOKS = {
    "size", "dim", "numel", "stride", "is_contiguous", "element_size", "is_floating_point", "get_device", "__len__",
}  # fmt: skip
_FORM = LOOKS | {
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "is_leaf", "is_quantized", "is_sparse",
    "untyped_storage", "is_inference", "_version", "data_ptr", "storage_offset", "_base",
}  # fmt: skip


def _name(call: Callable[..., Any]) -> str:
    return getattr(call, "__name__", "")


def _looks(call: Callable[..., Any]) -> bool:
    """Whether a call reads a tensor's metadata and not its numbers."""
    name = _name(call)
    return (_name(call.__self__) if name == "__get__" and hasattr(call, "__self__") else name) in _FORM


def _written(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to: `out=`, and the first argument of in-place methods and assignments."""
    name = _name(call)
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    in_place = in_place or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    places = [kwargs.get("out"), args[0] if in_place and args else None, args[0] if kwargs.get("inplace") else None]
    return [leaf for leaf in tree_leaves(places) if isinstance(leaf, Tensor)]


class FromTargetOn(Float64Spreads):
    """While active, whatever depends on `target` (a float64 tensor) is computed in float64.

    `seen` tells whether any call has used the target so far: everything before that is the prefix. `on_look` is told
    what each call is given, but for those that look at a tensor's form only.
    """

    def __init__(self, target: Tensor, lifts: Lifts | None = None) -> None:
        super().__init__(lifts)
        self.target = target
        self.views: list[Tensor] = []  # of the target, that the model holds in other places
        self.seen = False
        self.on_look: Callable[[list[Tensor]], None] | None = None

    def _look_at(self, tensors: list[Tensor]) -> None:
        self.seen = self.seen or any(tensor is own for own in (self.target, *self.views) for tensor in tensors)
        if self.on_look is not None:
            self.on_look(tensors)


def in_own_precision(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Mode that runs a model as it is; a float64 model stays float64 even where its code casts to float32."""
    wide = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return Float64Spreads() if wide else nullcontext()


def _lift(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def fit(inputs: Any, model: torch.nn.Module) -> Any:
    """The inputs in the precision and on the device of the model's first floating parameter; whole numbers stay."""
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return inputs.to(first.device, first.dtype) if inputs.is_floating_point() else inputs.to(first.device)


@contextmanager
def as_found(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Context with the model in eval mode without gradients; restores its mode and torch's random state."""
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
    model: torch.nn.Module, parameter: str, tensor: Tensor, inputs: Tensor, *, mode: FromTargetOn | None = None
) -> Any:
    """Run `model` once with `parameter` replaced by `tensor`, in float64 from there on, and return the logits."""
    mode = mode or FromTargetOn(tensor)
    with replaced(model, model.get_parameter(parameter), tensor) as mode.views, mode:
        return run(model, inputs)


def run(model: torch.nn.Module, inputs: Tensor) -> Any:
    """Run the model on a copy of the inputs (it may write to them); returns its `.logits`, or else its output."""
    output = model(inputs.clone())
    return getattr(output, "logits", output)

"""A caller's model is left as it was found: what its forward pass changes in it is put back.

In: a model, for the time of a job. Out: its parameters, buffers and attributes as before, bit by bit, and the random
states of Python, numpy and torch. A forward pass that writes to a parameter (`nn.Embedding(max_norm=...)` renormalises
its weight) leaves no fixed weights to ablate, so such a model is refused.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ablation.errors import ModelError
from ablation.sharing import find_holders, modules_of

COPIED_BYTES = 1 << 24  # models up to this size are copied at once; of larger ones, what is about to be written to

P = ParamSpec("P")
R = TypeVar("R")

_turn = threading.RLock()  # held by the one thread that works on a caller's model


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """Let one thread of the process at a time run this function; the others wait.

    While a model is worked on, its parameters are replaced and its modules wrapped, and the random states and torch's
    number of threads are those of the job: other threads' jobs share all of that, on this model or another.
    """

    @wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with _turn:
            return function(*args, **kwargs)

    return waiting


class Writes(TorchDispatchMode):
    """While active, keeps a copy of every parameter that a call is about to write to, by its name."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.copies: dict[str, tuple[Tensor, Tensor]] = {}  # the parameter, and what it held
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.layout == torch.strided and not torch.nn.parameter.is_lazy(parameter):
                self._by_storage.setdefault(parameter.untyped_storage()._cdata, []).append((name, parameter))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation; what it writes to is copied before."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
            written = [
                given.get(each.name)
                for each in func._schema.arguments
                if each.alias_info is not None and each.alias_info.is_write
            ]
            for tensor in tree_leaves(written):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    for name, parameter in self._by_storage.get(tensor.untyped_storage()._cdata, ()):
                        self.copies.setdefault(name, (parameter, parameter.detach().clone()))
        return func(*args, **kwargs)

    def restore(self) -> str | None:
        """Put back what has changed, and return the name of the first parameter that had."""
        changed = [name for name, (parameter, copy) in self.copies.items() if not is_same(parameter, copy)]
        for name in changed:
            write(*self.copies[name])
        return changed[0] if changed else None


class Unchanged:
    """Notices parameters that are written to while a job runs, by torch's own count of writes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.versions = _versions(model)

    def check(self, writes: Writes | None = None) -> None:
        """Refuse a model that has changed a parameter; those that `writes` has a copy of are compared with it.

        Raises:
            ModelError: a parameter was written to, and is not known to be the same.
        """
        name = writes.restore() if writes else None
        if name is not None:
            raise refusal(self.model, name)
        copied = writes.copies if writes else {}
        for name, version in _versions(self.model).items():
            if name not in copied and version != self.versions.get(name):
                raise refusal(self.model, name)


def _versions(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(each), _version(each)) for name, each in model.named_parameters()}


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def refusal(model: torch.nn.Module, name: str, what: str = "") -> ModelError:
    """The error about a model whose forward pass changes the parameter called `name`."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return ModelError(
        f"the forward pass changes {name} (of {type(owner).__name__}), so there are no fixed weights to ablate{what}; "
        "allowed: models whose forward pass leaves their parameters as they are. For max_norm, run the embedding over "
        "all its rows once and set max_norm=None."
    )


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is equal to NaN."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    return torch.equal(tensor, other) or bool(((tensor == other) | ((tensor != tensor) & (other != other))).all())


def write(tensor: Tensor, numbers: Tensor) -> None:
    """Overwrite a tensor's numbers in its own memory, unseen by autograd and by torch's count of writes."""
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        (tensor if tensor.is_inference() else tensor.data).copy_(numbers)


class _Kept:
    """What a model was before a job: where its tensors lie, what they held, and its modules' attributes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        held = {id(holder.tensor): holder for holder in reversed(find_holders(model))}
        n_bytes = sum(holder.tensor.numel() * holder.tensor.element_size() for holder in held.values())
        self.tensors = [holder.tensor for holder in held.values()]
        self.memory = [tensor.detach() for tensor in self.tensors]
        self.copies = [
            memory.clone() if holder.kind == "_buffers" or n_bytes <= COPIED_BYTES else None
            for holder, memory in zip(held.values(), self.memory, strict=True)
        ]
        self.attributes = [(module, _attributes(module)) for module in modules_of(model)]

    def restore(self) -> None:
        """Put all of it back."""
        for module, attributes in self.attributes:
            own = vars(module)
            for name in [name for name in own if name not in attributes]:
                del own[name]
            for name, (value, content) in attributes.items():
                own[name] = value
                if isinstance(value, list) and content is not None:
                    value[:] = content
                elif isinstance(value, dict | set) and content is not None:
                    value.clear()
                    value.update(content)
        for tensor, memory, copy in zip(self.tensors, self.memory, self.copies, strict=True):
            if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
                tensor.data = memory
            if copy is not None and not is_same(memory, copy):
                write(memory, copy)


def _attributes(module: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes, its dictionaries of parameters and buffers among them, with what containers hold."""

    def content(name: str, value: Any) -> Any:
        if type(value) in (list, set) or (type(value) is dict and name != "_modules"):
            return value.copy()
        return None

    return {name: (value, content(name, value)) for name, value in vars(module).items()}


@contextmanager
def left_alone(model: torch.nn.Module) -> Iterator[None]:
    """Context that puts back what the model's forward pass changes in it, and the random states that it draws from."""
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"})
    drawn = random.getstate(), np.random.get_state()
    kept = _Kept(model)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        kept.restore()

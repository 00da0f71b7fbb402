"""Numbers that a model holds in several places: found by where they lie in memory, and one object while a job runs.

Two Parameters may share a storage (`b.weight.data = a.weight.data`, `load_state_dict(assign=True)`), a buffer or a
plain attribute may be a parameter's memory under another name, and a decoder's weight may be an encoder's, transposed.
An ablation changes the number itself, so it has to reach all of them. Everything else in this package recognises a
parameter by its object. So what lies at the same place in memory is made one object (`tied`), and what is another view
of a parameter's memory is listed (`Holder.view`), so that whoever replaces the parameter replaces the view, too.

Copies and conversions of a model keep none of this by themselves: `converted` does.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ablation.errors import ModelError

_OWN = ("_parameters", "_buffers", "_modules")  # entries of a module's `__dict__` that are looked at by themselves


@dataclass(frozen=True)
class View:
    """How a tensor lies in the memory of a parameter: shape, strides and offset in numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This view of a contiguous tensor of the parameter's shape."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, eq=False)
class Holder:
    """One place that holds a parameter, or a view of it: a leaf of what `entries[key]` is."""

    module: int  # in the order of `modules_of`
    kind: str  # "_parameters", "_buffers", or "" for a plain attribute
    key: str
    leaf: int
    name: str
    tensor: Tensor

    def entries(self, modules: list[nn.Module]) -> dict[str, Any]:
        """The dictionary that holds it, of these modules."""
        module = modules[self.module]
        return getattr(module, self.kind) if self.kind else vars(module)


# What is known of the models that are tied now: by the id of a parameter, where its numbers are held.
_tied: "WeakKeyDictionary[nn.Module, dict[int, list[tuple[dict[str, Any], Holder, View | None]]]]" = WeakKeyDictionary()


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, and those that it holds in plain attributes, such as a list; in a fixed order."""
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found[module] = None
        hidden = [leaf for _, value in _plain(module) for leaf in tree_leaves(value) if isinstance(leaf, nn.Module)]
        waiting.extend(reversed([child for child in module._modules.values() if child is not None] + hidden))
    return [*found]


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's attributes that may hold tensors or modules, apart from those that torch knows of."""
    kinds = (Tensor, nn.Module, list, tuple, dict)
    return [
        (key, value)
        for key, value in vars(module).items()
        if isinstance(value, kinds) and key not in _OWN and (isinstance(value, Tensor | nn.Module) or len(value))
    ]


def find_holders(model: nn.Module, modules: list[nn.Module] | None = None) -> list[Holder]:
    """Every place of a model that holds numbers in memory, parameters first."""
    modules = modules or modules_of(model)
    names = {module: name for name, module in model.named_modules()}
    prefixes = [names.get(module, type(module).__name__) for module in modules]
    return [
        Holder(number, kind, key, leaf, f"{prefixes[number]}.{key}" if prefixes[number] else key, tensor)
        for kind in ("_parameters", "_buffers", "")
        for number, module in enumerate(modules)
        for key, value in (getattr(module, kind).items() if kind else _plain(module))
        for leaf, tensor in enumerate(tree_leaves(value))
        if isinstance(tensor, Tensor) and _lies_in_memory(tensor)
    ]


def _lies_in_memory(tensor: Tensor) -> bool:
    """Whether the tensor is strided numbers at an address."""
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.numel() == 0:
        return False
    try:
        return tensor.data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # a tensor subclass without memory of its own
        return False


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where the numbers of a tensor lie: equal for two tensors that are the same numbers."""
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), _strides(tensor))


def interval(tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first number to behind its last."""
    length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size()


def tie(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Put one object into all places of a model that hold the same numbers as a parameter.

    Returns the entries that were changed, each with what it held.
    """
    modules, before = modules_of(model), []
    first: dict[tuple[Any, ...], Tensor] = {}
    for holder in find_holders(model, modules):
        place = _place(holder.tensor)
        if holder.kind == "_parameters":
            first.setdefault(place, holder.tensor)
        own = first.get(place)
        if own is None or own is holder.tensor:
            continue
        entries = holder.entries(modules)
        before.append((entries, holder.key, entries[holder.key]))
        _put(entries, holder, own)
    return before


def _put(entries: dict[str, Any], holder: Holder, tensor: Tensor) -> None:
    """Put a tensor into a place; a list or another container is replaced by a new one."""
    if holder.kind or isinstance(entries[holder.key], Tensor):
        entries[holder.key] = tensor
        return
    leaves, form = tree_flatten(entries[holder.key])
    leaves[holder.leaf] = tensor
    entries[holder.key] = tree_unflatten(leaves, form)


@contextmanager
def tied(model: nn.Module) -> Iterator[None]:
    """Context in which numbers that a model holds in several places are one object in all of them."""
    if model in _tied:
        yield
        return
    before = tie(model)
    _tied[model] = {}
    try:
        yield
    finally:
        _tied.pop(model, None)
        for entries, key, value in reversed(before):
            entries[key] = value


def holders_of(model: nn.Module, own: Tensor) -> list[tuple[dict[str, Any], Holder, View | None]]:
    """Every place that holds this parameter's numbers: the dictionary, and a view where it is not all of them in order.

    Raises:
        ModelError: a part of the parameter's memory is held in a way that can't be followed.
    """
    known = _tied.get(model)
    if known is None:
        return _holders_of(model, own)
    if id(own) not in known:
        known[id(own)] = _holders_of(model, own)
    return known[id(own)]


def _holders_of(model: nn.Module, own: Tensor) -> list[tuple[dict[str, Any], Holder, View | None]]:
    modules = modules_of(model)
    if not _lies_in_memory(own):
        return [
            (module._parameters, Holder(number, "_parameters", key, 0, key, own), None)
            for number, module in enumerate(modules)
            for key, held in module._parameters.items()
            if held is own
        ]
    same: list[tuple[dict[str, Any], Holder, View | None]] = []
    for holder in find_holders(model, modules):
        other = holder.tensor
        if other is own or _place(other) == _place(own):
            same.append((holder.entries(modules), holder, None))
        elif _overlap(own, other):
            same.append((holder.entries(modules), holder, _view(own, other, holder.name)))
    return same


def _view(own: Tensor, other: Tensor, name: str) -> View:
    """How `other` lies in `own`, where it lies in it as a whole."""
    view = _inside(own, other)
    if view is None:
        raise ModelError(
            f"{name} has some of the numbers of the layer's parameter, of shape {tuple(own.shape)}, and others, or in "
            "another type; allowed: a layer whose parameter holds all numbers that share its memory, in their order. "
            f"Choose {name} as the layer if it does, or give the two memory of their own (`clone`)."
        )
    return view


def _inside(own: Tensor, other: Tensor) -> View | None:
    """How `other` lies in a contiguous `own`; None where it is not inside of it."""
    (first, last), (begin, end) = interval(own), interval(other)
    offset, rest = divmod(begin - first, own.element_size())
    if other.dtype != own.dtype or rest or begin < first or end > last or not own.is_contiguous():
        return None
    return View(tuple(other.shape), tuple(other.stride()), offset)


def _overlap(own: Tensor, other: Tensor) -> bool:
    """Whether two tensors have any byte in common."""
    (first, last), (begin, end) = interval(own), interval(other)
    if own.device != other.device or begin >= last or first >= end:
        return False
    if own.is_contiguous() and first <= begin and end <= last:
        return True
    start = min(first, begin)
    taken = torch.zeros(max(last, end) - start, dtype=torch.bool)
    _bytes(taken, own, start).fill_(True)
    return bool(_bytes(taken, other, start).any())


def _bytes(memory: Tensor, tensor: Tensor, start: int) -> Tensor:
    """The places of a tensor's bytes in a picture of the memory from `start` on, one number a byte."""
    shape = [1 if step == 0 else size for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    strides = [step * tensor.element_size() for step in tensor.stride()]
    return memory.as_strided([*shape, tensor.element_size()], [*strides, 1], tensor.data_ptr() - start)


def check_alone(own: Tensor, parameter: str) -> None:
    """Refuse a parameter that has two entries which are one number in memory.

    Raises:
        ModelError: it has, as after `expand`.
    """
    if any(step == 0 and size > 1 for step, size in zip(own.stride(), own.shape, strict=True)):
        raise ModelError(
            f"{parameter} has entries that are one number in memory (strides {tuple(own.stride())}, as after expand), "
            "so none of them can be replaced alone; allowed: a parameter whose entries are numbers of their own. "
            "Ablate the parameter that it was expanded from, or give it memory of its own (`clone`)."
        )


def partly_shared(model: nn.Module) -> set[int]:
    """The ids of the parameters that share some of their memory, but are not the same numbers in the same order."""
    found: set[int] = set()
    for group in _by_storage(find_holders(model)):
        for holder in group:
            if holder.kind == "_parameters" and any(
                other.tensor is not holder.tensor
                and _place(other.tensor) != _place(holder.tensor)
                and _overlap(holder.tensor, other.tensor)
                for other in group
            ):
                found.add(id(holder.tensor))
    return found


def _by_storage(holders: list[Holder]) -> list[list[Holder]]:
    """The holders of more than one tensor of a storage."""
    groups: dict[int, list[Holder]] = {}
    for holder in holders:
        groups.setdefault(holder.tensor.untyped_storage().data_ptr(), []).append(holder)
    return [group for group in groups.values() if len(group) > 1]


@contextmanager
def replaced(model: nn.Module, own: Tensor, tensor: Tensor) -> Iterator[list[Tensor]]:
    """Context with `tensor` in every place where the model holds the numbers of `own`, under every name.

    Gives the views of `tensor` that have been put where the model holds views of `own`.
    """
    before, views = [], []
    try:
        for entries, holder, view in holders_of(model, own):
            before.append((entries, holder.key, entries[holder.key]))
            part = tensor if view is None else view.of(tensor)
            views += [] if view is None else [part]
            _put(entries, holder, part)
        yield views
    finally:
        for entries, key, value in reversed(before):
            entries[key] = value


def converted(model: nn.Module, convert: Callable[[nn.Module], nn.Module], *, is_copied: bool = False) -> nn.Module:
    """A model after `convert` (to another type or device), in which all that shared memory shares it again.

    `is_copied`: convert a copy and leave the model itself as it is.
    """
    with tied(model):
        links = _links(find_holders(model))
        twin = copy.deepcopy(model) if is_copied else model
    if not is_copied:
        tie(twin)
    twin = convert(twin)
    modules = modules_of(twin)
    for holder, base, view in links:
        own = base.entries(modules)[base.key]
        if view is None:
            linked = own
        else:
            part = view.of(own.detach())
            linked = nn.Parameter(part, holder.tensor.requires_grad) if holder.kind == "_parameters" else part
        _put(holder.entries(modules), holder, linked)
    return twin


def _links(holders: list[Holder]) -> list[tuple[Holder, Holder, View | None]]:
    """What shares memory with a parameter, each with a holder of that parameter: the one that has the most of it."""
    links: list[tuple[Holder, Holder, View | None]] = []
    for group in _by_storage(holders):
        parameters = [holder for holder in group if holder.kind == "_parameters"]
        sizes = {id(holder.tensor): interval(holder.tensor) for holder in parameters}
        parameters.sort(key=lambda holder: sizes[id(holder.tensor)][0] - sizes[id(holder.tensor)][1])  # the largest
        parameters.sort(key=lambda holder: not holder.tensor.is_contiguous())
        for place, holder in enumerate(parameters + [other for other in group if other.kind != "_parameters"]):
            for base in parameters[:place]:
                if base.tensor is holder.tensor:
                    links.append((holder, base, None))
                    break
                view = _inside(base.tensor, holder.tensor)
                if view is not None:
                    links.append((holder, base, view))
                    break
    return links

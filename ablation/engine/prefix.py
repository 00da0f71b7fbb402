"""The prefix runs once per batch: the outputs of modules that end before the target are kept and replayed.

On the first run, every module whose whole forward pass happens before the target is first used keeps its output;
while `replay` is on, it returns that output instead of computing it again. So a run for more ablations costs only what
comes after the target, in any model, without knowing how it is built.

The numbers of most outputs are read by other remembered modules alone. Such outputs are found while remembering, not
kept, and replaced by uninitialised memory of the same layout.

A module that writes to its only input and returns it (an in-place ReLU) is remembered by what it wrote. A module that
returns its input unchanged, or does more than that, runs again each time; so does functional code in a parent's
forward. That is slower, not wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ablation.cache import Activations
from ablation.precision import FromTargetOn


@dataclass(frozen=True)
class Layout:
    """The layout of an output whose numbers nobody reads."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Output:
    """The output of one call of a module, or what the call wrote into its input."""

    value: Any  # tensors; `Layout` in place of those that nobody reads
    in_place: bool


Record = list[list[Output | None]]  # by module, then by call; None: the call runs again


class Prefix:
    """Remembered outputs of one batch: for each module, those of its calls that ended before the target was used."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [
            module
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule) and "forward" not in vars(module)
        ]
        self.record: Record = []

    def first_run(
        self, run: Callable[[], Any], mode: FromTargetOn, inputs: Tensor, activations: Activations | None = None
    ) -> Any:
        """Run the model on a batch and remember its prefix, or take the prefix from an earlier job on the same batch.

        `mode`, active in `run`, tells whether the target has been seen, and which calls read which tensors.
        """
        if activations is None:
            return self._remember(run, mode)
        address = activations.address(inputs)
        kept = activations.get(address)
        if kept is not None:
            self.record = _from_plain(kept)
            with self.replay():
                return run()
        result = self._remember(run, mode)
        activations.put(address, _to_plain(self.record), len(inputs))
        return result

    def _remember(self, run: Callable[[], Any], mode: FromTargetOn) -> Any:
        outputs: dict[torch.nn.Module, list[Output | None]] = {module: [] for module in self._modules}
        readers = _Readers()
        mode.on_look = readers.look

        def wrap(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            inside = [child for child in module.modules() if child is not module and child in outputs]

            def remembered(*args: Any, **kwargs: Any) -> Any:
                if mode.seen:
                    return forward(*args, **kwargs)
                n_before = [len(outputs[child]) for child in inside]
                before = [(leaf, _version(leaf)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                readers.enter()
                result = forward(*args, **kwargs)
                how = None if mode.seen else _how_replayed(before, result)
                if mode.seen or how is None:
                    readers.leave(keep=True)
                    if not mode.seen:
                        outputs[module].append(None)
                    return result
                kept = tree_map_only(Tensor, torch.clone, result)
                readers.leave(keep=False)
                for child, n in zip(inside, n_before, strict=True):  # the outer output makes the inner ones idle
                    del outputs[child][n:]
                outputs[module].append(Output(kept, in_place=how == "in place"))
                readers.name(result, kept)
                return result

            return remembered

        try:
            with _wrapped(self._modules, wrap):
                result = run()
        finally:
            mode.on_look = None
        readers.look([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        read = readers.read
        self.record = [[_without_unread(output, read) for output in outputs[module]] for module in self._modules]
        return result

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Replay remembered calls in the one run of the model inside this context."""
        left = {module: iter(outputs) for module, outputs in zip(self._modules, self.record, strict=True) if outputs}

        def wrap(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def replayed(*args: Any, **kwargs: Any) -> Any:
                output = next(left[module], None)
                if output is None:
                    return forward(*args, **kwargs)
                if not output.in_place:
                    return _give(output.value)
                written = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
                return written.copy_(output.value) if isinstance(output.value, Tensor) else written

            return replayed

        with _wrapped(list(left), wrap):
            yield


class _Readers:
    """Finds which remembered values are read by calls that every replay makes again."""

    def __init__(self) -> None:
        self.read: set[int] = set()  # by the id of the kept tensor
        self._frames: list[set[int]] = [self.read]
        self._names: dict[int, tuple[Tensor, set[int]]] = {}  # by storage, kept alive: the values in it

    def look(self, tensors: list[Tensor]) -> None:
        """Record that a call reads these tensors."""
        for tensor in tensors:
            _, values = self._names.get(tensor.untyped_storage()._cdata, (None, ()))
            self._frames[-1].update(values)

    def enter(self) -> None:
        """Begin a module; whether its calls will be made again is known when it ends."""
        self._frames.append(set())

    def leave(self, *, keep: bool) -> None:
        """End a module; what its calls read counts only if they are made again (`keep`)."""
        frame = self._frames.pop()
        if keep:
            self._frames[-1].update(frame)

    def name(self, result: Any, kept: Any) -> None:
        """Record that the memory of `result` holds the kept values from now on."""
        pairs = [
            (own, copy)
            for own, copy in zip(tree_leaves(result), tree_leaves(kept), strict=True)
            if isinstance(own, Tensor)
        ]
        for own, _ in pairs:
            self._names[own.untyped_storage()._cdata] = (own, set())
        for own, copy in pairs:
            self._names[own.untyped_storage()._cdata][1].add(id(copy))


def _without_unread(output: Output | None, read: set[int]) -> Output | None:
    if output is None:
        return None

    def without_numbers(tensor: Tensor) -> Tensor | Layout:
        is_read = id(tensor) in read
        return tensor if is_read else Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    return Output(tree_map_only(Tensor, without_numbers, output.value), output.in_place)


def _give(value: Any) -> Any:
    """Return a copy, since later calls may write to it; uninitialised memory where nobody reads the numbers."""
    return tree_map_only((Tensor, Layout), _give_leaf, value)


def _give_leaf(leaf: Tensor | Layout) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)


def _to_plain(record: Record) -> Any:
    """The record as lists, tuples, names and tensors, which can be loaded without running code."""

    def plain(leaf: Any) -> Any:
        is_form = isinstance(leaf, Layout)
        return ("form", leaf.shape, leaf.stride, leaf.dtype, str(leaf.device)) if is_form else leaf

    return [
        [
            None if output is None else (tree_map_only(Layout, plain, output.value), output.in_place)
            for output in outputs
        ]
        for outputs in record
    ]


def _from_plain(kept: Any) -> Record:
    def is_form(value: Any) -> bool:
        return isinstance(value, tuple) and value[:1] == ("form",)

    def leaf(value: Any) -> Any:
        return Layout(value[1], value[2], value[3], torch.device(value[4])) if is_form(value) else value

    return [
        [
            None if output is None else Output(tree_map(leaf, output[0], is_leaf=is_form), output[1])
            for output in outputs
        ]
        for outputs in kept
    ]


def _version(tensor: Tensor) -> int:
    """The number of writes to the tensor so far."""
    return -1 if tensor.is_inference() else tensor._version


def _how_replayed(inputs: list[tuple[Tensor, int]], result: Any) -> str | None:
    """How the call is replayed: by returning its result, by writing it into its one input, or (None) not at all."""
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    written = [tensor for tensor, version in inputs if _version(tensor) != version]
    if written:
        alone = len(inputs) == 1 and len(leaves) == 1 and leaves[0] is inputs[0][0] is result
        return "in place" if alone and _fills_its_storage(written[0]) else None
    given = {tensor.untyped_storage().data_ptr() for tensor, _ in inputs}
    is_new = bool(leaves) and not any(leaf.untyped_storage().data_ptr() in given for leaf in leaves)
    return "new" if is_new else None


def _fills_its_storage(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


@contextmanager
def _wrapped(modules: list[torch.nn.Module], wrap: Callable[..., Callable[..., Any]]) -> Iterator[None]:
    try:
        for module in modules:
            module.forward = wrap(module, module.forward)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)

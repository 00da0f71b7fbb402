"""The prefix, run once per batch: what the model computed before the target is remembered, module by module.

While `remember` is on, every module whose whole forward pass happens before the target is first used keeps its output;
while `replay` is on, it returns that output instead of computing it again. So a run for one more ablation costs only
what comes after the target, in any model, without knowing how it is built.

A module that works in place, or gives its input back, runs again each time; so does what stands outside of modules
(functional code in a parent's forward): slower, not wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ablation.precision import FromTargetOn

_RUN_AGAIN: Any = object()  # stands for a call that has to be made again: it did more than return something new


class Prefix:
    """Remembered outputs of one batch: for each module, those of its calls that ended before the target was used."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [
            module
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule) and "forward" not in vars(module)
        ]
        self._outputs: dict[torch.nn.Module, list[Any]] = {}

    @contextmanager
    def remember(self, mode: FromTargetOn) -> Iterator[None]:
        """Run the model once inside; `mode` says from when on the target has been seen."""
        self._outputs = {module: [] for module in self._modules}

        def wrap(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            inside = [child for child in module.modules() if child is not module and child in self._outputs]

            def remembered(*args: Any, **kwargs: Any) -> Any:
                n_before = [len(self._outputs[child]) for child in inside]
                before = [(leaf, _version(leaf)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                output = forward(*args, **kwargs)
                if mode.seen:
                    return output
                if _can_be_replayed(before, output):
                    for child, n in zip(inside, n_before, strict=True):  # the outer output makes the inner ones idle
                        del self._outputs[child][n:]
                    self._outputs[module].append(_copy(output))
                else:
                    self._outputs[module].append(_RUN_AGAIN)
                return output

            return remembered

        with _wrapped(self._modules, wrap):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Run the model once inside: remembered calls return what they returned."""

        def wrap(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            left = iter(self._outputs[module])

            def replayed(*args: Any, **kwargs: Any) -> Any:
                output = next(left, _RUN_AGAIN)
                if output is _RUN_AGAIN:
                    return forward(*args, **kwargs)
                return _copy(output)  # a copy: what follows may write to it in place

            return replayed

        with _wrapped([module for module in self._modules if self._outputs[module]], wrap):
            yield


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to."""
    return -1 if tensor.is_inference() else tensor._version


def _can_be_replayed(inputs: list[tuple[Tensor, int]], output: Any) -> bool:
    """Whether returning the output is all that the call did: it wrote to no input, and gave none of them back."""
    if any(_version(tensor) != version for tensor, version in inputs):
        return False
    given = {tensor.untyped_storage().data_ptr() for tensor, _ in inputs}
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return bool(leaves) and not any(leaf.untyped_storage().data_ptr() in given for leaf in leaves)


def _copy(output: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, output)


@contextmanager
def _wrapped(modules: list[torch.nn.Module], wrap: Callable[..., Callable[..., Any]]) -> Iterator[None]:
    try:
        for module in modules:
            module.forward = wrap(module, module.forward)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)

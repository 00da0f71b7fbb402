"""The prefix, run once per batch: what the model computed before the target is remembered, module by module.

While `remember` is on, every module whose whole forward pass happens before the target is first used keeps its output;
while `replay` is on, it returns that output instead of computing it again. So a run for one more ablation costs only
what comes after the target, in any model, without knowing how it is built.

A prefix that is written outside of modules (functional code in a parent's forward) is run again: slower, not wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ablation.precision import FromTargetOn


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
                output = forward(*args, **kwargs)
                if not mode.seen:
                    for child, n in zip(inside, n_before, strict=True):  # the outer output makes the inner ones idle
                        del self._outputs[child][n:]
                    self._outputs[module].append(_copy(output))
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
                for output in left:
                    return _copy(output)  # a copy: what follows may write to it in place
                return forward(*args, **kwargs)

            return replayed

        with _wrapped([module for module in self._modules if self._outputs[module]], wrap):
            yield


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

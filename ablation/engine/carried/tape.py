"""The matrix products of the intact network behind the target, once per batch: every run with deltas needs the same.

In: one pass over a batch. Out: their results, given again in order. Everything else behind the target is cheap beside
the deltas, and runs again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ablation.precision import FromTargetOn

aten = torch.ops.aten
PRODUCTS = {aten.convolution, aten.addmm, aten.mm, aten.bmm, aten.baddbmm}


class Tape(TorchDispatchMode):
    """While active as a mode, records the products that come once `mode` has seen the target."""

    def __init__(self, mode: FromTargetOn) -> None:
        super().__init__()
        self.mode = mode
        self.results: list[tuple[Any, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.mode.seen and _is_product(func, kwargs):
            self.results.append((func, result.clone()))  # what follows may write to it
        return result


class Player:
    """Gives the recorded products to one more run over the same batch."""

    def __init__(self, tape: Tape, mode: FromTargetOn) -> None:
        self.mode = mode
        self._left = iter(tape.results)
        self._is_in_step = True

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of one operation; a run that takes another way than the recorded one computes for itself."""
        if not (self._is_in_step and self.mode.seen and _is_product(func, kwargs)):
            return func(*args, **kwargs)
        recorded, result = next(self._left, (None, None))
        if recorded is func and result is not None:
            return result.clone()
        self._is_in_step = False
        return func(*args, **kwargs)


def _is_product(func: Any, kwargs: dict[str, Any]) -> bool:
    return func.overloadpacket in PRODUCTS and "out" not in kwargs

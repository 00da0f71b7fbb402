"""The matrix products of the intact network behind the target, recorded once per batch and replayed in every later run.

In: one pass over a batch. Out: the results of its products, in order. All other operations behind the target are cheap
compared with the deltas and run again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ablation.precision import FromTargetOn

aten = torch.ops.aten
PRODUCTS = {aten.convolution, aten.addmm, aten.mm, aten.bmm, aten.baddbmm}


class Tape(TorchDispatchMode):
    """Records, while active as a mode, the products that run after `mode` has seen the target."""

    def __init__(self, mode: FromTargetOn) -> None:
        super().__init__()
        self.mode = mode
        self.results: list[tuple[Any, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and record its result if it is a product."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.mode.seen and _is_product(func, kwargs):
            self.results.append((func, result.clone()))  # what follows may write to it
        return result


class Player:
    """Replays the recorded products in one more run over the same batch."""

    def __init__(self, tape: Tape, mode: FromTargetOn) -> None:
        self.mode = mode
        self._left = iter(tape.results)
        self._is_in_step = True

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the recorded result of one operation; once the run differs from the recorded one, compute it."""
        if not (self._is_in_step and self.mode.seen and _is_product(func, kwargs)):
            return func(*args, **kwargs)
        recorded, result = next(self._left, (None, None))
        if recorded is func and result is not None:
            return result.clone()
        self._is_in_step = False
        return func(*args, **kwargs)


def _is_product(func: Any, kwargs: dict[str, Any]) -> bool:
    return func.overloadpacket in PRODUCTS and "out" not in kwargs

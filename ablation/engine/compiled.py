"""Compiled loops: the decorators that pass a function to Numba, and the folder of the machine code.

In: a Python function over numbers and arrays. Out: the same function, compiled at its first call. The compiled code
releases Python's lock, so that threads share its work (`threads.py`).

Numerics: LLVM may reorder sums for vector registers and contract products into fused multiply-adds, but it may not
assume that NaN and infinity don't occur: both propagate.
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}  # LLVM's flags without nnan and ninf
_settings: Any = numba.config
_IMPORT = b"\nfrom ablation.engine.compiled import "
_OWN_CACHE = Path.home() / ".cache" / "weight-ablation"


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a loop, once per machine if the result can be stored. Sums may be reordered for vector registers."""
    return _compiled(function, _FASTMATH)


def part_of_kernel(function: Callable[..., Any]) -> Any:
    """Compile a function inlined in its callers, stored with them, since one source may have several variants."""
    return _compiled(function, _FASTMATH, is_kept=False)


def in_order(function: Callable[..., Any]) -> Any:
    """Compile a function whose sums keep their order, since their terms cancel."""
    return _compiled(function, _FASTMATH - {"reassoc"})


def _compiled(function: Callable[..., Any], fastmath: set[str], *, is_kept: bool = True) -> Any:
    function = inspect.unwrap(function)  # without the type checks of test runs
    # Inlined, since otherwise one compiled loop may call another's copy of a part, which rounds differently: bytes
    # would then depend on what the process has run before.
    options: Any = {"nogil": True, "fastmath": fastmath, "error_model": "numpy", "forceinline": True}
    if not is_kept:
        return numba.njit(**options)(function)
    given, _settings.CACHE_DIR = _settings.CACHE_DIR, _cache_folder()
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to store it in
        return numba.njit(**options)(function)
    finally:
        _settings.CACHE_DIR = given


inlined = numba.njit(inline="always")


def find_loops(engine: Path) -> list[Path]:
    """The files below the engine's folder that define compiled loops, sorted by path."""
    return sorted(path for path in engine.rglob("*.py") if _IMPORT in path.read_bytes())


@cache
def _cache_folder() -> str:
    """Folder of compiled loops, named by the source of all of them, since Numba checks only the file of a loop."""
    here = Path(__file__).parent
    texts = hashlib.blake2b(b"".join(path.read_bytes() for path in find_loops(here)), digest_size=8)
    places = [Path(_settings.CACHE_DIR)] if _settings.CACHE_DIR else [here / "__pycache__", _OWN_CACHE]
    for place in places:
        folder = place / f"loops-{texts.hexdigest()}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return str(folder)
    return ""


def is_ready(*tensors: Tensor) -> bool:
    """Whether the compiled loops take these tensors: float32 on the CPU."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)

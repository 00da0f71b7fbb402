"""Devices to compute on: those that torch finds on this machine, and their description."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ablation.errors import SpecError, say_cause


def find_device(device: str | int | torch.device | None, *, field: str = "device") -> torch.device:
    """Find the device of this name; None: CUDA if there is one, else the CPU. `field` names the setting in errors.

    Raises:
        SpecError: torch does not find the device; the message has torch's reason.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device is None or device == "" else device
    allowed = "a device that torch finds here, such as 'cpu' or 'cuda'"
    if isinstance(name, bool) or not isinstance(name, str | int | torch.device):
        raise SpecError(field, name, allowed)
    try:
        where = torch.device(name)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = say_cause(error).partition(": ")[2] + "."
        raise SpecError(field, str(name), allowed, reason) from None
    if where.type == "meta":
        raise SpecError(field, str(name), allowed, "The device meta has no numbers.")
    return where


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Context in which freed memory stays with the process for reuse; afterwards it returns to the system.

    The C library returns large blocks at once, and the system clears every page that it hands out again; on a CPU that
    took more time than the arithmetic (2 to 4 times as long in all). Only glibc has a setting for it.
    """
    mallopt, trim = _glibc()
    if mallopt is None:
        yield
        return
    for what, value in ((_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20), (_MMAP_MAX, 0)):
        mallopt(what, value)
    try:
        yield
    finally:
        for what, value in ((_TRIM_THRESHOLD, 128 << 10), (_TOP_PAD, 128 << 10), (_MMAP_MAX, 65536)):
            mallopt(what, value)
        trim(0)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # constants of malloc.h


def _glibc() -> tuple[Any, Any]:
    if platform.libc_ver()[0] != "glibc":
        return None, None
    library = ctypes.CDLL(None)
    return library.mallopt, library.malloc_trim


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or its cause, is that the device or the machine ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's error on a CPU
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def describe_device(where: torch.device) -> str:
    """Describe a device by its name and its memory."""
    if where.type != "cuda":
        return f"{where} ({_cpu_name()})"
    found = torch.cuda.get_device_properties(where)
    return f"{where} ({found.name}, {found.total_memory / 1e9:.0f} GB)"


def name_hardware(where: torch.device) -> str:
    """The name of the hardware that the last bits of numbers depend on: of a processor with its instruction set."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

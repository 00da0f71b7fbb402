"""Where is it computed? A device that torch finds here, and what a person calls it."""

import platform
from pathlib import Path

import torch

from ablation.errors import SpecError


def find_device(device: str | torch.device | None, *, field: str = "device") -> torch.device:
    """The device of this name; default: CUDA if there is one, else the CPU. `field` is who named it.

    Raises:
        SpecError: torch does not find it here; the message has torch's reason.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(name)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".") + "."
        raise SpecError(field, str(name), "a device that torch finds here, such as 'cpu' or 'cuda'", reason) from None
    return where


def describe_device(where: torch.device) -> str:
    """What a device is: its name, and how much memory it has."""
    if where.type != "cuda":
        return f"{where} ({_cpu_name()})"
    found = torch.cuda.get_device_properties(where)
    return f"{where} ({found.name}, {found.total_memory / 1e9:.0f} GB)"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

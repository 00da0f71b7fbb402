"""Versions and hardware of a measurement, stored with every result."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def describe_environment() -> dict[str, Any]:
    """Versions, processor, cores and threads."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_result(name: str, result: dict[str, Any]) -> None:
    """Print a result and store it as JSON under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**result, "environment": describe_environment()}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)

"""What does a worker find at its start? Versions, folders with their contents, and registered models and data sets.

In: settings, and what is registered. Out: log lines that list what a job may name, and nothing else. Torch-free: a
worker's parent process logs `describe`, its child the rest, because describing a registered model takes torch.
"""

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from ablation.errors import SpecError
from ablation.inputs.catalog import Registered, find_below
from worker.settings import Settings, hide_password
from worker.store import JobStore, connect

MAX_NAMES = 20  # names that are listed per folder


def describe(settings: Settings) -> str:
    """Describe what a worker with these settings finds, line by line."""
    packages = [f"{name} {version(name)}" for name in ("weight-ablation", "torch", "torchvision")]
    with connect(settings) as client:
        redis, doubts = client.info("server")["redis_version"], JobStore(client).doubts()
    return say(
        ", ".join([*packages, f"Python {platform.python_version()}"]),
        f"Redis {redis} at {hide_password(settings.redis_url)}",
        f"data {settings.data_dir}: {list_folder(settings.data_dir, subfolders)}",
        f"checkpoints {settings.checkpoint_dir}: {list_folder(settings.checkpoint_dir, files_below)}",
        f"cache {settings.cache_dir}",
        *(f"Warning: {doubt}" for doubt in doubts),
    )


def describe_registered(offered: Registered) -> str:
    """Describe the registered models and data sets that a job may name."""
    return say(
        f"registered models: {join(sorted(offered.models))}", f"registered data sets: {join(sorted(offered.datasets))}"
    )


def say(*lines: str) -> str:
    """Write lines to the log, marked as the worker's."""
    return "\n".join(f"worker: {line}" for line in lines)


def subfolders(folder: Path) -> Iterable[Path]:
    """Names of the subfolders, where data sets are; deeper folders may be named too, but most of them are classes."""
    return (path for path in folder.iterdir() if path.is_dir())


def files_below(folder: Path) -> Iterable[Path]:
    """Names of the files below the folder, at any depth."""
    return (path for path in folder.rglob("*") if path.is_file())


def list_folder(folder: Path, find: Callable[[Path], Iterable[Path]]) -> str:
    """List what a job may name in a folder, or the reason why it can't be read."""
    try:
        os.scandir(folder).close()  # raises where `rglob` would silently find nothing
        names = (str(path.relative_to(folder)) for path in find(folder))
        return join(sorted(name for name in names if is_shown(folder, name)))
    except OSError as error:
        return f"can't be read ({error.strerror})"


def is_shown(folder: Path, name: str) -> bool:
    """Whether a job may name the path: it isn't hidden, and no link leads out of the folder."""
    try:
        find_below(folder, name, "name", "")
    except SpecError:
        return False
    return not any(part.startswith(".") for part in Path(name).parts)


def join(names: Sequence[str]) -> str:
    """Join names with commas: the first of many, `none` if there are none."""
    more = [f"and {len(names) - MAX_NAMES:,} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*names[:MAX_NAMES], *more]) or "none"

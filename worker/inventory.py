"""What does a worker find where it starts? Versions, folders and what is in them, what the operator has registered.

In: settings; what is registered. Out: lines for the log that say what a job may name, and nothing else. Torch-free: a
worker's parent process says `describe`, its child the rest, since it takes torch to describe a registered model.
"""

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from ablation.errors import SpecError
from ablation.inputs.catalog import Registered, find_below
from worker.settings import Settings, hide_password
from worker.store import connect

MAX_NAMES = 20  # of a folder full of files, the first ones say enough


def describe(settings: Settings) -> str:
    """What a worker on these settings finds, line by line."""
    packages = [f"{name} {version(name)}" for name in ("weight-ablation", "torch", "torchvision")]
    with connect(settings) as client:
        redis = client.info("server")["redis_version"]
    return say(
        ", ".join([*packages, f"Python {platform.python_version()}"]),
        f"Redis {redis} at {hide_password(settings.redis_url)}",
        f"data {settings.data_dir}: {list_folder(settings.data_dir, subfolders)}",
        f"checkpoints {settings.checkpoint_dir}: {list_folder(settings.checkpoint_dir, files_below)}",
        f"cache {settings.cache_dir}",
    )


def describe_registered(offered: Registered) -> str:
    """What of the operator's own a job may name."""
    return say(
        f"registered models: {join(sorted(offered.models))}", f"registered data sets: {join(sorted(offered.datasets))}"
    )


def say(*lines: str) -> str:
    """Lines as a worker says them."""
    return "\n".join(f"worker: {line}" for line in lines)


def subfolders(folder: Path) -> Iterable[Path]:
    """Where data sets are; deeper ones may be named too, but most of those are classes."""
    return (path for path in folder.iterdir() if path.is_dir())


def files_below(folder: Path) -> Iterable[Path]:
    """Where checkpoints are."""
    return (path for path in folder.rglob("*") if path.is_file())


def list_folder(folder: Path, find: Callable[[Path], Iterable[Path]]) -> str:
    """What is in a folder that a job may name, or why nobody can tell."""
    try:
        os.scandir(folder).close()  # `rglob` would find nothing where it may not look
        names = (str(path.relative_to(folder)) for path in find(folder))
        return join(sorted(name for name in names if is_shown(folder, name)))
    except OSError as error:
        return f"can't be read ({error.strerror})"


def is_shown(folder: Path, name: str) -> bool:
    """Whether a job may name it: no link leads out of the folder. What is hidden is left out."""
    try:
        find_below(folder, name, "name", "")
    except SpecError:
        return False
    return not any(part.startswith(".") for part in Path(name).parts)


def join(names: Sequence[str]) -> str:
    """Names with commas between them: the first of many, `none` of none."""
    more = [f"and {len(names) - MAX_NAMES:,} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*names[:MAX_NAMES], *more]) or "none"

"""What does a worker find where it starts? Versions, folders and what is in them, what the operator has registered.

In: settings. Out: lines for the log. Torch-free: the parent process of a worker says this, its child adds the device.
"""

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from ablation.registered import DATASETS, MODELS, registered_names
from worker.settings import Settings, hide_password
from worker.store import connect

MAX_NAMES = 20  # of a folder full of files, the first ones say enough


def describe(settings: Settings) -> str:
    """What a worker on these settings finds, line by line."""
    packages = [f"{name} {version(name)}" for name in ("weight-ablation", "torch", "torchvision")]
    with connect(settings) as client:
        redis = client.info("server")["redis_version"]
    lines = (
        ", ".join([*packages, f"Python {platform.python_version()}"]),
        f"Redis {redis} at {hide_password(settings.redis_url)}",
        f"data {settings.data_dir}: {list_folder(settings.data_dir, Path.is_dir)}",
        f"checkpoints {settings.checkpoint_dir}: {list_folder(settings.checkpoint_dir, Path.is_file)}",
        f"cache {settings.cache_dir}",
        f"registered models: {join(registered_names(MODELS))}",
        f"registered data sets: {join(registered_names(DATASETS))}",
    )
    return "\n".join(f"worker: {line}" for line in lines)


def list_folder(folder: Path, is_listed: Callable[[Path], bool]) -> str:
    """What is in a folder, or why nobody can tell."""
    try:
        return join(sorted(path.name for path in folder.iterdir() if is_listed(path) and path.name[0] != "."))
    except OSError as error:
        return f"can't be read ({error.strerror})"


def join(names: Sequence[str]) -> str:
    """Names with commas between them: the first of many, `none` of none."""
    more = [f"and {len(names) - MAX_NAMES:,} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*names[:MAX_NAMES], *more]) or "none"

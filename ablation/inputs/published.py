"""What torchvision publishes: ImageNet's classes, and the files and preprocessing of its weights. Torch-free.

In: names, and the file that a checkpoint is. Out: facts out of `published.json` (`make facts`). Files are known by
their SHA-256, with whose first digits torchvision names them, so a renamed one is known, too.
"""

import hashlib
import json
import re
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

_HASH = re.compile(r"-([0-9a-f]{8,})\.pth$")
TRANSFORMS_INPUT = ("googlenet", "inception_v3")  # with torchvision's weights, part of their preprocessing is inside


@cache
def _published() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files("ablation.inputs").joinpath("published.json").read_text("utf-8"))
    return table


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """WordNet id and torchvision's name of every ImageNet class, in the order of their numbers."""
    return tuple((wnid, name) for wnid, name in _published()["classes"])


def default_weights(model: str) -> str:
    """Name of the weights that torchvision takes for a model by default."""
    name: str = _published()["models"][model]["default"]
    return name


def say_preprocessing(model: str, member: str, *, is_member: bool) -> str:
    """The preprocessing of these weights in words; `is_member`: whether the model has these very weights."""
    inside = ""
    if model in TRANSFORMS_INPUT:
        inside = ", then transform_input" if is_member else ", without transform_input"
    return f"{_published()['models'][model]['weights'][member][1]}, of {member}{inside}"


def published_files(model: str) -> dict[str, str]:
    """First digits of the SHA-256 of each file that torchvision publishes for a model, and its weights' name."""
    if model not in _published()["models"]:
        return {}
    found = {name: _HASH.search(file) for name, (file, _) in _published()["models"][model]["weights"].items()}
    return {match[1]: name for name, match in found.items() if match}


def recognise(model: str, path: Path) -> str | None:
    """Name of torchvision's weights that the file `path` holds; None if it is another file."""
    known = published_files(model)
    digest = hash_file(path) if known else ""
    return next((name for digits, name in known.items() if digest.startswith(digits)), None)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, kept until the file changes."""
    stat = path.stat()
    return _hash_file(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_file(path: str, size: int, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

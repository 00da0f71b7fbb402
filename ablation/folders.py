"""Where data sets, checkpoints and the cache are: chosen by the operator, handed down. Torch-free."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    """The three folders that a job may read from; only `cache` is ever written to."""

    data: Path
    checkpoints: Path
    cache: Path

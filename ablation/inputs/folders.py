"""Folders of data sets, checkpoints and the cache, chosen by the operator. Torch-free."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    """The three folders that a job may read from; only `cache` is ever written to.

    Activations kept between jobs take at most `cache_bytes` of it; 0: none are kept.
    """

    data: Path
    checkpoints: Path
    cache: Path
    cache_bytes: int = 0

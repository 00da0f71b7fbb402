"""Where data sets, checkpoints and the cache are: chosen by the operator, handed down. Torch-free."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    """The three folders that a job may read from; only `cache` is ever written to.

    Of it, activations kept between jobs take at most `cache_bytes`; 0: none are kept.
    """

    data: Path
    checkpoints: Path
    cache: Path
    cache_bytes: int = 0

"""What is told of loops that are compiled: on a machine's first jobs that takes seconds in which nothing else happens.

In: a function that tells it. Out: a context in which it is called. Not here: the loops (`engine/compiled.py`), whose
machine code is kept on disk, so that later jobs and other processes don't wait for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event

COMPILING = "compiling loops, which takes seconds and happens once on a machine"


class _Listener(event.Listener):
    """A listener of Numba's that tells of every compilation that begins."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def on_start(self, event: Any) -> None:
        """Tell that a loop is being compiled."""
        self.tell()

    def on_end(self, event: Any) -> None:
        """Do nothing: whatever comes next is told by itself."""


@contextmanager
def compiling_told(tell: Callable[[], None]) -> Iterator[None]:
    """Context in which `tell` is called whenever Numba begins to compile a loop; not where it finds one on disk."""
    with event.install_listener("numba:compile", _Listener(tell)):
        yield

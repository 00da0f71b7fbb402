"""What is told of loops that are compiled: on a machine's first jobs that takes seconds in which nothing else happens.

In: a function that tells it. Out: a context in which it is called. Not here: the loops (`engine/compiled.py`), whose
machine code is kept on disk, so that later jobs and other processes don't wait for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

COMPILING = "compiling loops, which takes seconds and happens once on a machine"


@contextmanager
def compiling_told(tell: Callable[[], None]) -> Iterator[None]:
    """Context in which `tell` is called whenever Numba begins to compile a loop; not where it finds one on disk."""
    from numba.core import event  # loaded here, so that the command line has the text without it

    class Told(event.Listener):
        def on_start(self, event: object) -> None:
            tell()

        def on_end(self, event: object) -> None:
            """Do nothing: whatever comes next is told by itself."""

    with event.install_listener("numba:compile", Told()):
        yield

"""How does a child process die with its parent, even when the parent is killed? By Linux' parent-death signal.

The signal fires when the *thread* that started the child ends, so children are started from a main thread.
Elsewhere than on Linux nothing happens: a killed parent leaves its children behind; stopping in good order still works.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # loaded before any fork


def tether(death_signal: signal.Signals, parent_pid: int) -> None:
    """Run in the child: it gets `death_signal` when its parent (`parent_pid`) dies, also if it already has."""
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), death_signal)

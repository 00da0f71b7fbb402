"""How does a child process die with its parent, even when the parent is killed? By Linux' parent-death signal.

The signal fires when the *thread* that started the child ends, so children are started from a main thread.
On other systems nothing happens: a killed parent leaves its children behind, but a graceful stop works.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # loaded before any fork


def tether(death_signal: signal.Signals, parent_pid: int) -> None:
    """Send this process `death_signal` when its parent (`parent_pid`) dies, or now if it is dead. Run in the child."""
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), death_signal)

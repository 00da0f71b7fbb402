"""Ending a server that a test has started."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stopping(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """Afterwards the process has been told to stop, and is gone."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()

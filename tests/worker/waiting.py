"""Wait for something that another process does."""

import time
from collections.abc import Callable


def wait_for(holds: Callable[[], object], seconds: float) -> None:
    """Return as soon as it holds; fail when it still does not after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.02)

"""What torch finds here, and memory that is freed while a shard runs."""

import platform
import subprocess
import sys

import pytest

from ablation.devices import freed_memory_kept

FREED_MEMORY = """
import psutil, torch
from ablation.devices import freed_memory_kept
here, piece = psutil.Process(), 256 << 20
torch.ones(piece // 4)
before = here.memory_info().rss
with freed_memory_kept():
    torch.ones(piece // 4)
    kept = here.memory_info().rss - before
after = here.memory_info().rss - before
assert kept > piece // 2, kept
assert after < piece // 2, after
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory when it is told to")
def test_freed_memory_stays_inside_and_goes_back_after() -> None:
    """A process of its own, whose allocator has not kept memory of other tests."""
    subprocess.run([sys.executable, "-c", FREED_MEMORY], check=True)


def test_it_ends_also_when_the_work_breaks_off() -> None:
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        raise ZeroDivisionError

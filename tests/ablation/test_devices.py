"""What torch finds here, and memory that is freed while a shard runs."""

import platform

import psutil
import pytest
import torch

from ablation.devices import freed_memory_kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory when it is told to")
def test_freed_memory_stays_inside_and_goes_back_after() -> None:
    here, piece = psutil.Process(), 256 << 20

    def use() -> None:
        torch.ones(piece // 4)

    use()
    before = here.memory_info().rss
    with freed_memory_kept():
        use()
        kept = here.memory_info().rss - before
    after = here.memory_info().rss - before
    assert kept > piece // 2
    assert after < piece // 2


def test_it_ends_also_when_the_work_breaks_off() -> None:
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        raise ZeroDivisionError

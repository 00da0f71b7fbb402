import signal
import subprocess
import sys

import psutil
import pytest

from tests.worker.waiting import wait_for

CHILD = (
    "from worker.parent_death import tether; import os, sys, time; {}; print(os.getpid(), flush=True); time.sleep(60)"
)


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux'")
def test_a_child_dies_with_its_parent() -> None:
    child = CHILD.format("tether(9, os.getppid())")
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.kill()
        wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux'")
def test_a_parent_that_is_dead_already_counts() -> None:
    child = CHILD.format("tether(9, 2**22)")  # nobody's process id
    assert subprocess.run([sys.executable, "-c", child], capture_output=True).returncode == -signal.SIGKILL

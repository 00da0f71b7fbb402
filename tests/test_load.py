"""The load tool, small: it finds nothing where all is well, finds what is not, and leaves no process behind."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.stopping import stopping
from tests.test_end_to_end import connect, serving
from tools import load
from worker import keys

ROOT = Path(__file__).parent.parent
SMALL_QUEUE = ["--jobs", "20", "--polls-per-s", "30", "--poll-s", "10", "--streams", "4"]
PATIENCE_S = 120.0


@contextmanager
def running(tmp_path: Path, *options: str) -> "Iterator[subprocess.Popen[str]]":
    """The tool, with its folder below `tmp_path`."""
    command = [sys.executable, "-m", "tools.load", *options]
    environment = os.environ | {"TMPDIR": str(tmp_path), "ABLATION_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as tool,
        stopping(tool),
    ):
        yield tool


def read_posts(tool: "subprocess.Popen[str]") -> str:
    """What it says until it has posted its jobs."""
    assert tool.stdout
    said = "".join(itertools.takewhile(lambda line: line != "posts\n", tool.stdout))
    assert tool.poll() is None, said
    return said


def number(said: str, phase: str, name: str) -> int:
    """What a phase has told under a name."""
    found = re.search(rf"^{phase}\n(?:  .*\n)*?  {name} +([\d,]+)$", said, re.MULTILINE)
    assert found, said
    return int(found[1].replace(",", ""))


@pytest.mark.slow
def test_all_phases_find_nothing_and_leave_nothing(tmp_path: Path) -> None:
    small = ["--soak", "60", "--table", "small", "--slow-s", "2"]
    with running(tmp_path, *SMALL_QUEUE, *small) as tool:
        said, _ = tool.communicate()
    assert tool.returncode == 0, said
    assert said.endswith("\nlost 0, differed 0, errors 0, grown 0\n")
    assert number(said, "polls", "polls") == 300
    assert number(said, "drain", "succeeded") == number(said, "run again alone", "tables") == 20
    assert number(said, "streams", "done") == 4
    assert number(said, "growth", "jobs") == 60
    assert number(said, "table", "rows") == 65536
    assert number(said, "table", "of them taken slowly") == 2_000_000
    assert [*tmp_path.glob("ablation-load-*")] == []


@pytest.mark.slow
def test_a_lost_job_and_a_table_that_differs_are_found(tmp_path: Path, home: Path) -> None:
    """While the tool polls, one of its jobs is deleted, and one is given the table of another."""
    with (
        serving(tmp_path / "served", home) as server,
        connect(server) as client,
        running(tmp_path, "--server", server.url, "--phases", "queue", *SMALL_QUEUE) as tool,
    ):
        read_posts(tool)
        deadline = time.monotonic() + PATIENCE_S
        while len(done := client.get("/v1/jobs", params={"status": "succeeded"}).json()["data"]) < 3:
            assert time.monotonic() < deadline, done
            time.sleep(0.05)
        deleted, changed, other = (job["id"] for job in done[:3])
        assert client.delete(f"/v1/jobs/{deleted}").status_code == 204
        redis = load.find_service(server.url).redis
        assert redis
        with redis:
            assert redis.copy(keys.table(other), keys.table(changed), replace=True)
        said, _ = tool.communicate()
    assert tool.returncode == 1, said
    assert re.search(r"^lost 1, differed 1, errors [1-9]\d*, grown 0$", said, re.MULTILINE), said
    assert re.search(rf"^  lost: job {deleted}: status 410", said, re.MULTILINE), said
    assert re.search(rf"^  differed: job {changed}: ", said, re.MULTILINE), said


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    with running(tmp_path, "--phases", "queue", *SMALL_QUEUE) as tool:
        read_posts(tool)
        family = psutil.Process(tool.pid).children(recursive=True)
        assert len(family) >= 5  # the supervisor, Redis, the API, the worker, its child
        tool.send_signal(signal.SIGINT)
        tool.communicate()
    assert tool.returncode == 130
    assert psutil.wait_procs(family, timeout=0)[1] == []
    assert [*tmp_path.glob("ablation-load-*")] == []


@pytest.mark.slow
def test_clients_that_do_harm_are_held_off(tmp_path: Path) -> None:
    phases = ["redis-freeze", "half-bodies", "half-heads", "many-streams", "long-spec"]
    with running(tmp_path, "--phases", *phases) as tool:
        said, _ = tool.communicate()
    assert tool.returncode == 0, said
    assert number(said, "redis-freeze", "refusals") > 60
    assert number(said, "half-bodies", "status 408") >= 1
    assert number(said, "half-heads", "closed") >= 4900
    assert number(said, "many-streams", "status 200") == 500
    assert [*tmp_path.glob("ablation-load-*")] == []


FLAT = {"API MB": 150.0, "API files": 80, "Redis data MB": 5.0, "tombstones": 0, "other Redis keys": 11, "logs MB": 0.1}


@pytest.mark.parametrize(
    ("name", "grown"),
    [("API MB", 171.0), ("API files", 101), ("Redis data MB", 30.0), ("other Redis keys", 32), ("logs MB", 20.2)],
)
def test_what_grows_is_found(name: str, grown: float) -> None:
    after_1000_jobs = {**FLAT, "tombstones": 1000, "Redis data MB": 9.0}
    assert [*load.too_much(FLAT, after_1000_jobs)] == []
    (found,) = load.too_much(FLAT, {**after_1000_jobs, name: grown})
    assert found.startswith(f"{name}: from ")

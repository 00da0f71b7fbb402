"""The soak (`tools/soak.py`): a short one against both services, and whether it sees what is wrong."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tools.soak import Client, Findings, kill_leftovers

SOAK = Path(__file__).parents[1] / "tools" / "soak.py"


def run_soak(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SOAK), *options]
    return subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False)


def summaries(printed: str) -> list[dict[str, str]]:
    """The rows of each summary."""
    return [dict(re.findall(r"^  (\S.*?)  +(.+)$", text, re.MULTILINE)) for text in printed.split("\nAgainst ")[1:]]


def problems(printed: str) -> list[str]:
    return re.findall(r"^(?:serve|parts): .*", printed, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_lost_and_no_byte_differs() -> None:
    soak = run_soak("--rounds", "2", "--seed", "1")
    found = summaries(soak.stdout)
    assert len(found) == 2, soak.stdout
    for rows in found:
        for name in ("jobs lost", "jobs that nobody asked for", "bytes that differed", "processes left over"):
            assert rows[name] == "0", soak.stdout
        assert int(rows["faults"].split()[0]) >= 4
        assert int(rows["CSVs compared"].split()[0]) >= 4
    late = [
        problem for problem in problems(soak.stdout) if "; allowed: " in problem
    ]  # a busy machine's as well as ours
    assert problems(soak.stdout) == late
    assert soak.returncode == bool(late)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_shard_that_lies_too_long_is_a_problem() -> None:
    options = ("--rounds", "1", "--against", "parts", "--faults", "worker-kill", "--seed", "2")
    soak = run_soak(*options, ABLATION_LEASE_S="25")
    assert soak.returncode == 1, soak.stdout
    assert any(re.search("runs again after worker-kill: .*; allowed: 15 s", each) for each in problems(soak.stdout))
    kept = re.search("kept in (.*)", soak.stdout)
    assert kept
    assert (Path(kept[1]) / "parts" / "worker-1.log").exists()
    shutil.rmtree(kept[1])


@pytest.mark.parametrize(("csv", "n_differing"), [(b"1,2\n", 0), (b"1,3\n", 1), (b"1,2\n3,4\n", 4), (b"", 4)])
def test_bytes_that_differ_are_counted(csv: bytes, n_differing: int) -> None:
    findings = Findings()
    Client("http://127.0.0.1:1", findings, {}, threading.Event()).compare("job", csv, b"1,2\n")
    assert findings.differing_bytes == [n_differing]
    assert len(findings.problems) == bool(n_differing)


def test_a_process_that_is_left_over_is_found_and_ended(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with (
        subprocess.Popen(["sleep", "60"], cwd=tmp_path / "home") as ours,
        subprocess.Popen(["sleep", "60"], cwd=tmp_path) as other,
    ):
        assert [int(each.split()[0]) for each in kill_leftovers(tmp_path / "home")] == [ours.pid]
        assert ours.wait(60) < 0
        assert other.poll() is None
        other.kill()

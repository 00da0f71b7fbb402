"""`ablation demo`: one command, the whole service, a CSV; nothing is left of it but that."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ablation.cli.demo import show
from ablation.cli.display import progress_bar
from ablation.cli.services import Child, Services
from ablation.compiling import COMPILING
from worker.settings import Settings

COMMAND = [sys.executable, "-m", "ablation.cli", "demo"]
PATIENCE_S = 120


def start(home: Path, out: Path) -> "subprocess.Popen[str]":
    command = [*COMMAND, "--home", str(home), "--out", str(out)]
    environment = {**os.environ, "TMPDIR": str(out.parent), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_demo_shows_the_summary_and_leaves_three_files(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo-out"
    with start(home, out) as process:
        said, progress = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, progress
    for item in ("sites", "intact", "|utility| with |w|", "train with test", "provably", "float32", "error", "time"):
        assert item in said, said
    assert "4,096" in said
    assert "100%" in progress
    assert sorted(path.name for path in out.iterdir()) == ["summary.json", "utility.csv", "utility.parquet"]
    assert len((out / "utility.csv").read_text().splitlines()) == 1 + 4096
    assert [*tmp_path.glob("ablation-*")] == []  # torch leaves a folder of its own there


def test_ctrl_c_stops_everything(home: Path, tmp_path: Path) -> None:
    with start(home, tmp_path / "demo-out") as process:
        assert process.stdout
        next(line for line in process.stdout if "POST" in line)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 130
    assert psutil.wait_procs(family, timeout=0)[1] == []
    assert [*tmp_path.glob("ablation-*")] == []


@pytest.mark.slow
def test_a_dead_api_is_started_again(home: Path, tmp_path: Path) -> None:
    with start(home, tmp_path / "demo-out") as process:
        assert process.stdout
        next(line for line in process.stdout if "POST" in line)
        api = next(each for each in psutil.Process(process.pid).children() if "api" in each.cmdline())
        api.kill()
        said, progress = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, progress
    assert "api ended with code -9" in said


def test_what_a_worker_says_of_compiling_is_shown_until_a_shard_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = Child("worker-1", "worker", {}, tmp_path / "worker-1.log")
    child.log.write_text(f"[WARNING] job 5f0c: {COMPILING}\n")
    services = Services(Settings(home=tmp_path), "127.0.0.1", 0, 1, say=print, children=[child])
    with progress_bar("job queued") as update:
        for n_done in (0.0, 1.0):
            show({"status": "running", "progress": {"done": n_done, "total": 2}}, update, services)
    assert capsys.readouterr().err.splitlines() == [f"  0%  job running: {COMPILING}", " 50%  job running"]

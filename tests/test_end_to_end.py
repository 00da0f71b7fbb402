"""The product as a user meets it: real processes started by the real command, real HTTP, the CSV at the end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.stopping import stopping
from worker.redis_server import find_binary

ABLATION = [sys.executable, "-m", "ablation.cli"]
PATIENCE_S = 120.0
JOB = [
    "--model",
    "digits_alexnet",
    "--layer",
    "fc2",
    "--data",
    "digits",
    "--train",
    "all",
    "--test",
    "9/class",
    "--sites",
    "512",
]
SPEC = {
    "model": {"name": "digits_alexnet"},
    "layer": "fc2",
    "data": {"name": "digits", "train": "all", "test": {"per_class": 9}},
    "sites": {"count": 512},
}
SLOW_SPEC = {**SPEC, "layer": "conv2", "sites": {"count": 2000}, "precision": "float64"}


@dataclass(frozen=True)
class Server:
    process: "subprocess.Popen[str]"
    url: str
    directions: str

    def family(self) -> list[psutil.Process]:
        """Every process of the server, itself first."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]


def environment(home: Path) -> dict[str, str]:
    ours = {
        "ABLATION_THREADS": "1",
        "ABLATION_CACHE_DIR": str(home / "cache"),
        "ABLATION_SHARD_S": "2",
        "ABLATION_LEASE_S": "2",
        "ABLATION_BEAT_S": "0.2",
        "ABLATION_SWEEP_S": "0.5",
        "ABLATION_LOST_S": "3",
        "PYTHONUNBUFFERED": "1",
    }
    return {**{name: value for name, value in os.environ.items() if name != "REDIS_URL"}, **ours}


@contextmanager
def serving(folder: Path, home: Path, *options: str) -> Iterator[Server]:
    command = [*ABLATION, "serve", "--port", "0", "--home", str(folder), *options]
    environ = environment(home)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process, stopping(process):
        assert process.stdout
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        directions = "".join(lines)
        found = re.search(r"ready at (http://\S+)", directions)
        assert found, directions
        yield Server(process, found[1], directions)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("served"), home, "--workers", "2") as server:
        yield server


@pytest.fixture(scope="module")
def run_csv(tmp_path_factory: pytest.TempPathFactory, home: Path) -> bytes:
    """The CSV of the same job by `ablation run`, without a service."""
    out = tmp_path_factory.mktemp("run")
    subprocess.run(
        [*ABLATION, "run", *JOB, "--out", str(out)], check=True, env=environment(home), stdout=subprocess.PIPE
    )
    return (out / "utility.csv").read_bytes()


@pytest.fixture(scope="module")
def slow_csv(server: Server) -> bytes:
    """The CSV of the slow job, undisturbed; of several shards, as it is when it is disturbed."""
    with connect(server) as client:
        url = client.post("/v1/jobs", json=SLOW_SPEC).headers["location"]
        assert poll(client, f"{url}/results").status_code == 200
        assert client.get(url).json()["progress"]["total"] > 2
        return client.get(f"{url}/results.csv").content


def connect(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=PATIENCE_S, trust_env=False)


def poll(client: httpx.Client, url: str) -> httpx.Response:
    """The first answer to the poll endpoint that is not: come back later."""
    deadline = time.monotonic() + PATIENCE_S
    while (answer := client.get(url)).status_code == 202:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    return answer


def test_from_post_to_csv(server: Server, run_csv: bytes) -> None:
    with connect(server) as client:
        posted = client.post("/v1/jobs", json=SPEC)
        assert posted.status_code == 202, posted.text
        results = poll(client, posted.headers["location"] + "/results")
        assert results.status_code == 200, results.text
        assert results.json()["total_rows"] == 512
        job = client.get(posted.headers["location"]).json()
        assert (job["status"], job["progress"]["done"]) == ("succeeded", job["progress"]["total"])
        served = client.get(posted.headers["location"] + "/results.csv")
    assert served.content == run_csv


def test_submit_downloads_the_same_bytes(server: Server, run_csv: bytes, tmp_path: Path, home: Path) -> None:
    command = [*ABLATION, "submit", "--server", server.url, *JOB, "--out", str(tmp_path)]
    subprocess.run(command, check=True, env=environment(home), stdout=subprocess.PIPE)
    assert (tmp_path / "utility.csv").read_bytes() == run_csv
    assert {path.name for path in tmp_path.iterdir()} == {"utility.csv", "utility.parquet", "summary.json"}


def test_submit_leaves_the_job_running_at_ctrl_c_and_says_so(server: Server, tmp_path: Path, home: Path) -> None:
    long = ["--model", "digits_alexnet", "--layer", "conv2", "--data", "digits", "--train", "all", "--sites", "4096"]
    command = [*ABLATION, "submit", "--server", server.url, *long, "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment(home), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        found = next(found for line in process.stderr if (found := re.search(r"Job (\w+): (http\S+)", line)))
        next(line for line in process.stderr if "%" in line)  # it polls
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(15) == 130
    assert f"Job {found[1]} goes on" in said
    assert f"{found[2]}/cancel" in said
    assert not (tmp_path / "out").exists()
    with connect(server) as client:
        assert client.get(found[2]).json()["status"] in ("queued", "running")
        assert client.post(f"{found[2]}/cancel").status_code == 202


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl on this machine; the lines that serve prints need it")
def test_the_printed_curl_lines_work_when_pasted(server: Server, tmp_path: Path) -> None:
    lines = [line for line in server.directions.splitlines() if line.startswith(("JOB=", "while ", "curl "))]
    assert len(lines) == 3
    pasted = subprocess.run(
        ["bash", "-e"],
        input="\n".join(lines),
        cwd=tmp_path,
        env={**os.environ, "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert pasted.returncode == 0, pasted.stderr
    rows = (tmp_path / "utility.csv").read_text().splitlines()
    assert rows[0].startswith("index,out,in,weight,magnitude,utility_train")
    assert len(rows) == 1 + 4096


@pytest.mark.slow
def test_sigint_in_mid_shard_stops_all_and_the_next_start_goes_on(tmp_path: Path, home: Path, slow_csv: bytes) -> None:
    with serving(tmp_path, home) as server, connect(server) as client:
        url = client.post("/v1/jobs", json=SLOW_SPEC).headers["location"]
        wait_until_in_mid_shard(client, url)
        family = server.family()
        assert len(family) >= 5  # the supervisor, Redis, the API, the worker, its child
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(15) in (0, 130)
        assert time.monotonic() - started < 10
        assert psutil.wait_procs(family, timeout=0)[1] == []
    with serving(tmp_path, home) as server, connect(server) as client:
        wait_until_in_mid_shard(client, url)
        assert poll(client, f"{url}/results").status_code == 200
        assert client.get(f"{url}/results.csv").content == slow_csv


@pytest.mark.slow
def test_kill_9_of_each_in_mid_job_changes_no_byte(tmp_path: Path, home: Path, slow_csv: bytes) -> None:
    with serving(tmp_path, home) as server, connect(server) as client:
        url = client.post("/v1/jobs", json=SLOW_SPEC).headers["location"]
        for name in ("api", find_binary().name, "worker"):
            wait_until_in_mid_shard(client, url)
            kill(server, name)
        assert poll(client, f"{url}/results").status_code == 200
        assert client.get(f"{url}/results.csv").content == slow_csv


def kill(server: Server, name: str) -> None:
    children = psutil.Process(server.process.pid).children()
    next(child for child in children if name in (*child.cmdline(), child.name())).kill()


def wait_until_in_mid_shard(client: httpx.Client, url: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    job: dict[str, Any] = {}
    while not (job and job["status"] == "running" and job["progress"]["done"] % 1 > 0):
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
        try:
            answer = client.get(url)
        except httpx.TransportError:
            continue  # the API is being started again
        if answer.status_code == 503:
            continue  # Redis is
        job = answer.json()
        assert job["status"] in ("queued", "running"), job

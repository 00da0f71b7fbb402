"""One real service for all of these tests: `ablation serve` as a process, with an operator's data, files and package.

Every test says in one line what was asked and what came back; `make contract` prints these lines as its report.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ablation.inputs.folders import Folders
from tests.contract.files import write_files
from tests.stopping import stopping

PATIENCE_S = 120.0
REPORT = pytest.StashKey[list[str]]()

QUICK = {
    "model": {"name": "digits_alexnet"},
    "layer": "fc2",
    "data": {"name": "digits", "train": {"per_class": 5}, "test": {"count": 40}},
    "sites": {"count": 23},
}
SLOW = {**QUICK, "layer": "conv2", "data": {"name": "digits", "train": "all"}, "sites": {"count": 2000}}


@dataclass(frozen=True)
class Service:
    """A running service and a plain HTTP client of it."""

    client: httpx.Client
    home: Path

    def post(self, spec: Mapping[str, Any], **options: Any) -> str:
        """The address of a new job."""
        answer = self.client.post("/v1/jobs", json=spec, **options)
        assert answer.status_code == 202, answer.text
        return answer.headers["location"]

    def wait(self, url: str, *states: str) -> dict[str, Any]:
        """The job once it is in one of these states."""
        deadline = time.monotonic() + PATIENCE_S
        while (job := self.client.get(url).json())["status"] not in states:
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        return job

    def over(self, spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """A job with this spec, once it is over."""
        url = self.post(spec)
        return url, self.wait(url, "succeeded", "failed", "cancelled")


@contextmanager
def serve(home: Path, cache: Path, packages: Path, **settings: str) -> Iterator[Service]:
    """`ablation serve` with one worker on this home."""
    kept = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    ours = {"PYTHONPATH": str(packages), "ABLATION_THREADS": "1", "ABLATION_CACHE_DIR": str(cache), **settings}
    command = [sys.executable, "-m", "ablation.cli", "serve", "--port", "0", "--home", str(home)]
    environment = {**kept, **ours}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process, stopping(process):
        assert process.stdout
        url = next(found[1] for line in process.stdout if (found := re.search(r"ready at (http://\S+)", line)))
        with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
            yield Service(client, home)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, home: Path, example_package: Path) -> Iterator[Service]:
    """The service that most tests share; whoever sends a long job cancels it."""
    folder = tmp_path_factory.mktemp("contract")
    write_files(Folders(data=folder / "data", checkpoints=folder / "checkpoints", cache=folder / "cache"))
    with serve(folder, home / "cache", example_package) as service:
        yield service


@pytest.fixture
def busy(service: Service) -> Iterator[str]:
    """The address of a job that keeps the only worker busy; cancelled at the end."""
    url = service.post(SLOW)
    service.wait(url, "running")
    yield url
    service.client.post(f"{url}/cancel")
    service.wait(url, "cancelled")


@pytest.fixture(scope="session")
def done(service: Service) -> str:
    """The address of a job that has succeeded."""
    url, job = service.over(QUICK)
    assert job["status"] == "succeeded", job
    return url


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to the report."""
    lines = request.config.stash.setdefault(REPORT, [])
    return lambda line: lines.append(line)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The report: one line for every row and refusal."""
    if config.get_verbosity() > 0 and (lines := config.stash.get(REPORT, [])):
        terminalreporter.section("what was asked: what came back")
        for line in lines:
            terminalreporter.line(line)

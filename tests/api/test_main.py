"""The API as a process: it serves on the socket that it is given, and ends at SIGTERM."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from worker.settings import Settings
from worker.store import JobStore

PATIENCE_S = 30.0
COMMAND = [sys.executable, "-m", "api"]


def environment(settings: Settings) -> dict[str, str]:
    return {**os.environ, "REDIS_URL": settings.redis_url, "ABLATION_HOME": str(settings.home)}


def test_it_serves_on_the_socket_of_its_supervisor_and_can_be_started_again(
    settings: Settings, store: JobStore
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        host, port = listener.getsockname()
        for _ in range(2):
            with subprocess.Popen(
                COMMAND, env={**environment(settings), "ABLATION_FD": str(fd)}, pass_fds=[fd], stderr=subprocess.DEVNULL
            ) as process:
                # The socket listens already: this request waits until the process is up.
                assert (
                    httpx.get(f"http://{host}:{port}/v1/jobs", timeout=PATIENCE_S, trust_env=False).json()["data"] == []
                )
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM)


def test_port_0_is_a_free_one_and_the_log_says_which(settings: Settings, store: JobStore) -> None:
    port_0 = {**environment(settings), "ABLATION_PORT": "0"}
    with subprocess.Popen(COMMAND, env=port_0, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address = next(found[1] for line in process.stderr if (found := re.search(r"running on (http://\S+)", line)))
        assert httpx.get(f"{address}/healthz", timeout=PATIENCE_S, trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)


def test_without_redis_it_says_what_to_set() -> None:
    nothing = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "ABLATION_REDIS_URL")}
    ended = subprocess.run(COMMAND, env=nothing, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode != 0
    assert "REDIS_URL" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("port", ["http", "65536"])
def test_a_wrong_port_is_one_line(port: str) -> None:
    wrong = {**os.environ, "ABLATION_PORT": port}
    ended = subprocess.run(COMMAND, env=wrong, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"Error: ABLATION_PORT: got {port!r}; allowed: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wrong = {**os.environ, "REDIS_URL": "redis://127.0.0.1:1/0", "ABLATION_PORT": str(port)}
        ended = subprocess.run(COMMAND, env=wrong, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"Error: ABLATION_PORT: got {port}; allowed: a port of 127.0.0.1 that is free")
    assert len(ended.stderr.splitlines()) == 1


def test_a_host_that_is_not_here_is_one_line() -> None:
    wrong = {**os.environ, "REDIS_URL": "redis://127.0.0.1:1/0", "ABLATION_HOST": "nohost.invalid"}
    ended = subprocess.run(COMMAND, env=wrong, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ABLATION_HOST: got 'nohost.invalid'; allowed: an address of this machine")
    assert len(ended.stderr.splitlines()) == 1


def test_a_socket_that_is_not_open_is_one_line() -> None:
    wrong = {**os.environ, "REDIS_URL": "redis://127.0.0.1:1/0", "ABLATION_FD": "999"}
    ended = subprocess.run(COMMAND, env=wrong, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ABLATION_FD: got 999 (Bad file descriptor)")

import os
import socket
import subprocess
import sys

import pytest

from worker import keys
from worker.health import SILENT_S, has_worker
from worker.settings import Settings
from worker.store import JobStore


def test_only_a_worker_of_this_host_counts(store: JobStore) -> None:
    store.note_worker("here-too:1:abc")
    assert has_worker(store, "here-too")
    assert not has_worker(store, "here")


def test_a_silent_worker_does_not_count(store: JobStore) -> None:
    store.client.zadd(keys.WORKERS, {"here:1:abc": store.now() - SILENT_S - 1})
    assert not has_worker(store, "here")


@pytest.mark.parametrize("there", [True, False])
def test_the_exit_status_says_it(store: JobStore, settings: Settings, there: bool) -> None:
    if there:
        store.note_worker(f"{socket.gethostname()}:1:abc")
    check = subprocess.run([sys.executable, "-m", "worker.health"], env=os.environ | {"REDIS_URL": settings.redis_url})
    assert check.returncode == (0 if there else 1)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, "refused"),
        ({"REDIS_URL": ""}, "Error: REDIS_URL: got nothing"),
        ({"REDIS_URL": "http://host"}, "Error: REDIS_URL: got 'http://host'"),
        ({"ABLATION_THREADS": "abc"}, "Error: ABLATION_THREADS: got 'abc'"),
    ],
)
def test_why_it_can_t_be_known_is_one_line(variables: dict[str, str], says: str) -> None:
    command = [sys.executable, "-m", "worker.health"]
    check = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert check.returncode == 1
    assert says in check.stderr
    assert len(check.stderr.splitlines()) == 1

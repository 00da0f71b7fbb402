import os
import re
import subprocess
import sys

import psutil
import pytest

from ablation.inputs.catalog import NOTHING
from worker.inventory import describe, describe_registered
from worker.settings import Settings
from worker.store import JobStore


def test_a_worker_says_what_it_found_and_its_parent_has_no_torch(settings: Settings, store: JobStore) -> None:
    environment = os.environ | {
        "REDIS_URL": settings.redis_url, "ABLATION_HOME": str(settings.home), "ABLATION_TREADS": "2"
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "worker"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdout
        told = [next(worker.stdout).rstrip("\n") for _ in range(8)]
        parent = psutil.Process(worker.pid)
        loaded = {process.pid: "libtorch" in str(process.memory_maps()) for process in (parent, *parent.children())}
        worker.terminate()
        _, errors = worker.communicate(timeout=30)
    assert told[:5] == describe(settings).splitlines()
    assert re.fullmatch(r"worker: device \S+ \(.+\), \d+ threads", told[5])
    assert told[6:] == describe_registered(NOTHING).splitlines()
    assert errors.startswith("Warning: ABLATION_TREADS is not a setting")
    assert not loaded.pop(worker.pid)
    assert [*loaded.values()] == [True]  # the child


def test_a_device_that_is_not_here_ends_the_worker(settings: Settings, store: JobStore) -> None:
    environment = os.environ | {
        "REDIS_URL": settings.redis_url, "ABLATION_HOME": str(settings.home), "ABLATION_DEVICE": "cuda:99"
    }  # fmt: skip
    told = subprocess.run([sys.executable, "-m", "worker"], env=environment, capture_output=True, text=True, timeout=60)
    assert "Error: ABLATION_DEVICE: got 'cuda:99'; allowed: a device that torch finds here" in told.stderr
    assert "Traceback" not in told.stderr
    assert told.returncode == 1
    assert store.n_workers() == 0


@pytest.mark.parametrize(("url", "why"), [("redis://127.0.0.1:1/0", "refused"), ("", "REDIS_URL")])
def test_a_worker_without_redis_says_so_and_ends(url: str, why: str) -> None:
    environment = os.environ | {"REDIS_URL": url}
    told = subprocess.run([sys.executable, "-m", "worker"], env=environment, capture_output=True, text=True, timeout=60)
    assert told.returncode == 1
    assert why in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ABLATION_THREADS", "abc"),
        ("REDIS_URL", "http://host"),
        ("ABLATION_REDIS_PASSWORD_FILE", "/no/such/file"),
        ("ABLATION_HOME", "~nobody-of-this-name"),
        ("ABLATION_DEVICE", "gpu"),
    ],
)
def test_a_wrong_setting_is_one_line(name: str, value: str) -> None:
    environment = os.environ | {name: value}
    told = subprocess.run([sys.executable, "-m", "worker"], env=environment, capture_output=True, text=True, timeout=60)
    assert told.returncode == 1
    assert told.stderr.startswith(f"Error: {name}: got {value!r}")
    assert len(told.stderr.splitlines()) == 1

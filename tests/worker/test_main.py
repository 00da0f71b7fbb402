import os
import subprocess
import sys

import pytest

from worker.__main__ import describe
from worker.settings import Settings


def test_a_worker_says_what_it_found(settings: Settings) -> None:
    told = describe(settings)
    assert len(told.splitlines()) == 2
    assert settings.redis_url in told
    assert str(settings.cache_dir) in told


@pytest.mark.parametrize(("url", "why"), [("redis://127.0.0.1:1/0", "refused"), ("", "REDIS_URL")])
def test_a_worker_without_redis_says_so_and_ends(url: str, why: str) -> None:
    environment = os.environ | {"REDIS_URL": url}
    told = subprocess.run([sys.executable, "-m", "worker"], env=environment, capture_output=True, text=True, timeout=60)
    assert told.returncode == 1
    assert why in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("ABLATION_THREADS", "abc"), ("REDIS_URL", "http://host"), ("ABLATION_REDIS_PASSWORD_FILE", "/no/such/file")],
)
def test_a_wrong_setting_is_one_line(name: str, value: str) -> None:
    environment = os.environ | {name: value}
    told = subprocess.run([sys.executable, "-m", "worker"], env=environment, capture_output=True, text=True, timeout=60)
    assert told.returncode == 1
    assert told.stderr.startswith(f"Error: {name}: got {value!r}")
    assert len(told.stderr.splitlines()) == 1

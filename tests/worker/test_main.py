import os
import subprocess
import sys

import pytest

from worker.__main__ import describe, hide_password
from worker.settings import Settings


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6379/0", "redis://host:6379/0"),
        ("rediss://user:secret@host/0", "rediss://host/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert hide_password(url) == shown


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

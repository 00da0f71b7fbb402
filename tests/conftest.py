"""Shared parts, all real: an embedded Redis for the whole run, emptied before every test; settings that point to it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from worker.redis_server import RedisServer, start_redis
from worker.settings import Settings
from worker.store import JobStore, connect


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="ablation-test-") as folder:
        server = start_redis(Path(folder) / "run", Path(folder) / "data")
        yield server
        server.stop()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for the whole run, so that the demo model is trained once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def settings(redis_server: RedisServer, home: Path) -> Settings:
    """Settings of a quick service: one thread, short leases."""
    return Settings(redis_url=redis_server.url, home=home, threads=1, lease_s=2, beat_s=0.2, sweep_s=0.2, lost_s=3)


@pytest.fixture
def redis_client(settings: Settings) -> Iterator[Redis]:
    """A client of an empty Redis."""
    with connect(settings) as client:
        client.flushall()
        yield client


@pytest.fixture
def store(redis_client: Redis) -> JobStore:
    return JobStore(redis_client)

"""Shared parts, all real: an embedded Redis for the whole run, emptied before every test; settings that point to it."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from ablation.layers import describe_registered
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
def example_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip has installed `tests/example_package` into: put it on the path, and it is registered."""
    source, target = tmp_path_factory.mktemp("source") / "zoo", tmp_path_factory.mktemp("packages")
    shutil.copytree(Path(__file__).parent / "example_package", source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return target


@pytest.fixture
def registered(example_package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example package on this process's path."""
    monkeypatch.syspath_prepend(example_package)
    yield
    describe_registered.cache_clear()


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

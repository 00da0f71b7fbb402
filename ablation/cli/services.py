"""The processes of a server: Redis, the API, workers. They are started in order, restarted, and stopped together.

In: settings, an address, a number of workers. Out: a running server whose address is known before it answers.
Children have sessions of their own, so a Ctrl-C in the terminal reaches the supervisor alone, which stops workers and
API first (a worker puts its shard back), and Redis last. If the supervisor itself is killed, so are they.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import ablation
from ablation.cli.client import Client
from ablation.errors import ServiceError
from worker.parent_death import tether
from worker.server_socket import listen, url_of
from worker.settings import Settings, make_writable

if TYPE_CHECKING:
    from worker.redis_server import RedisServer

READY_S = 120.0  # mostly a cold import of torch on a slow disk
STOP_S = 5.0  # then a process is killed; with the 5 s that Redis may take, all ends within 10 s
SAME_SIGNAL_S = 0.5  # `timeout` and others send a signal to a process and to its group: that is one signal, not two
STEADY_S = 60.0  # a process that ran this long is restarted at once when it dies
MAX_BACK_OFF_S = 4.0  # a shard must not wait more than 15 s for a worker, even one that is killed repeatedly
MAX_LOG_BYTES = 10_000_000
# Packages of the extra `service`; the embedded Redis server is looked for when it is started.
SERVICE_PACKAGES = ("celery", "fastapi", "fastapi_offline", "prometheus_client", "redis", "uvicorn")
# Idle OpenMP threads sleep, since spinning ones take the processors from other workers.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


@dataclass
class Child:
    """A process that is restarted when it dies."""

    name: str
    module: str
    environment: dict[str, str]
    log: Path
    fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    n_starts: int = 0
    n_early_deaths: int = 0
    said_from: int = 0  # position in the log where the output of this run begins

    def start(self) -> None:
        """Start the process, and append its output to its log."""
        self.started_at = time.monotonic()
        self.n_starts += 1
        with self.log.open("ab") as log:
            self.said_from = log.tell()
            self.process = subprocess.Popen(
                python_command(self.module),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=self.fds,
                start_new_session=True,
                # SIGKILL: the embedded Redis ends at the same moment, and a graceful stop would wait for it.
                preexec_fn=functools.partial(tether, signal.SIGKILL, os.getpid()),
            )

    def send(self, number: int) -> None:
        """Signal the whole process group, if it still exists."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def refusal(self, code: int) -> str:
        """The error with which the process refused to start; empty if a restart may help.

        Its settings don't change, so such an error is final. Later errors, such as an unreachable Redis, are not.
        """
        if code != 1 or self.n_starts > 1 or time.monotonic() - self.started_at > STEADY_S:
            return ""
        said = self.said().splitlines()
        return next((line.removeprefix("Error: ") for line in said if line.startswith("Error: ")), "")

    def said(self) -> str:
        """The output of this run so far."""
        return self.log.read_bytes()[self.said_from :].decode(errors="replace")

    def note_death(self) -> float:
        """Set when the process may be restarted: at once the first time, with growing delays if it keeps dying."""
        lived = time.monotonic() - self.started_at
        self.n_early_deaths = 0 if lived > STEADY_S else self.n_early_deaths + 1
        self.process = None
        wait = min(MAX_BACK_OFF_S, 0.25 * 2**self.n_early_deaths)
        self.start_at = time.monotonic() + wait
        return wait


@dataclass
class Services:
    """The processes of one server on one home folder."""

    settings: Settings
    host: str
    port: int
    n_workers: int
    say: Callable[[str], None]
    listener: socket.socket | None = None
    redis: "RedisServer | None" = None
    children: list[Child] = field(default_factory=list)
    stopping_at: float = 0.0

    @property
    def home(self) -> Path:
        """The home folder."""
        return self.settings.home

    @property
    def url(self) -> str:
        """URL of the API."""
        assert self.listener is not None
        return url_of(self.listener)

    def start(self) -> None:
        """Bind the address, start Redis, then the API and the workers in parallel."""
        check_installed()
        settings = self.settings
        make_writable(self.home, "--home")
        make_writable(self.home / "logs", "--home")
        make_writable(settings.cache_dir, "ABLATION_CACHE_DIR")
        for name, folder in (("DATA", settings.data_dir), ("CHECKPOINT", settings.checkpoint_dir)):
            if not folder.is_dir():  # an existing one may be read-only
                make_writable(folder, f"ABLATION_{name}_DIR")
        self.listener = listen(self.host, self.port, "--host", "--port")
        environment = self._environment()
        fd = self.listener.fileno()
        self.children = [
            self._child("api", "api", {**environment, "ABLATION_FD": str(fd)}, (fd,)),
            *(self._child(f"worker-{k + 1}", "worker", environment) for k in range(self.n_workers)),
        ]
        for child in self.children:
            child.start()

    def tend(self) -> None:
        """Restart processes that died; call this regularly, from the thread that called `start`.

        Raises:
            ServiceError: a process refuses these settings; the message is its own.
        """
        if self.redis and not self.redis.is_alive():
            self.say(f"Redis ended; starting it again (log: {self.home / 'redis' / 'redis.log'})")
            self._start_redis()
        for log in (self.home / "redis" / "redis.log", *(child.log for child in self.children)):
            bound_log(log)
        for child in self.children:
            if child.process is None:
                if time.monotonic() >= child.start_at:
                    child.start()
            elif (code := child.process.poll()) is not None:
                child.send(signal.SIGKILL)  # processes that it may have left behind
                if refusal := child.refusal(code):
                    raise ServiceError(f"{child.name} can't run: {refusal} (log: {child.log})")
                wait = child.note_death()
                self.say(f"{child.name} ended with code {code}; starting it again in {wait:g} s (log: {child.log})")

    def wait_ready(self) -> None:
        """Wait until the server is ready for jobs.

        Raises:
            ServiceError: it takes too long (the message shows the end of the logs), or a process refuses to start.
        """
        deadline = time.monotonic() + READY_S
        with Client(self.url, trust_env=False) as client:
            while not client.is_ready():
                self.tend()
                if time.monotonic() > deadline:
                    raise ServiceError(f"the services are not ready after {READY_S:g} s.\n{self._ends_of_logs()}")
                time.sleep(0.1)

    def stop(self) -> None:
        """Stop all processes, workers and API first, Redis last; a second signal kills them."""
        self.stopping_at = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._kill_now)
        self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for child in self.children:
            if child.process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline - time.monotonic()))
        self._signal_all(signal.SIGKILL)
        if self.redis:
            self.redis.stop()
        if self.listener:
            self.listener.close()

    def _signal_all(self, number: int) -> None:
        for child in self.children:
            child.send(number)

    def _kill_now(self, number: int, frame: object) -> None:
        if time.monotonic() - self.stopping_at < SAME_SIGNAL_S:
            return
        self._signal_all(signal.SIGKILL)
        if self.redis:
            self.redis.process.kill()
        os._exit(130)

    def _child(self, name: str, module: str, environment: dict[str, str], fds: tuple[int, ...] = ()) -> Child:
        return Child(name, module, environment, self.home / "logs" / f"{name}.log", fds)

    def _start_redis(self) -> str:
        """Start the embedded Redis and return its URL, which stays the same after a restart."""
        from worker.redis_server import start_redis

        before, data_dir = self.redis, self.home / "redis"
        self.redis = start_redis(before.socket.parent if before else data_dir, data_dir)
        if before:
            self.redis = dataclasses.replace(self.redis, own_folder=before.own_folder)
        return self.redis.url

    def _environment(self) -> dict[str, str]:
        settings, ours = self.settings, child_environment()
        ours.pop("ABLATION_REDIS_PASSWORD_FILE", None)  # the URL has the password
        return {
            **PATIENT_THREADS,
            **ours,
            "REDIS_URL": settings.redis_url or self._start_redis(),
            "ABLATION_HOME": str(settings.home),
            "ABLATION_DATA_DIR": str(settings.data_dir),
            "ABLATION_CHECKPOINT_DIR": str(settings.checkpoint_dir),
            "ABLATION_CACHE_DIR": str(settings.cache_dir),
        }

    def _ends_of_logs(self) -> str:
        ends = (f"{child.log}:\n{child.log.read_text(errors='replace')[-1000:]}" for child in self.children)
        return "\n".join(ends)


def check_installed() -> None:
    """Refuse to start a service where its packages are not installed: they come with an extra of the distribution.

    Raises:
        ServiceError: one is missing; the message names it and says how to install all of them.
    """
    if missing := [name for name in SERVICE_PACKAGES if not _is_installed(name)]:
        raise ServiceError(
            f"the service needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "allowed: `ablation run`, which needs no service. To have it, `pip install 'weight-ablation[service]'`, or "
            "`pip install '.[service]'` in a checkout."
        )


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def bound_log(log: Path) -> None:
    """Move a log that has grown too long to `NAME.log.1`, replacing the one before, and empty it.

    The log is copied and truncated rather than renamed, because its writer keeps the file open. All writers append;
    only a line written between copy and truncation is lost. Where the disk has no room for a copy, none is kept.
    """
    with contextlib.suppress(OSError):
        if log.stat().st_size > MAX_LOG_BYTES:
            older = log.with_name(f"{log.name}.1")
            try:
                shutil.copyfile(log, older)
            except OSError:
                older.unlink(missing_ok=True)
            os.truncate(log, 0)


def python_command(module: str, *arguments: str) -> list[str]:
    """Command that runs a module of this package; -P ignores a folder `api` in the working directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """This process's environment, with this package on the path even where it is not installed."""
    root = str(Path(ablation.__file__).parents[1])
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{others}" if others else root, "PYTHONUNBUFFERED": "1"}

"""Every process of a server: Redis, the API, workers. Started in order, kept alive, stopped together.

In: settings, an address, a number of workers. Out: a running server whose address is known before it answers.
Children get sessions of their own, so a Ctrl-C in the terminal reaches the supervisor alone and things end in order:
workers and API first (a worker puts its shard back), Redis last. If the supervisor itself is killed, so are they.
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
from pathlib import Path

import ablation
from ablation.cli.client import Client
from ablation.errors import ServiceError
from worker.parent_death import tether
from worker.redis_server import RedisServer, start_redis
from worker.server_socket import listen, url_of
from worker.settings import Settings, make_writable

READY_S = 120.0  # a cold import of torch on a slow disk is the longest part of this
STOP_S = 5.0  # who is still there after this is killed; with the 5 s that Redis may take, all is over within 10 s
SAME_SIGNAL_S = 0.5  # `timeout` and others send a signal to a process and to its group: that is one signal, not two
STEADY_S = 60.0  # who lived this long starts again at once when it dies
MAX_BACK_OFF_S = 4.0  # a shard waits no longer than 15 s for a worker, also where this one was killed again and again
MAX_LOG_BYTES = 10_000_000
# Threads that wait for work sleep; those that spin take the processors from the other workers.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


@dataclass
class Child:
    """One process that is started again when it dies."""

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
    said_from: int = 0  # where in the log the words of this life begin

    def start(self) -> None:
        """Start it, with its output at the end of its log."""
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
                # SIGKILL: our Redis goes at the same moment, and a gentle end would wait for it.
                preexec_fn=functools.partial(tether, signal.SIGKILL, os.getpid()),
            )

    def send(self, number: int) -> None:
        """Tell its whole process group; fine if there is nobody left."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def refusal(self, code: int) -> str:
        """The error that it named if it would not even begin; empty if to start it again may help.

        What it has been told doesn't change. Later in its life other things go wrong, such as a Redis that is away.
        """
        if code != 1 or self.n_starts > 1 or time.monotonic() - self.started_at > STEADY_S:
            return ""
        said = self.log.read_bytes()[self.said_from :].decode(errors="replace").splitlines()
        return next((line.removeprefix("Error: ") for line in said if line.startswith("Error: ")), "")

    def note_death(self) -> float:
        """When it may start again: at once the first time, later and later if it keeps dying."""
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
    redis: RedisServer | None = None
    children: list[Child] = field(default_factory=list)
    stopping_at: float = 0.0

    @property
    def home(self) -> Path:
        """Where everything is kept."""
        return self.settings.home

    @property
    def url(self) -> str:
        """The address of the API."""
        assert self.listener is not None
        return url_of(self.listener)

    def start(self) -> None:
        """Take the address, start Redis, then the API and the workers side by side."""
        settings = self.settings
        make_writable(self.home, "--home")
        make_writable(self.home / "logs", "--home")
        make_writable(settings.cache_dir, "ABLATION_CACHE_DIR")
        for name, folder in (("DATA", settings.data_dir), ("CHECKPOINT", settings.checkpoint_dir)):
            if not folder.is_dir():  # one that is there may be read only
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
        """Start again what died; call this every now and then, from the thread that called `start`.

        Raises:
            ServiceError: a process won't run with these settings; the message is its own.
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
                child.send(signal.SIGKILL)  # what it may have left of its own
                if refusal := child.refusal(code):
                    raise ServiceError(f"{child.name} can't run: {refusal} (log: {child.log})")
                wait = child.note_death()
                self.say(f"{child.name} ended with code {code}; starting it again in {wait:g} s (log: {child.log})")

    def wait_ready(self) -> None:
        """Return when jobs will be worked on.

        Raises:
            ServiceError: it takes too long (the message shows the end of the logs), or a process won't run.
        """
        deadline = time.monotonic() + READY_S
        with Client(self.url, trust_env=False) as client:
            while not client.is_ready():
                self.tend()
                if time.monotonic() > deadline:
                    raise ServiceError(f"the services are not ready after {READY_S:g} s.\n{self._ends_of_logs()}")
                time.sleep(0.1)

    def stop(self) -> None:
        """Stop everything that was started, workers and API first, Redis last; a second signal kills."""
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
        """The URL of our own Redis; after a restart the same, since the others know it."""
        before, data_dir = self.redis, self.home / "redis"
        self.redis = start_redis(before.socket.parent if before else data_dir, data_dir)
        if before:
            self.redis = dataclasses.replace(self.redis, own_folder=before.own_folder)
        return self.redis.url

    def _environment(self) -> dict[str, str]:
        settings, ours = self.settings, child_environment()
        ours.pop("ABLATION_REDIS_PASSWORD_FILE", None)  # the password is in the URL by now
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


def bound_log(log: Path) -> None:
    """Keep a log that has grown long as `NAME.log.1`, over the one before, and begin it anew.

    Copied and cut rather than renamed, because its writer goes on with the file it was given. Everyone writes at the
    end, wherever that is; only a line that is written between copy and cut is lost.
    """
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > MAX_LOG_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours; -P, so that a folder `api` where the user is isn't taken for it."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """This process's environment, with our packages on the path even where they are not installed."""
    root = str(Path(ablation.__file__).parents[1])
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{others}" if others else root, "PYTHONUNBUFFERED": "1"}

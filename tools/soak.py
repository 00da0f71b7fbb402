"""Soak test of the service: kill and freeze its processes at random points of jobs, and count what is lost.

Run by `make soak`. Jobs on the built-in model are posted, polled and downloaded by a patient client, while
workers, the API and Redis are killed, stopped and frozen by a seeded schedule. Every accepted job must end, its CSV
must be byte for byte that of an undisturbed run, and a shard that its worker left must run again within 15 s.
It runs against `ablation serve`, which restarts a process that dies, and against processes that are started one by one,
which the test restarts itself. `docs/soak.md` explains the output.

    python tools/soak.py [--seed 0] [--rounds 3 | --minutes 10] [--workers 2] [--against serve|parts] [--faults ...]
"""

import argparse
import contextlib
import functools
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from worker import keys
from worker.parent_death import tether
from worker.redis_server import RedisServer, find_binary, start_redis
from worker.server_socket import listen, url_of
from worker.settings import Settings, count_cpus
from worker.states import State
from worker.store import JobStore, connect

RECOVERY_S = 15.0  # a shard that its worker left is running again within this
STOP_S = 10.0  # a process that is told to stop ends within this
PATIENCE_S = 300.0  # a job that has not ended after this long is lost
ANSWER_S = 10.0  # a client without an answer tries again after this
PAUSE_S = 0.2  # between two polls of a client
N_TOMBSTONES = 150_000  # that one fault leaves
N_FAULTS, N_HURRIED = 4, 6  # per round; hurried: the next fault comes before the service has recovered

# Shards of some seconds; other settings by default or from this process's environment.
ENVIRONMENT = {"ABLATION_THREADS": "1", "ABLATION_SHARD_S": "0.5", "PYTHONUNBUFFERED": "1"}

DATA = {"name": "digits", "train": "all", "test": {"per_class": 9}}
ASKED: dict[str, dict[str, Any]] = {
    "conv2 in float64": {"layer": "conv2", "sites": {"count": 1000, "seed": 1}, "precision": "float64"},
    "conv2": {"layer": "conv2", "sites": {"count": 2500, "seed": 2}, "top1": True},
    "all of fc1": {"layer": "fc1", "sites": "all"},
    "fc2": {"layer": "fc2", "sites": {"count": 4096, "seed": 3}, "top1": True},
    "all of fc3": {"layer": "fc3", "sites": "all"},
}
SPECS = {name: {"model": {"name": "digits_alexnet"}, "data": DATA, **asked} for name, asked in ASKED.items()}
LONG, SHORT = ("conv2 in float64", "conv2"), ("all of fc1", "fc2", "all of fc3")


class Lost(Exception):
    """A job or a process did not end, or did not come back, as it must."""


class Interrupted(Exception):
    """The soak test is interrupted before its jobs are over."""


# --- findings --------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """Findings so far; several threads append to them."""

    started: float = field(default_factory=time.monotonic)
    n_rounds: int = 0
    accepted: list[str] = field(default_factory=list)  # ids of jobs
    ended: list[str] = field(default_factory=list)  # their last states
    unasked: list[str] = field(default_factory=list)  # ids of jobs that no client was told of
    faults: list[str] = field(default_factory=list)  # by name
    compared_bytes: list[int] = field(default_factory=list)  # size of each CSV
    differing_bytes: list[int] = field(default_factory=list)
    recoveries: dict[str, list[float]] = field(default_factory=dict)  # seconds, by what recovered
    loads: list[float] = field(default_factory=list)  # load of the machine at each recovery
    leftovers: list[str] = field(default_factory=list)  # processes
    problems: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print a line of progress."""
        print(
            f"{time.monotonic() - self.started:7.1f} s  {text}\n", end="", flush=True
        )  # in one write, since several threads print

    def note_problem(self, text: str) -> None:
        """Record a problem."""
        self.problems.append(text)
        self.say(f"PROBLEM: {text}")

    def note_recovery(self, what: str, seconds: float, allowed_s: float = PATIENCE_S) -> None:
        """Record the seconds that a recovery took."""
        self.say(f"  {what}: {seconds:.1f} s")
        self.recoveries.setdefault(what, []).append(seconds)
        self.loads.append(os.getloadavg()[0] / count_cpus())
        if seconds > allowed_s:
            self.note_problem(f"{what}: {seconds:.1f} s; allowed: {allowed_s:g} s")

    def summary(self) -> str:
        """All findings as plain text."""
        rows = {
            "rounds": self.n_rounds,
            "jobs accepted": len(self.accepted),
            "jobs ended": _count(self.ended),
            "jobs lost": len(self.accepted) - len(self.ended),
            "jobs that nobody asked for": len(self.unasked),
            "faults": _count(self.faults),
            "CSVs compared": f"{len(self.compared_bytes)} ({sum(self.compared_bytes):,} bytes)",
            "bytes that differed": sum(self.differing_bytes),
            **{what: f"{_middle(seconds)} s" for what, seconds in sorted(self.recoveries.items())},
            "processes that want a CPU": f"{_middle(self.loads)} for each" if self.loads else "",
            "processes left over": len(self.leftovers),
            "problems": len(self.problems),
        }
        return "\n".join(f"  {name:36} {value}" for name, value in rows.items())


def _count(names: Sequence[str]) -> str:
    each = ", ".join(f"{n} {name}" for name, n in sorted(Counter(names).items()))
    return f"{len(names)} ({each})" if names else "0"


def _middle(numbers: Sequence[float]) -> str:
    return f"{len(numbers):3}: median {statistics.median(numbers):.1f}, max {max(numbers):.1f}"


def await_that(holds: Callable[[], object], seconds: float, otherwise: str) -> float:
    """Wait until a condition holds; returns the seconds that this took.

    Raises:
        Lost: it doesn't hold in time.
    """
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > seconds:
            raise Lost(f"{otherwise} after {seconds:g} s")
        time.sleep(0.02)
    return time.monotonic() - started


# --- the service, started in one of two ways -------------------------------------------------------------------------


@dataclass
class Service(ABC):
    """Processes on one home folder. Those that can be killed have the roles api, worker and redis."""

    home: Path
    n_workers: int
    findings: Findings
    url: str = ""
    broken: set[int] = field(default_factory=set)  # the processes that this test ended

    @abstractmethod
    def start(self) -> None:
        """Start it."""

    @abstractmethod
    def redis_url(self) -> str:
        """URL of the service's Redis, which doesn't change."""

    @abstractmethod
    def pids(self, role: str) -> list[int]:
        """The processes of this role that run now."""

    @abstractmethod
    def mend(self, wait_s: float) -> None:
        """Restart, after a delay, the processes that this test has ended, unless something else does."""

    @abstractmethod
    def stop(self, number: signal.Signals) -> None:
        """Stop everything, by a signal first."""

    @abstractmethod
    def note_deaths(self) -> None:
        """Record processes that ended by themselves as problems."""

    def send(self, pid: int, number: signal.Signals, *, with_group: bool = False) -> None:
        """Send this signal to one of the processes to end it."""
        self.broken.add(pid)
        (os.killpg if with_group else os.kill)(pid, number)

    def spawn(self, log: str, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Run a command of this package in the home folder; it ends with this process."""
        self.home.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        folders = {"ABLATION_HOME": str(self.home), "ABLATION_CACHE_DIR": str(self.home.parent / "cache")}
        with (self.home / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "ablation.cli", *arguments],
                cwd=self.home,
                env={**ENVIRONMENT, **inherited, **folders, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone
                preexec_fn=functools.partial(tether, signal.SIGTERM, os.getpid()),
            )

    def end(self, processes: "Sequence[subprocess.Popen[bytes]]", number: signal.Signals) -> None:
        """Stop these together; one that doesn't end in time is killed."""
        started = time.monotonic()
        for process in processes:
            process.send_signal(number)
        for process in processes:
            try:
                process.wait(2 * STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.findings.note_recovery("all stopped", time.monotonic() - started, STOP_S)


class Served(Service):
    """`ablation serve`, which restarts a process that dies."""

    process: "subprocess.Popen[bytes]"

    def start(self) -> None:
        """Start the server; its address is in its output."""
        self.process = self.spawn("serve.log", "serve", "--port", "0", "--workers", str(self.n_workers))
        await_that(lambda: "Starting on" in self.said() or self.process.poll() is not None, PATIENCE_S, "no address")
        self.mend(0)
        self.url = self.said().partition("Starting on ")[2].split()[0]

    def said(self) -> str:
        """Output of the server so far."""
        return (self.home / "serve.log").read_text(errors="replace")

    def redis_url(self) -> str:
        """URL of the embedded Redis, from a child's environment."""
        return str(psutil.Process(self.pids("api")[0]).environ()["REDIS_URL"])

    def pids(self, role: str) -> list[int]:
        """Process ids of its children of this role."""
        return [child.pid for child in psutil.Process(self.process.pid).children() if role_of(child) == role]

    def mend(self, wait_s: float) -> None:
        """Do nothing, since the server restarts its children itself.

        Raises:
            Lost: the server is gone.
        """
        if self.process.poll() is not None:
            raise Lost(f"`ablation serve` has ended with code {self.process.returncode}: {self.said()[-500:]}")

    def stop(self, number: signal.Signals) -> None:
        """Stop the server by one signal."""
        if self.process.poll() is None:
            self.end([self.process], number)

    def note_deaths(self) -> None:
        """Compare the deaths that the server reports with those that this test caused."""
        said = re.findall(r"^(?:Redis|\S+) ended.*", self.said(), re.MULTILINE)
        if len(said) > len(self.broken):
            self.findings.note_problem(f"{len(said) - len(self.broken)} ended by themselves; all: {'; '.join(said)}")


class Parts(Service):
    """Redis, the API and workers, each started by itself, and restarted by this test."""

    processes: "dict[str, subprocess.Popen[bytes]]"
    servers: list[RedisServer]

    def start(self) -> None:
        """Start the processes, the API on a free port."""
        self.processes, self.servers = {}, []
        listener = listen("127.0.0.1", 0, "host", "port")
        self.url = url_of(listener)
        listener.close()
        self.mend(0)

    def redis_url(self) -> str:
        """URL of Redis, which is always on the same socket."""
        return self.servers[0].url

    def pids(self, role: str) -> list[int]:
        """Process ids of this role's running processes."""
        if role == "redis":
            return [server.pid for server in self.servers if server.is_alive()]
        named = [process for name, process in self.processes.items() if name.startswith(role)]
        return [process.pid for process in named if process.poll() is None]

    def mend(self, wait_s: float) -> None:
        """Start the processes that don't run."""
        self.note_deaths()
        time.sleep(wait_s)
        if not self.pids("redis"):
            folder = self.servers[0].socket.parent if self.servers else self.home / "redis"
            self.servers.append(start_redis(folder, self.home / "redis"))
        for name in ("api", *(f"worker-{k + 1}" for k in range(self.n_workers))):
            if name not in self.processes or self.processes[name].poll() is not None:
                environment = {"REDIS_URL": self.redis_url(), "ABLATION_PORT": self.url.rpartition(":")[2]}
                self.processes[name] = self.spawn(f"{name}.log", name.partition("-")[0], **environment)

    def stop(self, number: signal.Signals) -> None:
        """Stop workers and API first, Redis last."""
        self.end([process for process in self.processes.values() if process.poll() is None], number)
        for server in reversed(self.servers):  # the first server last, since it may own the folder of the socket
            server.stop()

    def note_deaths(self) -> None:
        """Record processes as problems that ended without being ended by this test."""
        every = [*self.processes.items(), *(("redis", server.process) for server in self.servers)]
        for name, process in every:
            if process.poll() is not None and process.pid not in self.broken:
                self.broken.add(process.pid)
                self.findings.note_problem(f"{name} ended by itself, with code {process.returncode}")


def role_of(process: psutil.Process) -> str:
    """Role of a process of the service; empty if it is gone."""
    with contextlib.suppress(psutil.Error):
        return "redis" if process.name() == find_binary().name else str((process.cmdline() or [""])[-1])
    return ""


def is_gone(pid: int) -> bool:
    """Whether a process has ended, even if its parent has not been notified yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def kill_leftovers(home: Path) -> list[str]:
    """Kill every process whose working directory is below `home`; returns their descriptions."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(home) and not is_gone(process.pid):
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
                process.kill()
    return found


# --- clients ---------------------------------------------------------------------------------------------------------


@dataclass
class Client:
    """A client that posts jobs, polls and downloads, and tries again while the service is away."""

    url: str
    findings: Findings
    csvs: dict[str, bytes]  # CSVs of undisturbed runs, by the spec's name; a missing one is added
    over: threading.Event  # set when the soak test is interrupted

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, trust_env=False, verify=False)  # no certificates on plain HTTP

    def ask(self, method: str, url: str, **content: Any) -> httpx.Response:
        """Send a request until the answer is neither a lost connection nor a 503.

        Raises:
            Lost: it takes too long.
            Interrupted: the soak is over.
        """
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self.over.is_set():
                raise Interrupted
            with contextlib.suppress(httpx.TransportError):
                answer = self.http.request(method, url, timeout=ANSWER_S, **content)
                if answer.status_code < 500:
                    return answer
                if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    self.findings.note_problem(f"{method} {url}: {answer.status_code} {answer.text}")
            time.sleep(PAUSE_S)
        raise Lost(f"{method} {url}: no answer for {PATIENCE_S:g} s")

    def ask_until(self, is_there: Callable[[httpx.Response], bool], url: str) -> httpx.Response:
        """Send a request until the answer is of this kind.

        Raises:
            Lost: it takes too long.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not is_there(answer := self.ask("GET", url)):
            if time.monotonic() > deadline:
                raise Lost(f"{url} after {PATIENCE_S:g} s: {answer.text}")
            time.sleep(PAUSE_S)
        return answer

    def is_answered(self, url: str) -> bool:
        """Whether the service answers without an error, and in time."""
        with contextlib.suppress(httpx.TransportError):
            return self.http.get(url, timeout=1).status_code == httpx.codes.OK
        return False

    def post(self, name: str, key: str) -> str:
        """Post a job under this key; returns its id.

        Raises:
            Lost: the job is refused.
        """
        answer = self.ask("POST", "/v1/jobs", json=SPECS[name], headers={"Idempotency-Key": key})
        if answer.status_code != httpx.codes.ACCEPTED:
            raise Lost(f"POST of {name}: {answer.status_code} {answer.text}")
        return str(answer.json()["id"])

    def fetch(self, job_id: str, name: str) -> None:
        """Wait for a job, download its CSV and compare it.

        Raises:
            Lost: the job has not succeeded.
        """
        url = f"/v1/jobs/{job_id}/results"
        answer = self.ask_until(lambda answer: answer.status_code != httpx.codes.ACCEPTED, f"{url}?limit=0")
        if answer.status_code == httpx.codes.OK:
            answer = self.ask("GET", f"{url}.csv")
        if answer.status_code != httpx.codes.OK:
            raise Lost(f"job {job_id} ({name}): {answer.status_code} {answer.text}")
        self.findings.ended.append(State.SUCCEEDED)
        if name in self.csvs:
            self.compare(job_id, answer.content, self.csvs[name])
        self.csvs.setdefault(name, answer.content)

    def compare(self, job_id: str, csv: bytes, expected: bytes) -> None:
        """Count the bytes that differ, and record them as a problem."""
        pairs = zip(csv, expected, strict=False) if csv != expected else ()
        n_differing = sum(one != other for one, other in pairs) + abs(len(csv) - len(expected))
        self.findings.compared_bytes.append(len(csv))
        self.findings.differing_bytes.append(n_differing)
        if n_differing:
            self.findings.note_problem(f"job {job_id}: {n_differing} bytes of its CSV differ")

    def run(self, name: str, key: str) -> None:
        """Run a job from post to CSV."""
        job_id = self.post(name, key)
        self.findings.accepted.append(job_id)
        self.fetch(job_id, name)

    def change_mind(self, name: str, key: str, after_s: float) -> None:
        """Cancel a job at some point, then run the same job again to its end.

        Raises:
            Lost: the job was not cancelled although it was not too late.
        """
        job_id = self.post(name, f"{key}-cancelled")
        self.findings.accepted.append(job_id)
        self.over.wait(after_s)
        if self.ask("POST", f"/v1/jobs/{job_id}/cancel").status_code == httpx.codes.CONFLICT:
            self.fetch(job_id, name)
        else:
            is_over = lambda answer: answer.json()["status"] != State.CANCELLING  # noqa: E731
            job = self.ask_until(is_over, f"/v1/jobs/{job_id}").json()
            if job["status"] != State.CANCELLED:
                raise Lost(f"job {job_id} was cancelled and is {job['status']}: {job['error']}")
            self.findings.ended.append(State.CANCELLED)
            self.findings.say(f"cancelled at {job['progress']['done']:.2f} of its shards and posted again: {job_id}")
        self.run(name, key)

    def list_ids(self) -> set[str]:
        """Ids of all jobs."""
        found: set[str] = set()
        page = {"next_cursor": ""}
        while page["next_cursor"] is not None:
            cursor = f"&cursor={page['next_cursor']}" if page["next_cursor"] else ""
            page = self.ask("GET", f"/v1/jobs?limit=100{cursor}").json()
            found |= {job["id"] for job in page["data"]}
        return found


# --- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lease:
    """A worker's lease of a shard, or of a merge."""

    job_id: str
    shard_id: str
    owner: str
    n_attempts: int

    @property
    def pid(self) -> int:
        """The worker's parent process."""
        return int(self.owner.split(":")[1])

    def __str__(self) -> str:
        return f"{keys.in_words(self.shard_id)} of job {self.job_id}"


def leases(store: JobStore) -> Iterator[Lease]:
    """All leases that workers hold."""
    for job_id in [*store.jobs_in(State.RUNNING, State.FINALIZING)]:
        attempts = store.client.hgetall(keys.attempts(job_id))
        for shard, owner in store.client.hgetall(keys.owners(job_id)).items():
            n_attempts = sum(int(n) for name, n in attempts.items() if name.split()[-1] == shard)
            yield Lease(job_id, shard.decode(), owner.decode(), n_attempts)


def is_left(store: JobStore, left: Lease) -> bool:
    """Whether the shard still has its old lease, or waits for another worker."""
    for lease in leases(store):
        if (lease.job_id, lease.shard_id) == (left.job_id, left.shard_id):
            return lease == left
    record = store.get(left.job_id)
    is_at_work = record is not None and record.status in (State.RUNNING, State.FINALIZING)
    return is_at_work and not store.client.sismember(keys.done(left.job_id), left.shard_id)


@dataclass
class Breaker:
    """Causes faults in a service, and measures how long it takes to recover."""

    service: Service
    store: JobStore
    client: Client
    findings: Findings
    random: Random
    spawn: Callable[..., object]  # runs a client's action in a thread
    is_hurried: bool = False  # the next fault comes soon, so recovery is not measured

    def strike(self, name: str) -> None:
        """Cause the fault of this name at a random moment."""
        self.client.over.wait(self.random.uniform(0, 1 if self.is_hurried else 4))
        FAULTS[name](self, name)

    def note(self, name: str, what: str) -> None:
        """Record a fault as it happens."""
        self.findings.faults.append(name)
        self.findings.say(f"{name}: {what}")

    def stop_worker(self, name: str, send: Callable[[Service, int], None]) -> None:
        """Apply `send` to a worker in mid-shard, and wait until the shard runs again."""
        lease = self.find_victim()
        if lease is None:
            return
        send(self.service, lease.pid)
        self.note(name, f"worker {lease.pid} at {lease}")
        with ThreadPoolExecutor(1) as pool:
            recovery = pool.submit(self.see_shard_again, lease, name)
            if lease.pid in self.service.broken:
                stopped_s = await_that(lambda: is_gone(lease.pid), PATIENCE_S, f"worker {lease.pid} is still there")
                self.findings.note_recovery("a worker stopped", stopped_s, STOP_S)
            self.service.mend(self.random.uniform(0, 1))
            recovery.result()

    def find_victim(self) -> Lease | None:
        """Find a running shard; None if for a while there is none that may lose its worker once more.

        A shard that loses too many workers fails its job, as it must.
        """
        n_most = Settings().max_attempts - 1
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline and not self.client.over.is_set():
            workers = self.service.pids("worker")
            found = [lease for lease in leases(self.store) if lease.pid in workers and lease.n_attempts < n_most]
            if found:
                return self.random.choice(found)
            time.sleep(0.05)
        return None

    def see_shard_again(self, left: Lease, name: str) -> None:
        """Measure how long a shard waits, unless its worker had just completed it."""
        if self.is_hurried or not is_left(self.store, left):
            return
        lies_s = self.wait_until(lambda: left not in leases(self.store), f"{left} still has its worker")
        waits_s = self.wait_until(lambda: not is_left(self.store, left), f"{left} still waits")
        self.findings.say(f"  taken from its worker after {lies_s:.1f} s, by another one after {waits_s:.1f} s more")
        self.findings.note_recovery(f"runs again after {name}", lies_s + waits_s, RECOVERY_S)

    def wait_until(self, holds: Callable[[], object], otherwise: str) -> float:
        """Wait until a condition holds; returns the seconds that this took.

        Raises:
            Lost: it doesn't hold in time.
            Interrupted: the soak is over.
        """
        seconds = await_that(lambda: self.client.over.is_set() or holds(), PATIENCE_S, otherwise)
        if self.client.over.is_set():
            raise Interrupted
        return seconds

    def end_one(self, role: str) -> int:
        """Kill one process of this role; returns its id."""
        await_that(lambda: self.service.pids(role), PATIENCE_S, f"there is no {role}")
        pid = self.service.pids(role)[0]
        self.service.send(pid, signal.SIGKILL)
        await_that(lambda: is_gone(pid), PATIENCE_S, f"{role} {pid} is still there")
        return pid

    def see_answer_again(self, what: str) -> None:
        """Wait for the first answer without an error."""
        seconds = self.wait_until(lambda: self.client.is_answered("/v1/jobs?limit=1"), f"{what} is not back")
        if not self.is_hurried:
            self.findings.note_recovery(f"{what} answers", seconds)

    def kill_api(self, name: str) -> None:
        """Kill the API, between requests or amid one."""
        self.note(name, f"process {self.end_one('api')}")
        self.service.mend(self.random.uniform(0, 1))
        self.see_answer_again("API")

    def kill_api_amid_posts(self, name: str) -> None:
        """Kill the API while four clients post the same three jobs: each must become one job."""
        spec, posted_keys = self.random.choice(SHORT), [draw_key(self.random) for _ in range(3)]
        with ThreadPoolExecutor(4) as pool:
            posted = [pool.submit(lambda: [self.client.post(spec, key) for key in posted_keys]) for _ in range(4)]
            time.sleep(self.random.uniform(0, 0.1))
            self.kill_api(name)
        for ids in zip(*(each.result() for each in posted), strict=True):
            if len(set(ids)) > 1:
                self.findings.note_problem(f"one Idempotency-Key made {len(set(ids))} jobs: {', '.join(set(ids))}")
            self.findings.accepted.append(ids[0])
            self.spawn(self.client.fetch, ids[0], spec)

    def kill_redis(self, name: str, away_s: float) -> None:
        """Kill Redis; after a while it starts again on its files."""
        self.note(name, f"process {self.end_one('redis')}" + f", for {away_s:.1f} s" * (name == "redis-away"))
        self.service.mend(away_s)
        self.see_answer_again("Redis")

    def freeze_redis(self, name: str) -> None:
        """Freeze Redis for some seconds."""
        frozen_s = self.random.uniform(1, 12)
        (pid,) = self.service.pids("redis")
        self.note(name, f"process {pid}, for {frozen_s:.1f} s")
        os.kill(pid, signal.SIGSTOP)
        try:
            self.client.over.wait(frozen_s)
        finally:
            os.kill(pid, signal.SIGCONT)
        self.see_answer_again("Redis")

    def make_replica(self, name: str) -> None:
        """Let Redis refuse all writes for some seconds, as a master does that has been replaced."""
        refuses_s = self.random.uniform(1, 8)
        self.note(name, f"for {refuses_s:.1f} s")
        self.store.client.execute_command("REPLICAOF", "127.0.0.1", "1")
        try:
            self.client.over.wait(refuses_s)
        finally:
            self.store.client.execute_command("REPLICAOF", "NO", "ONE")
        self.see_answer_again("Redis")

    def unblock(self, name: str) -> None:
        """End every wait for a message with an error."""
        waiting = [client["id"] for client in self.store.client.client_list() if "b" in client["flags"]]
        for number in waiting:
            self.store.client.execute_command("CLIENT", "UNBLOCK", number, "ERROR")
        self.note(name, f"{len(waiting)} connections")

    def set_clock_back(self, name: str) -> None:
        """Move what Redis has noted an hour ahead, as if its host's clock had been set back by an hour."""
        jobs = [*self.store.jobs_in(State.QUEUED, State.RUNNING, State.FINALIZING, State.CANCELLING)]
        of_jobs = [key(job_id) for job_id in jobs for key in (keys.leases, keys.waiting)]
        for key in (*of_jobs, keys.WORKERS, keys.TURNS):
            for member in self.store.client.zrange(key, 0, -1):
                self.store.client.zadd(key, {member: 3600.0}, xx=True, incr=True)
        for job_id in jobs:
            if self.store.client.hexists(keys.job(job_id), "turn_began"):
                self.store.client.hincrbyfloat(keys.job(job_id), "turn_began", 3600.0)
        self.note(name, f"an hour, with {len(jobs)} jobs")

    def bury(self, name: str) -> None:
        """Put tombstones of 150,000 jobs into the store."""
        now, state = self.store.now(), keys.in_state(State.EXPIRED)
        with self.store.client.pipeline(transaction=False) as pipeline:
            for number in range(N_TOMBSTONES):
                job_id = f"over{number:012d}"
                pipeline.hset(keys.job(job_id), mapping={"status": "expired", "seq": 0, "finished_at": now})
                pipeline.zadd(keys.TOMBSTONES, {job_id: now}).zadd(state, {job_id: 0})
            pipeline.execute()
        self.note(name, f"{N_TOMBSTONES:,} expired jobs")


def kill_child(service: Service, pid: int) -> None:
    """Kill the child process of a worker, which computes; its parent starts another one."""
    for child in psutil.Process(pid).children():
        child.kill()


def _stop_by(number: signal.Signals, *, with_group: bool = False) -> Callable[[Breaker, str], None]:
    return lambda breaker, name: breaker.stop_worker(
        name, lambda service, pid: service.send(pid, number, with_group=with_group)
    )


FAULTS: dict[str, Callable[[Breaker, str], None]] = {
    "worker-child-kill": lambda breaker, name: breaker.stop_worker(name, kill_child),
    "worker-kill": _stop_by(signal.SIGKILL),
    "worker-term": _stop_by(signal.SIGTERM),
    "worker-int": _stop_by(signal.SIGINT, with_group=True),  # as a terminal does at Ctrl-C
    "api-kill": Breaker.kill_api,
    "api-kill-amid-posts": Breaker.kill_api_amid_posts,
    "redis-kill": lambda breaker, name: breaker.kill_redis(name, breaker.random.uniform(0, 1)),
    "redis-away": lambda breaker, name: breaker.kill_redis(name, breaker.random.uniform(2, 12)),
    "redis-freeze": Breaker.freeze_redis,
    "redis-replica": Breaker.make_replica,
    "redis-unblocked": Breaker.unblock,
    "redis-clock-back": Breaker.set_clock_back,
    "tombstones": Breaker.bury,
}
WAYS: dict[str, tuple[type[Service], Sequence[str]]] = {
    "serve": (Served, [name for name in FAULTS if name != "redis-away"]),  # `ablation serve` restarts Redis at once
    "parts": (Parts, [*FAULTS]),
}


# --- the soak --------------------------------------------------------------------------------------------------------


@dataclass
class Soak:
    """Rounds of jobs and faults against one service."""

    way: str
    service: Service
    csvs: dict[str, bytes]
    findings: Findings
    random: Random
    faults: Iterator[str]  # endless names
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, n_rounds: int, seconds: float) -> None:
        """Start the service, run every round, stop it, and check what is left."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.break_off)
        started = self.findings.started = time.monotonic()
        self.findings.say(f"against {self.way}")
        try:
            self.service.start()
            client = Client(self.service.url, self.findings, self.csvs, self.over)
            await_that(lambda: client.is_answered("/readyz"), PATIENCE_S, "the service is not ready")
            self.findings.say(f"ready at {client.url}")
            for name in [name for name in SPECS if name not in self.csvs]:
                client.run(name, draw_key(self.random))
                self.findings.say(f"undisturbed: {name}")
            with connect(Settings(redis_url=self.service.redis_url()), n_retries=30) as connection:
                while self.findings.n_rounds < n_rounds and time.monotonic() - started < seconds:
                    self.run_round(client, JobStore(connection))
            self.findings.unasked = sorted(client.list_ids() - {*self.findings.accepted})
            for job_id in self.findings.unasked:
                self.findings.note_problem(f"nobody was told of job {job_id}")
        except Lost as error:
            self.findings.note_problem(str(error))
        except Exception:
            self.findings.note_problem(traceback.format_exc())
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the cleanup must not be interrupted
            self.service.note_deaths()
            self.service.stop(self.random.choice((signal.SIGINT, signal.SIGTERM)))
            self.findings.leftovers = kill_leftovers(self.service.home)
            for process in self.findings.leftovers:
                self.findings.note_problem(f"left over: {process}")

    def break_off(self, number: int, frame: object) -> None:
        """Tell all threads to end, since waiting for them would take long."""
        self.over.set()
        raise KeyboardInterrupt

    def run_round(self, client: Client, store: JobStore) -> None:
        """Run two clients and a few faults until every job is over."""
        self.findings.n_rounds += 1
        is_hurried = self.findings.n_rounds % 2 == 0
        long, short, key = self.random.choice(LONG), self.random.choice(SHORT), draw_key(self.random)
        self.findings.say(f"round {self.findings.n_rounds}{', hurried' * is_hurried}: {long}; {short}")
        with ThreadPoolExecutor(16) as pool:
            futures: list[Future[None]] = []

            def spawn(work: Callable[..., None], *arguments: Any) -> None:
                futures.append(pool.submit(self.guard, work, *arguments))

            try:
                if self.random.random() < 1 / 3:
                    spawn(client.change_mind, long, key, self.random.uniform(0, 10))
                else:
                    spawn(client.run, long, key)
                spawn(client.run, short, f"{key}-short")
                breaker = Breaker(self.service, store, client, self.findings, self.random, spawn, is_hurried)
                for _ in range(N_HURRIED if is_hurried else N_FAULTS):
                    if not all(future.done() for future in futures):
                        breaker.strike(next(self.faults))
                while not all(future.done() for future in futures):
                    time.sleep(PAUSE_S)
            except BaseException:
                self.over.set()
                raise

    def guard(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call a function and record an exception as a problem."""
        try:
            work(*arguments)
        except Lost as error:
            self.findings.note_problem(str(error))
        except Interrupted:
            pass
        except Exception:
            self.findings.note_problem(traceback.format_exc())


def draw_key(random: Random) -> str:
    """Draw an Idempotency-Key."""
    return f"{random.getrandbits(64):x}"


def deal(names: Sequence[str], random: Random) -> Iterator[str]:
    """Yield the names endlessly in random order: every one before any comes again."""
    while True:
        yield from random.sample(names, len(names))


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument("--rounds", type=int, default=3, help="against each service; every second is a hurried one")
    parser.add_argument("--minutes", type=float, help="begin rounds for so long in all, however many they are")
    parser.add_argument("--workers", type=int, default=2, help="of each service, with one thread each")
    parser.add_argument("--against", choices=WAYS, help="only this service; both in turn if left out")
    parser.add_argument("--faults", default=",".join(FAULTS), help="only these, with commas between them (%(default)s)")
    options = parser.parse_args()
    options.faults = options.faults.split(",")
    if unknown := {*options.faults} - FAULTS.keys():
        parser.error(f"--faults: got {', '.join(sorted(unknown))}; allowed: {', '.join(FAULTS)}")
    for way in [options.against] if options.against else WAYS:
        _, possible = WAYS[way]
        if not {*options.faults} & {*possible}:
            parser.error(f"--faults: got {', '.join(options.faults)}; against {way} there are: {', '.join(possible)}")
    return options


def make_soak(way: str, options: argparse.Namespace, folder: Path, csvs: dict[str, bytes]) -> Soak:
    """Make the soak test of this service, with a schedule of its own."""
    kind, possible = WAYS[way]
    findings, random = Findings(), Random(f"{options.seed} {way}")
    faults = [name for name in possible if name in options.faults]
    return Soak(way, kind(folder / way, options.workers, findings), csvs, findings, random, deal(faults, random))


def main() -> None:
    """Run the selected soak tests; the exit status is 0 only if nothing was lost and nothing differed."""
    options = read_options()
    folder = Path(tempfile.mkdtemp(prefix="ablation-soak-"))
    csvs: dict[str, bytes] = {}
    soaks = [make_soak(way, options, folder, csvs) for way in ([options.against] if options.against else WAYS)]
    code = 0
    try:
        for soak in soaks:
            if options.minutes:
                soak.run(n_rounds=sys.maxsize, seconds=60 * options.minutes / len(soaks))
            else:
                soak.run(n_rounds=options.rounds, seconds=math.inf)
    except KeyboardInterrupt:
        code = 130
    for soak in soaks:
        print(f"\nAgainst {soak.way}, seed {options.seed}, {options.workers} workers:\n{soak.findings.summary()}")
    problems = [f"{soak.way}: {problem}" for soak in soaks for problem in soak.findings.problems]
    if problems:
        print("\nPROBLEMS\n" + "\n".join(problems) + f"\nLogs and data are kept in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)
    print("\nInterrupted." if code else "\nAll is well.")
    sys.exit(code)


if __name__ == "__main__":
    main()

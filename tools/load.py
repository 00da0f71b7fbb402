"""Load test of the service: many jobs, polls and streams at once, and a slow client.

Run by `make load`; docs/load.md says how to read it. In: a server of its own (`ablation serve` in a folder of its own),
or one that runs (`--server`). Out: the numbers of each phase on standard output; exit status 1 if a job was lost, a
byte differed, a request failed or memory grew. Times are reported and not judged: they depend on the machine, too.

    queue     post 1,000 small jobs as fast as they are taken, while a worker works; 200 polls a second of them for
              30 s, while 20 streams of events are open; wait for all; run some again alone: the same bytes?
    growth    small jobs one batch after the other, each deleted when it is over: does anything grow?
    download  all 16.7 million rows of AlexNet's second Linear to a client that takes 1 MB/s, then at full speed
    redis-freeze, half-bodies, half-heads, many-streams, long-spec: clients that do harm (tools/clients.py)

    python -m tools.load [--phases queue growth ...] [--server URL] [--soak 10000] [--write]
"""

import argparse
import functools
import http.client
import itertools
import json
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
from redis import Redis

from tools import clients
from worker import keys
from worker.parent_death import tether
from worker.states import TERMINAL, State

PHASES = ("queue", "growth", "download", *clients.PHASES)
PATIENCE_S = 300.0  # for one answer, and for the end of one job after the one before it
N_POSTING, N_POLLING = 8, 64  # connections
N_COMPARED = 20  # jobs of the queue phase that are run again
BATCH = 20  # jobs at a time while growth is measured
WARM_UP = 0.2  # share of the batches during which caches fill
OTHERS_PER_S, OTHERS_S = 50.0, 10.0  # polls beside a download, and without one
PIECE_BYTES = 100_000
MB = 1e6

# Growth that is allowed after the warm-up, however many jobs there were, since allocators keep fragments.
# A leak of 2 kB a job exceeds this at 10,000 jobs.
MAY_GROW = {"MB": 20.0, "files": 20, "threads": 20, "clients": 20, "keys": 20}
TOMBSTONE_BYTES = 4096  # what a deleted job may leave in Redis until its tombstone is removed
MAY_ADD_MB = 256.0  # that a download may add to the API's memory: some blocks of 16 MB, decoded and as text

TABLES: dict[str, dict[str, Any]] = {
    "large": {"model": {"name": "alexnet", "weights": "none"}, "layer": "classifier.4"},  # no download
    "small": {"model": {"name": "digits_alexnet"}, "layer": "fc2"},
}


def table_spec(size: str) -> dict[str, Any]:
    """Spec of a job on all weights of a layer, and few examples."""
    data = {"name": "digits", "test": {"count": 16}, "classes": {str(digit): digit for digit in range(10)}}
    return {**TABLES[size], "data": data, "sites": "all", "verify": 0}


def small_spec(seed: int) -> dict[str, Any]:
    """Spec of a job that takes a worker a tenth of a second; each seed has other weights and examples."""
    return {
        "model": {"name": "digits_alexnet"},
        "layer": "fc2",
        "data": {"name": "digits", "test": {"count": 50, "seed": seed}},
        "sites": {"count": 64, "seed": seed},
        "verify": 2,
    }


# --- the report ------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """The numbers of every phase, and all faults."""

    numbers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    differed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)

    def add(self, phase: str, numbers: Mapping[str, Any]) -> None:
        """Print and store what a phase has measured."""
        self.numbers[phase] = numbers
        print(f"\n{phase}")
        for name, value in numbers.items():
            print(f"  {name:<22} {show(value)}", flush=True)

    @property
    def faults(self) -> dict[str, list[str]]:
        """All faults, by kind."""
        return {"lost": self.lost, "differed": self.differed, "errors": self.errors, "grown": self.grown}

    def verdict(self) -> str:
        """Number of faults of each kind in one line, and some of them."""
        counts = ", ".join(f"{kind} {len(faults)}" for kind, faults in self.faults.items())
        return "\n".join(
            ["", counts, *(f"  {kind}: {one}" for kind, faults in self.faults.items() for one in faults[:5])]
        )


def show(value: Any) -> str:
    """Format numbers with their significant digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show(one)}" for name, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


# --- requests --------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """One HTTP request."""

    method: str
    path: str
    spec: Mapping[str, Any] | None = None


class Answer(NamedTuple):
    """One answer; status 0 if none came, with the reason as the body."""

    seconds: float
    status: int
    body: bytes


def connect(server: str) -> http.client.HTTPConnection:
    """Open a persistent connection. httpx would take several times as long, on the machine that is measured."""
    return http.client.HTTPConnection(urlsplit(server).netloc, timeout=PATIENCE_S)


def ask(connection: http.client.HTTPConnection, request: Request, due: float | None = None) -> Answer:
    """Send one request; its time counts from when it was `due`, else from now."""
    start = time.perf_counter() if due is None else due
    body = None if request.spec is None else json.dumps(request.spec)
    try:
        connection.request(request.method, request.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, answered = response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        connection.close()  # the next request opens it again
        status, answered = 0, repr(error).encode()
    return Answer(time.perf_counter() - start, status, answered)


def send(server: str, requests: Sequence[Request], connections: int, per_s: float | None = None) -> list[Answer]:
    """Send requests as fast as they are answered, or at a fixed rate; returns the answers in order.

    At a fixed rate each request has its due time, whatever the others take: one that must wait for a free connection
    counts from then, so a slow server is not asked less often.
    """
    numbers = itertools.count()  # a thread takes the next one
    answers = [Answer(0.0, 0, b"not sent")] * len(requests)
    start = time.perf_counter()

    def work() -> None:
        connection = connect(server)
        while (k := next(numbers)) < len(requests):
            due = start + k / per_s if per_s else time.perf_counter()
            time.sleep(max(0.0, due - time.perf_counter()))
            answers[k] = ask(connection, requests[k], due)
        connection.close()

    threads = [
        threading.Thread(target=work, daemon=True) for _ in range(connections)
    ]  # daemons, so that Ctrl-C doesn't wait for them
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def check(answers: Iterable[Answer], allowed: set[int], report: Report) -> None:
    """Record every answer with another status than these as a fault."""
    wrong = [answer for answer in answers if answer.status not in allowed]
    report.errors.extend(f"status {answer.status}: {answer.body[:300].decode(errors='replace')}" for answer in wrong)


def times_ms(answers: Iterable[Answer]) -> dict[str, float]:
    """Median, 99th percentile and maximum of the answers' times."""
    ordered = sorted(1e3 * answer.seconds for answer in answers)
    return {"p50 ms": statistics.median(ordered), "p99 ms": ordered[int(0.99 * len(ordered))], "max ms": ordered[-1]}


def post(server: str, specs: Sequence[Mapping[str, Any]], report: Report) -> tuple[list[str], list[Answer]]:
    """Post these jobs as fast as they are accepted; returns their ids, and the answers.

    Raises:
        SystemExit: none was accepted.
    """
    answers = send(server, [Request("POST", "/v1/jobs", spec) for spec in specs], min(N_POSTING, len(specs)))
    check(answers, {202}, report)
    ids = [json.loads(answer.body)["id"] for answer in answers if answer.status == 202]
    if not ids:
        raise SystemExit(f"no job was taken: {report.errors[0]}")
    return ids, answers


def wait(server: str, ids: Sequence[str], report: Report) -> list[dict[str, Any]]:
    """Wait for these jobs; one that does not succeed is recorded as lost."""
    connection, jobs = connect(server), []
    for job_id in ids:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = ask(connection, Request("GET", f"/v1/jobs/{job_id}"))
            job = json.loads(answer.body) if answer.status == 200 else {"status": f"status {answer.status}"}
            if answer.status != 200 or job["status"] in TERMINAL or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if job["status"] != State.SUCCEEDED:
            report.lost.append(f"job {job_id}: {job['status']} {job.get('error') or ''}")
        jobs.append(job)
    connection.close()
    return jobs


def run_alone(server: str, spec: Mapping[str, Any], report: Report) -> str:
    """Run one job to its end; returns its id."""
    ids, _ = post(server, [spec], report)
    wait(server, ids, report)
    return ids[0]


def delete(server: str, ids: Sequence[str], report: Report) -> None:
    """Delete these jobs."""
    check(send(server, [Request("DELETE", f"/v1/jobs/{job_id}") for job_id in ids], 1), {204}, report)


def read_csv(server: str, job_id: str) -> bytes:
    """A job's table, or the answer that came instead."""
    return ask(connect(server), Request("GET", f"/v1/jobs/{job_id}/results.csv")).body


# --- the service -----------------------------------------------------------------------------------------------------


@contextmanager
def serving(home: Path) -> Iterator[str]:
    """Context with the address of an `ablation serve` on this folder, which ends with this process."""
    command = [sys.executable, "-m", "ablation.cli", "serve", "--port", "0", "--home", str(home)]
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    options: dict[str, Any] = {"start_new_session": True}  # Ctrl-C reaches this process alone
    options["preexec_fn"] = functools.partial(tether, signal.SIGTERM, os.getpid())
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options) as process:
        try:
            assert process.stdout
            found = next(
                (found for line in process.stdout if (found := re.search(r"ready at (http://\S+)", line))), None
            )
            if found is None:
                raise SystemExit("`ablation serve` ended before it was ready.")
            yield found[1]
        finally:
            process.terminate()
            process.wait()  # `Popen.__exit__` doesn't wait after a Ctrl-C


@dataclass(frozen=True)
class Service:
    """A running server, and its processes on this machine."""

    url: str
    processes: Mapping[str, psutil.Process]
    redis: Redis | None
    logs: Sequence[Path]


def find_service(url: str) -> Service:
    """Find the processes of a server: the API that listens at an address, and the workers and server of its Redis."""
    modules = [(process, module_of(process)) for process in psutil.process_iter(["cmdline"])]
    apis = (process for process, module in modules if module == "api" and listens(process, urlsplit(url).port))
    api = next(apis, None)
    redis_url = redis_of(api) if api else ""
    if api is None or not redis_url:
        print("The service's processes are not on this machine, or not ours to see: their memory is not measured.")
        return Service(url, {}, None, [])
    processes, redis = {"API": api}, Redis.from_url(redis_url)
    workers = [process for process, module in modules if module == "worker" and redis_of(process) == redis_url]
    parents = [process for process in workers if process.parent() not in workers]
    for k, parent in enumerate(parents, 1):
        processes |= {f"worker-{k} parent": parent} | {f"worker-{k} child": child for child in parent.children()}
    if redis_url.startswith("unix://"):  # else it may be on another machine
        processes["Redis"] = psutil.Process(redis.info("server")["process_id"])
    home = Path(api.environ().get("ABLATION_HOME", "nowhere"))
    return Service(url, processes, redis, [*home.glob("logs/*.log"), *home.glob("redis/*.log")])


def module_of(process: psutil.Process) -> str:
    """Name of the module that this process runs by `python -m`, if any."""
    words = process.info["cmdline"] or []
    return next((word for before, word in itertools.pairwise(words) if before == "-m"), "")


def listens(process: psutil.Process, port: int | None) -> bool:
    """Whether the process listens at this port."""
    with suppress(psutil.Error):
        sockets = process.net_connections("tcp")
        return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets)
    return False


def redis_of(process: psutil.Process) -> str:
    """URL of the Redis that the process uses."""
    with suppress(psutil.Error):
        return str(process.environ().get("REDIS_URL", ""))
    return ""


def sample(service: Service) -> dict[str, float]:
    """Measure everything that could grow."""
    found: dict[str, float] = {}
    for name, process in service.processes.items():
        found[f"{name} MB"] = process.memory_info().rss / MB
        found[f"{name} files"], found[f"{name} threads"] = process.num_fds(), process.num_threads()
    if service.redis:
        info: Any = service.redis.info()
        tombstones: Any = service.redis.zcard(keys.in_state(State.EXPIRED))
        others: Any = service.redis.dbsize()
        found |= {"Redis data MB": info["used_memory"] / MB, "Redis clients": info["connected_clients"]}
        found |= {"tombstones": tombstones, "other Redis keys": others - tombstones}
        found["logs MB"] = sum(log.stat().st_size for log in service.logs) / MB
    return found


# --- many jobs at once -----------------------------------------------------------------------------------------------


def measure_queue(service: Service, asked: argparse.Namespace, report: Report) -> None:
    """Run the phase `queue`: post, poll, wait, compare."""
    specs = [small_spec(seed) for seed in range(asked.jobs)]
    before, start = sample(service), time.perf_counter()
    ids, answers = post(service.url, specs, report)
    pace = {"jobs": len(ids), "posts per s": len(specs) / (time.perf_counter() - start)}
    after = sample(service)
    memory = {name: {"before": before[name], "with the queue": after[name]} for name in after if name.endswith("MB")}
    report.add("posts", pace | times_ms(answers) | memory)
    streams = Streams(service.url, ids[-asked.streams :])
    measure_polls(service, ids, asked, report)
    jobs = wait(service.url, ids, report)
    measure_drain(jobs, report)
    streams.finish(report)
    compare_alone(service.url, [job for job in jobs if job["status"] == State.SUCCEEDED], report)
    delete(service.url, ids, report)


class Streams:
    """Event streams, each read to its end in a thread."""

    def __init__(self, server: str, ids: Sequence[str]) -> None:
        self.server = server
        self.told: dict[str, list[str]] = {job_id: [] for job_id in ids}
        self.threads = [threading.Thread(target=self.follow, args=[job_id], daemon=True) for job_id in ids]
        for thread in self.threads:
            thread.start()

    def follow(self, job_id: str) -> None:
        """Record the name of every event of a job, and what interrupted the stream."""
        told, connection = self.told[job_id], connect(self.server)
        try:
            connection.request("GET", f"/v1/jobs/{job_id}/events")
            told.extend(line.split()[1].decode() for line in connection.getresponse() if line.startswith(b"event: "))
        except (OSError, http.client.HTTPException) as error:
            told.append(repr(error))

    def finish(self, report: Report) -> None:
        """Wait for the streams to end; the last event of each must be `done`."""
        for thread in self.threads:
            thread.join(PATIENCE_S)
        for job_id, names in self.told.items():
            if names.count("done") != 1 or names[-1] != "done":
                report.errors.append(f"the events of job {job_id} end with {names[-3:]}")
        told = Counter(itertools.chain.from_iterable(self.told.values()))
        report.add("streams", {"streams": len(self.told), "events": told.total(), "done": told["done"]})


def poll(server: str, ids: Sequence[str], per_s: float, seconds: float) -> list[Answer]:
    """Poll state and results of one job after the other, at fixed times."""
    paths = itertools.cycle(path for job_id in ids for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/results"))
    requests = [Request("GET", path) for path in itertools.islice(paths, int(per_s * seconds))]
    return send(server, requests, N_POLLING, per_s)


def measure_polls(service: Service, ids: Sequence[str], asked: argparse.Namespace, report: Report) -> None:
    """Poll all jobs while the worker works."""
    start, cpu_s = time.perf_counter(), api_cpu_s(service)
    answers = poll(service.url, ids, asked.polls_per_s, asked.poll_s)
    pace = {"polls": len(answers), "polls per s": len(answers) / (time.perf_counter() - start)}
    pace["API CPU ms a poll"] = 1e3 * (api_cpu_s(service) - cpu_s) / len(answers)  # including the streams
    check(answers, {200, 202}, report)
    statuses = Counter(answer.status for answer in answers)
    report.add("polls", pace | times_ms(answers) | {f"status {status}": n for status, n in sorted(statuses.items())})


def api_cpu_s(service: Service) -> float:
    """CPU seconds of the API until now; NaN if they can't be read."""
    return sum(service.processes["API"].cpu_times()[:2]) if service.processes else math.nan


def measure_drain(jobs: Sequence[dict[str, Any]], report: Report) -> None:
    """Measure the worker's rate by the jobs' own times."""
    ended = [job for job in jobs if job["status"] == State.SUCCEEDED]
    numbers: dict[str, Any] = {"posted": len(jobs), "succeeded": len(ended)}
    if ended:
        first = min(datetime.fromisoformat(job["started_at"]) for job in ended)
        last = max(datetime.fromisoformat(job["finished_at"]) for job in ended)
        numbers["jobs per s"] = len(ended) / (last - first).total_seconds()
    report.add("drain", numbers)


def compare_alone(server: str, jobs: Sequence[dict[str, Any]], report: Report) -> None:
    """Run some of these jobs again, each alone, and compare the tables."""
    chosen, n_bytes = jobs[:: max(1, len(jobs) // N_COMPARED)], 0
    for job in chosen:
        again = run_alone(server, job["spec"], report)
        queued, alone = read_csv(server, job["id"]), read_csv(server, again)
        n_bytes += len(alone)
        if queued != alone or alone.count(b"\n") != 1 + job["spec"]["sites"]["count"]:
            report.differed.append(f"job {job['id']}: {len(queued)} bytes in the queue, {len(alone)} alone")
        delete(server, [again], report)
    report.add("run again alone", {"tables": len(chosen), "bytes": n_bytes})


# --- many jobs after each other --------------------------------------------------------------------------------------


def measure_growth(service: Service, asked: argparse.Namespace, report: Report) -> None:
    """Run small jobs in batches and delete them; measure everything that could grow after each batch."""
    samples, start = [], time.perf_counter()
    for seed in range(0, asked.soak, BATCH):
        ids, _ = post(service.url, [small_spec(seed + k) for k in range(BATCH)], report)
        wait(service.url, ids, report)
        delete(service.url, ids, report)
        samples.append(sample(service))
        n_jobs = BATCH * len(samples)
        if n_jobs % 1000 == 0:
            print(f"{n_jobs:,} of {asked.soak:,} jobs ...", flush=True)
    warm = samples[int(WARM_UP * len(samples)) :]
    pace = {"jobs": n_jobs, "jobs per s": n_jobs / (time.perf_counter() - start)}
    report.add("growth", pace | {name: course([one[name] for one in warm]) for name in warm[0]})
    report.grown.extend(too_much(warm[0], warm[-1]))


def course(values: Sequence[float]) -> dict[str, float]:
    """First, last and largest value of a number, and its slope by least squares over the batches."""
    slope = statistics.linear_regression(range(len(values)), values).slope if len(values) > 1 else 0.0
    return {"begin": values[0], "end": values[-1], "most": max(values), "per 1,000 jobs": slope * 1000 / BATCH}


def too_much(first: Mapping[str, float], last: Mapping[str, float]) -> Iterator[str]:
    """Names of what has grown beyond its limit."""
    for name in first.keys() - {"tombstones"}:
        bound = next(bound for ending, bound in MAY_GROW.items() if name.endswith(ending))
        if name.startswith("Redis") and name.endswith("MB"):
            bound += (last["tombstones"] - first["tombstones"]) * TOMBSTONE_BYTES / MB
        if last[name] - first[name] > bound:
            yield f"{name}: from {show(first[name])} to {show(last[name])}, more than {show(bound)}"


# --- a large table ---------------------------------------------------------------------------------------------------


class Seen:
    """Bytes and lines of a streamed file, and whether it began with these bytes."""

    def __init__(self, beginning: bytes) -> None:
        self.beginning, self.n_bytes, self.n_lines, self.differs = beginning, 0, 0, False

    def take(self, piece: bytes) -> None:
        """Count the next bytes."""
        self.differs |= not piece.startswith(self.beginning[self.n_bytes : self.n_bytes + len(piece)])
        self.n_bytes += len(piece)
        self.n_lines += piece.count(b"\n")


def measure_download(service: Service, asked: argparse.Namespace, report: Report) -> None:
    """Download a large table by a slow client that disconnects, then to its end, while another job is polled."""
    large, small = (run_alone(service.url, spec, report) for spec in (table_spec(asked.table), small_spec(0)))
    others = functools.partial(poll, service.url, [small], OTHERS_PER_S)
    measure_beside("no download", lambda: None, functools.partial(others, OTHERS_S), service, report)
    slowly = bytearray()
    download = functools.partial(download_csv, service.url, large, report)
    take_slowly = functools.partial(download, slowly.extend, asked.slow_mb_per_s, asked.slow_s)
    measure_beside("slow download", take_slowly, functools.partial(others, asked.slow_s), service, report)
    seen = Seen(bytes(slowly))
    take_all = functools.partial(download, seen.take)
    measure_beside("whole download", take_all, functools.partial(others, OTHERS_S), service, report)
    results = json.loads(ask(connect(service.url), Request("GET", f"/v1/jobs/{large}/results?limit=0")).body)
    report.add("table", {"rows": results["total_rows"], "bytes": seen.n_bytes, "of them taken slowly": len(slowly)})
    if seen.n_lines != 1 + results["total_rows"]:
        report.differed.append(f"the table has {results['total_rows']} rows, the file {seen.n_lines} lines")
    if seen.differs or not slowly:
        report.differed.append(f"the {len(slowly)} bytes that were taken slowly are not those taken fast")
    delete(service.url, [large, small], report)


def download_csv(
    server: str,
    job_id: str,
    report: Report,
    take: Callable[[bytes], None],
    mb_per_s: float = math.inf,
    seconds: float = math.inf,
) -> None:
    """Read a table piece by piece at this rate, and disconnect after a time."""
    connection, n_bytes = connect(server), 0
    try:
        connection.request("GET", f"/v1/jobs/{job_id}/results.csv")
        response, start = connection.getresponse(), time.perf_counter()
        while n_bytes < mb_per_s * MB * seconds and (piece := response.read(PIECE_BYTES)):
            take(piece)
            n_bytes += len(piece)
            time.sleep(max(0.0, start + n_bytes / (mb_per_s * MB) - time.perf_counter()))
    except (OSError, http.client.HTTPException) as error:
        report.errors.append(f"the download broke off after {n_bytes} bytes: {error!r}")
    finally:
        connection.close()


def measure_beside(
    name: str, download: Callable[[], None], ask_others: Callable[[], list[Answer]], service: Service, report: Report
) -> None:
    """Measure polls during a download, and what it adds to the API's memory."""
    answers: list[Answer] = []
    start, used = time.perf_counter(), [api_mb(service)]
    downloading = threading.Thread(target=download, daemon=True)
    asking = threading.Thread(target=lambda: answers.extend(ask_others()), daemon=True)
    downloading.start()
    asking.start()
    while downloading.is_alive() or asking.is_alive():
        time.sleep(0.05)
        used.append(api_mb(service))
    seconds = time.perf_counter() - start
    check(answers, {200}, report)
    report.add(name, {"seconds": seconds, **times_ms(answers), "API MB": {"before": used[0], "most": max(used)}})
    if max(used) - used[0] > MAY_ADD_MB:
        report.grown.append(f"API MB: from {show(used[0])} to {show(max(used))} for {name}")


def api_mb(service: Service) -> float:
    """Memory of the API; NaN if it can't be read."""
    return service.processes["API"].memory_info().rss / MB if service.processes else math.nan


# --- the whole -------------------------------------------------------------------------------------------------------


def measure(url: str, asked: argparse.Namespace, report: Report) -> None:
    """Run the selected phases on a server that has its model loaded."""
    delete(url, [run_alone(url, small_spec(0), report)], report)
    service = find_service(url)
    report.add("machine", {"cores": os.cpu_count(), "load before": os.getloadavg()[0]})
    phases = {"queue": measure_queue, "growth": measure_growth, "download": measure_download, **clients.PHASES}
    for phase in asked.phases:
        phases[phase](service, asked, report)
    ended = [name for name, process in service.processes.items() if not process.is_running()]
    report.errors.extend(f"{name} ended meanwhile" for name in ended)
    tracebacks = {log: log.read_text(errors="replace").count("Traceback") for log in service.logs}
    report.errors.extend(f"{n} tracebacks in {log}" for log, n in tracebacks.items() if n)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.load", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="default: all of them")
    parser.add_argument("--server", help="a server that runs; default: one of its own")
    parser.add_argument("--jobs", type=int, default=1000, help="in the queue at once; default: %(default)s")
    parser.add_argument("--polls-per-s", type=float, default=200.0, help="default: %(default)s")
    parser.add_argument("--poll-s", type=float, default=30.0, help="for so long; default: %(default)s")
    parser.add_argument("--streams", type=int, default=20, help="of events; default: %(default)s")
    parser.add_argument("--soak", type=int, default=300, help="jobs of the phase growth; default: %(default)s")
    parser.add_argument("--table", choices=TABLES, default="large", help="the table to download; default: %(default)s")
    parser.add_argument("--slow-mb-per-s", type=float, default=1.0, help="of the slow client; default: %(default)s")
    parser.add_argument("--slow-s", type=float, default=30.0, help="it stays for so long; default: %(default)s")
    parser.add_argument("--write", action="store_true", help="keep the numbers in benchmarks/results/load.json")
    return parser.parse_args()


def main() -> int:
    """Measure and report; the exit status is 1 if there were faults."""
    asked, report = parse_options(), Report()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends it like Ctrl-C
    home = Path(tempfile.mkdtemp(prefix="ablation-load-"))
    try:
        with nullcontext(asked.server) if asked.server else serving(home) as url:
            measure(url, asked, report)
    except psutil.NoSuchProcess as gone:
        report.errors.append(f"process {gone.pid} ended meanwhile")
    except KeyboardInterrupt:
        shutil.rmtree(home)
        print("Interrupted.")
        return 130
    is_well = not any(report.faults.values())
    print(report.verdict())
    if asked.write:
        from benchmarks.environment import write_result  # imports torch, which takes seconds

        write_result("load", {"claim": "the service under load", **report.numbers, "faults": report.faults})
    if is_well or asked.server:
        shutil.rmtree(home)
    else:
        print(f"logs: {home / 'logs'}")
    return int(not is_well)


if __name__ == "__main__":
    sys.exit(main())

"""Clients that do harm: phases of the load test with slow and many clients, and with a Redis that is stopped.

Used by `tools/load.py`. In: a running service. Out: the numbers of each phase, and its faults: an answer that is not
what it must be, one that comes too late, memory that is taken, a connection that is never closed.

    redis-freeze   the server of Redis is stopped for some seconds, while 60 clients ask for jobs
    half-bodies    150 bodies of 8 MiB that stop before their end
    half-heads     5,000 connections with half the head of a request, or nothing
    many-streams   2,000 streams of events at once, and polls beside them
    long-spec      a spec with a million indices: what do its answers weigh?
"""

import argparse
import http.client
import json
import resource
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from worker.states import TERMINAL

if TYPE_CHECKING:
    from tools.load import Report, Service

PULSE_S = 0.05  # between two requests for what must always be answered
FREE_S = 2.5  # what needs no Redis must be answered within that, also where a client had to knock twice
REFUSED_S = 5.0  # what needs Redis must be answered within that while it is stopped
FROZEN_S, N_ASKING, ASK_S = 8.0, 60, 0.2
N_BODIES, BODY_BYTES, MAY_ADD_MB = 150, 8 << 20, 300.0
N_HEADS = 5000
CLOSED_S = 45.0  # until the last connection of a silent client is closed
N_STREAMS, N_LONG, POLLED_S = 2000, 20, 10.0
N_INDICES, LONGEST_ANSWER = 1_000_000, 20_000
TIMEOUT_S = 60.0


def get(server: str, path: str) -> tuple[int, bool, float, bytes]:
    """Ask once on a new connection; returns status (0: none came), whether it says when to come back, time, body."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        found = answer.status, bool(answer.headers.get("Retry-After")), answer.read()
    except (OSError, http.client.HTTPException) as error:
        found = 0, False, repr(error).encode()
    finally:
        connection.close()
    return found[0], found[1], time.perf_counter() - start, found[2]


class Pulse:
    """A thread that asks for some addresses all the time, and what came back."""

    def __init__(self, server: str, paths: Sequence[str], most_s: float = FREE_S) -> None:
        self.server, self.most_s = server, most_s
        self.seconds: dict[str, list[float]] = {path: [] for path in paths}
        self.statuses: Counter[str] = Counter()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=[path], daemon=True) for path in paths]

    def __enter__(self) -> "Pulse":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)

    def _ask(self, path: str) -> None:
        while not self._is_over.wait(PULSE_S):
            status, _, seconds, _ = get(self.server, path)
            self.seconds[path].append(seconds)
            self.statuses[f"{path} {status}"] += 1

    def judge(self, phase: str, allowed: set[int], report: "Report") -> dict[str, Any]:
        """Record what was not answered in time; returns the numbers."""
        wrong = {name: n for name, n in self.statuses.items() if int(name.split()[1]) not in allowed}
        report.errors.extend(f"{phase}: {n} times {name}" for name, n in wrong.items())
        numbers: dict[str, Any] = {}
        for path, seconds in self.seconds.items():
            ordered = sorted(1e3 * one for one in seconds) or [0.0]
            numbers[path] = {"p50 ms": ordered[len(ordered) // 2], "p99 ms": ordered[int(0.99 * len(ordered))]}
            numbers[path]["max ms"] = ordered[-1]
            if ordered[-1] > 1e3 * self.most_s:
                report.errors.append(f"{phase}: {path} was answered after {ordered[-1]:,.0f} ms")
        return numbers


def raise_file_limit() -> None:
    """Let this process open as many connections as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connect(server: str, *pieces: bytes) -> socket.socket | None:
    """A connection on which these bytes were sent; None where the server refused them."""
    place = urlsplit(server)
    with suppress(OSError):
        line = socket.create_connection((place.hostname, place.port), timeout=TIMEOUT_S)
        with suppress(OSError):
            for piece in pieces:
                line.sendall(piece)
        return line
    return None


def read_until_closed(lines: list[socket.socket], seconds: float) -> Iterator[bytes]:
    """The beginning of what came on each connection that the server closes; those that it doesn't close are left."""
    poll, by_fd, said = select.poll(), {line.fileno(): line for line in lines}, dict.fromkeys(lines, b"")
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + seconds
    while by_fd and time.monotonic() < deadline:
        for fd, _ in poll.poll(100):
            line, piece = by_fd[fd], b""
            with suppress(OSError):
                piece = line.recv(1 << 14)
            said[line] += piece[: max(0, 1000 - len(said[line]))]
            if not piece:
                poll.unregister(fd)
                del by_fd[fd]
                lines.remove(line)
                line.close()
                yield said[line]


def status_of(said: bytes) -> str:
    """The status in the beginning of an answer."""
    return f"status {said.split()[1].decode()}" if said.startswith(b"HTTP/") else "closed"


def count_closed(phase: str, lines: list[socket.socket], report: "Report") -> dict[str, Any]:
    """Wait until the server has closed these connections; those that it keeps are a fault."""
    start = time.perf_counter()
    statuses = Counter(status_of(said) for said in read_until_closed(lines, CLOSED_S))
    if lines:
        report.errors.append(f"{phase}: {len(lines)} connections are still open after {CLOSED_S:g} s")
    for line in lines:
        line.close()
    return {**statuses, "closed after s": time.perf_counter() - start}


def measure_redis_freeze(service: "Service", asked: argparse.Namespace, report: "Report") -> None:
    """Stop the server of Redis, ask, and let it go on."""
    if "Redis" not in service.processes:
        return print("The server of Redis is not here: it is not stopped.")
    process, stop = service.processes["Redis"], threading.Event()
    answers: list[tuple[int, bool, float, bytes]] = []

    def work() -> None:
        while not stop.is_set():
            answers.append(get(service.url, "/v1/jobs"))
            time.sleep(ASK_S)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(N_ASKING)]
    free = Pulse(service.url, ["/healthz", "/metrics", "/v1/models", "/docs"])
    process.send_signal(signal.SIGSTOP)
    try:
        with free:
            for thread in threads:
                thread.start()
            time.sleep(FROZEN_S)
            stop.set()
            for thread in threads:
                thread.join(TIMEOUT_S)
    finally:
        process.send_signal(signal.SIGCONT)
    late = [seconds for _, _, seconds, _ in answers if seconds > REFUSED_S]
    if late:
        report.errors.append(f"redis-freeze: {len(late)} answers came late, the last after {max(late):.1f} s")
    odd = [body[:200] for status, says, _, body in answers if status != 503 or not says]
    report.errors.extend(f"redis-freeze: an answer that is not 503 with Retry-After: {body!r}" for body in odd[:3])
    numbers = {"refusals": len(answers), "latest s": max(seconds for _, _, seconds, _ in answers)}
    start = time.perf_counter()
    while get(service.url, "/v1/jobs")[0] != 200 and time.perf_counter() < start + TIMEOUT_S:
        time.sleep(0.05)
    numbers["answers again after s"] = time.perf_counter() - start
    report.add("redis-freeze", numbers | free.judge("redis-freeze", {200}, report))


@contextmanager
def watching_memory(service: "Service") -> Iterator[list[float]]:
    """Context with the API's memory in MB: first as it was, then at its most."""
    from tools.load import api_mb

    used, is_over = [api_mb(service)] * 2, threading.Event()

    def watch() -> None:
        while not is_over.wait(0.1):
            used[1] = max(used[1], api_mb(service))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield used
    finally:
        is_over.set()
        thread.join()


def measure_half_bodies(service: "Service", asked: argparse.Namespace, report: "Report") -> None:
    """Send bodies all but their ends, from clients that then do nothing."""
    head = f"POST /v1/plans HTTP/1.1\r\nHost: here\r\nContent-Length: {BODY_BYTES}\r\n\r\n".encode()
    with watching_memory(service) as used, Pulse(service.url, ["/healthz"]) as free:
        sent = [connect(service.url, head, b" " * (BODY_BYTES - 1)) for _ in range(N_BODIES)]
        closed = count_closed("half-bodies", [line for line in sent if line], report)
    if used[1] - used[0] > MAY_ADD_MB:
        report.grown.append(f"API MB: from {used[0]:.0f} to {used[1]:.0f} for half-bodies")
    numbers = {"bodies": N_BODIES, **closed, "API MB": {"before": used[0], "most": used[1]}}
    report.add("half-bodies", numbers | free.judge("half-bodies", {200}, report))


def measure_half_heads(service: "Service", asked: argparse.Namespace, report: "Report") -> None:
    """Open connections that never become requests."""
    raise_file_limit()
    with Pulse(service.url, ["/healthz"]) as free, Pulse(service.url, ["/v1/models"]) as others:
        sent = [connect(service.url, b"GET /healthz HTTP/1.1\r\nX-Half" if k % 2 else b"") for k in range(N_HEADS)]
        closed = count_closed("half-heads", [line for line in sent if line], report)
    numbers = free.judge("half-heads", {200}, report)
    numbers |= others.judge("half-heads", {200, 503}, report)  # 503 while all connections are new
    report.add("half-heads", {"connections": N_HEADS, **closed} | numbers)


def measure_many_streams(service: "Service", asked: argparse.Namespace, report: "Report") -> None:
    """Open more streams than are allowed, of jobs that last, and poll beside them."""
    from tools.load import Request, post, send

    raise_file_limit()
    ids, _ = post(service.url, [long_spec(seed) for seed in range(N_LONG)], report)
    requests = [f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: here\r\n\r\n".encode() for job_id in ids]
    with (
        Pulse(service.url, ["/healthz"]) as free,
        Pulse(service.url, [f"/v1/jobs/{ids[0]}"], REFUSED_S) as polls,  # 503 where all connections are taken
    ):
        sent = [connect(service.url, requests[k % len(requests)]) for k in range(N_STREAMS)]
        time.sleep(POLLED_S)
        statuses: Counter[str] = Counter()
        for line in filter(None, sent):
            line.settimeout(1)
            with suppress(OSError):
                statuses[status_of(line.recv(100))] += 1
            line.close()
    send(service.url, [Request("POST", f"/v1/jobs/{job_id}/cancel") for job_id in ids], 1)
    for job_id in ids:
        while json.loads(get(service.url, f"/v1/jobs/{job_id}")[3])["status"] not in TERMINAL:
            time.sleep(0.1)
    if statuses.keys() - {"status 200", "status 503"}:
        report.errors.append(f"many-streams: {dict(statuses)}")
    numbers = free.judge("many-streams", {200}, report) | polls.judge("many-streams", {200, 503}, report)
    report.add("many-streams", {"streams": N_STREAMS, **statuses} | numbers)


def long_spec(seed: int) -> dict[str, Any]:
    """Spec of a job that takes minutes."""
    data = {"name": "digits", "train": "all"}
    sites = {"count": 2000, "seed": seed}
    return {"model": {"name": "digits_alexnet"}, "layer": "conv2", "data": data, "sites": sites}


def measure_long_spec(service: "Service", asked: argparse.Namespace, report: "Report") -> None:
    """Post a job with a million indices, and weigh its answers."""
    from tools.load import Request, ask, table_spec
    from tools.load import connect as connect_http

    spec = {**table_spec("large"), "sites": {"indices": list(range(N_INDICES))}}
    with Pulse(service.url, ["/healthz"]) as free:
        posted = ask(connect_http(service.url), Request("POST", "/v1/jobs", spec))
        url = json.loads(posted.body).get("urls", {}).get("self", "/nowhere")
        answers = {path: get(service.url, path) for path in (url, "/v1/jobs?limit=1")}
        whole = get(service.url, f"{url}/spec")
        ask(connect_http(service.url), Request("POST", f"{url}/cancel", {}))
    sizes = {"posted": len(posted.body), "job": len(answers[url][3]), "list": len(answers["/v1/jobs?limit=1"][3])}
    report.errors.extend(f"long-spec: {name} has {n} bytes" for name, n in sizes.items() if n > LONGEST_ANSWER)
    if posted.status != 202 or len(json.loads(whole[3])["sites"]["indices"]) != N_INDICES:
        report.errors.append("long-spec: the whole spec can't be had")
    report.add("long-spec", {"bytes": {**sizes, "whole": len(whole[3])}} | free.judge("long-spec", {200}, report))


Measure = Callable[["Service", argparse.Namespace, "Report"], None]
PHASES: dict[str, Measure] = {
    "redis-freeze": measure_redis_freeze,
    "half-bodies": measure_half_bodies,
    "half-heads": measure_half_heads,
    "many-streams": measure_many_streams,
    "long-spec": measure_long_spec,
}

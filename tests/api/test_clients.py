"""Clients that are slow, or many: none of them holds the service up, or takes its memory. The API is a real process."""

import json
import re
import resource
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from fastapi import HTTPException

from ablation.spec import JobSpec
from api.app import make_app
from api.slots import Slots
from tests.api import conftest as jobs
from tests.api.conftest import FIELDS
from tests.api.test_main import COMMAND, PATIENCE_S, environment
from tests.worker.waiting import wait_for
from worker.settings import Settings
from worker.store import JobStore

BODY = json.dumps(FIELDS).encode()
HALF = b"GET /healthz HTTP/1.1\r\nHost: here\r\nX-Half"
LARGE = 4 << 20


@dataclass
class Api:
    """A running process and its address."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path
    stack: ExitStack = field(repr=False)

    def connect(self, *pieces: bytes) -> socket.socket:
        """A connection on which these bytes were sent."""
        url = httpx.URL(self.url)
        line = self.stack.enter_context(socket.create_connection((url.host, url.port), timeout=PATIENCE_S))
        for piece in pieces:
            line.sendall(piece)
        return line

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S, trust_env=False)

    def post(self, n_bytes: int = 0) -> httpx.Response:
        """A plan of a spec with so many blanks behind it."""
        content = BODY + b" " * n_bytes
        return httpx.post(f"{self.url}/v1/plans", content=content, timeout=PATIENCE_S, trust_env=False)

    def mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


def post_head(n_bytes: int, path: str = "/v1/plans") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {n_bytes}\r\n\r\n".encode()


def is_closed(line: socket.socket) -> bool:
    """Whether the server has closed the connection; what it has sent is read."""
    while select.select([line], [], [], 0)[0]:
        try:
            if not line.recv(1 << 16):
                return True
        except OSError:
            return True
    return False


def read_answer(line: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and the beginning of the body of an answer."""
    with closing(line.makefile("rb")) as file:
        status = int(file.readline().split()[1])
        headers = {}
        while (text := file.readline().strip()) != b"":
            name, _, value = text.decode().partition(": ")
            headers[name.lower()] = value
        return status, headers, file.read(int(headers.get("content-length", 0)))


@pytest.fixture
def start(settings: Settings, store: JobStore, tmp_path: Path) -> Iterator[Callable[..., Api]]:
    """Starts an API process with these variables."""
    with ExitStack() as stack:

        def begin(preexec_fn: Any = None, **variables: object) -> Api:
            more = {f"ABLATION_{name.upper()}": str(value) for name, value in variables.items()}
            own = {**environment(settings), "ABLATION_PORT": "0", **more}
            log = tmp_path / "api.log"
            with log.open("wb") as file:
                process = subprocess.Popen(COMMAND, env=own, stderr=file, preexec_fn=preexec_fn)
            stack.callback(process.wait, PATIENCE_S)
            stack.callback(process.send_signal, signal.SIGKILL)
            wait_for(lambda: b"running on" in log.read_bytes(), PATIENCE_S)
            found = re.search(r"running on (http://\S+)", log.read_text())
            assert found
            api = Api(process, found[1], log, stack.enter_context(ExitStack()))
            assert api.get("/healthz").status_code == 200
            return api

        yield begin


# --- slow clients ----------------------------------------------------------------------------------------------------


def test_half_heads_and_idle_connections_are_closed(start: Callable[..., Api]) -> None:
    api = start(client_s=1)
    answered = api.connect(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
    assert read_answer(answered)[0] == 200
    lines = [api.connect(HALF) for _ in range(50)] + [api.connect() for _ in range(50)] + [answered]
    trickling = api.connect(HALF)
    before = time.monotonic()
    while not all(is_closed(line) for line in [*lines, trickling]):
        assert time.monotonic() < before + 15
        assert api.get("/healthz").status_code == 200
        with suppress(OSError):
            trickling.sendall(b"x")  # which is no progress: the head must be there in time
        time.sleep(0.2)


def test_a_body_that_does_not_come_on_is_408(start: Callable[..., Api]) -> None:
    api = start(client_s=0.5)
    silent, trickling = (api.connect(post_head(1000), BODY[:10]) for _ in range(2))
    for _ in range(20):
        try:
            trickling.sendall(b" ")
        except OSError:
            break
        time.sleep(0.1)
    for line in (silent, trickling):
        status, headers, body = read_answer(line)
        assert (status, headers["content-type"]) == (408, "application/problem+json")
        assert json.loads(body)["instance"] == "/v1/plans"
        wait_for(lambda line=line: is_closed(line), 5)  # type: ignore[misc]


def test_unfinished_bodies_are_bounded_in_sum(start: Callable[..., Api]) -> None:
    api = start(max_body_bytes=8 << 20, client_s=3)
    before = api.mb()
    lines = [api.connect(post_head(2 * LARGE), b" " * LARGE) for _ in range(20)]
    refused = api.post(LARGE)
    assert (refused.status_code, int(refused.headers["retry-after"]) >= 1) == (503, True)
    assert "bodies" in refused.json()["detail"]
    assert api.post().status_code == 200  # small ones are read all the same
    assert api.mb() < before + 60  # 80 MB have been sent
    statuses = [read_answer(line)[0] for line in lines]
    assert set(statuses) == {408, 503}
    assert api.post(LARGE).status_code == 200


def test_a_client_that_does_not_take_its_answers_is_given_up(start: Callable[..., Api]) -> None:
    api = start(client_s=0.3)
    line = api.connect()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.settimeout(0.2)
    with suppress(OSError):  # nobody reads it any more
        for _ in range(2000):
            line.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: here\r\n\r\n")
    n_open = lambda: len(psutil.Process(api.process.pid).net_connections("tcp"))  # noqa: E731
    wait_for(lambda: n_open() <= 1, 20)


# --- many clients ----------------------------------------------------------------------------------------------------


def test_connections_beyond_the_limit_are_503(start: Callable[..., Api]) -> None:
    api = start(max_connections=20)
    busy = [api.connect(post_head(1000), BODY[:10]) for _ in range(20)]
    wait_for(lambda: api.get("/v1/models").status_code == 503, 5)
    refused = api.get("/v1/models")
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["content-type"] == "application/problem+json"
    assert api.get("/healthz").status_code == 200
    for line in busy:
        line.close()
    wait_for(lambda: api.get("/v1/models").status_code == 200, 5)


def test_those_who_only_wait_make_room_for_others(start: Callable[..., Api]) -> None:
    api = start(max_connections=20)
    for _ in range(20):
        api.connect(HALF)
    time.sleep(1.5)
    with httpx.Client(base_url=api.url, trust_env=False) as client:
        assert {client.get("/v1/models").status_code for _ in range(3)} == {200}


def test_the_limit_of_open_files_is_not_met(start: Callable[..., Api]) -> None:
    """The soft limit is raised, and where the hard one is low, fewer connections are kept."""
    api = start(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 300)))
    for _ in range(400):
        try:
            api.connect(HALF)
        except OSError:
            break
    time.sleep(1.5)
    answers = [api.get("/healthz").status_code for _ in range(5)]
    assert answers == [200] * 5
    log = api.log.read_text()
    assert "Traceback" not in log
    assert len(log) < 5000, log
    assert resource.prlimit(api.process.pid, resource.RLIMIT_NOFILE) == (300, 300)
    assert "allows 104 connections" in log


def test_streams_beyond_the_limit_are_503(
    start: Callable[..., Api], store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    api = start(max_streams=3)
    path = f"/v1/jobs/{jobs.queued(store, settings, spec).id}/events"
    request = f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode()
    open_ones = [api.connect(request) for _ in range(3)]
    assert [read_answer(line)[0] for line in open_ones] == [200] * 3
    refused = api.get(path)
    assert (refused.status_code, int(refused.headers["retry-after"]) >= 1) == (503, True)
    assert "Poll the job instead." in refused.json()["detail"]
    assert httpx.head(api.url + path, trust_env=False).status_code == 503
    open_ones[0].close()

    def is_served() -> bool:
        line = api.connect(request)
        with closing(line):
            return read_answer(line)[0] == 200

    wait_for(is_served, 10)
    wait_for(is_served, 10)  # its place was given back


def test_many_streams_read_redis_once(settings: Settings, store: JobStore, spec: JobSpec) -> None:
    def n_looks() -> int:
        return int(store.client.info("commandstats")["cmdstat_evalsha"]["calls"])

    job = jobs.queued(store, settings, spec)
    with jobs.serving(settings) as api, ExitStack() as stack:
        streams = [stack.enter_context(api.stream("GET", f"/v1/jobs/{job.id}/events")) for _ in range(50)]
        lines = [stream.iter_lines() for stream in streams]
        assert {next(one) for one in lines} == {"event: status"}
        time.sleep(1)
        before = n_looks()
        time.sleep(2)
        assert 1 <= n_looks() - before <= 8  # 200 would be one each


def test_downloads_beyond_the_limit_are_503(settings: Settings, store: JobStore, spec: JobSpec) -> None:
    app = make_app(settings.model_copy(update={"max_downloads": 1}))
    job = jobs.succeeded(store, settings, spec)
    with jobs.serving(settings, app) as api:
        path, slots = f"/v1/jobs/{job.id}/results.csv", app.state.desk.downloads
        for method in ("GET", "HEAD") * 3:  # each gives its place back, a moment after the client has its answer
            wait_for(lambda method=method: api.request(method, path).status_code == 200, 5)  # type: ignore[misc]
        wait_for(lambda: takes(slots), 5)
        refused = api.get(path)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert api.get(f"/v1/jobs/{job.id}/results").status_code == 200
        slots.give_back()
        assert api.get(path).status_code == 200


def takes(slots: Slots) -> bool:
    try:
        slots.take()
    except HTTPException:
        return False
    return True

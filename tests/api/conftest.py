"""The API over real HTTP on a real Redis, and jobs in whatever state a test needs."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI

from ablation.inputs.catalog import NOTHING
from ablation.spec import JobSpec, make_spec
from ablation.table import ImportanceTable
from api.app import make_app
from api.examples import EXAMPLES
from tests.worker.conftest import make_partial
from worker import codec
from worker.planner import plan_job
from worker.redis_server import RedisServer
from worker.settings import Settings
from worker.store import JobRecord, JobStore

OWNER = "a-worker"
SUMMARY = EXAMPLES["results"]["summary"]

FIELDS = {
    "model": {"name": "digits_alexnet"},
    "layer": "fc2",
    "data": {"name": "digits", "train": "all", "test": {"per_class": 7}},
    "sites": {"count": 11},
}


@pytest.fixture
def spec() -> JobSpec:
    return make_spec(FIELDS)


@pytest.fixture(scope="session")
def service(redis_server: RedisServer, home: Path) -> Iterator[httpx.Client]:
    """A client of the whole application, one for the whole run."""
    with serving(Settings(redis_url=redis_server.url, home=home, threads=1)) as client:
        document = client.get("/openapi.json").json()
        client.event_hooks["response"] = [lambda answer: check_documented(answer, document["paths"])]
        yield client


def check_documented(answer: httpx.Response, paths: dict[str, Any]) -> None:
    """Every answer in these tests is one that OpenAPI knows: status, content type, headers."""
    path = answer.request.url.path
    known = next((one for one in paths if re.fullmatch(re.sub(r"{\w+}", "[^/]+", one), path)), None)
    method = answer.request.method.lower().replace("head", "get")  # the same, without a body
    operation = paths[known].get(method) if known else None
    if operation is None:
        assert answer.status_code in (404, 405, 413) or path in ("/docs", "/openapi.json") or "static" in path
        return
    said = operation["responses"].get(str(answer.status_code))
    assert said, f"{answer.request.method} {path}: {answer.status_code} is not documented"
    kind = answer.headers.get("content-type", "").partition(";")[0]
    assert kind in said.get("content", {"": None}), f"{answer.request.method} {path}: {kind} is not documented"
    told = {"location", "retry-after", "etag", "vary", "content-disposition"} & set(answer.headers)
    assert told <= {name.lower() for name in said.get("headers", {})}, (path, told)


@pytest.fixture
def api(service: httpx.Client, store: JobStore) -> httpx.Client:
    """A client of a service without jobs: `store` has emptied Redis."""
    return service


@contextmanager
def serving(settings: Settings, app: FastAPI | None = None) -> Iterator[httpx.Client]:
    """A client of a server on these settings, in a thread of this process."""
    # With its protocol named, asyncio turns Nagle's algorithm off, as it does for the real service: 40 ms an answer.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # a client that is quicker than the thread waits, and is not refused
        server = uvicorn.Server(uvicorn.Config(app or make_app(settings), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        host, port = listener.getsockname()
        try:
            with httpx.Client(base_url=f"http://{host}:{port}", timeout=60, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def make_table() -> ImportanceTable:
    """Three rows with everything that JSON and CSV may stumble over."""
    columns = {
        "index": np.array([5, 2, 9], np.int64),
        "weight": np.array([0.1, -1e-300, 3.0]),
        "utility_test": np.array([np.nan, 1 / 3, -2.5e-8]),
    }
    return ImportanceTable(columns=columns, about={"seconds": 1.5})


def queued(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    return store.create(spec, plan_job(spec, settings, NOTHING))


def running(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    job = queued(store, settings, spec)
    assert job.plan
    assert store.claim(job.id, job.plan.shards[0].id, OWNER)
    store.beat(job.id, job.plan.shards[0].id, OWNER, 0.25)
    return job


def finalizing(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    job = running(store, settings, spec)
    bring_partials(store, job)
    return job


def succeeded(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    job = running(store, settings, spec)
    succeed(store, job)
    return job


def bring_partials(store: JobStore, job: JobRecord) -> None:
    assert job.plan
    payload = codec.encode_partial(make_partial(0, 11))
    for shard in job.plan.shards:
        store.claim(job.id, shard.id, OWNER)
        store.complete(job.id, shard.id, OWNER, payload)


def succeed(store: JobStore, job: JobRecord) -> None:
    bring_partials(store, job)
    assert store.claim_finalize(job.id, OWNER)
    table = make_table()
    assert store.save_table(job.id, OWNER, table.about, SUMMARY, codec.encode_blocks(table))


def failed(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    job = running(store, settings, spec)
    assert store.fail(job.id, {"type": "proof", "title": "Proof failed.", "detail": "0.1 is more than 1e-4"})
    return job


def cancelled(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    job = queued(store, settings, spec)
    assert store.cancel(job.id).state == "cancelled"
    return job

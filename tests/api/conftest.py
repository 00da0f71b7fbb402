"""The API over real HTTP on a real Redis, and jobs in whatever state a test needs."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import uvicorn

from ablation.partial import zero
from ablation.spec import JobSpec, make_spec
from ablation.table import ImportanceTable
from api.app import make_app
from api.dependencies import plan_job
from worker import codec
from worker.settings import Settings
from worker.store import JobRecord, JobStore

OWNER = "a-worker"
SUMMARY = {"n_sites": 3, "correlation": None}

FIELDS = {
    "model": {"name": "digits_alexnet"},
    "layer": "fc2",
    "data": {"name": "digits", "train": "all", "test": {"per_class": 7}},
    "sites": {"count": 11},
}


@pytest.fixture
def spec() -> JobSpec:
    return make_spec(FIELDS)


@pytest.fixture
def api(settings: Settings, store: JobStore) -> Iterator[httpx.Client]:
    """A client of the whole application; `store` has emptied Redis."""
    with serving(settings) as client:
        yield client


@contextmanager
def serving(settings: Settings) -> Iterator[httpx.Client]:
    """A client of a server on these settings, in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(settings), log_level="error"))
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
    return store.create(spec, plan_job(spec, settings))


def running(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    job = queued(store, settings, spec)
    assert job.plan
    assert store.claim(job.id, job.plan.shards[0].id, OWNER)
    store.beat(job.id, job.plan.shards[0].id, OWNER, 0.25)
    return job


def succeeded(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    job = running(store, settings, spec)
    assert job.plan
    payload = codec.encode_partial(zero(11))
    for shard in job.plan.shards:
        store.claim(job.id, shard.id, OWNER)
        store.complete(job.id, shard.id, OWNER, payload)
    assert store.claim_finalize(job.id, OWNER)
    table = make_table()
    assert store.save_table(job.id, OWNER, table.about, SUMMARY, codec.encode_blocks(table))
    return job


def failed(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    job = running(store, settings, spec)
    assert store.fail(job.id, {"type": "proof", "title": "Proof failed.", "detail": "0.1 is more than 1e-4"})
    return job


def cancelled(store: JobStore, settings: Settings, spec: JobSpec) -> JobRecord:
    job = queued(store, settings, spec)
    assert store.cancel(job.id) == "cancelled"
    return job

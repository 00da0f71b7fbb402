"""16.7 million rows through the store and the API: the same files as from the table, in constant memory."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from ablation.export import csv_chunks, parquet_chunks
from ablation.partial import PartialSums
from ablation.table import ImportanceTable, make_table
from tests.worker.conftest import make_partial, make_toy
from worker import codec
from worker.settings import Settings
from worker.store import JobStore

SHAPE = (4096, 4096)
MB = 1 << 20


def make_large() -> ImportanceTable:
    """Every weight of AlexNet's second Linear, with numbers whose text is as long as of real ones."""
    random, n = np.random.default_rng(0), SHAPE[0] * SHAPE[1]
    delta = 1e-4 * random.standard_normal(n)
    touched = random.integers(0, 2000, n, dtype=np.int32)
    delta[touched < 600] = 0
    sums = PartialSums(n_examples=2000, n_correct=9, loss=1.0, delta=delta, delta_squared=delta**2, touched=touched)
    weights = 0.01 * random.standard_normal(n, dtype=np.float32)
    return make_table(
        indices=None,
        shape=SHAPE,
        weights=weights,
        replacements=np.zeros(n),
        splits={"test": sums},
        per_class={"test": None},
        top1=False,
        not_finite=None,
        about={"seconds": 1.0},
    )


def keep(store: JobStore, table: ImportanceTable) -> str:
    """A job that has succeeded with this table."""
    job = store.create(*make_toy(1))
    assert job
    assert job.plan
    shard = job.plan.shards[0].id
    assert store.claim(job.id, shard, "a")
    assert store.complete(job.id, shard, "a", codec.encode_partial(make_partial(1)))
    assert store.claim_finalize(job.id, "a")
    assert store.save_table(job.id, "a", table.about, {}, codec.encode_blocks(table))
    return job.id


@contextmanager
def api_process(settings: Settings) -> Iterator[tuple[str, int]]:
    """The address and the process id of an API of its own."""
    variables = {"REDIS_URL": settings.redis_url, "ABLATION_HOME": str(settings.home), "ABLATION_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "api"], env=os.environ | variables, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr
        found = re.search(r"http://\S+", process.stderr.readline())
        assert found
        yield found.group(), process.pid
    finally:
        process.terminate()
        process.communicate()


def peak_bytes(pid: int) -> int:
    """The most memory that the process has had."""
    with open(f"/proc/{pid}/status") as status:
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read()).group(1)) * 1024  # type: ignore[union-attr]


def hash_and_lines(chunks: Iterator[bytes]) -> tuple[str, int]:
    found, n_lines = hashlib.blake2b(), 0
    for chunk in chunks:
        found.update(chunk)
        n_lines += chunk.count(b"\n")
    return found.hexdigest(), n_lines


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from /proc")
def test_sixteen_million_rows_in_constant_memory(store: JobStore, settings: Settings) -> None:
    table = make_large()
    n = len(table)
    job_id = keep(store, table)
    held = store.client.memory_usage(f"ablation:job:{job_id}:table", samples=0)
    assert held <= 1.02 * 24 * n
    with api_process(settings) as (url, pid), httpx.Client(base_url=url, timeout=300, trust_env=False) as client:

        def stream(name: str) -> tuple[str, int]:
            with client.stream("GET", f"/v1/jobs/{job_id}/{name}") as answer:
                assert answer.status_code == 200
                return hash_and_lines(answer.iter_raw())

        client.get(f"/v1/jobs/{job_id}/results", params={"limit": 1})
        before = peak_bytes(pid)
        last = client.get(f"/v1/jobs/{job_id}/results", params={"offset": n - 2, "limit": 10}).json()
        assert last["total_rows"] == n
        assert [row[:3] for row in last["rows"]] == [[n - 2, 4095, 4094], [n - 1, 4095, 4095]]
        for name, chunks in (
            ("results.csv", csv_chunks([table.columns])),
            ("results.parquet", parquet_chunks([table.columns], table.about)),
        ):
            served = stream(name)
            assert served == hash_and_lines(chunks), name
            if name == "results.csv":
                assert served[1] == n + 1
        assert peak_bytes(pid) - before < 256 * MB

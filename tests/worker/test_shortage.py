"""Memory, room in the store and processes that run out: a clear end or another way, and the rest goes on."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from celery import Celery
from redis.exceptions import ResponseError

from ablation.machine import Machine
from ablation.spec import make_spec
from tests.worker.conftest import about_of, make_partial, make_toy
from tests.worker.real_jobs import encode, plan_real, run_undisturbed
from tests.worker.test_queue import messages
from tests.worker.waiting import wait_for
from worker import codec, keys, runner
from worker.planner import plan_job
from worker.queue import enqueue_shards, make_celery
from worker.redis_server import start_redis
from worker.runner import Worker
from worker.settings import Settings
from worker.states import TERMINAL, State
from worker.store import JobRecord, JobStore, connect

SITES = {"count": 5, "seed": 0}
STRIPES = {"layer": "0", "data": {"name": "stripes", "train": "all"}, "sites": SITES, "verify": 2}


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return make_celery(settings)


def reload(store: JobStore, job: JobRecord) -> JobRecord:
    record = store.get(job.id)
    assert record
    return record


# --- memory of the worker --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
def test_where_memory_runs_out_the_job_is_cut_smaller_and_says_so(
    store: JobStore, celery: Celery, settings: Settings
) -> None:
    """The net takes few examples at once; what it wants for more no machine has."""
    store.publish(runner.find_registered(), Machine(1.0, 1 << 40))
    job = store.create(make_spec({**STRIPES, "model": {"name": "hungry_net"}}), None)
    assert job
    seen = []
    for _ in range(10):
        runner.run_next(Worker(store, celery, settings, "a"))
        record = reload(store, job)
        if record.plan and record.plan.batch_size not in seen:
            seen.append(record.plan.batch_size)
    assert seen == [256, 128, 64, 32]
    assert (record.status, record.n_cut) == (State.FINALIZING, 4)
    runner.finalize(Worker(store, celery, settings, "a"), job.id)
    assert reload(store, job).status is State.SUCCEEDED
    about = about_of(store, job.id)["plan"]
    assert (about["batch_size"], about["n_halved"]) == (32, 3)
    assert record.plan
    assert b"".join(store.table_blocks(job.id)) == encode(run_undisturbed(settings, record.spec, record.plan))


def test_a_shard_of_an_earlier_cut_counts_for_nothing(store: JobStore) -> None:
    spec, plan = make_toy(2)
    job = store.create(spec, plan)
    assert job
    one, two = (shard.id for shard in plan.shards)
    for shard in (one, two):
        assert store.claim(job.id, shard, "a")
    assert not store.complete(job.id, one, "a", codec.encode_partial(make_partial(0)))
    assert store.cut_again(job.id, 1, runner.mark_cut(plan, 1))
    assert not store.cut_again(job.id, 1, runner.mark_cut(plan, 1)), "another worker has run out of memory, too"
    assert store.beat(job.id, two, "a", 0.5) is None
    assert not store.complete(job.id, two, "a", codec.encode_partial(make_partial(1)))
    record = reload(store, job)
    assert (record.status, record.progress.done, record.n_cut) == (State.RUNNING, 0, 2)
    assert [store.next_shard(60) for _ in range(2)] == [(job.id, f"{one}-cut1")] * 2


@pytest.mark.usefixtures("registered")
def test_one_example_that_is_too_large_ends_the_job(
    store: JobStore, celery: Celery, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import example_zoo

    store.publish(runner.find_registered(), Machine(1.0, 1 << 40))
    job = store.create(make_spec({**STRIPES, "model": {"name": "hungry_net"}}), None)
    assert job
    monkeypatch.setattr(example_zoo, "FEW", 0)
    for _ in range(20):
        runner.run_next(Worker(store, celery, settings, "a"))
    record = reload(store, job)
    assert record.status is State.FAILED
    assert record.error
    assert record.error["type"] == "out-of-memory"
    assert "one example at a time" in record.error["detail"]


def test_a_job_is_cut_for_the_memory_that_workers_have(settings: Settings) -> None:
    ten = {str(digit): digit for digit in range(10)}
    spec = make_spec(
        {
            "model": {"name": "alexnet", "weights": "none"}, "layer": "features.10",
            "data": {"name": "digits", "test": "all", "classes": ten}, "sites": {"count": 100},
        }
    )  # fmt: skip
    from ablation.errors import SpecError
    from ablation.inputs.catalog import NOTHING

    free = plan_job(spec, settings, NOTHING)
    assert free
    need = free.estimate.memory_bytes
    tight = plan_job(spec, settings, NOTHING, machine=Machine(memory_bytes=need - 1))
    assert tight
    assert tight.n_halved > 0 == free.n_halved
    assert tight.estimate.memory_bytes < need
    with pytest.raises(
        SpecError, match=r"^sites: got '100 sites in batches of 1 .* at most 1000 bytes of memory; this"
    ):
        plan_job(spec, settings, NOTHING, machine=Machine(memory_bytes=1000))


# --- a shard that kills its worker -----------------------------------------------------------------------------------


@pytest.fixture
def worker(settings: Settings, store: JobStore, example_package: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real worker that knows the example package."""
    names = ("redis_url", "home", "threads", "lease_s", "beat_s", "sweep_s", "lost_s")
    variables = {f"ABLATION_{name.upper()}": str(getattr(settings, name)) for name in names}
    variables |= {"ABLATION_MAX_ATTEMPTS": "2", "PYTHONPATH": str(example_package)}
    process = subprocess.Popen([sys.executable, "-m", "worker"], env=os.environ | variables)
    try:
        wait_for(store.n_workers, 90)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.usefixtures("worker")
def test_a_shard_that_kills_its_worker_fails_its_job_and_the_next_one_runs(
    store: JobStore, celery: Celery, settings: Settings
) -> None:
    deadly = store.create(make_spec({**STRIPES, "model": {"name": "deadly_net"}}), None)
    harmless = store.create(make_spec({**STRIPES, "model": {"name": "stripe_net"}}), None)
    assert deadly
    assert harmless
    enqueue_shards(celery, 2)
    wait_for(lambda: {reload(store, job).status for job in (deadly, harmless)} <= TERMINAL, 120)
    assert reload(store, harmless).status is State.SUCCEEDED
    record = reload(store, deadly)
    assert record.status is State.FAILED
    assert record.error
    assert record.error["type"] == "worker-lost"
    assert "its worker died each time" in record.error["detail"]


# --- room in the store -----------------------------------------------------------------------------------------------


@pytest.fixture
def full(store: JobStore) -> Iterator[None]:
    """Redis is at its limit, and has room again afterwards."""
    yield
    store.client.config_set("maxmemory", 0)


@pytest.mark.usefixtures("full")
def test_a_store_without_room_fails_the_job_with_the_reason_and_goes_on_later(
    store: JobStore, celery: Celery, settings: Settings
) -> None:
    spec, plan = plan_real(settings, 60, sites=SITES)
    job = store.create(spec, plan)
    assert job
    store.client.config_set("maxmemory", 1)
    for _ in plan.shards:
        runner.run_next(Worker(store, celery, settings, "a"))
    record = reload(store, job)
    assert record.status is State.FAILED
    assert record.error
    assert (record.error["type"], "maxmemory" in record.error["detail"]) == ("store-full", True)
    assert messages(store.client, keys.SHARD_QUEUE) == []

    store.client.config_set("maxmemory", 0)
    again = store.create(spec, plan)
    assert again
    for _ in plan.shards:
        runner.run_next(Worker(store, celery, settings, "a"))
    runner.finalize(Worker(store, celery, settings, "a"), again.id)
    assert b"".join(store.table_blocks(again.id)) == encode(run_undisturbed(settings, spec, plan))


@pytest.mark.usefixtures("full")
def test_a_lease_can_be_kept_without_room(store: JobStore) -> None:
    """Else a shard would be taken away from a worker that is well."""
    job = store.create(*make_toy(1))
    assert job
    shard = make_toy(1)[1].shards[0].id
    assert store.claim(job.id, shard, "a")
    store.client.config_set("maxmemory", 1)
    assert store.beat(job.id, shard, "a", 0.5) is State.RUNNING


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own can't be mounted here: that takes root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_what_writes_and_nothing_that_was_taken_in_is_lost(
    small_disk: Path, settings: Settings
) -> None:
    with tempfile.TemporaryDirectory(prefix="ablation-test-") as run:
        server = start_redis(Path(run), small_disk)
        here = settings.model_copy(update={"redis_url": server.url})
        with connect(here) as client:
            store, celery = JobStore(client), make_celery(here)
            spec, plan = plan_real(here, 60, sites=SITES)
            job = store.create(spec, plan)
            assert job
            filler = small_disk / "filler"
            with suppress(OSError), filler.open("wb") as file:
                while True:
                    file.write(b"x" * 4096)

            def refused() -> bool:
                try:
                    client.set("ablation:test", "x" * 10_000)
                except ResponseError as error:
                    return str(error).startswith("MISCONF")
                return False

            wait_for(refused, 20)
            with pytest.raises(ResponseError, match="MISCONF"):
                store.create(spec, plan)
            with pytest.raises(ResponseError, match="MISCONF"):
                runner.run_next(Worker(store, celery, here, "a"))
            assert reload(store, job).status is State.QUEUED
            filler.unlink()
            wait_for(lambda: not refused(), 20)
            for _ in plan.shards:
                runner.run_next(Worker(store, celery, here, "a"))
            runner.finalize(Worker(store, celery, here, "a"), job.id)
            assert b"".join(store.table_blocks(job.id)) == encode(run_undisturbed(here, spec, plan))
        server.stop()

"""Real worker processes on a real Redis: what they survive, how they stop, and that neither changes a byte."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from celery import Celery

from ablation.plan import Plan
from ablation.spec import JobSpec
from tests.worker.real_jobs import encode, plan_real, run_undisturbed, submit
from tests.worker.waiting import wait_for
from worker import keys
from worker.queue import make_celery
from worker.settings import Settings
from worker.states import TERMINAL, State
from worker.store import JobRecord, JobStore

Worker = subprocess.Popen[bytes]
StartWorker = Callable[[], Worker]

START_S = 60.0
JOB_S = 60.0
STOP_S = 6.0  # `leave` gives a shard in flight 4 s


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return make_celery(settings)


@pytest.fixture(scope="module")
def planned(home: Path) -> tuple[JobSpec, Plan]:
    """A job of several shards of about a second each."""
    spec, plan = plan_real(Settings(home=home), 0.7)
    assert len(plan.shards) >= 4
    return spec, plan


@pytest.fixture(scope="module")
def undisturbed(home: Path, planned: tuple[JobSpec, Plan]) -> bytes:
    """The bytes of the table that the job must give, however it is run."""
    return encode(run_undisturbed(Settings(home=home), *planned))


@pytest.fixture
def start_worker(settings: Settings, store: JobStore, undisturbed: bytes) -> Iterator[StartWorker]:
    """Starts workers; what is left of them is killed at the end. (`undisturbed` has trained the model by then.)"""
    names = ("redis_url", "home", "threads", "lease_s", "beat_s", "sweep_s", "lost_s")
    environment = {f"ABLATION_{name.upper()}": str(getattr(settings, name)) for name in names}
    workers: list[Worker] = []

    def start() -> Worker:
        worker = subprocess.Popen([sys.executable, "-m", "worker"], env=os.environ | environment)
        workers.append(worker)
        wait_for(lambda: f":{worker.pid}:" in str(store.client.zrange(keys.WORKERS, 0, -1)), START_S)
        return worker

    yield start
    for worker in workers:
        worker.kill()
        worker.wait()


def child_of(worker: Worker) -> int:
    children = psutil.Process(worker.pid).children()
    assert len(children) == 1
    return children[0].pid


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def libraries_of(pid: int) -> set[str]:
    """Names of the shared libraries that a process has loaded."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.rsplit("/", 1)[-1].split(".")[0] for line in lines if ".so" in line}


def reload(store: JobStore, job: JobRecord) -> JobRecord:
    record = store.get(job.id)
    assert record
    return record


def wait_until_in_mid_shard(store: JobStore, job: JobRecord) -> None:
    """Until a worker is at its second shard, with a part of it done."""

    def in_mid_shard() -> bool:
        return reload(store, job).progress.done > 1 and reload(store, job).progress.done % 1 > 0

    wait_for(in_mid_shard, JOB_S)


def finish(store: JobStore, job: JobRecord) -> bytes:
    """The bytes of the job's table once it has succeeded."""
    wait_for(lambda: reload(store, job).status in TERMINAL, JOB_S)
    record = reload(store, job)
    assert record.status is State.SUCCEEDED, record.error
    return b"".join(store.table_blocks(job.id))


def test_a_worker_killed_in_mid_shard_changes_no_byte(
    store: JobStore, celery: Celery, start_worker: StartWorker, planned: tuple[JobSpec, Plan], undisturbed: bytes
) -> None:
    first = start_worker()
    child = child_of(first)
    job = submit(store, celery, *planned)
    wait_until_in_mid_shard(store, job)
    assert "libtorch_cpu" in libraries_of(child)
    assert not {name for name in libraries_of(first.pid) if "torch" in name or "llvmlite" in name}
    first.kill()
    wait_for(lambda: is_gone(child), 2)
    assert reload(store, job).status is State.RUNNING
    assert len([*store.stale_leases(0)]) == 1, "nobody could release the lease"

    start_worker()
    assert finish(store, job) == undisturbed


def test_two_workers_on_one_job_change_no_byte(
    store: JobStore, celery: Celery, start_worker: StartWorker, planned: tuple[JobSpec, Plan], undisturbed: bytes
) -> None:
    start_worker()
    start_worker()
    job = submit(store, celery, *planned)
    owners: set[bytes] = set()

    def both_have_worked() -> bool:
        owners.update(store.client.hvals(keys.owners(job.id)))
        return len(owners) == 2

    wait_for(both_have_worked, JOB_S)
    assert finish(store, job) == undisturbed


def test_a_child_that_dies_is_replaced_and_its_shard_run_again(
    store: JobStore, celery: Celery, start_worker: StartWorker, planned: tuple[JobSpec, Plan], undisturbed: bytes
) -> None:
    """As when the kernel ends the process that takes most memory."""
    worker = start_worker()
    job = submit(store, celery, *planned)
    wait_until_in_mid_shard(store, job)
    os.kill(child_of(worker), signal.SIGKILL)
    assert finish(store, job) == undisturbed
    replacement = child_of(worker)
    worker.kill()
    wait_for(lambda: is_gone(replacement), 2)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_told_to_stop_puts_its_shard_back(
    store: JobStore, celery: Celery, start_worker: StartWorker, planned: tuple[JobSpec, Plan], how: signal.Signals
) -> None:
    worker = start_worker()
    child = child_of(worker)
    job = submit(store, celery, *planned)
    wait_until_in_mid_shard(store, job)
    n_done = int(reload(store, job).progress.done)
    worker.send_signal(how)
    assert worker.wait(STOP_S) == 0
    wait_for(lambda: is_gone(child), 1)
    record = reload(store, job)
    assert record.status is State.RUNNING
    assert record.progress.done in (n_done, n_done + 1)  # the shard may have come to its end in that very moment
    assert [*store.stale_leases(0)] == []
    assert store.client.exists(keys.attempts(job.id)) == 0, "stopping is no failed attempt"
    assert store.client.llen(keys.SHARD_QUEUE) >= len(job.plan.shards) - record.progress.done
    assert store.n_workers() == 0


def test_cancelling_stops_a_shard_at_once(
    store: JobStore, celery: Celery, start_worker: StartWorker, planned: tuple[JobSpec, Plan]
) -> None:
    start_worker()
    job = submit(store, celery, *planned)
    wait_until_in_mid_shard(store, job)
    started = time.monotonic()
    store.cancel(job.id)
    wait_for(lambda: reload(store, job).status is State.CANCELLED, 2)
    assert time.monotonic() - started < 1.0
    assert [key.decode() for key in store.client.scan_iter(f"{keys.job(job.id)}*")] == [keys.job(job.id)]


def test_a_worker_that_lost_every_message_is_sent_new_ones(
    store: JobStore, celery: Celery, start_worker: StartWorker, planned: tuple[JobSpec, Plan], undisturbed: bytes
) -> None:
    """The job is stored, but what was sent to the queue is gone, as after a crash of Redis."""
    job = store.create(*planned)
    start_worker()
    assert finish(store, job) == undisturbed

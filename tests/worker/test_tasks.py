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
GetWorkers = Callable[[int], list[Worker]]

START_S = 60.0
JOB_S = 60.0
STOP_S = 6.0  # `leave` gives a shard in flight 4 s


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return make_celery(settings)


@pytest.fixture(scope="module")
def planned(home: Path) -> tuple[JobSpec, Plan]:
    """A job of several shards of about a second each."""
    spec, plan = plan_real(Settings(home=home), 0.4)
    assert len(plan.shards) >= 4
    return spec, plan


@pytest.fixture(scope="module")
def undisturbed(home: Path, planned: tuple[JobSpec, Plan]) -> bytes:
    """The bytes of the table that the job must give, however it is run."""
    return encode(run_undisturbed(Settings(home=home), *planned))


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Worker]]:
    """Workers that earlier tests have left alive: a start takes seconds. They are killed at the end."""
    workers: list[Worker] = []
    yield workers
    for worker in workers:
        worker.kill()
        worker.wait()


@pytest.fixture
def get_workers(pool: list[Worker], settings: Settings, store: JobStore, undisturbed: bytes) -> GetWorkers:
    """Gives that many idle workers. (`undisturbed` has trained the model by then.)"""
    names = ("redis_url", "home", "threads", "lease_s", "beat_s", "sweep_s", "lost_s")
    environment = {f"ABLATION_{name.upper()}": str(getattr(settings, name)) for name in names}

    def get(n: int) -> list[Worker]:
        alive = [worker for worker in pool if worker.poll() is None]
        for worker in alive[n:]:
            worker.kill()
            worker.wait()
        missing = range(n - len(alive))
        pool.extend(subprocess.Popen([sys.executable, "-m", "worker"], env=os.environ | environment) for _ in missing)
        workers = [worker for worker in pool if worker.poll() is None]
        wait_for(lambda: all(is_seen(store, worker) for worker in workers), START_S)
        return workers

    return get


def is_seen(store: JobStore, worker: Worker) -> bool:
    """Whether a worker has said that it is alive since Redis was emptied for this test."""
    return f":{worker.pid}:" in str(store.client.zrange(keys.WORKERS, 0, -1))


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


def test_two_workers_on_one_job_change_no_byte(
    store: JobStore, celery: Celery, get_workers: GetWorkers, planned: tuple[JobSpec, Plan], undisturbed: bytes
) -> None:
    get_workers(2)
    job = submit(store, celery, *planned)
    wait_for(lambda: store.client.zcard(keys.leases(job.id)) == 2, JOB_S)
    assert len(set(store.client.hvals(keys.owners(job.id)))) == 2
    assert finish(store, job) == undisturbed


def test_a_worker_killed_in_mid_shard_changes_no_byte(
    store: JobStore, celery: Celery, get_workers: GetWorkers, planned: tuple[JobSpec, Plan], undisturbed: bytes
) -> None:
    victim, second = get_workers(2)
    child = child_of(victim)
    second.send_signal(signal.SIGSTOP)  # it takes no shard until the victim is dead
    try:
        job = submit(store, celery, *planned)
        wait_until_in_mid_shard(store, job)
        assert "libtorch_cpu" in libraries_of(child)
        assert not {name for name in libraries_of(victim.pid) if "torch" in name or "llvmlite" in name}
        victim.kill()
        wait_for(lambda: is_gone(child), 2)
        record = reload(store, job)
        assert (record.status, len([*store.stale_leases(0)])) == (State.RUNNING, 1), "nobody could release the lease"
    finally:
        second.send_signal(signal.SIGCONT)
    assert finish(store, job) == undisturbed


def test_cancelling_stops_a_shard_at_once(
    store: JobStore, celery: Celery, get_workers: GetWorkers, planned: tuple[JobSpec, Plan]
) -> None:
    get_workers(1)
    job = submit(store, celery, *planned)
    wait_until_in_mid_shard(store, job)
    started = time.monotonic()
    store.cancel(job.id)
    wait_for(lambda: reload(store, job).status is State.CANCELLED, 2)
    assert time.monotonic() - started < 1.0
    assert [key.decode() for key in store.client.scan_iter(f"{keys.job(job.id)}*")] == [keys.job(job.id)]


def test_a_worker_that_lost_every_message_is_sent_new_ones(
    store: JobStore, celery: Celery, get_workers: GetWorkers, planned: tuple[JobSpec, Plan], undisturbed: bytes
) -> None:
    """The job is stored, but what was sent to the queue is gone, as after a crash of Redis."""
    job = store.create(*planned)
    get_workers(1)
    assert finish(store, job) == undisturbed


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_told_to_stop_puts_its_shard_back(
    store: JobStore, celery: Celery, get_workers: GetWorkers, planned: tuple[JobSpec, Plan], how: signal.Signals
) -> None:
    (worker,) = get_workers(1)
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


def test_only_the_parent_acts_on_a_signal_to_all_of_a_worker(get_workers: GetWorkers) -> None:
    """A child that died of it would look like one that crashed."""
    (worker,) = get_workers(1)
    child = child_of(worker)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.5)
    assert not is_gone(child)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(STOP_S) == 0
    wait_for(lambda: is_gone(child), 1)


@pytest.mark.slow
def test_a_child_that_dies_is_replaced_and_its_shard_run_again(
    store: JobStore, celery: Celery, get_workers: GetWorkers, planned: tuple[JobSpec, Plan], undisturbed: bytes
) -> None:
    """The child dies as it does when the kernel ends the process that takes most memory."""
    (worker,) = get_workers(1)
    job = submit(store, celery, *planned)
    wait_until_in_mid_shard(store, job)
    os.kill(child_of(worker), signal.SIGKILL)
    assert finish(store, job) == undisturbed
    replacement = child_of(worker)
    worker.kill()
    worker.wait()
    wait_for(lambda: is_gone(replacement), 2)

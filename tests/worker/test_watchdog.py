"""Nothing keeps a worker for ever: a model that never returns, one that ends Python, a clock that was set back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery import Celery

from ablation.machine import Machine
from ablation.spec import make_spec
from tests.worker.conftest import make_toy
from tests.worker.waiting import wait_for
from worker import keys, runner, watchdog
from worker.queue import enqueue_shards, make_celery
from worker.runner import Worker
from worker.settings import Settings
from worker.states import TERMINAL, State
from worker.store import JobRecord, JobStore
from worker.sweeper import Sweeper, sweep
from worker.watchdog import CANCEL_S, HUNG, Progress, Watchdog

STRIPES = {"layer": "0", "data": {"name": "stripes", "train": "all"}, "sites": {"count": 5, "seed": 0}, "verify": 2}
HOUR_S = 3600.0


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return make_celery(settings)


def reload(store: JobStore, job: JobRecord) -> JobRecord:
    record = store.get(job.id)
    assert record
    return record


def create(store: JobStore, model: str) -> JobRecord:
    job = store.create(make_spec({**STRIPES, "model": {"name": model}}), None)
    assert job
    return job


@contextmanager
def a_worker(settings: Settings, store: JobStore, package: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real worker that knows the example package."""
    names = ("redis_url", "home", "threads", "lease_s", "beat_s", "sweep_s", "lost_s")
    variables = {f"ABLATION_{name.upper()}": str(getattr(settings, name)) for name in names}
    variables |= {"ABLATION_MAX_ATTEMPTS": "2", "PYTHONPATH": str(package), **more}
    process = subprocess.Popen([sys.executable, "-m", "worker"], env=os.environ | variables)
    try:
        wait_for(store.n_workers, 90)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


# --- models that don't come back -------------------------------------------------------------------------------------


def test_a_model_that_never_returns_fails_its_job(
    store: JobStore, celery: Celery, settings: Settings, example_package: Path
) -> None:
    with a_worker(settings, store, example_package, ABLATION_HANG_S="3", ABLATION_HANG_FACTOR="1") as process:
        job = create(store, "endless_net")
        enqueue_shards(celery, 1)
        wait_for(lambda: reload(store, job).status in TERMINAL, 120)
        assert reload(store, job).error == HUNG
        assert process.poll() is None


def test_a_cancel_takes_effect_whatever_the_model_does(
    store: JobStore, celery: Celery, settings: Settings, example_package: Path
) -> None:
    with a_worker(settings, store, example_package):
        endless = create(store, "endless_net")
        enqueue_shards(celery, 1)
        wait_for(lambda: reload(store, endless).plan and store.client.zcard(keys.leases(endless.id)), 90)
        time.sleep(1)  # its shard has begun
        harmless = create(store, "stripe_net")
        enqueue_shards(celery, 1)
        store.cancel(endless.id)
        wait_for(lambda: reload(store, endless).status is State.CANCELLED, 4 * CANCEL_S)
        wait_for(lambda: reload(store, harmless).status is State.SUCCEEDED, 120)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("ending", [SystemExit(3), SystemExit(), KeyboardInterrupt()])
def test_a_model_that_ends_python_fails_its_job_with_the_reason(
    store: JobStore, celery: Celery, settings: Settings, monkeypatch: pytest.MonkeyPatch, ending: BaseException
) -> None:
    import example_zoo

    monkeypatch.setattr(example_zoo, "ENDING", ending)
    store.publish(runner.find_registered(), Machine(1.0, 1 << 40))
    job = create(store, "leaving_net")
    for _ in range(2):  # the plan, then a shard
        runner.run_next(Worker(store, celery, settings, "a"))
    error = reload(store, job).error
    assert error
    assert (error["type"], type(ending).__name__ in error["detail"]) == ("model-error", True)


# --- what the watchdog sees ------------------------------------------------------------------------------------------


@pytest.fixture
def killed(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> tuple[Watchdog, Progress, list[object]]:
    """A watchdog over this process, and the errors with which it has killed it."""
    monkeypatch.setattr(watchdog.os, "kill", lambda pid, number: None)
    progress, errors = Progress(), []
    progress.of_this_process()
    return Watchdog(store, progress, errors.append, threading.Event()), progress, errors


def test_a_child_without_progress_is_killed_and_one_with_progress_is_not(
    toy_job: Callable[..., JobRecord], killed: tuple[Watchdog, Progress, list[object]]
) -> None:
    dog, progress, errors = killed
    dog.look()
    progress.begin(toy_job(1).id, 1000.0)
    dog.look()
    assert errors == []
    progress.allow(-1.0)
    dog.look()
    dog.look()
    assert errors == [HUNG]


def test_a_child_whose_job_is_gone_is_killed_after_a_while(
    killed: tuple[Watchdog, Progress, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dog, progress, errors = killed
    progress.begin("gone", 1000.0)
    dog.look()
    assert errors == []
    monkeypatch.setattr(watchdog, "CANCEL_S", -1.0)
    dog.look()
    assert errors == [None]


# --- turns between attempts ------------------------------------------------------------------------------------------


def test_other_jobs_go_first_between_the_attempts_of_one_that_fails(
    store: JobStore, toy_job: Callable[..., JobRecord]
) -> None:
    failing, other = toy_job(1), toy_job(3)
    shard = make_toy(1)[1].shards[0].id
    taken = []
    for _ in range(3):
        turn = store.next_shard(HOUR_S)
        assert turn
        taken.append(turn[0])
        store.claim(*turn, "a")
        if turn[0] == failing.id:
            assert store.retry(failing.id, shard, "a", 5, {})
    assert taken == [failing.id, failing.id, other.id]  # a first failure may be an accident


# --- clocks and what is over -----------------------------------------------------------------------------------------


def test_a_lease_that_was_renewed_before_the_clock_was_set_back_becomes_stale(
    store: JobStore, toy_job: Callable[..., JobRecord], celery: Celery, settings: Settings
) -> None:
    job = toy_job(1)
    shard = make_toy(1)[1].shards[0].id
    assert store.claim(job.id, shard, "dead")
    store.note_worker("dead")
    for key in (keys.leases(job.id), keys.WORKERS):
        for member in store.client.zrange(key, 0, -1):
            store.client.zincrby(key, HOUR_S, member)
    assert store.n_workers() == 0
    quick = settings.model_copy(update={"lease_s": 0.5, "lost_s": 60})
    sweep(store, celery, quick)
    assert [*store.leases_of("dead")], "its worker gets the time of a lease to renew it"
    time.sleep(0.6)
    sweep(store, celery, quick)
    assert [*store.leases_of("dead")] == []
    assert store.client.hget(keys.attempts(job.id), f"lost {shard}") == b"1"


def test_what_was_sent_before_the_clock_was_set_back_is_sent_again(
    store: JobStore, toy_job: Callable[..., JobRecord]
) -> None:
    job = toy_job(2)
    for shard in store.client.zrange(keys.waiting(job.id), 0, -1):
        store.client.zincrby(keys.waiting(job.id), HOUR_S, shard)
    assert len(store.resend(job.id, 30)) == 2
    assert store.resend(job.id, 30) == []


def test_a_turn_that_began_before_the_clock_was_set_back_is_over(
    store: JobStore, toy_job: Callable[..., JobRecord]
) -> None:
    jobs = [toy_job(2), toy_job(1)]
    assert store.next_shard(60.0) == (jobs[0].id, make_toy(2)[1].shards[0].id)
    store.client.hincrbyfloat(keys.job(jobs[0].id), "turn_began", HOUR_S)
    turn = store.next_shard(60.0)
    assert turn
    assert turn[0] == jobs[1].id


def test_a_lock_whose_end_moved_with_the_clock_is_taken_away(
    store: JobStore, celery: Celery, settings: Settings
) -> None:
    store.client.set(keys.SWEEP_LOCK, "dead", ex=3600)
    sweeper = Sweeper(store, celery, settings, "a", threading.Event())
    sweeper.sweep_alone()
    assert not store.client.exists(keys.SWEEP_LOCK)


def test_a_sweep_costs_what_is_due_and_nothing_else(store: JobStore, celery: Celery, settings: Settings) -> None:
    """With 150,000 tombstones in the store the commands of a sweep are those without any."""
    now = store.now()
    with store.client.pipeline(transaction=False) as pipeline:
        for first in range(0, 150_000, 10_000):
            ids = {f"gone{number}": now - number for number in range(first, first + 10_000)}
            pipeline.zadd(keys.TOMBSTONES, ids).zadd(keys.in_state("expired"), ids)
        pipeline.execute()
    store.client.script_flush()
    sweep(store, celery, settings)  # scripts are loaded
    counts = []
    for _ in range(2):
        before = store.client.info("stats")["total_commands_processed"]
        sweep(store, celery, settings)
        counts.append(store.client.info("stats")["total_commands_processed"] - before)
        store.client.delete(keys.TOMBSTONES, keys.in_state("expired"))
    assert counts[0] == counts[1]


def test_a_tombstone_keeps_no_plan_and_goes_in_the_end(store: JobStore, toy_job: Callable[..., JobRecord]) -> None:
    job = toy_job(3)
    store.client.hincrbyfloat(keys.job(job.id), "created_at", -25 * HOUR_S)  # its request can't be repeated any more
    store.cancel(job.id)
    store.delete(job.id)
    assert store.client.hget(keys.job(job.id), "plan") == b""
    store.expire_due(HOUR_S, HOUR_S)
    assert reload(store, job).status is State.EXPIRED
    time.sleep(0.01)
    store.expire_due(HOUR_S, 0.001)
    assert store.get(job.id) is None
    assert store.client.zcard(keys.TOMBSTONES) == 0


def test_tombstones_of_an_older_version_move_to_their_index(store: JobStore, toy_job: Callable[..., JobRecord]) -> None:
    job = toy_job(1)
    store.cancel(job.id)
    store.delete(job.id)
    store.client.zrem(keys.TOMBSTONES, job.id)
    store.client.zadd(keys.FINISHED, {job.id: store.now() - 2 * HOUR_S})  # where version 0.2 had them
    store.expire_due(HOUR_S, HOUR_S)
    assert store.client.zscore(keys.TOMBSTONES, job.id)
    assert store.client.zcard(keys.FINISHED) == 0

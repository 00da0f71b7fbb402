import time
from collections.abc import Callable
from threading import Event

import pytest
from celery import Celery

from tests.worker.conftest import make_partial
from tests.worker.test_queue import messages
from tests.worker.waiting import wait_for
from worker import codec, keys
from worker.queue import make_celery
from worker.settings import Settings
from worker.states import State
from worker.store import JobRecord, JobStore, connect
from worker.sweeper import Sweeper, sweep

MakeJob = Callable[..., JobRecord]


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return make_celery(settings)


@pytest.fixture
def stale(settings: Settings) -> Settings:
    """Settings by which every lease is stale and every message lost."""
    return settings.model_copy(update={"lease_s": 1e-3, "lost_s": 1e-3})


def sweep_later(store: JobStore, celery: Celery, settings: Settings) -> None:
    time.sleep(0.01)
    sweep(store, celery, settings)


def state_of(store: JobStore, job: JobRecord) -> State:
    record = store.get(job.id)
    assert record
    return record.status


def test_a_healthy_job_is_left_alone(store: JobStore, toy_job: MakeJob, celery: Celery, settings: Settings) -> None:
    job = toy_job(2)
    store.claim(job.id, job.plan.shards[0].id, "a")
    sweep(store, celery, settings)
    assert messages(store.client, keys.SHARD_QUEUE) == []
    assert [*store.leases_of("a")] == [(job.id, job.plan.shards[0].id)]


def test_a_stale_shard_is_sent_again_then_its_job_fails(
    store: JobStore, toy_job: MakeJob, celery: Celery, stale: Settings
) -> None:
    job = toy_job(1)
    shard = job.plan.shards[0].id
    for attempt in range(1, stale.max_losses):
        assert store.claim(job.id, shard, "dead")
        sweep_later(store, celery, stale)
        assert messages(store.client, keys.SHARD_QUEUE) == [("worker.run_shard", [])] * attempt
    assert store.claim(job.id, shard, "dead")
    sweep_later(store, celery, stale)
    record = store.get(job.id)
    assert record
    assert record.status is State.FAILED
    assert record.error
    assert record.error["type"] == "worker-lost"
    assert f"shard {shard}" in record.error["detail"]


def test_a_worker_that_lives_on_and_one_that_is_gone_are_counted_apart(
    store: JobStore, toy_job: MakeJob, celery: Celery, settings: Settings
) -> None:
    """A shard that kills the process it runs in is given up sooner than one whose worker others have killed."""
    job, here = toy_job(1), settings.model_copy(update={"lease_s": 0.05, "max_attempts": 2, "max_losses": 4})
    shard = job.plan.shards[0].id
    for worker in ["gone", "gone", "gone", "alive", "alive"]:
        assert state_of(store, job) is not State.FAILED
        assert store.claim(job.id, shard, worker)
        time.sleep(0.06)
        if worker == "alive":
            store.note_worker(worker)
        sweep(store, celery, here)
    assert state_of(store, job) is State.FAILED


def test_shards_without_a_message_are_sent_again(
    store: JobStore, toy_job: MakeJob, celery: Celery, stale: Settings
) -> None:
    toy_job(2)
    sweep_later(store, celery, stale)
    assert messages(store.client, keys.SHARD_QUEUE) == [("worker.run_shard", [])] * 2
    sweep_later(store, celery, stale)
    assert len(messages(store.client, keys.SHARD_QUEUE)) == 2, "the queue is not empty: nothing is lost"


def test_a_merge_that_nobody_began_is_sent_again(
    store: JobStore, toy_job: MakeJob, celery: Celery, stale: Settings
) -> None:
    """The worker died between the last completion and its message."""
    job = toy_job(1)
    store.claim(job.id, job.plan.shards[0].id, "a")
    assert store.complete(job.id, job.plan.shards[0].id, "a", codec.encode_partial(make_partial(0)))
    sweep_later(store, celery, stale)
    assert messages(store.client, keys.FINALIZE_QUEUE) == [("worker.finalize", [job.id])]


def test_a_merge_whose_worker_died_is_sent_again(
    store: JobStore, toy_job: MakeJob, celery: Celery, stale: Settings
) -> None:
    job = toy_job(1)
    store.claim(job.id, job.plan.shards[0].id, "a")
    store.complete(job.id, job.plan.shards[0].id, "a", codec.encode_partial(make_partial(0)))
    assert store.claim_finalize(job.id, "dead")
    sweep_later(store, celery, stale)
    assert messages(store.client, keys.FINALIZE_QUEUE) == [("worker.finalize", [job.id])]
    assert store.claim_finalize(job.id, "b")


def test_a_cancelling_job_whose_worker_died_is_finished(
    store: JobStore, toy_job: MakeJob, celery: Celery, settings: Settings, stale: Settings
) -> None:
    job = toy_job(2)
    store.claim(job.id, job.plan.shards[0].id, "dead")
    assert store.cancel(job.id).state is State.CANCELLING
    sweep(store, celery, settings)
    assert state_of(store, job) is State.CANCELLING, "its worker may be alive"
    sweep_later(store, celery, stale)
    assert state_of(store, job) is State.CANCELLED
    assert messages(store.client, keys.SHARD_QUEUE) == []


def test_old_results_become_tombstones(store: JobStore, toy_job: MakeJob, celery: Celery, settings: Settings) -> None:
    job = toy_job(1)
    store.cancel(job.id)
    sweep(store, celery, settings)
    assert state_of(store, job) is State.CANCELLED
    sweep_later(store, celery, settings.model_copy(update={"result_days": 1e-9}))
    assert state_of(store, job) is State.EXPIRED
    sweep_later(store, celery, settings.model_copy(update={"tombstone_days": 1e-9}))
    assert store.get(job.id) is None


def test_one_sweeps_at_a_time(store: JobStore, toy_job: MakeJob, celery: Celery, stale: Settings) -> None:
    toy_job(1)
    time.sleep(0.01)
    sweeper = Sweeper(store, celery, stale, "a", Event())
    with store.client.lock(keys.SWEEP_LOCK, timeout=5):
        sweeper.sweep_alone()
        assert messages(store.client, keys.SHARD_QUEUE) == []
    sweeper.sweep_alone()
    assert len(messages(store.client, keys.SHARD_QUEUE)) == 1


def test_the_thread_sweeps_and_says_that_the_worker_lives(
    store: JobStore, toy_job: MakeJob, celery: Celery, settings: Settings
) -> None:
    job = toy_job(1)
    store.claim(job.id, job.plan.shards[0].id, "dead")
    with connect(settings) as client:
        quick = settings.model_copy(update={"lease_s": 0.1, "sweep_s": 0.05})
        sweeper = Sweeper(JobStore(client), celery, quick, "a", Event())
        sweeper.start()
        try:
            wait_for(lambda: messages(store.client, keys.SHARD_QUEUE), 5)
            assert store.n_workers() == 1
        finally:
            sweeper.stopping.set()
            sweeper.join()
        assert store.n_workers() == 0

"""A Redis that is there and refuses: workers wait and go on, and no process ends."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis
from redis.exceptions import ResponseError

from tests.worker.real_jobs import encode, plan_real, run_undisturbed
from tests.worker.test_watchdog import a_worker, reload
from tests.worker.waiting import wait_for
from worker import keys
from worker.queue import enqueue_shards, make_celery
from worker.settings import Settings
from worker.states import State
from worker.store import JobStore

TROUBLE_S = 4.0


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return make_celery(settings)


def become_replica(client: Redis) -> None:
    client.execute_command("REPLICAOF", "127.0.0.1", "1")


def be_master(client: Redis) -> None:
    client.execute_command("REPLICAOF", "NO", "ONE")


def fill(client: Redis) -> None:
    client.config_set("maxmemory", 1)


def empty(client: Redis) -> None:
    client.config_set("maxmemory", 0)


def unblock(client: Redis) -> None:
    """End every wait for a message with an error, as an operator may."""
    for _ in range(5):
        for other in client.client_list():
            with suppress(ResponseError):
                client.execute_command("CLIENT", "UNBLOCK", other["id"], "ERROR")
        time.sleep(0.2)


TROUBLES: dict[str, tuple[Callable[[Redis], None], Callable[[Redis], None]]] = {
    "READONLY": (become_replica, be_master),
    "OOM": (fill, empty),
    "UNBLOCKED": (unblock, lambda client: None),
}


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLES)
def test_an_idle_worker_waits_and_goes_on(
    store: JobStore, celery: Celery, settings: Settings, tmp_path: Path, trouble: str
) -> None:
    begin, end = TROUBLES[trouble]
    spec, plan = plan_real(settings, 60, sites={"count": 5, "seed": 0})
    with a_worker(settings, store, tmp_path) as process:
        try:
            begin(store.client)
            time.sleep(TROUBLE_S)
        finally:
            end(store.client)
        job = store.create(spec, plan)
        assert job
        enqueue_shards(celery, len(plan.shards))
        wait_for(lambda: reload(store, job).status is State.SUCCEEDED, 120)
        assert process.poll() is None
    assert b"".join(store.table_blocks(job.id)) == encode(run_undisturbed(settings, spec, plan))


def test_a_busy_worker_keeps_its_shard_until_redis_takes_writes_again(
    store: JobStore, celery: Celery, settings: Settings, tmp_path: Path
) -> None:
    spec, plan = plan_real(settings, 60, sites={"count": 5, "seed": 0})
    with a_worker(settings, store, tmp_path) as process:
        job = store.create(spec, plan)
        assert job
        enqueue_shards(celery, len(plan.shards))
        wait_for(lambda: store.client.zcard(keys.leases(job.id)), 60)
        try:
            become_replica(store.client)
            time.sleep(TROUBLE_S)
        finally:
            be_master(store.client)
        wait_for(lambda: reload(store, job).status is State.SUCCEEDED, 120)
        assert process.poll() is None
    assert b"".join(store.table_blocks(job.id)) == encode(run_undisturbed(settings, spec, plan))

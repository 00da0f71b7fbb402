import base64
import json
from pathlib import Path

import pytest
from celery import Celery
from kombu.exceptions import KombuError
from redis import Redis

from worker import keys, queue
from worker.settings import Settings


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return queue.make_celery(settings)


def messages(client: Redis, name: str) -> list[tuple[str, list[str]]]:
    """(task name, arguments) of everything in a queue, oldest first."""
    found = [json.loads(raw) for raw in client.lrange(name, 0, -1)][::-1]  # type: ignore[union-attr]
    return [(each["headers"]["task"], json.loads(base64.b64decode(each["body"]))[0]) for each in found]


def test_work_is_sent_by_name_as_json_to_its_queue(celery: Celery, redis_client: Redis) -> None:
    queue.enqueue(celery, "job", "test-0-0")
    queue.enqueue(celery, "job", keys.PLAN)
    queue.enqueue_finalize(celery, "job")
    queue.enqueue(celery, "other", keys.FINALIZE)
    assert messages(redis_client, keys.SHARD_QUEUE) == [("worker.run_shard", [])] * 2
    assert messages(redis_client, keys.FINALIZE_QUEUE) == [("worker.finalize", ["job"]), ("worker.finalize", ["other"])]


def test_many_shards_are_sent_in_a_few_round_trips(celery: Celery, redis_client: Redis) -> None:
    queue.enqueue_shards(celery, 1)
    before = redis_client.info("stats")["total_reads_processed"]  # type: ignore[index]
    queue.enqueue_shards(celery, 2500)
    reads = redis_client.info("stats")["total_reads_processed"] - before  # type: ignore[index]
    assert messages(redis_client, keys.SHARD_QUEUE) == [("worker.run_shard", [])] * 2501
    alone, *_, last = redis_client.lrange(keys.SHARD_QUEUE, 0, -1)[::-1]  # type: ignore[index]
    assert json.loads(alone).keys() == json.loads(last).keys()
    assert reads < 1000  # one by one: 2500 at least; what comes in one piece is read in several


@pytest.mark.parametrize("n", [1, 2500])
def test_shards_that_can_not_be_sent_are_an_error_of_kombu(settings: Settings, tmp_path: Path, n: int) -> None:
    celery = queue.make_celery(settings.model_copy(update={"redis_url": f"unix://{tmp_path}/nobody.sock"}))
    with pytest.raises(KombuError):
        queue.enqueue_shards(celery, n)


def test_nothing_is_kept_in_a_result_backend(celery: Celery, redis_client: Redis) -> None:
    queue.enqueue_shards(celery, 1)
    assert type(celery.backend).__name__ == "DisabledBackend"
    assert [*redis_client.scan_iter("celery-task-meta*")] == []


def test_the_settings_that_recovery_rests_on(celery: Celery) -> None:
    conf = celery.conf
    assert conf.task_acks_late
    assert conf.task_reject_on_worker_lost
    assert conf.task_ignore_result
    assert (conf.worker_concurrency, conf.worker_prefetch_multiplier, conf.worker_proc_alive_timeout) == (1, 1, 60)
    assert (conf.accept_content, conf.task_serializer) == (["json"], "json")
    long = {"visibility_timeout": 3600}
    assert conf.result_backend_transport_options == long
    limits = {"socket_connect_timeout": 5, "socket_timeout": 10, "health_check_interval": 10}
    assert conf.broker_transport_options == long | limits, "or a worker waits for ever where a link is cut in silence"
    assert conf.visibility_timeout == 3600

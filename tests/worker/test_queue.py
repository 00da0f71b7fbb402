import base64
import json

import pytest
from celery import Celery
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
    queue.enqueue_shard(celery, "job", "test-0-0")
    queue.enqueue_shard(celery, "job", "test-1-0")
    queue.enqueue_finalize(celery, "job")
    queue.enqueue_shard(celery, "other", keys.FINALIZE)
    shards = [("worker.run_shard", ["job", "test-0-0"]), ("worker.run_shard", ["job", "test-1-0"])]
    assert messages(redis_client, keys.SHARD_QUEUE) == shards
    assert messages(redis_client, keys.FINALIZE_QUEUE) == [("worker.finalize", ["job"]), ("worker.finalize", ["other"])]


def test_nothing_is_kept_in_a_result_backend(celery: Celery, redis_client: Redis) -> None:
    queue.enqueue_shard(celery, "job", "test-0-0")
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
    assert conf.broker_transport_options == conf.result_backend_transport_options == long
    assert conf.visibility_timeout == 3600

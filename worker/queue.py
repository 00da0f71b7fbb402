"""How are workers told of work? Tasks are sent by name, so the API never imports the code that runs them.

In: settings. Out: the Celery application with every Celery setting, and one function per kind of message.
A message says only that there is work; the store decides what is done, by which worker and how often.
"""

from typing import NamedTuple

from celery import Celery

from worker import keys
from worker.redis_server import broker_url
from worker.settings import Settings

RUN_SHARD = "worker.run_shard"
RUN_FINALIZE = "worker.finalize"

# Redis redelivers an unacknowledged message after this long. Short values run long shards twice, and even then recovery
# took 93 s. So it is long, and the sweeper, which uses the leases, does the recovery.
VISIBILITY_S = 3600

# A network link that fails silently leaves connections open on which no answer comes. Without these limits (Celery sets
# none) a worker waits until the kernel gives up, about 15 minutes later.
CONNECT_S = 5  # to open a connection
CHECK_S = 10  # between two checks for overdue answers


class Patience(NamedTuple):
    """How long sending waits for Redis."""

    answer_s: float = 10.0  # for the answer to a command; BRPOP is told to answer within a second
    n_retries: int = 3


def make_celery(settings: Settings, patience: Patience = Patience()) -> Celery:  # noqa: B008  # it is frozen
    """Make the Celery application, without tasks, which is enough for sending (`tasks.py` adds them)."""
    celery = Celery("ablation", broker=broker_url(settings.redis_url), set_as_current=False)
    celery.conf.update(
        accept_content=["json"],
        broker_channel_error_retry=True,  # what Redis refuses for a while (READONLY, OOM, UNBLOCKED) ends no worker
        broker_connection_max_retries=None,  # wait for Redis without limit
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_S,
            "socket_connect_timeout": min(CONNECT_S, patience.answer_s),
            "socket_timeout": patience.answer_s,
            "health_check_interval": CHECK_S,
        },
        enable_utc=True,
        result_backend=None,
        result_backend_transport_options={"visibility_timeout": VISIBILITY_S},
        result_serializer="json",
        task_acks_late=True,
        task_default_queue=keys.SHARD_QUEUE,
        task_ignore_result=True,
        task_publish_retry_policy={
            "max_retries": patience.n_retries,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 0.5,
        },
        task_reject_on_worker_lost=True,
        task_routes={RUN_SHARD: {"queue": keys.SHARD_QUEUE}, RUN_FINALIZE: {"queue": keys.FINALIZE_QUEUE}},
        task_serializer="json",
        visibility_timeout=VISIBILITY_S,
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_proc_alive_timeout=60,  # a cold import of torch takes longer than the default of 4
    )
    return celery


def enqueue(celery: Celery, job_id: str, shard_id: str) -> None:
    """Send the message for one merge (`keys.FINALIZE`), or else for one shard."""
    if shard_id == keys.FINALIZE:
        enqueue_finalize(celery, job_id)
    else:
        enqueue_shards(celery, 1)


def enqueue_shards(celery: Celery, n: int) -> None:
    """Send messages for `n` shards, in a few round trips. A worker that takes one is given a shard of the job in turn.

    Raises:
        KombuError: Redis is away; some of them may have been sent.
    """
    with celery.producer_or_acquire() as producer, producer.batch():
        for _ in range(n):
            celery.send_task(RUN_SHARD, ignore_result=True, producer=producer)


def enqueue_finalize(celery: Celery, job_id: str) -> None:
    """Send the message for a merge, which also runs the proof and stores the table."""
    celery.send_task(RUN_FINALIZE, args=[job_id], ignore_result=True)

"""How does work get to a worker? Tasks are sent by name, so the API never imports the code that runs them.

In: settings. Out: the Celery application with every Celery setting, and one function per kind of message.
A message is only a hint that there is work: what is to be done, by whom and how often is decided in the store.
"""

from celery import Celery

from worker import keys
from worker.redis_server import broker_url
from worker.settings import Settings

RUN_SHARD = "worker.run_shard"
FINALIZE = "worker.finalize"

# Redis gives an unacknowledged message back after this long. Short values run long shards twice, and even then recovery
# took 93 s; so it is long here, and the sweeper, which goes by leases, does the recovering.
VISIBILITY_S = 3600

# A link that goes away without a word leaves connections open that nobody answers on. Without these limits (Celery has
# none) a worker waits on them until the kernel gives up, about 15 minutes later.
CONNECT_S = 5  # until a connection stands
ANSWER_S = 10  # until the answer to a command; BRPOP is asked to answer within a second
CHECK_S = 10  # between two looks at whether answers are overdue


def make_celery(settings: Settings) -> Celery:
    """The Celery application; without tasks, so good for sending only (`tasks.py` adds them)."""
    celery = Celery("ablation", broker=broker_url(settings.redis_url), set_as_current=False)
    celery.conf.update(
        accept_content=["json"],
        broker_connection_max_retries=None,  # a Redis that is away is waited for
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_S,
            "socket_connect_timeout": CONNECT_S,
            "socket_timeout": ANSWER_S,
            "health_check_interval": CHECK_S,
        },
        enable_utc=True,
        result_backend=None,
        result_backend_transport_options={"visibility_timeout": VISIBILITY_S},
        result_serializer="json",
        task_acks_late=True,
        task_default_queue=keys.SHARD_QUEUE,
        task_ignore_result=True,
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
        task_reject_on_worker_lost=True,
        task_routes={RUN_SHARD: {"queue": keys.SHARD_QUEUE}, FINALIZE: {"queue": keys.FINALIZE_QUEUE}},
        task_serializer="json",
        visibility_timeout=VISIBILITY_S,
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_proc_alive_timeout=60,  # a cold import of torch takes longer than the default of 4
    )
    return celery


def enqueue(celery: Celery, job_id: str, shard_id: str) -> None:
    """Send a worker to what is to be done: the merge of this job (`keys.FINALIZE`), or else one shard more."""
    if shard_id == keys.FINALIZE:
        enqueue_finalize(celery, job_id)
    else:
        enqueue_shards(celery, 1)


def enqueue_shards(celery: Celery, n: int) -> None:
    """Send workers to `n` shards, in a few round trips. Which ones is decided when they come: whose turn it is then.

    Raises:
        KombuError: Redis is away; some of them may have been sent.
    """
    with celery.producer_or_acquire() as producer, producer.batch():
        for _ in range(n):
            celery.send_task(RUN_SHARD, ignore_result=True, producer=producer)


def enqueue_finalize(celery: Celery, job_id: str) -> None:
    """Send a worker to merge, prove and write the table."""
    celery.send_task(FINALIZE, args=[job_id], ignore_result=True)

"""What route handlers share: the settings, the job store, the queue. Made once per process."""

import functools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from celery import Celery
from fastapi import Depends, Path, Request
from redis.exceptions import RedisError

from ablation.errors import SpecError, nearest
from ablation.inputs.catalog import NOTHING, Registered, dataset_names, model_names
from ablation.plan import Plan
from api.body import CROWDED, SpecDep
from api.errors import gone, not_found
from api.events import Feed
from api.redis_errors import reason_of
from api.redis_watch import RedisWatch
from api.slots import Slots
from api.threads import asks_redis, in_redis_thread
from worker.planner import plan_job
from worker.queue import Patience, make_celery
from worker.settings import Settings
from worker.states import State
from worker.store import JobRecord, JobStore, connect

Answer = TypeVar("Answer")

HASTE = 0.25  # share of the time for Redis that is waited where there is an answer without it, too


@dataclass(frozen=True)
class Desk:
    """Everything that route handlers share.

    The store waits some seconds for Redis, the hasty store a moment, and the store for files long: a download that has
    begun can't be answered otherwise any more.
    """

    settings: Settings
    watch: RedisWatch
    store: JobStore
    hasty_store: JobStore
    file_store: JobStore
    celery: Celery
    feed: Feed
    streams: Slots
    downloads: Slots
    body_room: Slots


def make_desk(settings: Settings) -> Desk:
    """Make the desk of one process; it connects at the first request."""
    watch = RedisWatch(settings)
    store = JobStore(watch.client(settings))
    return Desk(
        settings,
        watch,
        store,
        hasty_store=JobStore(watch.client(settings, HASTE)),
        file_store=JobStore(connect(settings)),
        celery=make_celery(settings, Patience(answer_s=settings.redis_answer_s / 2, n_retries=1)),
        feed=Feed(watch, store),
        streams=Slots(
            settings.max_streams, "There are as many streams of events as are allowed. Poll the job instead."
        ),
        downloads=Slots(settings.max_downloads, "As many files are being sent as are allowed at once."),
        body_room=Slots(settings.max_body_bytes, CROWDED),
    )


async def get_desk(request: Request) -> Desk:
    """The desk that the application was made with."""
    desk: Desk = request.app.state.desk
    return desk


async def get_store(desk: Annotated[Desk, Depends(get_desk)]) -> JobStore:
    """The job store; refused while Redis is known to be away, so that no thread is taken for it."""
    desk.watch.refuse()
    return desk.store


@asks_redis
def get_job(job_id: Annotated[str, Path(max_length=100)], store: Annotated[JobStore, Depends(get_store)]) -> JobRecord:
    """The job that the path names; 404 if there is none, 410 if it has expired."""
    job = store.get(job_id)
    if job is None:
        raise not_found(f"job {job_id!r}", "GET /v1/jobs")
    if job.status == State.EXPIRED:
        raise gone(f"Job {job_id}")
    return job


async def get_registered(desk: Annotated[Desk, Depends(get_desk)]) -> Registered | None:
    """Registered models and data sets, as workers have published them; None while Redis is away."""
    return await _ask_hastily(desk, desk.hasty_store.registered)


async def get_planner(spec: SpecDep, desk: Annotated[Desk, Depends(get_desk)]) -> Callable[[], Plan | None]:
    """A function that plans the spec with this service's settings; None comes if a worker must open the data first.

    While Redis is away it plans built-in models and data, at the pace of the cost table.
    """
    is_built_in = spec.model.name in model_names() and spec.data.name in dataset_names()
    registered = NOTHING if is_built_in else await in_redis_thread(desk.store.registered)
    machine = await _ask_hastily(desk, desk.hasty_store.machine)
    return functools.partial(plan_job, spec, desk.settings, registered, machine=machine)


async def _ask_hastily(desk: Desk, ask: Callable[[], Answer]) -> Answer | None:
    """What Redis answers in a moment; None where it doesn't."""
    try:
        desk.watch.refuse()
        return await in_redis_thread(ask, HASTE * desk.settings.redis_answer_s / 2)
    except RedisError as error:
        if reason_of(error) is None:
            raise
        return None


async def take_stream(desk: Annotated[Desk, Depends(get_desk)]) -> AsyncIterator[None]:
    """Take the place of one stream of events, until it ends."""
    desk.streams.take()
    try:
        yield
    finally:
        desk.streams.give_back()


async def refuse_unknown_parameters(request: Request) -> None:
    """Refuse query parameters that the address does not have; a misspelt one would be ignored.

    Raises:
        SpecError: an unknown parameter; the message names those that the address has.
    """
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]  # those of the handler
    for name, given in request.query_params.items():
        if name not in known:
            allowed = f"only the parameters {', '.join(known)}" if known else "no parameters"
            next_step = f"There is no such parameter. {nearest(name, known)}".rstrip()
            raise SpecError(name, given, allowed, next_step)


DeskDep = Annotated[Desk, Depends(get_desk)]
StoreDep = Annotated[JobStore, Depends(get_store)]
StreamDep = Annotated[None, Depends(take_stream)]
JobDep = Annotated[JobRecord, Depends(get_job)]
RegisteredDep = Annotated[Registered | None, Depends(get_registered)]
PlannerDep = Annotated[Callable[[], Plan | None], Depends(get_planner)]

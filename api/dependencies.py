"""What a route works with: the settings, the job store, the queue. Made once per process, handed to every handler."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Path, Request
from redis import Redis

from ablation.catalog import Registered
from ablation.plan import Plan
from ablation.spec import JobSpec
from api.errors import gone, not_found
from worker.planner import plan_job
from worker.queue import make_celery
from worker.settings import Settings
from worker.states import State
from worker.store import JobRecord, JobStore, connect


@dataclass(frozen=True)
class Desk:
    """Everything that the handlers share."""

    settings: Settings
    redis: Redis
    store: JobStore
    celery: Celery


def make_desk(settings: Settings) -> Desk:
    """The desk of one process; connects at the first request, not now."""
    client = connect(settings)
    return Desk(settings, client, JobStore(client), make_celery(settings))


def get_desk(request: Request) -> Desk:
    """The desk that the app was made with."""
    desk: Desk = request.app.state.desk
    return desk


def get_store(desk: Annotated[Desk, Depends(get_desk)]) -> JobStore:
    """The job store."""
    return desk.store


def get_job(job_id: Annotated[str, Path(max_length=100)], store: Annotated[JobStore, Depends(get_store)]) -> JobRecord:
    """The job that the path names; 404 where there is none, 410 where it has expired."""
    job = store.get(job_id)
    if job is None:
        raise not_found(f"job {job_id!r}", "GET /v1/jobs")
    if job.status == State.EXPIRED:
        raise gone(f"Job {job_id}")
    return job


def get_registered(store: Annotated[JobStore, Depends(get_store)]) -> Registered:
    """What workers have published beside what is built in."""
    return store.registered()


def get_planner(
    desk: Annotated[Desk, Depends(get_desk)], registered: Annotated[Registered, Depends(get_registered)]
) -> Callable[[JobSpec], Plan | None]:
    """The function that plans a spec with this service's settings; None: a worker has to open its data first."""
    return lambda spec: plan_job(spec, desk.settings, registered)


DeskDep = Annotated[Desk, Depends(get_desk)]
StoreDep = Annotated[JobStore, Depends(get_store)]
JobDep = Annotated[JobRecord, Depends(get_job)]
RegisteredDep = Annotated[Registered, Depends(get_registered)]
PlannerDep = Annotated[Callable[[JobSpec], Plan | None], Depends(get_planner)]

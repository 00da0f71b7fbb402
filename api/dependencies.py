"""What a route works with: the settings, the job store, the queue. Made once per process, handed to every handler."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Path, Request
from redis import Redis

from ablation.catalog import find_checkpoint, model_facts, split_counts
from ablation.errors import SpecError
from ablation.plan import Plan, make_plan
from ablation.spec import JobSpec
from api.errors import gone, not_found
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


def get_planner(desk: Annotated[Desk, Depends(get_desk)]) -> Callable[[JobSpec], Plan]:
    """The function that plans a spec with this service's settings."""
    return lambda spec: plan_job(spec, desk.settings)


def plan_job(spec: JobSpec, settings: Settings) -> Plan:
    """The plan of a job here.

    Raises:
        SpecError: it asks for something that there is not, or for more than Redis may hold.
    """
    facts = model_facts(spec.model.name)
    find_checkpoint(spec.model, settings.folders)
    counts = split_counts(spec.data, settings.folders)
    plan = make_plan(spec, facts, counts, threads=settings.threads, shard_s=settings.shard_s)
    if plan.estimate.redis_bytes > settings.max_redis_bytes:
        raise SpecError(
            "sites",
            f"{plan.n_sites} sites in {len(plan.shards)} shards",
            f"what fits into {settings.max_redis_bytes} bytes of Redis; this needs {plan.estimate.redis_bytes}",
            "Ask for fewer sites, or raise ABLATION_MAX_REDIS_BYTES.",
        )
    return plan


DeskDep = Annotated[Desk, Depends(get_desk)]
StoreDep = Annotated[JobStore, Depends(get_store)]
JobDep = Annotated[JobRecord, Depends(get_job)]
PlannerDep = Annotated[Callable[[JobSpec], Plan], Depends(get_planner)]

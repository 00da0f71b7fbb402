"""What route handlers share: the settings, the job store, the queue. Made once per process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Path, Request

from ablation.errors import SpecError, nearest
from ablation.inputs.catalog import NOTHING, Registered, dataset_names, model_names
from ablation.machine import Machine
from ablation.plan import Plan
from ablation.spec import JobSpec
from api.errors import AWAY, gone, not_found
from worker.planner import plan_job
from worker.queue import make_celery
from worker.settings import Settings
from worker.states import State
from worker.store import JobRecord, JobStore, connect


@dataclass(frozen=True)
class Desk:
    """Everything that route handlers share; the hasty store doesn't wait while Redis is away."""

    settings: Settings
    store: JobStore
    hasty_store: JobStore
    celery: Celery


def make_desk(settings: Settings) -> Desk:
    """Make the desk of one process; it connects at the first request."""
    store, hasty_store = JobStore(connect(settings)), JobStore(connect(settings, n_retries=1))
    return Desk(settings, store, hasty_store, make_celery(settings))


async def get_desk(request: Request) -> Desk:
    """The desk that the application was made with."""
    desk: Desk = request.app.state.desk
    return desk


async def get_store(desk: Annotated[Desk, Depends(get_desk)]) -> JobStore:
    """The job store."""
    return desk.store


def get_job(job_id: Annotated[str, Path(max_length=100)], store: Annotated[JobStore, Depends(get_store)]) -> JobRecord:
    """The job that the path names; 404 if there is none, 410 if it has expired."""
    job = store.get(job_id)
    if job is None:
        raise not_found(f"job {job_id!r}", "GET /v1/jobs")
    if job.status == State.EXPIRED:
        raise gone(f"Job {job_id}")
    return job


def get_registered(desk: Annotated[Desk, Depends(get_desk)]) -> Registered | None:
    """Registered models and data sets, as workers have published them; None while Redis is away."""
    try:
        return desk.hasty_store.registered()
    except AWAY:
        return None


def get_planner(desk: Annotated[Desk, Depends(get_desk)]) -> Callable[[JobSpec], Plan | None]:
    """A function that plans a spec with this service's settings; it returns None if a worker must open the data first.

    While Redis is away it plans built-in models and data, at the pace of the cost table.
    """

    def plan(spec: JobSpec) -> Plan | None:
        is_built_in = spec.model.name in model_names() and spec.data.name in dataset_names()
        registered = NOTHING if is_built_in else desk.store.registered()
        return plan_job(spec, desk.settings, registered, machine=get_machine(desk))

    return plan


def get_machine(desk: Desk) -> Machine | None:
    """The workers' machine; None while Redis is away, which makes the estimate coarser."""
    try:
        return desk.hasty_store.machine()
    except AWAY:
        return None


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
JobDep = Annotated[JobRecord, Depends(get_job)]
RegisteredDep = Annotated[Registered | None, Depends(get_registered)]
PlannerDep = Annotated[Callable[[JobSpec], Plan | None], Depends(get_planner)]

"""Answers of every route as plain records. The request's record is `ablation.spec.JobSpec`.

In: the worker's and the catalog's records. Out: their public fields. Records that the command line prints, too, are in
`ablation.views`, a finished job's summary is in `summary.py`.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ablation.inputs.catalog import DatasetFacts, ModelFacts
from ablation.spec import JobSpec
from ablation.views import LayerView, ModelView, PlanView, model_view, plan_view
from api.short_spec import ShortSpec, shorten_spec
from api.summary import Summary
from worker.states import State
from worker.store import JobRecord

MAX_POLL_S = 30  # longest interval between polls


EtaSeconds = Annotated[
    float | None,
    Field(
        description="seconds that are left at the pace measured from the first progress to the last; null until there "
        "is one, for the merge and the proof at the end, and once the job is over"
    ),
]


class Progress(BaseModel):
    """How many shards are done, including fractions of running ones, and how many there are."""

    done: float
    total: int


class Urls(BaseModel):
    """Addresses of the job's resources."""

    self: str
    cancel: str
    results: str
    csv: str
    parquet: str
    events: str


class JobError(BaseModel):
    """Why a job failed."""

    type: str = Field(description="what kind of error, for programs: data-error, checkpoint-error, worker-lost, ...")
    title: str = Field(description="what that means")
    detail: str = Field(description="what happened, without paths of the host")


class JobView(BaseModel):
    """One job in its present state."""

    id: str
    status: State
    progress: Progress
    eta_seconds: EtaSeconds
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    spec: ShortSpec | JobSpec
    plan: PlanView | None = Field(description="null until a worker has opened the data and cut the job")
    error: JobError | None = Field(description="null unless the job has failed")
    urls: Urls


class JobPage(BaseModel):
    """A page of jobs, newest first, and the cursor of the next page."""

    data: list[JobView]
    next_cursor: str | None


class Pending(BaseModel):
    """The answer to a poll while there are no results yet."""

    id: str
    status: State
    progress: Progress
    eta_seconds: EtaSeconds


class News(Pending):
    """The data of an event; `error` is set once the job has failed."""

    error: JobError | None


class Results(BaseModel):
    """Some rows of a finished table: each row is an array in column order, NaN is null."""

    columns: list[str]
    rows: list[list[int | float | None]]
    total_rows: int
    summary: Summary


IsComplete = Annotated[
    bool, Field(description="false while Redis is away: those that an operator has registered are missing then")
]


class LinkedModel(ModelView):
    """One model that a job may name, and the address of its layers."""

    layers_url: str


class ModelPage(BaseModel):
    """Every model that a job may name."""

    data: list[LinkedModel]
    next_cursor: None = None
    is_complete: IsComplete


class LayerPage(BaseModel):
    """Every layer of one model."""

    data: list[LayerView]
    next_cursor: None = None


class DatasetPage(BaseModel):
    """Every data set that a job may name."""

    data: list[DatasetFacts]
    next_cursor: None = None
    is_complete: IsComplete


class Health(BaseModel):
    """The service is healthy, and what was checked."""

    status: Literal["ok"] = "ok"
    checks: dict[str, str] = {}


class Readiness(Health):
    """The service is ready."""

    warnings: list[str] | None = Field(
        default=None, description="settings of Redis by which jobs may be lost; absent where there are none"
    )


class Problem(BaseModel):
    """A problem document (RFC 9457).

    `field`, `given`, `allowed` and `next_step` are set where a part of the request is wrong, `checks` where a
    part of the service is away.
    """

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str
    field: str | None = None
    given: Any = None
    allowed: str | None = None
    next_step: str | None = None
    checks: dict[str, str] | None = None


def job_view(job: JobRecord) -> JobView:
    """The public view of a job."""
    url = f"/v1/jobs/{job.id}"
    return JobView(
        id=job.id,
        status=job.status,
        progress=_progress(job),
        eta_seconds=eta_s(job),
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        spec=shorten_spec(job.spec, f"{url}/spec"),
        plan=plan_view(job.plan) if job.plan else None,
        error=_error(job),
        urls=Urls(
            self=url,
            cancel=f"{url}/cancel",
            results=f"{url}/results",
            csv=f"{url}/results.csv",
            parquet=f"{url}/results.parquet",
            events=f"{url}/events",
        ),
    )


def pending(job: JobRecord) -> Pending:
    """The answer for a job that has no results yet."""
    return Pending(id=job.id, status=job.status, progress=_progress(job), eta_seconds=eta_s(job))


def news(job: JobRecord) -> News:
    """The data of an event about a job."""
    return News(**pending(job).model_dump(), error=_error(job))


def linked_model(facts: ModelFacts) -> LinkedModel:
    """The public view of a model, with the address of its layers."""
    return LinkedModel(**model_view(facts).model_dump(), layers_url=f"/v1/models/{facts.name}/layers")


def _error(job: JobRecord) -> JobError | None:
    return JobError(**job.error) if job.error else None


def _progress(job: JobRecord) -> Progress:
    return Progress(done=job.progress.done, total=job.progress.total)


def eta_s(job: JobRecord) -> float | None:
    """Remaining seconds by the job's own pace; None until that is measured.

    It changes with the progress and not with the clock.
    """
    if job.status != State.RUNNING or job.shards_per_s is None:
        return None
    return max(0.0, job.progress.total - job.progress.done) / job.shards_per_s


def retry_after_s(job: JobRecord) -> int:
    """Seconds until the next poll: a tenth of the remaining time (at first the plan's estimate), from 1 to 30 s."""
    left_s = eta_s(job)
    if left_s is None and job.plan and job.status in (State.QUEUED, State.RUNNING):
        left_s = job.plan.estimate.seconds
    return round(min(MAX_POLL_S, max(1.0, (left_s or 0.0) / 10)))

"""What goes over the wire: the answers of every route as plain records. What comes in is `ablation.spec.JobSpec`.

In: the worker's and the catalog's records. Out: their public form, without what only machines need (a plan's shards).
"""

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel

from ablation.catalog import DatasetFacts, LayerFacts, ModelFacts
from ablation.plan import Estimate, Plan, ProofPlan, SplitPlan
from ablation.spec import JobSpec, Precision
from worker.states import TERMINAL, State
from worker.store import JobRecord

MAX_POLL_S = 30  # nobody should have to wait longer than this for news that is there


class PlanView(BaseModel):
    """How a job is cut and what it will cost; its shards only as a number, since there may be many."""

    parameter: str
    kind: str
    shape: tuple[int, ...]
    n_sites: int
    path: str
    precision: Precision
    batch_size: int
    threads: int
    splits: tuple[SplitPlan, ...]
    n_shards: int
    proof: ProofPlan
    estimate: Estimate


class Progress(BaseModel):
    """How many shards are done, of how many; the fractions in flight count."""

    done: float
    total: int


class Urls(BaseModel):
    """Where the job's parts are."""

    self: str
    cancel: str
    results: str
    csv: str
    parquet: str
    events: str


class JobView(BaseModel):
    """One job, in whatever state it is."""

    id: str
    status: State
    progress: Progress
    eta_seconds: float | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    spec: JobSpec
    plan: PlanView | None
    error: dict[str, Any] | None
    urls: Urls


class JobPage(BaseModel):
    """Some jobs, newest first, and where the next page starts."""

    data: list[JobView]
    next_cursor: str | None


class Pending(BaseModel):
    """The answer to a poll while there are no results yet."""

    id: str
    status: State
    progress: Progress
    eta_seconds: float | None


class News(Pending):
    """What an event says of a job; `error` is there once it has failed."""

    error: dict[str, Any] | None


class Results(BaseModel):
    """Some rows of a finished table: each row is an array in column order, NaN is null."""

    columns: list[str]
    rows: list[list[int | float | None]]
    total_rows: int
    summary: dict[str, Any]


class ModelView(BaseModel):
    """One model that may be asked for."""

    name: str
    weights: tuple[str, ...]
    n_classes: int
    input_shape: tuple[int, ...]
    flops: float
    n_layers: int
    layers_url: str


class ModelPage(BaseModel):
    """Every model that may be asked for."""

    data: list[ModelView]
    next_cursor: None = None


class LayerView(BaseModel):
    """One layer that may be a target, and the path it takes."""

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    n_weights: int
    path: str


class LayerPage(BaseModel):
    """Every layer of one model."""

    data: list[LayerView]
    next_cursor: None = None


class DatasetPage(BaseModel):
    """Every data set that may be asked for."""

    data: list[DatasetFacts]
    next_cursor: None = None


class Health(BaseModel):
    """The service is well, and what that stands on."""

    status: Literal["ok"] = "ok"
    checks: dict[str, str] = {}


class Problem(BaseModel):
    """What went wrong (RFC 9457).

    `field`, `given`, `allowed` and `next_step` are there where a part of the request is to blame, `checks` where a
    part of the service is.
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


def plan_view(plan: Plan) -> PlanView:
    """The public form of a plan."""
    same = {name: getattr(plan, name) for name in PlanView.model_fields if name != "n_shards"}
    return PlanView(n_shards=len(plan.shards), **same)


def job_view(job: JobRecord) -> JobView:
    """The public form of a job."""
    url = f"/v1/jobs/{job.id}"
    return JobView(
        id=job.id,
        status=job.status,
        progress=_progress(job),
        eta_seconds=eta_s(job),
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        spec=job.spec,
        plan=plan_view(job.plan) if job.plan else None,
        error=job.error,
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
    """What there is to say of a job that has no results yet."""
    return Pending(id=job.id, status=job.status, progress=_progress(job), eta_seconds=eta_s(job))


def news(job: JobRecord) -> News:
    """What an event says of a job."""
    return News(**pending(job).model_dump(), error=job.error)


def model_view(facts: ModelFacts) -> ModelView:
    """The public form of a model's facts."""
    return ModelView(
        name=facts.name,
        weights=facts.weights,
        n_classes=facts.n_classes,
        input_shape=facts.input_shape,
        flops=facts.flops,
        n_layers=len(facts.layers),
        layers_url=f"/v1/models/{facts.name}/layers",
    )


def layer_view(layer: LayerFacts) -> LayerView:
    """The public form of a layer's facts."""
    return LayerView(**{name: getattr(layer, name) for name in LayerView.model_fields})


def _progress(job: JobRecord) -> Progress:
    return Progress(done=job.progress.done, total=job.progress.total)


def eta_s(job: JobRecord) -> float | None:
    """Seconds that are left: by the plan at first, more and more by the job's own pace; None once it is over."""
    if job.status in TERMINAL or job.plan is None:
        return None
    planned_s, done = job.plan.estimate.seconds, job.progress.done / job.progress.total
    if job.started_at is None or done <= 0:
        return planned_s
    elapsed_s = max(0.0, (datetime.now(UTC) - job.started_at).total_seconds())
    by_pace = min(1.0, elapsed_s / planned_s)  # a job's first seconds go into reading its model and data
    return (1 - done) * (by_pace * elapsed_s / done + (1 - by_pace) * planned_s)


def retry_after_s(job: JobRecord) -> int:
    """When to ask again: a tenth of the time that is left, from one second to half a minute."""
    return round(min(MAX_POLL_S, max(1.0, (eta_s(job) or 0.0) / 10)))

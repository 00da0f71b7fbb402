"""Every address of the service, one thin handler each: read the request, ask the store or the catalog, answer.

Handlers are plain functions, run in threads: every one of them is a few round trips to Redis, and the streamed files
do their work in blocks, so a poll is answered in milliseconds whatever else is going on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from kombu.exceptions import OperationalError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ablation.catalog import dataset_facts, dataset_names, model_facts, model_names
from ablation.errors import nearest
from ablation.export import csv_chunks, parquet_chunks
from ablation.spec import JobSpec
from api.dependencies import DeskDep, JobDep, PlannerDep, StoreDep
from api.errors import PROBLEM, conflict, gone, not_found, problems
from api.schemas import (
    DatasetPage,
    Health,
    JobPage,
    JobView,
    LayerPage,
    ModelPage,
    Pending,
    PlanView,
    Results,
    job_view,
    layer_view,
    model_view,
    pending,
    plan_view,
    retry_after_s,
)
from worker.codec import decode_block
from worker.queue import enqueue_shard
from worker.states import TERMINAL, State
from worker.store import JobRecord, JobStore

routes = APIRouter(responses=problems(422, 503))

Blocks = Iterable[Mapping[str, np.ndarray]]

CSV = "text/csv; charset=utf-8; header=present"
PARQUET = "application/vnd.apache.parquet"
UNFINISHED = {202: {"model": Pending}, **problems(404, 409, 410)}  # what OpenAPI says of no results


@routes.post("/v1/jobs", status_code=202, tags=["jobs"])
def post_job(spec: JobSpec, plan_of: PlannerDep, desk: DeskDep, response: Response) -> JobView:
    """Ask for the utilities of some weights; the answer says where they will be."""
    job = desk.store.create(spec, plan_of(spec))
    assert job.plan is not None
    with suppress(OperationalError):  # Redis went away just now: the sweeper sends what waits without a message
        for shard in job.plan.shards:
            enqueue_shard(desk.celery, job.id, shard.id)
    view = job_view(job)
    response.headers["Location"] = view.urls.self
    response.headers["Retry-After"] = str(retry_after_s(job))
    return view


@routes.get("/v1/jobs", tags=["jobs"])
def list_jobs(
    store: StoreDep,
    status: State | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> JobPage:
    """The jobs there are, newest first."""
    jobs, next_cursor = store.list(status, limit, cursor)
    return JobPage(data=[job_view(job) for job in jobs], next_cursor=next_cursor)


@routes.get("/v1/jobs/{job_id}", tags=["jobs"], responses=problems(404, 410))
def get_job(job: JobDep, response: Response) -> JobView:
    """How a job is doing."""
    if job.status not in TERMINAL:
        response.headers["Retry-After"] = str(retry_after_s(job))
    return job_view(job)


@routes.post("/v1/jobs/{job_id}/cancel", tags=["jobs"], responses={202: {"model": JobView}, **problems(404, 409, 410)})
def cancel_job(job: JobDep, store: StoreDep, response: Response) -> JobView:
    """Stop a job; what runs stops within one batch. 202 when this call did it, 200 when it was so already."""
    response.status_code = 200 if job.status in (State.CANCELLING, State.CANCELLED) else 202
    after = store.cancel(job.id)
    if after in (State.SUCCEEDED, State.FAILED):
        raise conflict(f"Job {job.id} has {after} and can't be cancelled; DELETE it if it is not wanted.")
    if after == State.EXPIRED:
        raise gone(f"Job {job.id}")
    return job_view(_again(store, job.id))


@routes.delete("/v1/jobs/{job_id}", status_code=204, tags=["jobs"], responses=problems(404, 409, 410))
def delete_job(job: JobDep, store: StoreDep) -> None:
    """Forget a job that is over, with its results."""
    after = store.delete(job.id)
    if after not in (None, State.EXPIRED):
        raise conflict(f"Job {job.id} is {after}; cancel it first, or wait until it is over.")


@routes.get(
    "/v1/jobs/{job_id}/results",
    tags=["results"],
    response_model=Results,
    responses={**UNFINISHED, 200: {"content": {"text/csv": {}}}},
)
def get_results(
    request: Request,
    job: JobDep,
    store: StoreDep,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=0, le=10_000)] = 100,
) -> Response:
    """The poll endpoint: 202 and the progress until the job is done, then its rows."""
    if "text/csv" in request.headers.get("accept", ""):
        return get_csv(job, store)
    if wait := _unfinished(job):
        return wait
    columns = store.read_rows(job.id, offset, limit)
    body = {
        "columns": list(columns),
        "rows": [list(row) for row in zip(*(_plain(column) for column in columns.values()), strict=True)],
        "total_rows": store.n_rows(job.id),
        "summary": store.summary(job.id),
    }
    return JSONResponse(body)


@routes.get("/v1/jobs/{job_id}/results.csv", tags=["results"], response_class=StreamingResponse, responses=UNFINISHED)
def get_csv(job: JobDep, store: StoreDep) -> Response:
    """The whole table as CSV, streamed."""
    return _unfinished(job) or _stream(job, store, csv_chunks, CSV, "utility.csv")


@routes.get(
    "/v1/jobs/{job_id}/results.parquet", tags=["results"], response_class=StreamingResponse, responses=UNFINISHED
)
def get_parquet(job: JobDep, store: StoreDep) -> Response:
    """The whole table as Parquet, streamed."""
    return _unfinished(job) or _stream(job, store, parquet_chunks, PARQUET, "utility.parquet")


@routes.post("/v1/plans", tags=["catalog"])
def post_plan(spec: JobSpec, plan_of: PlannerDep) -> PlanView:
    """How a job would be cut and what it would cost; nothing is queued."""
    return plan_view(plan_of(spec))


@routes.get("/v1/models", tags=["catalog"])
def list_models() -> ModelPage:
    """Every model that may be asked for."""
    return ModelPage(data=[model_view(model_facts(name)) for name in model_names()])


@routes.get("/v1/models/{name}/layers", tags=["catalog"], responses=problems(404))
def list_layers(name: str) -> LayerPage:
    """Every layer of a model, with the path that it takes."""
    if name not in model_names():
        raise not_found(f"model {name!r}", "GET /v1/models", nearest(name.lower(), model_names()))
    return LayerPage(data=[layer_view(layer) for layer in model_facts(name).layers])


@routes.get("/v1/datasets", tags=["catalog"])
def list_datasets() -> DatasetPage:
    """Every data set that may be asked for."""
    return DatasetPage(data=[dataset_facts(name) for name in dataset_names()])


@routes.get("/healthz", tags=["health"])
def healthz() -> Health:
    """This process is alive."""
    return Health(status="ok")


@routes.get("/readyz", tags=["health"], responses={503: {"model": Health, "content": PROBLEM}})
def readyz(desk: DeskDep, response: Response) -> Health:
    """Jobs will be worked on: Redis answers and a worker has been seen."""
    desk.redis.ping()
    n_workers = desk.store.n_workers()
    response.status_code = 200 if n_workers else 503
    return Health(status="ok" if n_workers else "no worker", checks={"redis": "ok", "workers": str(n_workers)})


@routes.get("/metrics", tags=["health"], response_class=Response)
def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


def _unfinished(job: JobRecord) -> Response | None:
    """What to answer while there is no table: come back later, or never."""
    if job.status == State.SUCCEEDED:
        return None
    if job.status in TERMINAL or job.status == State.CANCELLING:
        why = f": {job.error.get('detail', job.error)}" if job.error else ""
        raise conflict(f"Job {job.id} is {job.status} and has no results{why}".rstrip(".") + ".")
    return JSONResponse(pending(job).model_dump(mode="json"), 202, {"Retry-After": str(retry_after_s(job))})


def _stream(
    job: JobRecord, store: JobStore, encode: Callable[[Blocks], Iterator[bytes]], media_type: str, name: str
) -> Response:
    """A file, encoded block by block as it is read from Redis."""
    blocks = (decode_block(block) for block in store.table_blocks(job.id))
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(encode(blocks), media_type=media_type, headers=headers)


def _plain(column: np.ndarray) -> list[Any]:
    """A column as JSON numbers; what is not a number is null."""
    if not np.issubdtype(column.dtype, np.floating):
        return column.tolist()
    numbers = column.astype(object)
    numbers[~np.isfinite(column)] = None
    return numbers.tolist()


def _again(store: JobStore, job_id: str) -> JobRecord:
    job = store.get(job_id)
    if job is None:
        raise not_found(f"job {job_id!r}", "GET /v1/jobs")
    return job

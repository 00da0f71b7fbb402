"""Every route of the service, one thin handler each: read the request, ask the store or the catalog, answer.

Handlers that ask Redis are plain functions, which `asks_redis` runs in threads of their own: each makes a few round
trips, and files are streamed in blocks, so a poll is answered in milliseconds under any load. What needs no Redis is
asynchronous, so that it never waits for it. What OpenAPI says of each address is in `document.py`.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from kombu.exceptions import KombuError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from ablation.errors import SpecError, nearest
from ablation.export import csv_chunks, parquet_chunks
from ablation.inputs.catalog import NOTHING, dataset_facts, dataset_names, model_facts, model_names
from ablation.plan import Plan
from ablation.results import name_file
from ablation.spec import JobSpec
from ablation.views import PlanView, layer_view, plan_view
from api import document
from api.body import SpecDep
from api.dependencies import (
    Desk,
    DeskDep,
    JobDep,
    PlannerDep,
    RegisteredDep,
    StoreDep,
    StreamDep,
    refuse_unknown_parameters,
)
from api.errors import conflict, gone, not_found, unavailable
from api.events import Told, read_last_event, watch_job
from api.headers import IdempotencyKey, choose_type, is_known, make_etag
from api.redis_errors import AWAY, code_of, reason_of
from api.schemas import (
    DatasetPage,
    Health,
    JobPage,
    JobView,
    LayerPage,
    ModelPage,
    Readiness,
    Results,
    job_view,
    linked_model,
    pending,
    retry_after_s,
)
from api.short_spec import shorten_fields
from api.slots import Slots
from api.threads import asks_redis, each_in_thread, in_redis_thread
from worker.codec import decode_block
from worker.queue import enqueue_shards
from worker.states import TERMINAL, State
from worker.store import JobRecord, JobStore

log = logging.getLogger(__name__)

routes = APIRouter(responses=document.EVERYWHERE, dependencies=[Depends(refuse_unknown_parameters)])

Blocks = Iterable[Mapping[str, np.ndarray]]

CSV = "text/csv; charset=utf-8; header=present"
PARQUET = "application/vnd.apache.parquet"


@routes.post("/v1/jobs", status_code=202, tags=["jobs"], responses=document.POST_JOB, openapi_extra=document.SPEC_BODY)
@asks_redis
def post_job(
    spec: SpecDep,
    store: StoreDep,
    make_plan: PlannerDep,
    desk: DeskDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobView:
    """Create a job that computes the utilities of some weights."""
    job = store.posted(idempotency_key) if idempotency_key else None
    if job is None:
        job = _create(desk, spec, make_plan(), idempotency_key)
    if job.spec != spec:
        next_step = "Send this spec with a key of its own."
        raise SpecError("Idempotency-Key", idempotency_key, "the spec that it came with first, for 24 hours", next_step)
    view = job_view(job)
    response.headers["Location"] = view.urls.self
    response.headers["Retry-After"] = str(retry_after_s(job))
    return view


@routes.get("/v1/jobs", tags=["jobs"], responses=document.LIST_JOBS)
@asks_redis
def list_jobs(
    store: StoreDep,
    status: State | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> JobPage:
    """List the jobs, newest first."""
    jobs, next_cursor = store.list(status, limit, cursor)
    return JobPage(data=[job_view(job) for job in jobs], next_cursor=next_cursor)


@routes.get("/v1/jobs/{job_id}", tags=["jobs"], responses=document.GET_JOB, response_model=JobView)
@asks_redis
def get_job(
    job: JobDep, response: Response, if_none_match: Annotated[tuple[str, ...], Header(alias="If-None-Match")] = ()
) -> JobView | Response:
    """State and progress of a job."""
    view = job_view(job)
    response.headers["ETag"] = etag = make_etag(view)
    if job.status not in TERMINAL:
        response.headers["Retry-After"] = str(retry_after_s(job))
    return Response(status_code=304, headers=response.headers) if is_known(etag, if_none_match) else view


@routes.get("/v1/jobs/{job_id}/spec", tags=["jobs"], responses=document.GET_SPEC)
@asks_redis
def get_spec(job: JobDep) -> Response:
    """The whole spec of a job; elsewhere, lists of more than 1,000 entries are cut."""
    return Response(job.spec.model_dump_json(), media_type="application/json")


@routes.post("/v1/jobs/{job_id}/cancel", tags=["jobs"], responses=document.CANCEL_JOB)
@asks_redis
def cancel_job(job: JobDep, store: StoreDep, response: Response) -> JobView:
    """Cancel a job; a running shard stops within one batch. 202 if this call cancels it, 200 if another has."""
    after, is_new = store.cancel(job.id)
    response.status_code = 202 if is_new else 200
    if after in (State.SUCCEEDED, State.FAILED):
        raise conflict(f"Job {job.id} has {after} and can't be cancelled; DELETE it if it is not wanted.")
    if after == State.EXPIRED:
        raise gone(f"Job {job.id}")
    return job_view(_again(store, job.id))


@routes.delete("/v1/jobs/{job_id}", status_code=204, tags=["jobs"], responses=document.DELETE_JOB)
@asks_redis
def delete_job(job: JobDep, store: StoreDep) -> Response:
    """Delete a job that is over, with its results."""
    after = store.delete(job.id)
    if after not in (None, State.EXPIRED):
        raise conflict(f"Job {job.id} is {after}; cancel it first, or wait until it is over.")
    return Response(status_code=204)


@routes.get("/v1/jobs/{job_id}/results", tags=["results"], response_model=Results, responses=document.GET_RESULTS)
@asks_redis
def get_results(
    job: JobDep,
    store: StoreDep,
    desk: DeskDep,
    accept: Annotated[str, Header(include_in_schema=False)] = "*/*",
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=0, le=10_000)] = 100,
) -> Response:
    """The rows of a job's table; 202 with the progress until the job is done."""
    if choose_type(accept, ("application/json", "text/csv")) == "text/csv":
        answer = _stream_csv(job, desk)
    else:
        answer = _unfinished(job) or _rows(job, store, offset, limit)
    answer.headers["Vary"] = "Accept"
    return answer


@routes.get(
    "/v1/jobs/{job_id}/results.csv", tags=["results"], response_class=StreamingResponse, responses=document.GET_CSV
)
@asks_redis
def get_csv(job: JobDep, desk: DeskDep) -> Response:
    """The whole table as CSV, streamed."""
    return _stream_csv(job, desk)


@routes.get(
    "/v1/jobs/{job_id}/results.parquet",
    tags=["results"],
    response_class=StreamingResponse,
    responses=document.GET_PARQUET,
)
@asks_redis
def get_parquet(job: JobDep, desk: DeskDep) -> Response:
    """The whole table as Parquet, streamed."""

    def encode(blocks: Blocks) -> Iterator[bytes]:
        return parquet_chunks(blocks, desk.file_store.about(job.id))

    return _unfinished(job) or _stream(job, desk, encode, PARQUET, "parquet")


@routes.get(
    "/v1/jobs/{job_id}/events", tags=["jobs"], response_class=EventSourceResponse, responses=document.GET_EVENTS
)
async def get_events(
    _: StreamDep, job: JobDep, desk: DeskDep, told: Annotated[Told, Depends(read_last_event)]
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events of a job: `status`, `progress`, and finally `done`."""
    async with aclosing(watch_job(desk.feed, job, told)) as events:
        async for event in events:
            yield event


@routes.post("/v1/plans", tags=["catalog"], responses=document.POST_PLAN, openapi_extra=document.SPEC_BODY)
def post_plan(spec: SpecDep, make_plan: PlannerDep) -> PlanView:
    """Plan a job and estimate its cost; nothing is queued."""
    plan = make_plan()
    if plan is None:
        next_step = "Only a worker can count its examples: POST /v1/jobs, the job has its plan once one has looked."
        if spec.data.name in dataset_names():
            raise SpecError("data.bad_images", spec.data.bad_images, "'refuse'", next_step)
        raise SpecError("data.name", spec.data.name, "a built-in data set", next_step)
    return plan_view(plan)


@routes.get("/v1/models", tags=["catalog"], responses=document.LIST_MODELS)
async def list_models(registered: RegisteredDep) -> ModelPage:
    """List the models that a job may name."""
    known = registered or NOTHING
    models = [linked_model(model_facts(name, known)) for name in model_names(known)]
    return ModelPage(data=models, is_complete=registered is not None)


@routes.get("/v1/models/{name}/layers", tags=["catalog"], responses=document.LIST_LAYERS)
async def list_layers(name: str, desk: DeskDep) -> LayerPage:
    """List the layers of a model, with the path that each takes."""
    registered = NOTHING if name in model_names() else await in_redis_thread(desk.store.registered)
    names = model_names(registered)
    if name not in names:
        raise not_found(f"model {name!r}", "GET /v1/models", nearest(name.lower(), names))
    return LayerPage(data=[layer_view(layer) for layer in model_facts(name, registered).layers])


@routes.get("/v1/datasets", tags=["catalog"], responses=document.LIST_DATASETS)
async def list_datasets(registered: RegisteredDep) -> DatasetPage:
    """List the data sets that a job may name."""
    known = registered or NOTHING
    data_sets = [dataset_facts(name, known) for name in dataset_names(known)]
    return DatasetPage(data=data_sets, is_complete=registered is not None)


@routes.get("/healthz", tags=["health"], responses=document.HEALTHZ)
async def healthz() -> Health:
    """Liveness: this process is running."""
    return Health()


@routes.get(
    "/readyz",
    tags=["health"],
    responses=document.READYZ,
    response_model=Readiness,
    response_model_exclude_none=True,
)
async def readyz(request: Request, desk: DeskDep) -> Readiness | Response:
    """Readiness: Redis answers, and a worker has reported. Settings of Redis that endanger jobs are warned of."""
    try:
        desk.watch.refuse()
        n_workers = await in_redis_thread(desk.store.n_workers)
    except RedisError as error:
        detail = reason_of(error)
        if detail is None:
            raise
        is_away = isinstance(error, AWAY) and not code_of(error)
        checks = {"redis": "away" if is_away else "refuses", "workers": "unknown"}
    else:
        checks, detail = {"redis": "ok", "workers": str(n_workers)}, "No worker has been seen for a while."
        if n_workers:
            return Readiness(checks=checks, warnings=[*desk.watch.warnings] or None)
    return unavailable(request, f"{detail} Jobs wait until there is one.", checks=checks)


@routes.get("/metrics", tags=["health"], response_class=Response, responses=document.METRICS)
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


def _create(desk: Desk, spec: JobSpec, plan: Plan | None, idempotency_key: str | None) -> JobRecord:
    """Create a job and send it to the workers, or return the one that another request with this key has created."""
    job = desk.store.create(spec, plan, max_jobs=desk.settings.max_jobs, idempotency_key=idempotency_key)
    if job is None:
        assert idempotency_key is not None
        posted = desk.store.posted(idempotency_key)
        assert posted is not None  # it was there a moment ago
        return posted
    try:
        enqueue_shards(desk.celery, len(plan.shards) if plan else 1)
    except (KombuError, RedisError, OSError) as error:  # Redis went away, or has no room
        log.warning("job %s: not all messages were sent, which the workers make good: %s", job.id, error)
    return job


def _unfinished(job: JobRecord) -> Response | None:
    """Answer while there is no table: 202, or an error if there will be none."""
    if job.status == State.SUCCEEDED:
        return None
    if job.status in TERMINAL or job.status == State.CANCELLING:
        why = f": {job.error.get('detail', job.error)}" if job.error else ""
        raise conflict(f"Job {job.id} is {job.status} and has no results{why}".rstrip(".") + ".")
    return JSONResponse(pending(job).model_dump(mode="json"), 202, {"Retry-After": str(retry_after_s(job))})


def _rows(job: JobRecord, store: JobStore, offset: int, limit: int) -> Response:
    columns = store.read_rows(job.id, offset, limit)
    body = {
        "columns": list(columns),
        "rows": [list(row) for row in zip(*(_plain(column) for column in columns.values()), strict=True)],
        "total_rows": store.n_rows(job.id),
        "summary": _summary(job, store),
    }
    return JSONResponse(body)


def _summary(job: JobRecord, store: JobStore) -> dict[str, Any]:
    """The summary, with the spec as other answers show it."""
    summary = store.summary(job.id)
    if about := summary.get("about"):
        about["spec"] = shorten_fields(about["spec"], f"/v1/jobs/{job.id}/spec")
    return summary


def _stream_csv(job: JobRecord, desk: Desk) -> Response:
    return _unfinished(job) or _stream(job, desk, csv_chunks, CSV, "csv")


def _stream(
    job: JobRecord, desk: Desk, encode: Callable[[Blocks], Iterator[bytes]], media_type: str, suffix: str
) -> Response:
    """Stream a file, encoded block by block as it is read from Redis."""
    desk.store.n_rows(job.id)  # raises before the headers are sent, if the table is gone
    blocks = (decode_block(block) for block in desk.file_store.table_blocks(job.id))
    name = name_file(job.spec, job.id, suffix)
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    desk.downloads.take()
    return _File(encode(blocks), desk.downloads, media_type=media_type, headers=headers)


class _File(StreamingResponse):
    """A streamed response that releases its blocks when it ends, also when the client disconnects.

    Otherwise they stay until the next garbage collection, because the response is part of a cycle.
    """

    def __init__(self, pieces: Iterator[bytes], slots: Slots, **options: Any) -> None:
        super().__init__(each_in_thread(pieces), **options)
        self.pieces, self.slots = pieces, slots

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.slots.give_back()
            self.pieces.close()  # type: ignore[attr-defined]


def _plain(column: np.ndarray) -> list[Any]:
    """A column as JSON numbers, with null for NaN."""
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

"""The parts of the OpenAPI document that the routes' types don't give: problems, headers, media types, examples.

Out: values for `responses=` of a route, and the finished document. The examples are in `examples.py`.
"""

import http
from typing import Any

from fastapi import FastAPI

from api.errors import MEDIA_TYPE
from api.examples import EXAMPLES
from api.schemas import JobView, Pending, Problem

Responses = dict[int | str, dict[str, Any]]

RETRY_AFTER = {
    "Retry-After": {"description": "seconds until the next request is useful", "schema": {"type": "integer"}}
}
LOCATION = {"Location": {"description": "the address of the job", "schema": {"type": "string"}}}
ETAG = {"ETag": {"description": "weak tag of the whole answer", "schema": {"type": "string"}}}
ALLOW = {"Allow": {"description": "the methods that the address has", "schema": {"type": "string"}}}
VARY = {"Vary": {"description": "Accept, where that chooses the format", "schema": {"type": "string"}}}
ATTACHMENT = {
    "Content-Disposition": {"description": "of a file: attachment, and its name", "schema": {"type": "string"}}
}


def says(examples: str, *headers: dict[str, Any], kind: str = "application/json", **more: Any) -> dict[str, Any]:
    """Describe one answer: the names of examples of its body, and its headers."""
    return {**_content(kind, examples), **_headers(*headers), **more}


def problems(*statuses: int) -> Responses:
    """Describe the problems that an address may answer with."""
    return {status: _problem(status) for status in statuses}


def _problem(status: int) -> dict[str, Any]:
    headers = _headers(RETRY_AFTER) if status in (429, 503) else {}
    content = _content(MEDIA_TYPE, f"problem-{status}", schema={"$ref": "#/components/schemas/Problem"})
    return {"description": http.HTTPStatus(status).phrase, **content, **headers}


def _content(kind: str, examples: str, **more: Any) -> dict[str, Any]:
    # Examples are referred to by name, since the framework drops every null of an example that stands here.
    named = {name: {"$ref": f"#/components/examples/{name}"} for name in examples.split()}
    return {"content": {kind: {**more, "examples": named}}}


def _headers(*headers: dict[str, Any]) -> dict[str, Any]:
    return {"headers": {name: one for header in headers for name, one in header.items()}} if headers else {}


_CSV = _content("text/csv", "csv", schema={"type": "string"})["content"]
_PARQUET = {"application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}}}
_NO_RESULTS: Responses = {202: says("pending", RETRY_AFTER, VARY, model=Pending), **problems(404, 409, 410, 503)}

# Every answer of each address, beside those of `EVERYWHERE`.
EVERYWHERE = problems(405, 408, 413, 422, 500, 503)
EVERYWHERE[405] |= {"description": "for a method that the address does not have", **_headers(ALLOW)}
POST_JOB = {202: says("job", LOCATION, RETRY_AFTER), **problems(400, 415, 429, 503)}
LIST_JOBS = {200: says("jobs"), **problems(503)}
GET_JOB: Responses = {
    200: says("running failed", ETAG, RETRY_AFTER),
    304: {"description": "the client has it already", **_headers(ETAG, RETRY_AFTER)},
    **problems(404, 410, 503),
}
_WHOLE_SPEC = {"$ref": "#/components/schemas/JobSpec"}
GET_SPEC: Responses = {
    200: {"description": "as it was sent", **_content("application/json", "spec flip-sign", schema=_WHOLE_SPEC)},
    **problems(404, 410, 503),
}
CANCEL_JOB: Responses = {
    200: says("cancelled", description="it was cancelled already"),
    202: says("cancelling", description="it is being cancelled", model=JobView),
    **problems(404, 409, 410, 503),
}
DELETE_JOB = problems(404, 409, 410, 503)
GET_RESULTS: Responses = {
    **_NO_RESULTS,
    200: says("results", VARY, ATTACHMENT, description="some rows; the whole table where Accept prefers text/csv"),
}
GET_RESULTS[200]["content"].update(_CSV)
GET_CSV: Responses = {
    **_NO_RESULTS,
    200: {"description": "the whole table", "content": _CSV, **_headers(ATTACHMENT)},
}
GET_PARQUET: Responses = {
    **_NO_RESULTS,
    200: {"description": "the whole table", "content": _PARQUET, **_headers(ATTACHMENT)},
}
GET_EVENTS: Responses = {
    200: _content("text/event-stream", "events", schema={"type": "string"}),
    204: {"description": "Last-Event-ID was that of `done`: there will be no more"},
    **problems(404, 410, 503),
}
POST_PLAN = {200: says("plan"), **problems(400, 415, 503)}
LIST_MODELS: Responses = {200: says("models")}
LIST_LAYERS = {200: says("layers"), **problems(404, 503)}
LIST_DATASETS: Responses = {200: says("datasets")}
HEALTHZ: Responses = {200: says("alive")}
READYZ = {200: says("ready"), **problems(503)}
METRICS: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

# The job spec in the body of a request; written by hand, since `body.read_spec` bypasses the framework.
_SPEC = _content("application/json", "spec flip-sign", schema={"$ref": "#/components/schemas/JobSpec"})
SPEC_BODY: dict[str, Any] = {"requestBody": {"required": True, **_SPEC}}


def finish_document(app: FastAPI) -> None:
    """Complete `app`'s document with the examples and the schema of problems."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        document["components"]["examples"] = {name: {"value": value} for name, value in EXAMPLES.items()}
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        return document

    app.openapi = openapi  # type: ignore[method-assign]

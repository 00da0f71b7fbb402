"""What does OpenAPI say beside what the types of the routes say? Problems, headers, media types, examples.

Out: values for `responses=` of a route, and the finished document. The examples are in `examples.py`.
"""

import http
from typing import Any

from fastapi import FastAPI

from api.errors import MEDIA_TYPE
from api.examples import EXAMPLES
from api.schemas import JobView, Pending, Problem

Responses = dict[int | str, dict[str, Any]]

RETRY_AFTER = {"Retry-After": {"description": "seconds until it pays to ask again", "schema": {"type": "integer"}}}
LOCATION = {"Location": {"description": "the address of the job", "schema": {"type": "string"}}}
ETAG = {"ETag": {"description": "weak; over everything but eta_seconds", "schema": {"type": "string"}}}
VARY = {"Vary": {"description": "Accept, where that chooses the format", "schema": {"type": "string"}}}
ATTACHMENT = {
    "Content-Disposition": {"description": "of a file: attachment, and its name", "schema": {"type": "string"}}
}


def says(example: str, *headers: dict[str, Any], kind: str = "application/json", **more: Any) -> dict[str, Any]:
    """One answer: a body like this example, and the headers that come with it."""
    return {**_content(kind, example), **_headers(*headers), **more}


def problems(*statuses: int) -> Responses:
    """The problems that an address may answer with."""
    return {status: _problem(status) for status in statuses}


def _problem(status: int) -> dict[str, Any]:
    headers = _headers(RETRY_AFTER) if status in (429, 503) else {}
    content = _content(MEDIA_TYPE, f"problem-{status}", schema={"$ref": "#/components/schemas/Problem"})
    return {"description": http.HTTPStatus(status).phrase, **content, **headers}


def _content(kind: str, example: str, **more: Any) -> dict[str, Any]:
    # By name: the framework would drop every null of an example that stands here.
    return {"content": {kind: {**more, "examples": {example: {"$ref": f"#/components/examples/{example}"}}}}}


def _headers(*headers: dict[str, Any]) -> dict[str, Any]:
    return {"headers": {name: one for header in headers for name, one in header.items()}} if headers else {}


_CSV = _content("text/csv", "csv", schema={"type": "string"})["content"]
_PARQUET = {"application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}}}
_NO_RESULTS: Responses = {202: says("pending", RETRY_AFTER, VARY, model=Pending), **problems(404, 409, 410, 422, 503)}

# By address: every answer that it may give, beside those of `EVERYWHERE`.
EVERYWHERE = problems(413, 500)
POST_JOB = {202: says("job", LOCATION, RETRY_AFTER), **problems(400, 415, 422, 429, 503)}
LIST_JOBS = {200: says("jobs"), **problems(422, 503)}
GET_JOB: Responses = {
    200: says("running", ETAG, RETRY_AFTER),
    304: {"description": "the client has it already", **_headers(ETAG, RETRY_AFTER)},
    **problems(404, 410, 422, 503),
}
CANCEL_JOB: Responses = {
    200: says("cancelled", description="it was cancelled already"),
    202: says("cancelling", description="it is being cancelled", model=JobView),
    **problems(404, 409, 410, 422, 503),
}
DELETE_JOB = problems(404, 409, 410, 422, 503)
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
    **problems(404, 410, 422, 503),
}
POST_PLAN = {200: says("plan"), **problems(400, 415, 422, 503)}
LIST_MODELS = {200: says("models"), **problems(503)}
LIST_LAYERS = {200: says("layers"), **problems(404, 503)}
LIST_DATASETS = {200: says("datasets"), **problems(503)}
HEALTHZ: Responses = {200: says("alive")}
READYZ = {200: says("ready"), **problems(503)}
METRICS: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

# The job spec in the body of a request; said by hand, since `body.read_spec` reads it behind the framework's back.
_SPEC = _content("application/json", "spec", schema={"$ref": "#/components/schemas/JobSpec"})
SPEC_BODY: dict[str, Any] = {"requestBody": {"required": True, **_SPEC}}


def finish_document(app: FastAPI) -> None:
    """Complete `app`'s document: examples and the schema of problems are in, the framework's own errors are out."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        schemas = document["components"]["schemas"]
        document["components"]["examples"] = {name: {"value": value} for name, value in EXAMPLES.items()}
        schemas["Problem"] = Problem.model_json_schema()
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for path in document["paths"].values():
            for operation in path.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]  # of an address that refuses no parameter
        return document

    app.openapi = openapi  # type: ignore[method-assign]

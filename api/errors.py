"""How what goes wrong is told: RFC 9457 problem documents, for every error, with what was given and what is allowed.

In: exceptions that a route raised. Out: `application/problem+json`, never with a traceback or a path of this host.
"""

import http
import logging
from typing import Any

import redis.exceptions
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from ablation.errors import ServiceError, SpecError
from ablation.spec import spec_error
from api.schemas import Problem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
PROBLEM = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
RETRY_S = 5  # how soon to come back when a part of the service is away
MAX_GIVEN = 200  # characters of a wrong value that are shown again


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an address may answer instead, for OpenAPI."""
    return {status: {"description": http.HTTPStatus(status).phrase, "content": PROBLEM} for status in statuses}


def add_problem_schema(app: FastAPI) -> None:
    """Give `app`'s OpenAPI document the schema that `problems` refers to."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def make_problem(request: Request, status: int, detail: str, **more: Any) -> JSONResponse:
    """One problem document; `more` are its extension members."""
    headers = more.pop("headers", None)
    title = http.HTTPStatus(status).phrase
    body = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": request.url.path,
        **more,
    }
    return JSONResponse(body, status, headers, media_type=MEDIA_TYPE)


def gone(what: str) -> HTTPException:
    """The error for something that was here and has expired."""
    return HTTPException(410, f"{what} has expired; send its spec again to have it computed again.")


def not_found(what: str, where: str, next_step: str = "") -> HTTPException:
    """The error for something that there is not; `where` lists what there is."""
    return HTTPException(404, f"There is no {what}; {where} lists those there are. {next_step}".rstrip())


def conflict(what: str) -> HTTPException:
    """The error for something that can't be done in the job's state."""
    return HTTPException(409, what)


def add_error_handlers(app: FastAPI) -> None:
    """Tell every error of `app` as a problem document."""
    app.add_exception_handler(SpecError, _answer_spec_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(StarletteHTTPException, _answer_http_error)
    app.add_exception_handler(ServiceError, _answer_unavailable)
    app.add_exception_handler(redis.exceptions.ConnectionError, _answer_unavailable)
    app.add_exception_handler(redis.exceptions.TimeoutError, _answer_unavailable)
    app.add_exception_handler(Exception, _answer_fault)


def _answer_spec_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SpecError)
    given = _short(error.given)
    detail = f"{error.field}: got {given!r}; allowed: {error.allowed}. {error.next_step}".rstrip()
    return make_problem(
        request, 422, detail, field=error.field, given=given, allowed=error.allowed, next_step=error.next_step
    )


def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return make_problem(request, 400, f"The body is not JSON: {first['ctx']['error']}.")
    inside = [{**e, "loc": e["loc"][1:]} for e in error.errors()]  # without "body" or "query"
    return _answer_spec_error(request, spec_error(inside))


def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return make_problem(request, error.status_code, str(error.detail), headers=error.headers)


def _answer_unavailable(request: Request, error: Exception) -> JSONResponse:
    log.warning("unavailable: %s", error)
    detail = f"A part of the service is away; ask again in {RETRY_S} seconds."
    return make_problem(request, 503, detail, headers={"Retry-After": str(RETRY_S)})


def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    return make_problem(request, 500, "This is a fault of the service, not of the request; its log has the details.")


def _short(given: object) -> object:
    """The wrong value, cut where it is too long to send back."""
    text = given if isinstance(given, str) else repr(given)
    if len(text) > MAX_GIVEN:
        return text[:MAX_GIVEN] + "..."
    return given if isinstance(given, str | int | float | bool | list | dict | None) else text

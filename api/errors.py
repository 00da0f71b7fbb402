"""Errors as RFC 9457 problem documents, with the value given and what is allowed.

In: exceptions raised by a route. Out: `application/problem+json`, never with a traceback or a path of this host.
"""

import http
import json
import logging
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Match

from ablation.errors import ServiceError, SpecError, shorten
from ablation.spec import spec_error
from api.redis_errors import Refused, reason_of
from worker.store import TableGone, TooManyJobs

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_S = 5  # Retry-After while a part of the service is away
QUOTA_RETRY_S = 30  # Retry-After when the limit of jobs is reached
METHODS = ("DELETE", "GET", "POST")

# What to do next, for messages that have no better advice: where the allowed names are listed.
HINTS = {
    "model.name": "GET /v1/models lists them.",
    "layer": "GET /v1/models/NAME/layers lists those of a model.",
    "data.name": "GET /v1/datasets lists them.",
}


def make_problem(request: Request, status: int, detail: str, **more: Any) -> JSONResponse:
    """Make one problem document; `more` are its extension members."""
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
    """Make the error for something that has expired."""
    return HTTPException(410, f"{what} has expired or was deleted; send its spec again to compute it again.")


def not_found(what: str, where: str, next_step: str = "") -> HTTPException:
    """Make the error for something that doesn't exist; `where` lists what exists."""
    return HTTPException(404, f"There is no {what}; {where} lists those that exist. {next_step}".rstrip())


def conflict(what: str) -> HTTPException:
    """Make the error for something that can't be done in the job's state."""
    return HTTPException(409, what)


def unavailable(request: Request, why: str, **more: Any) -> JSONResponse:
    """Make the answer while a part of the service is away."""
    detail = f"{why} Ask again in {RETRY_S} seconds."
    return make_problem(request, 503, detail, headers={"Retry-After": str(RETRY_S)}, **more)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` with a problem document."""
    app.add_exception_handler(SpecError, _answer_spec_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(StarletteHTTPException, _answer_http_error)
    app.add_exception_handler(TooManyJobs, _answer_quota)
    app.add_exception_handler(TableGone, _answer_gone)
    app.add_exception_handler(ServiceError, _answer_unavailable)
    app.add_exception_handler(RedisError, _answer_refusal)
    app.add_exception_handler(Exception, _answer_fault)


def _answer_spec_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SpecError)
    hint = "" if error.next_step else HINTS.get(error.field, "")
    return make_problem(
        request,
        422,
        f"{error} {hint}".rstrip(),
        field=error.field,
        given=_plain(error.given),
        allowed=error.allowed,
        next_step=error.next_step or hint,
    )


def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    inside = [{**e, "loc": e["loc"][1:]} for e in error.errors()]  # without "query", "path" or "header"
    return _answer_spec_error(request, spec_error(inside))


def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 204:  # not an error, and without a body
        return Response(status_code=204)
    detail, headers = str(error.detail), error.headers
    if error.status_code == 405:
        allowed = _allowed_methods(request)
        detail = f"{request.method} is not possible here; allowed: {allowed}."
        headers = {"Allow": allowed}
    elif detail == "Not Found":  # raised by the framework, not by a route
        detail = f"There is no address {shorten(request.url.path)!r}; GET /docs shows those that exist."
    return make_problem(request, error.status_code, detail, headers=headers)


def _allowed_methods(request: Request) -> str:
    """Every method of this address; the framework names only those of the first matching route."""
    scopes = ({**request.scope, "method": method} for method in METHODS)
    routes = request.app.router.routes
    found = [one["method"] for one in scopes if any(route.matches(one)[0] == Match.FULL for route in routes)]
    return ", ".join(found).replace("GET", "GET, HEAD")


def _answer_quota(request: Request, error: Exception) -> JSONResponse:
    return make_problem(request, 429, str(error), headers={"Retry-After": str(QUOTA_RETRY_S)})


def _answer_gone(request: Request, error: Exception) -> JSONResponse:
    return make_problem(request, 410, gone("The table").detail)


def _answer_unavailable(request: Request, error: Exception) -> JSONResponse:
    log.warning("unavailable: %s", error)
    return unavailable(request, "A part of the service is away.")


def _answer_refusal(request: Request, error: Exception) -> JSONResponse:
    """Answer an error of Redis: 503 with the reason, unless it is a fault of this program."""
    reason = reason_of(error)
    if reason is None:
        raise error
    if not isinstance(error, Refused):  # else the log has it
        log.warning("%s %r: %s (%s)", request.method, request.url.path[:200], reason, error)
    return unavailable(request, reason)


def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    detail = "This is a fault of the service, not of the request; its log has the details."
    return make_problem(request, 500, detail, headers={"Connection": "close"})  # the server closes it after a fault


def _plain(given: object) -> object:
    """The wrong value, or its text where it can't be JSON."""
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError):
        return str(given)
    return given

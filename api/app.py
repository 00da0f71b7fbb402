"""The HTTP application: routes, errors and metrics around one desk. `python -m api` runs it."""

import time
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram

from api.dependencies import make_desk
from api.errors import add_error_handlers, add_problem_schema
from api.routes import routes
from worker.settings import Settings

DESCRIPTION = """How much does the loss change when one weight is set to zero?

POST a job, poll its results, download a CSV with the exact utility of every weight that was asked for."""


def make_app(settings: Settings) -> FastAPI:
    """The application on these settings; connects to Redis at the first request."""
    app = FastAPI(title="weight-ablation", version="1", description=DESCRIPTION)
    app.state.desk = make_desk(settings)
    app.include_router(routes)
    add_error_handlers(app)
    add_problem_schema(app)
    _count_requests(app)
    return app


def _count_requests(app: FastAPI) -> None:
    """Count and time every request by route, not by path: the ids of jobs would make a series each."""
    app.state.registry = registry = CollectorRegistry()
    requests = Counter("ablation_http_requests", "Requests answered.", ["method", "route", "status"], registry=registry)
    seconds = Histogram("ablation_http_seconds", "Time to the first byte.", ["method", "route"], registry=registry)

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        start = time.perf_counter()
        response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "none")
        requests.labels(request.method, route, response.status_code).inc()
        seconds.labels(request.method, route).observe(time.perf_counter() - start)
        return response

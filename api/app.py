"""The HTTP application: routes, errors, limits and metrics. `python -m api` runs it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.body import LimitBody
from api.dependencies import make_desk
from api.document import finish_document
from api.errors import METHODS, add_error_handlers
from api.routes import routes
from worker.settings import Settings

DESCRIPTION = """How much does the loss change when one weight is set to zero?

POST a job, poll its results, download a CSV with the exact utility of every weight that was asked for.

HEAD is answered at every address that has GET: its status and headers, without the body."""


def make_app(settings: Settings) -> FastAPI:
    """Make the application with these settings; it connects to Redis at the first request."""
    options: dict[str, Any] = {
        "title": "weight-ablation",
        "version": "1",
        "description": DESCRIPTION,
        "redirect_slashes": False,  # one address per resource
        "separate_input_output_schemas": False,  # a spec in an answer has the schema of a request
    }
    desk = make_desk(settings)

    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        desk.watch.start()
        yield
        desk.watch.stop()

    app = FastAPIOffline("/docs", None, lifespan=live, **options)  # Swagger UI from a package; no ReDoc
    app.state.desk = desk
    app.state.registry = registry = CollectorRegistry()
    app.include_router(routes)
    add_error_handlers(app)
    finish_document(app)
    app.add_middleware(LimitBody, room=desk.body_room, seconds=settings.client_s)
    app.add_middleware(CountRequests, registry=registry)
    app.add_middleware(AnswerHead)
    app.add_middleware(Turnstile)  # the last one added is the outermost
    return app


class Turnstile:
    """Let requests in one after the other, so that thousands that come at once leave room for those on health."""

    AT_ONCE = ("/healthz", "/metrics")

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.turn = app, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["path"] not in self.AT_ONCE:
            async with self.turn:
                await asyncio.sleep(0)  # whatever else is ready goes first
        await self.app(scope, receive, send)


class AnswerHead:
    """Answer HEAD like GET up to the headers; no body is generated, not even a stream of events.

    Inside the application, and in the metrics, a HEAD is a GET.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def send_headers(message: Message) -> None:
            await send(message)
            await send({"type": "http.response.body"})
            raise _Enough

        try:
            await self.app({**scope, "method": "GET"}, receive, send_headers)
        except* _Enough:  # streams raise it in a group
            pass


class _Enough(Exception):
    """Raised once the headers have been sent."""


class CountRequests:
    """Count and time requests by route and not by path, since every job id would be a series of its own."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        labels = ["method", "route"]
        self.requests = Counter("ablation_http_requests", "Requests answered.", [*labels, "status"], registry=registry)
        self.seconds = Histogram("ablation_http_seconds", "Time to the first byte.", labels, registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, answered = time.perf_counter(), False

        def count(status: int) -> None:
            nonlocal answered
            answered = True
            method = scope["method"] if scope["method"] in METHODS else "other"
            labels = method, getattr(scope.get("route"), "path", "none")
            self.requests.labels(*labels, status).inc()
            self.seconds.labels(*labels).observe(time.perf_counter() - start)

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_and_count)
        finally:
            if not answered:  # an exception in here is answered by an outer layer
                count(500)

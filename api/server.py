"""The HTTP server: uvicorn, with limits on clients that are slow or many.

In: the application. Out: a server that closes connections on which nothing comes on, keeps only so many, and answers
503 beyond. uvicorn's own limit (`limit_concurrency`) answers in plain text without `Retry-After`, also `/healthz`; its
time-out for idle connections begins with the first answer and ends with any byte. A handler's own time and the bodies
of requests are limited in the application (`redis_watch.py`, `body.py`).
"""

import asyncio
import errno
import functools
import logging
import resource
import socket
import time
from typing import Any

import h11
import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.errors import RETRY_S, make_problem
from worker.server_socket import BACKLOG
from worker.settings import Settings

log = logging.getLogger(__name__)

LONG = 6  # a client may take so many times as long to take its answer, or to send a body that was refused
YOUNG_S = 0.25  # a connection that is that new is not closed for another, unless that could not even be refused
SPARE = 32  # connections beyond the limit, which get 503
BURST = 64  # connections that are accepted at once, before any of them is looked at
OWN_FILES = 100  # that this process has open beside connections: for Redis, above all
QUIET_S = 10.0  # between two lines in the log about files that can't be opened
NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def make_server(app: ASGIApp, settings: Settings, shutdown_s: int) -> uvicorn.Server:
    """Make the server of an application; it may open as many files as the system lets it."""
    gate = Gate(min(settings.max_connections, raise_file_limit() - OWN_FILES - SPARE - BURST), settings.client_s)
    if gate.limit < settings.max_connections:
        log.warning("The limit of open files allows %d connections at once (ulimit -n).", gate.limit)
    config = uvicorn.Config(
        app,
        http=functools.partial(GuardedProtocol, gate),  # type: ignore[arg-type]
        ws="none",
        backlog=BURST,
        timeout_graceful_shutdown=shutdown_s,
        access_log=False,  # /metrics counts requests; polls would fill the log
    )
    return GuardedServer(config, gate)


def raise_file_limit() -> int:
    """Raise this process's limit of open files to the highest that it may have; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # some systems have a lower limit than they say
        hard = soft
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


class Gate:
    """Which connections are kept: at most `limit`, and those that are slow only for a time."""

    def __init__(self, limit: int, client_s: float) -> None:
        self.limit, self.client_s = max(1, limit), client_s
        self.waiting: dict[GuardedProtocol, float] = {}  # those without a request, since when, the oldest first

    def make_room(self, young_s: float) -> bool:
        """Close the connection that has been without a request for the longest; False if there is none so old."""
        oldest = next(iter(self.waiting), None)
        if oldest is None or time.monotonic() - self.waiting[oldest] < young_s:
            return False
        oldest.close()
        return True

    def close_overdue(self, connections: set["GuardedProtocol"]) -> None:
        """Close every connection that nothing comes on for too long."""
        now = time.monotonic()
        for one in [*connections]:
            if one.is_stalled(now, LONG * self.client_s):
                one.transport.abort()
            elif one in self.waiting and now > one.deadline(self.waiting[one], self.client_s):
                one.close()


class GuardedProtocol(H11Protocol):
    """One connection: it knows since when it has been without a request, and whether its client takes its answer."""

    def __init__(self, gate: Gate, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = gate
        self._n_unsent, self._unsent_since, self._heard_at = 0, 0.0, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Keep the connection, answer it 503, or close it."""
        super().connection_made(transport)
        if len(self.connections) > self.gate.limit and not self.gate.make_room(YOUNG_S):
            self.app = functools.partial(refuse, self.app)
            if len(self.connections) > self.gate.limit + SPARE and not self.gate.make_room(0):
                self.connections.discard(self)
                return transport.abort()
        self.gate.waiting[self] = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.gate.waiting.pop(self, None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Handle what has come; a whole head is a request."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self.gate.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if self.cycle.response_complete and self in self.connections:
            self.gate.waiting[self] = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        self._heard_at = time.monotonic()
        super().data_received(data)

    def deadline(self, since: float, client_s: float) -> float:
        """When it has been without a request for too long; later while it drops the rest of a refused body."""
        if self.conn.their_state is h11.SEND_BODY:
            return min(since + LONG * client_s, self._heard_at + client_s)
        return since + client_s

    def is_stalled(self, now: float, stall_s: float) -> bool:
        """Whether its client has taken none of what it is sent for so long."""
        n = self.transport.get_write_buffer_size()
        if n == 0 or n < self._n_unsent or self._n_unsent == 0:
            self._unsent_since = now
        self._n_unsent = n
        return now > self._unsent_since + stall_s

    def close(self) -> None:
        """Close it, once what was sent has arrived."""
        self.gate.waiting.pop(self, None)
        self.connections.discard(self)
        self.transport.close()


class GuardedServer(uvicorn.Server):
    """A server that looks after its connections every second, and writes one line where it can't accept any more."""

    def __init__(self, config: uvicorn.Config, gate: Gate) -> None:
        super().__init__(config)
        self.gate, self._said_at = gate, float("-inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and let as many clients wait as before: uvicorn takes the size of a burst for their number, too."""
        asyncio.get_running_loop().set_exception_handler(self._say)
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        """Do what is due, ten times a second."""
        if counter % 10 == 0:
            self.gate.close_overdue(self.server_state.connections)  # type: ignore[arg-type]
        return await super().on_tick(counter)

    def _say(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in NO_FILES):
            return loop.default_exception_handler(context)
        if time.monotonic() > self._said_at + QUIET_S:
            self._said_at = time.monotonic()
            log.error("No connection can be accepted: %s", error.strerror)


async def refuse(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 503 for a connection beyond the limit; `/healthz` is answered as ever."""
    if scope["type"] == "http" and scope["path"] == "/healthz":
        return await app(scope, receive, send)
    detail = f"There are as many connections as are allowed. Ask again in {RETRY_S} seconds."
    headers = {"Retry-After": str(RETRY_S), "Connection": "close"}
    await make_problem(Request(scope), 503, detail, headers=headers)(scope, receive, send)

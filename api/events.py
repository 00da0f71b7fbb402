"""Server-sent events of a job, for as long as a client listens.

In: a job's id, and the id of the last event that the client has. Out: events `status`, `progress` and at last `done`.
The id of an event encodes everything reported up to it (`status:shards done`, and `:done` at the end), so any API
process can resume a stream and report what has changed since. Nothing is stored for it.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Annotated, NamedTuple

from fastapi import Header, HTTPException
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import ServerSentEvent

from api.redis_errors import AWAY
from api.schemas import news
from worker.states import TERMINAL, State
from worker.store import JobRecord, JobStore

POLL_S = 0.5


class Told(NamedTuple):
    """What a client has been told."""

    status: str = ""
    n_done: str = ""
    is_over: bool = False

    @property
    def event_id(self) -> str:
        """Encode this as the id of an event."""
        return f"{self.status}:{self.n_done}" + ":done" * self.is_over


def read_event_id(event_id: str) -> Told:
    """Decode what a client with this id has been told; nothing for an id in another format."""
    found = re.fullmatch(r"([a-z]+):([0-9.e+-]*)(:done)?", event_id)
    return Told(found[1], found[2], bool(found[3])) if found else Told()


def read_last_event(last_event_id: Annotated[str, Header(alias="Last-Event-ID")] = "") -> Told:
    """What the client has been told, by its `Last-Event-ID`.

    Raises:
        HTTPException: 204, it has been told everything; browsers then stop connecting again.
    """
    told = read_event_id(last_event_id)
    if told.is_over:
        raise HTTPException(204)
    return told


async def watch_job(store: JobStore, job_id: str, told: Told) -> AsyncIterator[ServerSentEvent]:
    """Yield every event after `told`, until the job is over or deleted. It waits without a thread.

    While Redis is away the stream stays open and silent, because browsers don't reconnect after an error.
    """
    while True:
        with suppress(*AWAY):
            job = await run_in_threadpool(store.get, job_id)
            if job is None or job.status == State.EXPIRED:
                return
            for name, after in _untold(job, told):
                told = after
                yield ServerSentEvent(event=name, id=told.event_id, data=news(job))
            if told.is_over:
                return
        await asyncio.sleep(POLL_S)


def _untold(job: JobRecord, told: Told) -> Iterator[tuple[str, Told]]:
    """Yield the events that bring a client up to date, each with what it has been told then."""
    if job.status != told.status:
        told = told._replace(status=job.status.value)
        yield "status", told
    if repr(job.progress.done) != told.n_done:
        told = told._replace(n_done=repr(job.progress.done))
        yield "progress", told
    if job.status in TERMINAL:
        yield "done", told._replace(is_over=True)

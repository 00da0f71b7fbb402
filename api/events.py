"""Server-sent events of a job, for as long as a client listens.

In: a job's id, and the id of the last event that the client has. Out: events `status`, `progress` and at last `done`.
The id of an event encodes everything reported up to it (`status:shards done`, and `:done` at the end), so any API
process can resume a stream and report what has changed since. Nothing is stored for it.
"""

import asyncio
import functools
import itertools
import logging
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, NamedTuple

from fastapi import Header, HTTPException
from fastapi.sse import ServerSentEvent
from redis.exceptions import RedisError

from api.redis_errors import reason_of
from api.redis_watch import RedisWatch
from api.schemas import news
from api.threads import in_redis_thread
from worker.states import TERMINAL, State
from worker.store import JobRecord, JobStore

log = logging.getLogger(__name__)

POLL_S = 0.5
LOOKED_AT_ONCE = 500  # jobs
READ_AT_ONCE = 20  # jobs, whose specs may be large


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


class Feed:
    """One reader of Redis for all streams of this process.

    Twice a second it looks at every job that somebody listens to, in one round trip that leaves out spec and plan, and
    reads the whole of those that have changed. While Redis is away the streams stay open and silent, because browsers
    don't reconnect after an error.
    """

    def __init__(self, watch: RedisWatch, store: JobStore) -> None:
        self._watch, self._store = watch, store
        self._listeners: dict[str, set[_Listener]] = {}
        self._marks: dict[str, object] = {}  # of the jobs all of whose listeners know the latest
        self._n_looks = 0
        self._reader: asyncio.Task[None] | None = None

    async def follow(self, job_id: str) -> AsyncGenerator[JobRecord, None]:
        """Yield the job in a moment, and whenever it has changed; it ends when the job has expired."""
        listener = _Listener(self._n_looks)
        self._listeners.setdefault(job_id, set()).add(listener)
        self._marks.pop(job_id, None)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())
        try:
            while job := await listener.next():
                yield job
        finally:
            self._listeners[job_id].discard(listener)
            if not self._listeners[job_id]:
                del self._listeners[job_id]
                self._marks.pop(job_id, None)

    async def _read(self) -> None:
        """Look until nobody listens; a fault of this program ends all streams, so that it is not met twice a second."""
        try:
            while self._listeners:
                await self._look_if_possible()
                await asyncio.sleep(POLL_S)
        except Exception:
            log.exception("the jobs that are listened to can't be read")
            for listener in itertools.chain.from_iterable(self._listeners.values()):
                listener.tell(None)

    async def _look_if_possible(self) -> None:
        try:
            self._watch.refuse()
            await self._look()
        except RedisError as error:
            if reason_of(error) is None:
                raise

    async def _look(self) -> None:
        self._n_looks += 1
        for job_ids in _in_batches([*self._listeners], LOOKED_AT_ONCE):
            found = await in_redis_thread(functools.partial(self._store.marks, job_ids))
            marks = dict(zip(job_ids, found, strict=True))
            changed = [job_id for job_id in job_ids if self._marks.get(job_id) != marks[job_id]]
            for some in _in_batches(changed, READ_AT_ONCE):
                jobs = await in_redis_thread(functools.partial(self._store.get_all, some))
                for job_id, job in zip(some, jobs, strict=True):
                    self._tell(job_id, job, marks[job_id])

    def _tell(self, job_id: str, job: JobRecord | None, mark: object) -> None:
        listeners = self._listeners.get(job_id, set())
        told = [listener for listener in listeners if listener.since < self._n_looks]
        for listener in told:
            listener.tell(None if job is None or job.status == State.EXPIRED else job)
        if len(told) == len(listeners) > 0:  # who has come meanwhile may know more than this
            self._marks[job_id] = mark


class _Listener:
    """One stream: what it is to be told next."""

    def __init__(self, since: int) -> None:
        self.since = since  # the look that it came after
        self._latest: JobRecord | None = None
        self._news = asyncio.Event()

    def tell(self, job: JobRecord | None) -> None:
        """Pass on the job; None once it is gone."""
        self._latest = job
        self._news.set()

    async def next(self) -> JobRecord | None:
        """Wait for news."""
        await self._news.wait()
        self._news.clear()
        return self._latest


def _in_batches(job_ids: list[str], n: int) -> Iterator[list[str]]:
    yield from (job_ids[i : i + n] for i in range(0, len(job_ids), n))


async def watch_job(feed: Feed, job: JobRecord, told: Told) -> AsyncGenerator[ServerSentEvent, None]:
    """Yield every event after `told`, until the job is over or deleted. It waits without a thread."""
    async with aclosing(feed.follow(job.id)) as later:
        while not told.is_over:
            for name, after in _untold(job, told):
                told = after
                yield ServerSentEvent(event=name, id=told.event_id, data=news(job))
            if told.is_over or (next_job := await anext(later, None)) is None:
                return
            job = next_job


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

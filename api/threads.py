"""Threads for what may wait long, so that nothing else waits behind it.

In: a function that asks Redis, or the pieces of a file. Out: the same, to be awaited. What asks Redis runs in threads
of its own, and so do files. What needs neither has the framework's threads, or none.
"""

import functools
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, fail_after, to_thread
from anyio.lowlevel import RunVar

from api.redis_errors import Refused

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

N_REDIS, N_FILES = 24, 8  # threads
QUEUE_S = 3.0  # longest wait for one of those that ask Redis

_for_redis: RunVar[CapacityLimiter] = RunVar("_for_redis")
_for_files: RunVar[CapacityLimiter] = RunVar("_for_files")


def asks_redis(ask: Callable[Parameters, Answer]) -> Callable[Parameters, Awaitable[Answer]]:
    """Make a handler or a dependency run in one of the threads that may wait for Redis."""

    @functools.wraps(ask)
    async def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
        return await in_redis_thread(functools.partial(ask, *args, **kwargs))

    return run


async def in_redis_thread(ask: Callable[[], Answer], queue_s: float = QUEUE_S) -> Answer:
    """Run `ask` in one of the threads that may wait for Redis.

    Raises:
        Refused: no thread has become free within `queue_s`.
    """
    limiter, borrower = _limiter(_for_redis, N_REDIS), object()
    try:
        with fail_after(queue_s):
            await limiter.acquire_on_behalf_of(borrower)
    except TimeoutError:
        raise Refused("Too many requests wait for an answer of Redis.") from None
    try:
        return await to_thread.run_sync(ask, limiter=CapacityLimiter(math.inf))
    finally:
        limiter.release_on_behalf_of(borrower)


async def each_in_thread(pieces: Iterator[Answer]) -> AsyncIterator[Answer]:
    """Yield the pieces of a file, each made in one of the threads for files."""
    end = object()
    while True:
        piece = await to_thread.run_sync(next, pieces, end, limiter=_limiter(_for_files, N_FILES))
        if piece is end:
            return
        yield piece  # type: ignore[misc]


def _limiter(variable: RunVar[CapacityLimiter], n: int) -> CapacityLimiter:
    """The limiter of this event loop."""
    try:
        return variable.get()
    except LookupError:
        variable.set(CapacityLimiter(n))
        return variable.get()

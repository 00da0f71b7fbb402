"""Does Redis answer? One thread of each API process looks, so that requests need not find out one by one.

In: settings. Out: whether Redis can be asked, the reason why not, and what in its own settings endangers jobs.
While it can't, requests are refused at once: a server that is stopped, but not gone, would hold each of them for the
whole time-out, and those behind them for many. `Patience` bounds what one command takes, with its retries.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from redis import Redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, ConnectionError, ReadOnlyError, RedisError
from redis.retry import Retry

from api.redis_errors import AWAY, Refused, reason_of
from worker.settings import Settings
from worker.store import JobStore, connect

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

LOOK_S = 0.5  # between two looks
CHECK_S = 60.0  # between two looks at Redis' own settings


class RedisWatch:
    """A thread that asks Redis twice a second, and what it knows by that."""

    def __init__(self, settings: Settings) -> None:
        self.answer_s = settings.redis_answer_s
        self.trouble: str | None = None  # why Redis can't be asked
        self.warnings: Sequence[str] = ()
        self._store = JobStore(connect(settings, retry=Retry(NoBackoff(), 0), answer_s=self.answer_s))
        self._checked_at, self._failing_since = float("-inf"), float("inf")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="redis-watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; the thread ends by itself."""
        self._is_over.set()

    def refuse(self) -> None:
        """Refuse the request if Redis is known not to answer.

        Raises:
            Refused: it doesn't; the message says why.
        """
        if self.trouble:
            raise Refused(self.trouble)

    def note(self, error: Exception) -> None:
        """Record that Redis did not answer; the next look that succeeds takes that back."""
        if self.trouble is None and self._thread.is_alive():
            self.trouble = reason_of(error) or "Redis can't be asked."
            log.warning("%s Requests that need it are refused until it answers. (%s)", self.trouble, error)

    def client(self, settings: Settings, share: float = 1.0) -> Redis:
        """Make a client whose commands end in `share` of the time, and at once while Redis is known not to answer."""
        seconds = share * self.answer_s
        return connect(settings, retry=Patience(self, seconds), answer_s=seconds)

    def _watch(self) -> None:
        while not self._is_over.is_set():
            try:
                self._look()
                self._failing_since = float("inf")
            except RedisError as error:
                self._failing_since = min(self._failing_since, time.monotonic())
                if not _is_lost(error) or time.monotonic() > self._failing_since + self.answer_s:
                    self.note(error)  # a server that is started again is waited for
            except Exception:  # whatever it is, requests must not be refused for ever
                log.exception("looking at Redis has failed")
                self.trouble = None
            self._is_over.wait(LOOK_S)
        self._store.client.close()

    def _look(self) -> None:
        self._store.check_reads()
        if self.trouble:
            log.warning("Redis answers again.")
            self._checked_at = float("-inf")  # it may be another one
        self.trouble = None
        if time.monotonic() > self._checked_at + CHECK_S:
            before, self.warnings = self.warnings, self._store.doubts()
            self._checked_at = time.monotonic()
            for warning in self.warnings:
                if warning not in before:
                    log.warning("%s", warning)


class Patience(Retry):
    """Retries of one command: lost connections for some seconds, silence and refusals not at all."""

    def __init__(self, watch: RedisWatch, seconds: float) -> None:
        super().__init__(ExponentialBackoff(cap=0.5, base=0.05), -1, AWAY)
        self._watch, self._seconds = watch, seconds

    def __deepcopy__(self, memo: object) -> "Patience":
        return self  # redis-py copies it for every connection

    def call_with_retry(
        self,
        do: Callable[[], Answer],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> Answer:
        """Run `do` until it succeeds, or its time is over; `fail` drops the connection."""
        deadline, n_failures = time.monotonic() + self._seconds, 0
        while True:
            self._watch.refuse()
            try:
                return do()
            except Refused:
                raise
            except (*AWAY, ReadOnlyError) as error:  # after a failover, the next connection may lead to the new master
                n_failures += 1
                fail(*([error, n_failures] if with_failure_count else [error]))
                if isinstance(error, ReadOnlyError):
                    raise
                if not _is_lost(error) or time.monotonic() > deadline:
                    if self._seconds >= self._watch.answer_s:  # a hasty client may be wrong
                        self._watch.note(error)
                    raise
            time.sleep(self._backoff.compute(n_failures))


def _is_lost(error: Exception) -> bool:
    """Whether the connection is lost, which another one may mend; not silence or a refused login."""
    return isinstance(error, ConnectionError) and not isinstance(error, AuthenticationError | AuthorizationError)

"""Does a worker's child still get on? A child that hangs, or does not heed a cancel, is killed.

In: what the child notes in memory that it shares with its parent, and the state of its job in the store. Out: a killed
child, and its shard put back as a failed attempt; Celery starts another child. Runs in the parent process, since a
child that hangs may hold the interpreter lock. Torch-free.
"""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from worker import keys
from worker.states import State
from worker.store import JobStore

LOOK_S = 1.0  # seconds between two looks at the child
CANCEL_S = 8.0  # time for the child to notice that its job is not wanted any more

HUNG = {
    "type": "worker-hung",
    "title": "A part of the job came to no end.",
    "detail": "A worker made no progress with it for a multiple of its planned time, each time it was tried: the "
    "model, the data or the machine hangs. Look for an endless loop, a lock or a network file; where the work really "
    "takes that long, let the operator raise ABLATION_HANG_S.",
}

log = logging.getLogger(__name__)


class Progress:
    """What a child notes for its parent: its process, the job it works on, and until when to wait for progress."""

    def __init__(self) -> None:
        self._pid = multiprocessing.Value("i", 0, lock=False)
        self._job = multiprocessing.Array("c", 64, lock=False)
        self._due = multiprocessing.Value("d", math.inf, lock=False)
        self.limit_s = math.inf

    def of_this_process(self) -> None:
        """Note the process that works from now on."""
        self.end()
        self._pid.value = os.getpid()

    def begin(self, job_id: str, limit_s: float) -> None:
        """Note that work on a job begins; each piece of progress is to come within `limit_s` of the last."""
        self._job.value = job_id.encode()
        self.allow(limit_s)

    def allow(self, limit_s: float) -> None:
        """Change the limit; it counts from now on."""
        self.limit_s = limit_s
        self.note()

    def note(self) -> None:
        """Note a piece of progress."""
        self._due.value = time.monotonic() + self.limit_s

    def end(self) -> None:
        """Note that nothing is being worked on."""
        self._due.value = math.inf
        self._job.value = b""

    @property
    def pid(self) -> int:
        """The child's process id; 0 before it has started."""
        return int(self._pid.value)

    @property
    def job_id(self) -> str:
        """The job that is being worked on; empty: none."""
        return bytes(self._job.value).decode()

    @property
    def is_overdue(self) -> bool:
        """Whether progress should have come by now."""
        return time.monotonic() > self._due.value


class Watchdog(threading.Thread):
    """Looks at the child every `LOOK_S` until `stopping` is set."""

    def __init__(
        self,
        store: JobStore,
        progress: Progress,
        give_up: Callable[[dict[str, str] | None], None],
        stopping: threading.Event,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.store, self.progress, self.give_up, self.stopping = store, progress, give_up, stopping
        self.unwanted: tuple[str, float] | None = None  # the job that is not wanted, and since when

    def run(self) -> None:
        """Look at every interval; while Redis is away, only for progress."""
        while not self.stopping.wait(LOOK_S):
            try:
                self.look()
            except (RedisError, OSError) as error:
                log.warning("watchdog: Redis is away (%s)", error)
            except Exception:
                log.exception("watchdog: failed; trying again")

    def look(self) -> None:
        """Kill the child if it hangs, or still works on a job that is not wanted."""
        job_id = self.progress.job_id
        if not job_id:
            self.unwanted = None
        elif self.progress.is_overdue:
            self.kill(f"job {job_id}: no progress for too long; its process is killed", HUNG)
        elif self.is_wanted(job_id):
            self.unwanted = None
        elif self.unwanted is None or self.unwanted[0] != job_id:
            self.unwanted = job_id, time.monotonic()
        elif time.monotonic() - self.unwanted[1] > CANCEL_S:
            self.kill(f"job {job_id}: it is not wanted, and its process goes on; the process is killed", None)

    def is_wanted(self, job_id: str) -> bool:
        """Whether the job is in a state in which it is worked on."""
        status = self.store.client.hget(keys.job(job_id), "status")
        return status is not None and status.decode() in (State.QUEUED, State.RUNNING, State.FINALIZING)

    def kill(self, why: str, error: dict[str, str] | None) -> None:
        """Kill the child and put its shards back."""
        log.error(why)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.progress.pid, signal.SIGKILL)
        self.progress.end()
        self.unwanted = None
        self.give_up(error)

"""Recovery after a dead worker, a broken connection or a restart of Redis.

In: a store, Celery, settings. Out: shards of stale leases sent again (or their job failed, after too many attempts),
lost messages sent again, jobs cancelled that nobody works on any more, old results dropped. Runs in the parent process
of every worker, one at a time; every change is a compare-and-set of the store, so that two at once would do no harm.
"""

import logging
import threading
import time
from collections.abc import Callable

from celery import Celery
from redis.exceptions import LockError, RedisError

from worker import keys
from worker.queue import enqueue
from worker.settings import Settings
from worker.states import State
from worker.store import SEEN_S, JobStore

LOCK_S = 5.0  # a sweeper that was killed delays the others for this long
DAY_S = 24 * 3600.0

log = logging.getLogger(__name__)


def sweep(store: JobStore, celery: Celery, settings: Settings, *, with_leases: bool = True) -> None:
    """Recover once whatever needs it; leases are left out while no worker could renew one."""
    if with_leases:
        retry_stale_shards(store, celery, settings)
    for job_id in store.jobs_in(State.CANCELLING):
        store.cancel(job_id)
    resend_lost_shards(store, celery, settings)
    for job_id, error in [*store.refused_by_all(SEEN_S, settings.lost_s)]:
        log.error("job %s: no worker here may work on it: %s", job_id, error.get("detail"))
        store.fail(job_id, error)
    store.expire_due(settings.result_days * DAY_S, settings.tombstone_days * DAY_S)


def retry_stale_shards(store: JobStore, celery: Celery, settings: Settings) -> None:
    """Send shards again whose lease has had no beat for `lease_s`; fail their job after too many attempts."""
    for job_id, shard_id in [*store.stale_leases(settings.lease_s)]:
        caps = settings.max_attempts, settings.max_losses
        if store.retry_stale(job_id, shard_id, settings.lease_s, *caps, make_lost_error(shard_id)):
            log.warning("job %s, shard %s: its worker is gone; sent again", job_id, shard_id)
            enqueue(celery, job_id, shard_id)


def resend_lost_shards(store: JobStore, celery: Celery, settings: Settings) -> None:
    """Send shards again that wait although no message does.

    Only while the queue is empty: then a shard that waits longer than a worker takes to begin has no message. A surplus
    message is refused by `claim`.
    """
    waiting = {State.QUEUED: keys.SHARD_QUEUE, State.RUNNING: keys.SHARD_QUEUE, State.FINALIZING: keys.FINALIZE_QUEUE}
    empty = [state for state, queue in waiting.items() if not store.client.llen(queue)]
    for job_id in [*store.jobs_in(*empty)]:
        for shard_id in store.resend(job_id, settings.lost_s):
            log.warning("job %s, shard %s: its message was lost; sent again", job_id, shard_id)
            enqueue(celery, job_id, shard_id)


def make_lost_error(shard_id: str) -> dict[str, str]:
    """Describe the failure of a job whose shard lost its worker each time."""
    return {
        "type": "worker-lost",
        "title": "A part of the job could not be finished.",
        "detail": f"{keys.in_words(shard_id)} was given up after many attempts: its worker died each time, most often "
        "because memory ran out. Ask for fewer sites or examples, or give the worker more memory.",
    }


class Sweeper(threading.Thread):
    """Sweeps every `sweep_s` until `stopping` is set, and records that the worker is alive once it `is_ready`."""

    def __init__(
        self,
        store: JobStore,
        celery: Celery,
        settings: Settings,
        worker: str,
        stopping: threading.Event,
        is_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(name="sweeper", daemon=True)
        self.store, self.celery, self.settings, self.worker, self.stopping = store, celery, settings, worker, stopping
        self.is_ready = is_ready
        self.blind_until = 0.0  # by time.monotonic(): until then stale leases are ignored

    def run(self) -> None:
        """Sweep at every interval; wait for Redis while it is away."""
        while not self.stopping.is_set():
            self.attempt(self.sweep_alone)
            self.stopping.wait(self.settings.sweep_s)
        self.attempt(lambda: self.store.drop_worker(self.worker))

    def attempt(self, step: Callable[[], None]) -> None:
        """Run one part of a sweep; if it fails, the next sweep runs it again."""
        try:
            step()
        except (RedisError, OSError) as error:
            self.note_outage()
            log.warning("sweep: Redis is away (%s); trying again", error)
        except Exception:
            log.exception("sweep: failed; trying again")

    def sweep_alone(self) -> None:
        """Record that this worker is alive, and sweep unless another worker does so right now."""
        started = time.monotonic()
        if self.is_ready():
            self.store.note_worker(self.worker)
        lock = self.store.client.lock(keys.SWEEP_LOCK, timeout=LOCK_S, blocking=False)
        if not lock.acquire():
            if self.store.client.pttl(keys.SWEEP_LOCK) > LOCK_S * 1000:  # its end moved with the clock
                self.store.client.delete(keys.SWEEP_LOCK)
            return
        if time.monotonic() - started > self.settings.lease_s / 2:
            self.note_outage()
        try:
            sweep(self.store, self.celery, self.settings, with_leases=time.monotonic() >= self.blind_until)
        finally:
            release_quietly(lock)

    def note_outage(self) -> None:
        """Give every holder of a lease the time of one to come back, since Redis was away."""
        self.blind_until = time.monotonic() + self.settings.lease_s


def release_quietly(lock: object) -> None:
    """Release a lock that may have expired meanwhile."""
    try:
        lock.release()  # type: ignore[attr-defined]
    except LockError:
        log.warning("sweep: took longer than its lock")

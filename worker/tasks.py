"""The Celery side of a worker: the function for each task name, and what happens at start and stop.

The parent process receives messages and computes nothing: it imports neither torch nor Numba (neither survives a fork),
sweeps, and on SIGTERM or SIGINT puts its shards back. The child computes, and dies with its parent.
"""

import logging
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import time
from functools import cache
from typing import Any

import celery.worker.request
from celery.signals import worker_process_init, worker_ready, worker_shutting_down
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from ablation.errors import SpecError
from ablation.inputs.catalog import Registered
from ablation.machine import Machine
from worker import inventory, runner
from worker.parent_death import tether
from worker.queue import RUN_FINALIZE, RUN_SHARD, enqueue, make_celery
from worker.runner import Worker
from worker.settings import load_settings
from worker.store import JobStore, connect
from worker.sweeper import Sweeper, make_lost_error
from worker.watchdog import Progress, Watchdog

PATIENCE = 600  # tries, a second apart, to hand in a shard while Redis is away, before its work is dropped
GRACE_S = 4.0  # time for a running shard to notice a stop; then the process ends anyway

log = logging.getLogger(__name__)
settings = load_settings()
app = make_celery(settings)
PARENT_PID = os.getpid()  # this and the next are made before the fork: parent and child agree on them
OWNER = f"{socket.gethostname()}:{PARENT_PID}:{secrets.token_hex(4)}"
stopping = threading.Event()
loaded = multiprocessing.Event()  # set by the child: the worker could begin a shard at once
progress = Progress()  # of the child; the parent watches it
refused = multiprocessing.Event()  # set by the child: a setting is wrong, so this worker can't work on any job


@cache
def child() -> Worker:
    """Make the worker that the child is; its store is its own, since a connection must not be shared across a fork."""
    return Worker(JobStore(connect(settings, n_retries=PATIENCE), PATIENCE), app, settings, OWNER, progress)


class Request(celery.worker.request.Request):
    """A message that this worker has received."""

    def acknowledge(self) -> None:
        """Acknowledge the message; where that fails, open a new connection.

        Celery would log the failure and count the message as still running, and never ask for another.
        """
        self._connection_errors = ()  # errors that Celery would swallow
        super().acknowledge()


@app.task(name=RUN_SHARD, Request=Request)
def run_shard() -> None:
    """Compute the shard in turn, or plan its job if it has no plan yet."""
    runner.run_next(child())


@app.task(name=RUN_FINALIZE, Request=Request)
def finalize(job_id: str) -> None:
    """Merge the partials, run the proof, and store the table."""
    runner.finalize(child(), job_id)


@worker_process_init.connect
def start_child(**_: Any) -> None:
    """Let the child die with its parent, and load torch now rather than in the first job."""
    tether(signal.SIGKILL, PARENT_PID)
    progress.of_this_process()
    # A supervisor signals the whole group. The parent puts the shard back and lets the child finish its batch; a child
    # that died of the signal would count as crashed, with two tracebacks in the log. (Celery does so for SIGINT.)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import ablation.run
    import ablation.statistics  # noqa: F401
    from ablation.devices import describe_device, find_device
    from ablation.machine import measure_machine

    try:
        device = describe_device(find_device(settings.device, field="ABLATION_DEVICE"))
    except SpecError as error:
        print(f"Error: {error}", file=sys.__stderr__, flush=True)
        refused.set()
        os.kill(PARENT_PID, signal.SIGTERM)
        return
    # Not through Celery, which logs everything printed as a warning.
    print(f"worker: device {device}, {settings.threads} threads", file=sys.__stdout__, flush=True)
    offered = runner.find_registered()
    print(inventory.describe_registered(offered), file=sys.__stdout__, flush=True)
    machine = measure_machine(settings.memory_bytes)
    while not begin(offered, machine):  # wait for Redis
        time.sleep(1)
    loaded.set()


def begin(offered: Registered, machine: Machine) -> bool:
    """Publish what is registered here, and report this worker as ready; False where Redis is away."""
    store = JobStore(connect(settings))
    try:
        store.publish(offered, machine)
        give_up_orphans(store)
        store.note_worker(OWNER)
    except (RedisError, KombuError, OSError) as error:
        log.warning("starting: Redis is away (%s); trying again", error)
        return False
    return True


def give_up_orphans(store: JobStore, error: dict[str, str] | None = None) -> None:
    """Put back the shards of a former child that died, each as a failed attempt; `error` says why, if it is known."""
    for job_id, shard_id in [*store.leases_of(OWNER)]:
        if store.retry(job_id, shard_id, OWNER, settings.max_attempts, error or make_lost_error(shard_id)):
            log.warning("job %s, shard %s: its process died; sent again", job_id, shard_id)
            enqueue(app, job_id, shard_id)


@worker_ready.connect
def start_parent(**_: Any) -> None:
    """Start the sweeper and the watchdog."""
    Sweeper(JobStore(connect(settings)), app, settings, OWNER, stopping, loaded.is_set).start()
    store = JobStore(connect(settings))
    Watchdog(store, progress, lambda error: give_up_orphans(store, error), stopping).start()


@worker_shutting_down.connect
def stop_parent(**_: Any) -> None:
    """Stop the sweeper and put back the child's shards, in threads, because this runs in a signal handler."""
    stopping.set()
    for thread in (threading.Thread(target=leave), threading.Timer(GRACE_S, os._exit, [exit_code()])):
        thread.daemon = True
        thread.start()


def exit_code() -> int:
    """Exit code of the worker: 1 where a setting is wrong, or where it ends although no signal told it to."""
    return int(refused.is_set() or not stopping.is_set())


def leave() -> None:
    """Take the child's leases away until it has stopped, which it does within one batch."""
    store = JobStore(connect(settings))
    while True:
        try:
            put_back(store)
        except Exception as error:  # the sweeper of another worker will find stale leases
            log.warning("stopping: could not put the shard back (%s)", error)
        time.sleep(0.2)


def put_back(store: JobStore) -> None:
    """Release every lease of this worker and send their shards again."""
    for job_id, shard_id in [*store.leases_of(OWNER)]:
        if store.release(job_id, shard_id, OWNER):
            enqueue(app, job_id, shard_id)

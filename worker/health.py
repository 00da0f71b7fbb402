"""`python -m worker.health`: does a worker run on this host? Exit status 0 or 1, for a container's health check.

A worker reports that it is alive at every sweep, also while it computes. Celery's own ping would need the worker's
name, which is chosen at random at every start.
"""

import socket
import sys

from redis.exceptions import RedisError

from ablation.errors import ServiceError
from worker import keys
from worker.settings import load_settings
from worker.store import AHEAD_S, JobStore, connect

SILENT_S = 30.0  # long enough for Redis to restart: a worker that waits for it is healthy


def has_worker(store: JobStore, host: str) -> bool:
    """Whether a worker on `host` has reported lately."""
    now = store.now()
    seen = store.client.zrangebyscore(keys.WORKERS, now - SILENT_S, now + AHEAD_S)
    return any(worker.decode().startswith(f"{host}:") for worker in seen)


def main() -> None:
    """Exit with 0 if a worker runs here; else with 1, and say why."""
    host = socket.gethostname()
    try:
        with connect(load_settings()) as client:
            if not has_worker(JobStore(client), host):
                sys.exit(f"No worker on {host} has reported for {SILENT_S:g} s.")
    except ServiceError as error:
        sys.exit(f"Error: {error}")
    except RedisError as error:
        sys.exit(f"Error: the Redis that REDIS_URL names can't be used ({error}).")


if __name__ == "__main__":
    main()

"""The states of a job, and the moves between them.

The store makes every move a compare-and-set by the table `MOVES`.
"""

from enum import StrEnum


class State(StrEnum):
    """The state of a job."""

    QUEUED = "queued"  # stored and cut into shards; no worker has begun one
    RUNNING = "running"  # a worker has begun a shard, and not all of them are done
    FINALIZING = "finalizing"  # every shard is done; a worker merges, proves and writes the table
    SUCCEEDED = "succeeded"  # the table is stored and can be read
    FAILED = "failed"  # it can't be computed; `error` says why
    CANCELLING = "cancelling"  # asked to stop; a worker is still in mid-shard
    CANCELLED = "cancelled"  # stopped before it was done; nothing of it is kept
    EXPIRED = "expired"  # the table has been dropped, by age or on request; only the tombstone is left


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED})

_ENDED = frozenset({State.EXPIRED})

MOVES: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.FAILED, State.CANCELLING}),
    State.RUNNING: frozenset({State.FINALIZING, State.FAILED, State.CANCELLING}),
    State.FINALIZING: frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLING}),
    State.CANCELLING: frozenset({State.CANCELLED}),
    State.SUCCEEDED: _ENDED,
    State.FAILED: _ENDED,
    State.CANCELLED: _ENDED,
    State.EXPIRED: frozenset(),
}

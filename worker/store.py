"""The job store: the only access to Redis for the API and the workers.

In: specs, plans, partials, tables. Out: `JobRecord`s and the bytes back. Every change is a script of `scripts.py`.
Not here: what a shard computes (`ablation/`), when lost shards are recovered (`sweeper.py`), messages (`queue.py`).
"""

import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field
from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.connection import DefaultParser
from redis.exceptions import BusyLoadingError, ConnectionError, ReadOnlyError, ResponseError, TimeoutError
from redis.retry import Retry

from ablation.errors import ServiceError, SpecError
from ablation.inputs.catalog import FactsTable, Registered, line_from_facts
from ablation.machine import Machine
from ablation.plan import Plan
from ablation.spec import JobSpec, Record
from ablation.table import count_rows, cut_rows
from worker import codec, keys, scripts
from worker.settings import Settings
from worker.states import TERMINAL, State

log = logging.getLogger(__name__)

PACKAGE = version("weight-ablation")
DRAFT_S = 3600  # an unfinished draft of a dead worker expires after this
ANSWER_S = 10.0  # longest wait for one answer of Redis
SEEN_S = 10.0  # a worker that hasn't reported for this long counts as gone
AHEAD_S = 1.0  # a time that is further ahead was noted before the clock of Redis' host was set back
AT_ONCE = 500  # jobs that a sweep expires or forgets at the most, so that it ends in time
IDEMPOTENCY_S = 24 * 3600  # how long a repeated request with the same key gets the first answer


# A job's hash without spec and plan, and its progress, for who looks often.
_MARK = """
return {redis.call('HMGET', KEYS[1], 'status', 'n_cut', 'n_shards', 'first_done', 'last_done_at', 'error'),
  redis.call('SCARD', KEYS[2]), redis.call('HGETALL', KEYS[3])}
"""


class TooManyJobs(ServiceError):
    """The limit of jobs that are queued or running is reached."""


class TableGone(ServiceError):
    """The job has no table (any more)."""


class Progress(Record):
    """Progress of a job in shards; `done` includes the fractions of shards that are running."""

    done: float
    total: int


class JobRecord(Record):
    """One job in its present state."""

    id: str
    status: State
    progress: Progress
    n_cut: int = Field(default=1, description="how often it was cut: once more each time memory ran out")
    shards_per_s: float | None = Field(default=None, description="measured pace; None: there is no measure yet")
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    spec: JobSpec
    plan: Plan | None = Field(default=None, description="None until a worker has opened the data and cut the job")
    error: dict[str, Any] | None = None


class Cancellation(NamedTuple):
    """The state after a call to cancel (None if the job is unknown), and whether it was this call that stopped it."""

    state: State | None
    is_new: bool


Page = tuple[list[JobRecord], str | None]  # jobs, and the cursor of the next page


def connect(settings: Settings, n_retries: int = 5, *, retry: Retry | None = None, answer_s: float = ANSWER_S) -> Redis:
    """Make a Redis client; its retries outlast a restart of Redis that takes a second or two.

    `retry` replaces these retries, and `answer_s` is how long one answer may take.

    Raises:
        ServiceError: no Redis is configured.
    """
    if not settings.redis_url:
        raise ServiceError(
            "REDIS_URL: got nothing; allowed: redis://host:6379/0 or unix:///path. "
            "Set it, or use `ablation serve`, which starts its own Redis."
        )
    return Redis.from_url(
        settings.redis_url,
        # Not the default errors: they include the timeout of connecting, which is retried on its own.
        retry=retry or Retry(ExponentialBackoff(cap=1, base=0.05), n_retries, (ConnectionError, TimeoutError)),
        retry_on_error=[BusyLoadingError, ConnectionError, TimeoutError],
        socket_connect_timeout=min(2.0, answer_s),
        socket_timeout=answer_s,
    )


def _cause_in_script(error: ResponseError) -> Exception:
    """The error of the command that failed in a script, which Redis before version 7 quotes behind its place."""
    found = re.match(r"Error running script .*: -([A-Z]+ .*)", str(error))
    return DefaultParser.parse_error(found[1]) if found else error


def takes_no_writes(error: Exception) -> bool:
    """Whether Redis takes no writes for now: it has become a replica, or can't write to its disk."""
    return isinstance(error, ReadOnlyError) or str(error).startswith("MISCONF")


class JobStore:
    """Jobs in Redis. `client` must return bytes (`decode_responses=False`, the default).

    `patience`: how many seconds to wait with a change that a worker has to make while Redis takes no writes.
    """

    def __init__(self, client: Redis, patience: int = 0) -> None:
        self.client: Any = client  # redis-py types every answer as sync or async
        self.patience = patience
        self._scripts: dict[str, Any] = {}

    def _run(self, script: str, job_id: str, *arguments: str | bytes | float) -> Any:
        try:
            return self._registered(script)(keys=scripts.keys_of(job_id), args=[job_id, *arguments])
        except ResponseError as error:
            raise _cause_in_script(error) from error

    def _run_patiently(self, script: str, job_id: str, *arguments: str | bytes | float) -> Any:
        return self._patiently(lambda: self._run(script, job_id, *arguments))

    def _patiently(self, change: Callable[[], Any]) -> Any:
        """Make a change, once Redis takes writes again."""
        for _ in range(self.patience):
            try:
                return change()
            except ResponseError as error:
                if not takes_no_writes(error):
                    raise
                log.warning("waiting: Redis takes no writes (%s)", error)
                time.sleep(1)
        return change()

    def _registered(self, script: str) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        return self._scripts[script]

    # For the API and the command line

    def create(
        self, spec: JobSpec, plan: Plan | None, *, max_jobs: float = math.inf, idempotency_key: str | None = None
    ) -> JobRecord | None:
        """Create a job in state `queued`; the caller sends its shards to the queue (without a plan: the planning).

        Returns None where `idempotency_key` has created a job already (`posted`); one of many calls at once creates it.

        Raises:
            TooManyJobs: `max_jobs` jobs are queued or running.
        """
        job_id = secrets.token_hex(8)
        texts = [spec.model_dump_json(), plan.model_dump_json() if plan else ""]
        posted = keys.posted(idempotency_key) if idempotency_key else ""
        shards = [shard.id for shard in plan.shards] if plan else [keys.PLAN]
        outcome = self._run(scripts.CREATE, job_id, *texts, posted, IDEMPOTENCY_S, max_jobs, PACKAGE, *shards)
        if outcome == b"full":
            raise TooManyJobs(
                f"{max_jobs} jobs are queued or running, and no more are allowed at once. "
                "Wait until some are over, cancel some, or let the operator raise ABLATION_MAX_JOBS."
            )
        return self.get(job_id) if outcome == b"made" else None

    def posted(self, idempotency_key: str) -> JobRecord | None:
        """The job that this key created, as first answered; None if there is none (any more)."""
        known = self.client.hgetall(keys.posted(idempotency_key))
        job = self.get(known[b"id"].decode()) if known else None
        if job is None:
            return None
        first_plan = self.client.hget(keys.job(job.id), "first_plan")  # present if the job was planned again
        plan = Plan.model_validate_json(first_plan) if first_plan else job.plan
        plan = plan if known[b"planned"] == b"1" else None
        return JobRecord(
            id=job.id,
            status=State.QUEUED,
            progress=Progress(done=0, total=len(plan.shards) if plan else 1),
            created_at=job.created_at,
            spec=job.spec,
            plan=plan,
        )

    def get(self, job_id: str) -> JobRecord | None:
        """The job in whatever state; None if there is none (any more)."""
        return self._load([job_id])[0]

    def get_all(self, job_ids: Sequence[str]) -> Sequence[JobRecord | None]:
        """Several jobs, as `get` gives each."""
        return self._load(job_ids)

    def marks(self, job_ids: Sequence[str]) -> Sequence[object]:
        """What changes of these jobs, without spec and plan: equal as long as a job is as it was."""
        with self.client.pipeline(transaction=False) as pipeline:  # a transaction is refused at maxmemory
            for job_id in job_ids:
                names = [keys.job(job_id), keys.done(job_id), keys.fractions(job_id)]
                self._registered(_MARK)(keys=names, client=pipeline)
            return pipeline.execute()

    def list(self, status: State | None = None, limit: int = 20, cursor: str | None = None) -> Page:
        """At most `limit` jobs, newest first, and the cursor of the next page (None after the last).

        Raises:
            SpecError: the cursor is not one that this method returned.
        """
        if cursor is not None and not (cursor.isascii() and cursor.isdigit()):
            raise SpecError("cursor", cursor, "the next_cursor of an earlier answer", "Leave it out to begin.")
        key = keys.in_state(status) if status else keys.JOBS
        newest = f"({cursor}" if cursor else "+inf"
        found = self.client.zrevrangebyscore(key, newest, "-inf", start=0, num=limit + 1, withscores=True)
        records = self._load([job_id.decode() for job_id, _ in found[:limit]])
        next_cursor = str(int(found[limit - 1][1])) if len(found) > limit else None
        return [record for record in records if record], next_cursor

    def cancel(self, job_id: str) -> Cancellation:
        """Stop a job: `cancelling` while a worker is in mid-shard, else `cancelled`."""
        state, moved = self._run(scripts.CANCEL, job_id)
        return Cancellation(_state(state), bool(moved))

    def delete(self, job_id: str) -> State | None:
        """Drop a job's results and return its state: `expired`, or the one that forbids it; None for an unknown job."""
        return _state(self._run(scripts.EXPIRE, job_id, IDEMPOTENCY_S))

    def table_blocks(self, job_id: str) -> Iterator[bytes]:
        """The table, block by block (`codec.decode_block`).

        Raises:
            ServiceError: there is no table (any more).
        """
        for i in range(len(self._block_rows(job_id))):
            yield self._block(job_id, i)

    def summary(self, job_id: str) -> dict[str, Any]:
        """The statistics of the table."""
        return json.loads(self._result(job_id, "summary"))

    def about(self, job_id: str) -> dict[str, Any]:
        """What the table is of."""
        return json.loads(self._result(job_id, "about"))

    def n_rows(self, job_id: str) -> int:
        """Number of rows of the table."""
        return sum(self._block_rows(job_id))

    def read_rows(self, job_id: str, offset: int, limit: int) -> dict[str, np.ndarray]:
        """At most `limit` rows from `offset` on; reads only the blocks they are in."""
        rows = self._block_rows(job_id)
        starts = [0, *accumulate(rows)]
        touched = [i for i, n in enumerate(rows) if starts[i] < offset + limit and starts[i] + n > offset] or [0]
        pieces = []
        for i in touched:
            first, last = (max(0, row - starts[i]) for row in (offset, offset + limit))
            pieces.append(cut_rows(codec.decode_block(self._block(job_id, i)), slice(first, last)))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def registered(self) -> Registered:
        """The models and data sets that workers have published."""
        lines = {name.decode(): line.decode() for name, line in self.client.hgetall(keys.MODELS).items()}
        return Registered(
            FactsTable(lines), tuple(sorted(name.decode() for name in self.client.smembers(keys.DATASETS)))
        )

    def machine(self) -> Machine:
        """The machine of the worker that started last; the cost table's machine where none has started."""
        known = self.client.hgetall(keys.MACHINE)
        return Machine(**{name.decode(): float(number) for name, number in known.items()})

    def check_reads(self) -> None:
        """Make sure that Redis can be read.

        Raises:
            RedisError: it can't.
        """
        self.client.exists(keys.JOBS)  # and no PING, which a server with a full disk refuses

    def doubts(self) -> Sequence[str]:
        """Sentences on settings of Redis by which jobs may be lost; none where it does not tell its settings."""
        try:
            info = self.client.info()
        except ResponseError:  # this user may not ask
            return []
        found = []
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            found.append(
                f"Redis drops data when its memory is full (maxmemory-policy {policy}): jobs and results may vanish. "
                "Set it to noeviction."
            )
        if not info.get("aof_enabled", 1):
            kept = "only snapshots of its data" if self._saves() else "nothing of its data"
            found.append(
                f"Redis keeps {kept} on its disk (appendonly no): accepted jobs are lost when it ends. "
                "Set appendonly to yes."
            )
        return found

    def _saves(self) -> bool:
        """Whether Redis writes snapshots; also where it does not tell."""
        try:
            return bool(self.client.config_get("save").get("save", "unknown"))
        except ResponseError:
            return True

    # For the workers

    def publish(self, registered: Registered, machine: Machine) -> None:
        """Replace the published models, data sets and machine facts by this worker's."""
        with self.client.pipeline() as pipeline:
            pipeline.hset(keys.MACHINE, mapping=asdict(machine))
            pipeline.delete(keys.MODELS, keys.DATASETS)
            for name, facts in registered.models.items():
                pipeline.hset(keys.MODELS, name, line_from_facts(facts))
            for name in registered.datasets:
                pipeline.sadd(keys.DATASETS, name)
            pipeline.execute()

    def next_shard(self, turn_s: float, unfit: Iterable[str] = ()) -> tuple[str, str] | None:
        """(job, shard) next in turn, leaving out the `unfit` jobs; None where no shard waits.

        Jobs take turns of `turn_s`. Nothing is claimed yet, so another worker may get the same answer.
        """
        found = self._registered(scripts.NEXT)(keys=[keys.TURNS], args=[turn_s, *unfit])
        return found and (found[0].decode(), found[1].decode())

    def claim(self, job_id: str, shard_id: str, owner: str) -> bool:
        """Take the lease of a shard; False where the shard is done, leased or not wanted any more."""
        return bool(self._run(scripts.CLAIM, job_id, shard_id, owner))

    def claim_finalize(self, job_id: str, owner: str) -> bool:
        """Take the lease of the merge; False where that is refused."""
        return self.claim(job_id, keys.FINALIZE, owner)

    def agree(self, job_id: str, found: Mapping[str, str]) -> dict[str, str]:
        """What the first worker that opened the job found; `found` itself where this worker is the first."""
        return json.loads(self._run_patiently(scripts.AGREE, job_id, json.dumps(dict(found))))

    def refuse(self, job_id: str, shard_id: str, owner: str, error: Mapping[str, Any]) -> bool:
        """Note that `owner` must not work on the job; True where the shard, if it had one, waits again."""
        return bool(self._run_patiently(scripts.REFUSE, job_id, owner, json.dumps(error), shard_id))

    def is_over(self, job_id: str) -> bool:
        """Whether the job has ended, or is gone."""
        status = self.client.hget(keys.job(job_id), "status")
        return status is None or status.decode() in TERMINAL

    def package_of(self, job_id: str) -> str | None:
        """Version of this package that accepted the job."""
        answer = self.client.hget(keys.job(job_id), "package")
        return answer and answer.decode()

    def set_plan(self, job_id: str, owner: str, plan: Plan) -> bool:
        """Set the plan that `owner` has made; True where the job's shards are to be sent to the queue."""
        shards = [shard.id for shard in plan.shards]
        return bool(self._run_patiently(scripts.SET_PLAN, job_id, keys.PLAN, owner, plan.model_dump_json(), *shards))

    def cut_again(self, job_id: str, n_cut: int, plan: Plan) -> bool:
        """Drop what is done of a job that was planned `n_cut` times, and set this plan; True to send its shards.

        The new shards must have new ids, so that workers that still hold old shards can't complete them.
        """
        shards = [shard.id for shard in plan.shards]
        return bool(self._run_patiently(scripts.CUT_AGAIN, job_id, n_cut, plan.model_dump_json(), *shards))

    def beat(self, job_id: str, shard_id: str, owner: str, fraction: float) -> State | None:
        """Renew the lease; returns the job's state, or None where the lease has been taken away."""
        return _state(self._run(scripts.BEAT, job_id, shard_id, owner, fraction))

    def release(self, job_id: str, shard_id: str, owner: str) -> bool:
        """Give the lease back unused; True where the shard waits again and must be sent to the queue."""
        return bool(self._run_patiently(scripts.RELEASE, job_id, shard_id, owner))

    def retry(self, job_id: str, shard_id: str, owner: str, max_attempts: int, error: Mapping[str, Any]) -> bool:
        """Count a failed attempt of `owner`; True where the shard waits again, else the job has failed with `error`."""
        text = json.dumps(error)
        return bool(self._run_patiently(scripts.RETRY, job_id, shard_id, owner, 0, max_attempts, max_attempts, text))

    def retry_stale(
        self, job_id: str, shard_id: str, lease_s: float, max_attempts: int, max_losses: int, error: Mapping[str, Any]
    ) -> bool:
        """Count a failed attempt as `retry` does, if the lease has had no beat for `lease_s`.

        Where the whole worker is gone, it counts as a loss, up to `max_losses`.
        """
        text = json.dumps(error)
        return bool(self._run(scripts.RETRY, job_id, shard_id, "", lease_s, max_attempts, max_losses, text))

    def complete(self, job_id: str, shard_id: str, owner: str, payload: bytes) -> bool:
        """Store a partial and mark its shard done; True where it was the last, and the merge is to be sent."""
        draft, n_chunks = self._write_draft(job_id, shard_id, codec.split_chunks(payload))
        return bool(self._run_patiently(scripts.COMPLETE, job_id, shard_id, draft, n_chunks, owner))

    def partials(self, job_id: str, plan: Plan) -> Iterator[bytes]:
        """The partials of every shard, in plan order; empty where one has been dropped, since the job has ended."""
        for shard in plan.shards:
            yield b"".join(self.client.lrange(keys.partial(job_id, shard.id), 0, -1))

    def save_table(
        self,
        job_id: str,
        owner: str,
        about: Mapping[str, Any],
        summary: Mapping[str, Any],
        blocks: Iterable[bytes],
    ) -> bool:
        """Store the result and drop the partials; True where the job has succeeded by this call."""
        texts = [codec.encode_json(about), codec.encode_json(summary)]
        n_rows: list[int] = []
        draft, n_blocks = self._write_draft(job_id, keys.FINALIZE, _counted(blocks, n_rows))
        return bool(self._run_patiently(scripts.SAVE_TABLE, job_id, draft, n_blocks, *texts, json.dumps(n_rows), owner))

    def fail(self, job_id: str, error: Mapping[str, Any]) -> bool:
        """Mark the job as failed; True if this call did so (a job that has ended stays as it is)."""
        return bool(self._run_patiently(scripts.FAIL, job_id, json.dumps(error)))

    # For the sweeper

    def now(self) -> float:
        """Redis' own time, in Unix seconds."""
        seconds, microseconds = self.client.time()
        return seconds + microseconds / 1e6

    def jobs_in(self, *states: State) -> Iterator[str]:
        """The ids of all jobs in these states, oldest first."""
        for state in states:
            yield from (job_id.decode() for job_id in self.client.zrange(keys.in_state(state), 0, -1))

    def stale_leases(self, lease_s: float) -> Iterator[tuple[str, str]]:
        """(job, shard) of every lease that has had no beat for `lease_s`.

        A beat that is still to come was sent before the clock was set back: it counts as one that has come just now.
        """
        for job_id in self.jobs_in(State.RUNNING, State.FINALIZING, State.CANCELLING):
            leases, now = keys.leases(job_id), self.now()
            stale = self.client.zrangebyscore(leases, "-inf", now - lease_s)
            yield from ((job_id, shard_id.decode()) for shard_id in stale)
            for shard_id in self.client.zrangebyscore(leases, now + AHEAD_S, "+inf"):
                self.client.zadd(leases, {shard_id: now}, xx=True)

    def leases_of(self, owner: str) -> Iterator[tuple[str, str]]:
        """(job, shard) of every lease that `owner` holds."""
        for job_id in self.jobs_in(State.RUNNING, State.FINALIZING, State.CANCELLING):
            held = self.client.hgetall(keys.owners(job_id))
            yield from ((job_id, shard_id.decode()) for shard_id, by in held.items() if by.decode() == owner)

    def refused_by_all(self, within_s: float, waited_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """Jobs that every worker seen `within_s` has refused, first `waited_s` ago or earlier, each with one reason."""
        now = self.now()
        alive = set(self.client.zrangebyscore(keys.WORKERS, now - within_s, now + AHEAD_S))
        waited = self.client.zrangebyscore(keys.REFUSED, "-inf", now - waited_s)
        for job_id in map(bytes.decode, [*waited, *self.client.zrangebyscore(keys.REFUSED, now + waited_s, "+inf")]):
            refusals = self.client.hgetall(keys.refusals(job_id))
            if alive and alive <= refusals.keys() and not self.client.zcard(keys.leases(job_id)):
                yield job_id, json.loads(next(iter(refusals.values())))

    def resend(self, job_id: str, lost_s: float) -> Sequence[str]:
        """Shards that have been waiting for more than `lost_s`; from now on they count as just sent."""
        return [shard_id.decode() for shard_id in self._run(scripts.RESEND, job_id, lost_s)]

    def expire_due(self, result_s: float, tombstone_s: float) -> None:
        """Make tombstones of jobs that ended more than `result_s` ago, and drop those older than `tombstone_s`.

        At most `AT_ONCE` of each; the next sweep goes on.
        """
        for key, age_s, script in (
            (keys.FINISHED, result_s, scripts.EXPIRE),
            (keys.TOMBSTONES, tombstone_s, scripts.FORGET),
        ):
            for job_id in self.client.zrangebyscore(key, "-inf", self.now() - age_s, start=0, num=AT_ONCE):
                self._run(script, job_id.decode(), IDEMPOTENCY_S)

    def note_worker(self, worker: str) -> None:
        """Record that this worker is alive."""
        now = self.now()
        self.client.zadd(keys.WORKERS, {worker: now})
        self.client.zremrangebyscore(keys.WORKERS, "-inf", now - 24 * 3600)

    def drop_worker(self, worker: str) -> None:
        """Record that this worker has stopped."""
        self.client.zrem(keys.WORKERS, worker)

    def n_workers(self, within_s: float = SEEN_S) -> int:
        """Number of workers seen within the last seconds."""
        now = self.now()
        return self.client.zcount(keys.WORKERS, now - within_s, now + AHEAD_S)

    # Private

    def _load(self, job_ids: Iterable[str]) -> Sequence[JobRecord | None]:
        job_ids = [*job_ids]
        load = self._registered(scripts.LOAD)
        with self.client.pipeline(transaction=False) as pipeline:  # a transaction is refused at maxmemory
            for job_id in job_ids:
                load(keys=[keys.job(job_id), keys.done(job_id), keys.fractions(job_id)], client=pipeline)
            answers = pipeline.execute()
        return [_make_record(job_id, *parts) for job_id, parts in zip(job_ids, answers, strict=True)]

    def _write_draft(self, job_id: str, shard_id: str, chunks: Iterable[bytes]) -> tuple[str, int]:
        draft, n_chunks = keys.draft(job_id, shard_id, secrets.token_hex(4)), 0
        for n_chunks, chunk in enumerate(chunks, 1):  # noqa: B007  # counts
            with self.client.pipeline() as pipeline:  # both or none: an unfinished draft expires
                self._patiently(pipeline.rpush(draft, chunk).expire(draft, DRAFT_S).execute)
        return draft, n_chunks

    def _result(self, job_id: str, field: str) -> bytes:
        return self._there(job_id, self.client.hget(keys.result(job_id), field))

    def _block_rows(self, job_id: str) -> Sequence[int]:
        return json.loads(self._result(job_id, "block_rows"))

    def _block(self, job_id: str, i: int) -> bytes:
        return self._there(job_id, self.client.lindex(keys.table(job_id), i))

    def _there(self, job_id: str, answer: bytes | None) -> bytes:
        if answer is None:
            raise TableGone(f"the table of job {job_id} is not there: the job has not succeeded, or it has expired.")
        return answer


def _state(answer: bytes | None) -> State | None:
    return None if answer is None or answer == b"unknown" else State(answer.decode())


def _counted(blocks: Iterable[bytes], n_rows: list[int]) -> Iterator[bytes]:
    for block in blocks:
        n_rows.append(count_rows(codec.decode_block(block)))
        yield block


def _make_record(job_id: str, raw: list[bytes], n_done: int, fractions: list[bytes]) -> JobRecord | None:
    if not raw:
        return None
    fields = {name.decode(): value for name, value in zip(raw[::2], raw[1::2], strict=True)}
    status = State(fields["status"].decode())
    total = int(fields["n_shards"])
    done = float(fields["n_done"]) if status in TERMINAL else n_done + sum(map(float, fractions))
    return JobRecord(
        id=job_id,
        status=status,
        progress=Progress(done=min(done, total), total=total),
        n_cut=int(fields.get("n_cut", 1)),
        shards_per_s=_pace(fields, done),
        created_at=_time(fields["created_at"]),
        started_at=_time(fields["started_at"]) if "started_at" in fields else None,
        finished_at=_time(fields["finished_at"]) if "finished_at" in fields else None,
        spec=_read_spec(fields["spec"]),
        plan=_read_plan(fields["plan"]) if fields["plan"] else None,
        error=json.loads(fields["error"]) if "error" in fields else None,
    )


@lru_cache(maxsize=16)  # polls of a job of thousands of shards parse the same plan
def _read_plan(text: bytes) -> Plan:
    return Plan.model_validate_json(text)


@lru_cache(maxsize=8)  # polls of a job of a million indices would take 200 ms each
def _read_spec(text: bytes) -> JobSpec:
    return JobSpec.model_validate_json(text)


def _pace(fields: Mapping[str, bytes], done: float) -> float | None:
    """Shards per second since the first progress, which leaves out the loading of model and data."""
    if "first_done" not in fields:
        return None
    n_shards = done - float(fields["first_done"])
    seconds = float(fields["last_done_at"]) - float(fields["first_done_at"])
    return n_shards / seconds if n_shards > 0 and seconds > 0 else None


def _time(seconds: bytes) -> datetime:
    return datetime.fromtimestamp(float(seconds), UTC)

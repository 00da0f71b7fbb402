"""Whatever happens to jobs, in whatever order: a model without Redis says what the store must answer and hold.

Hypothesis makes up the order. In: verbs of workers, clients and the sweeper, connections that break, and hours that
pass. After each of them the answer and every key in Redis are compared with the model's, and the rules of the house
are checked on the keys alone. Not here: what happens at the same time (`test_store.py`); a script is whole or not.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ResponseError

from ablation.plan import Plan
from ablation.table import ImportanceTable
from tests.worker.conftest import make_toy
from worker import codec, keys, scripts
from worker.states import MOVES, TERMINAL, State
from worker.store import DRAFT_S, IDEMPOTENCY_S, JobRecord, JobStore, Progress, TooManyJobs

OPEN = {State.QUEUED, State.RUNNING, State.FINALIZING}
LIVE = {*OPEN, State.CANCELLING}
ENDED = TERMINAL - {State.EXPIRED}
HOUR_S = 3600
LONG_S = HOUR_S / 2  # for a lease without a beat, a wait, a turn; and hours pass whole
CAPS = MAX_ATTEMPTS, MAX_LOSSES = 2, 3
ERROR = {"type": "test", "title": "A test.", "detail": "failed on purpose"}
BLOCKS = [*codec.encode_blocks(ImportanceTable({"index": np.arange(5), "weight": np.arange(5) / 7}, {}))]
SHARD = make_toy(1)[1].shards[0].id  # of every toy, until it is cut anew
TOYS = {n_shards: make_toy(n_shards) for n_shards in (1, 2, 3)}
T = TypeVar("T")
Seen = Mapping[str, Any]  # every key of ours in Redis, with what it holds


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Waiting:
    """Nobody works on the shard."""

    hours: int = 0  # since it was sent


@dataclass
class Lease:
    """A worker is at it."""

    owner: str
    hours: int = 0  # since the last beat
    fraction: float = 0.0


@dataclass
class Done:
    """Its partial is stored."""

    partial: bytes
    hours: int = 0


@dataclass
class World:
    """What jobs share."""

    line: list["Job"] = field(default_factory=list)  # those that wait for their turn
    workers: dict[str, int] = field(default_factory=dict)  # hours since each was seen


@dataclass(eq=False)
class Job:
    """A job as it must be. Its verbs are the store's, with the same arguments and answers."""

    world: World
    first: JobRecord
    plan: Plan  # the one that it has, or that its planning will give it
    is_planned: bool
    status: State | None = State.QUEUED  # None: it is forgotten
    places: dict[str, Waiting | Lease | Done] = field(default_factory=dict)  # what waits, in the order of waiting
    attempts: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    hours_refused: int = 0  # since the first of them
    turn_hours: int | None = None  # since its turn began
    n_cut: int = 1
    is_started: bool = False
    n_done: int = 0  # when it ended
    hours_over: int = 0  # since then
    error: Mapping[str, Any] | None = None
    summary: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.wait(self.shards)

    @property
    def id(self) -> str:
        return self.first.id

    @property
    def shards(self) -> Collection[str]:
        return [shard.id for shard in self.plan.shards] if self.is_planned else [keys.PLAN]

    def those(self, kind: type) -> list[str]:
        return [shard for shard, place in self.places.items() if isinstance(place, kind)]

    def lease(self, shard: str, owner: str | None = None) -> Lease | None:
        place = self.places.get(shard)
        return place if isinstance(place, Lease) and owner in (None, place.owner) else None

    def holder(self, shard: str) -> str:
        lease = self.lease(shard)
        return lease.owner if lease else "a"

    def leave_line(self) -> None:
        if self in self.world.line:
            self.world.line.remove(self)

    def drop_work(self) -> None:
        self.places, self.attempts = {}, Counter()

    def go(self, status: State) -> None:
        self.status = status
        if status is not State.RUNNING:
            self.leave_line()
        if status in TERMINAL:
            self.n_done = self.n_done or len(self.those(Done))
            self.hours_over = 0
            self.drop_work()
            self.refusals, self.hours_refused = {}, 0

    def wait(self, shards: Collection[str]) -> None:
        for shard in shards:
            self.places.pop(shard, None)
            self.places[shard] = Waiting()
        if self.status is not State.FINALIZING and self not in self.world.line:
            self.world.line.append(self)

    def wait_first(self, shard: str) -> None:
        hours = [place.hours for place in self.places.values() if isinstance(place, Waiting)]
        self.places = {shard: Waiting(max(hours, default=0)), **self.places}
        if self.status is not State.FINALIZING:
            self.leave_line()
            self.world.line.insert(0, self)
            self.turn_hours = None

    def wait_last(self, shard: str) -> None:
        self.leave_line()
        self.turn_hours = self.turn_hours if self.status is State.FINALIZING else None
        self.wait([shard])

    def put_back(self, shard: str, *, is_first: bool = True) -> bool:
        del self.places[shard]
        if self.status is State.CANCELLING and not self.those(Lease):
            self.go(State.CANCELLED)
        if self.status in OPEN:
            self.wait_first(shard) if is_first else self.wait([shard])
        return self.status in OPEN

    def claim(self, shard: str, owner: str) -> bool:
        if self.status not in OPEN or not isinstance(self.places.get(shard), Waiting):
            return False
        self.places[shard] = Lease(owner)
        if not self.those(Waiting):
            self.leave_line()
        if self.status is State.QUEUED:
            self.is_started = True
            self.go(State.RUNNING)
        return True

    def claim_finalize(self, owner: str) -> bool:
        return self.claim(keys.FINALIZE, owner)

    def refuse(self, shard: str, owner: str, error: Mapping[str, Any]) -> bool:
        if self.status in TERMINAL or self.status is None:
            return False
        self.refusals[owner] = error
        return bool(self.lease(shard, owner)) and self.put_back(shard, is_first=False)

    def set_plan(self, owner: str, plan: Plan) -> bool:
        if not self.lease(keys.PLAN, owner) or not self.put_back(keys.PLAN, is_first=False):
            return False
        self.is_planned = True
        self.places = {}
        self.wait(self.shards)
        return True

    def cut_again(self, n_cut: int, plan: Plan) -> bool:
        if self.status is not State.RUNNING or self.n_cut != n_cut:
            return False
        self.drop_work()
        self.plan, self.n_cut = plan, n_cut + 1
        self.wait(self.shards)
        return True

    def beat(self, shard: str, owner: str, fraction: float) -> State | None:
        lease = self.lease(shard, owner)
        if not lease:
            return None
        lease.hours = 0
        if shard not in (keys.PLAN, keys.FINALIZE):
            lease.fraction = fraction
        return self.status

    def release(self, shard: str, owner: str) -> bool:
        return bool(self.lease(shard, owner)) and self.put_back(shard)

    def retry(self, shard: str, owner: str, max_attempts: int, error: Mapping[str, Any]) -> bool:
        return bool(self.lease(shard, owner)) and self.lose(shard, shard, max_attempts, error)

    def retry_stale(
        self, shard: str, lease_s: float, max_attempts: int, max_losses: int, error: Mapping[str, Any]
    ) -> bool:
        lease = self.lease(shard)
        if not lease or lease.hours * HOUR_S < lease_s:
            return False
        if self.world.workers.get(lease.owner, 99) * HOUR_S < lease_s / 2:
            return self.lose(shard, shard, max_attempts, error)
        return self.lose(shard, f"lost {shard}", max_losses, error)

    def lose(self, shard: str, counted: str, most: int, error: Mapping[str, Any]) -> bool:
        is_first = not self.attempts[counted] or counted.startswith("lost ")
        if not self.put_back(shard):
            return False
        self.attempts[counted] += 1
        if self.attempts[counted] >= most:
            return not self.fail(error)
        if not is_first:
            self.wait_last(shard)
        return True

    def takes(self, shard: str) -> bool:
        """Whether a partial of this shard counts, whoever brings it."""
        return self.status is State.RUNNING and isinstance(self.places.get(shard), Waiting | Lease)

    def complete(self, shard: str, owner: str, payload: bytes) -> bool:
        if not self.takes(shard):
            self.release(shard, owner)
            return False
        self.places[shard] = Done(payload)
        if len(self.those(Done)) < len(self.shards):
            return False
        self.go(State.FINALIZING)
        self.wait([keys.FINALIZE])
        return True

    def save_table(self, owner: str, about: object, summary: Mapping[str, Any], blocks: object) -> bool:
        if self.status is not State.FINALIZING:
            self.release(keys.FINALIZE, owner)
            return False
        self.summary = summary
        self.go(State.SUCCEEDED)
        return True

    def fail(self, error: Mapping[str, Any]) -> bool:
        if self.status not in OPEN:
            return False
        self.error = error
        self.go(State.FAILED)
        return True

    def cancel(self) -> tuple[State | None, bool]:
        is_new = self.status in OPEN
        if is_new:
            self.go(State.CANCELLING)
        if self.status is State.CANCELLING and not self.those(Lease):
            self.go(State.CANCELLED)
        return self.status, is_new

    def delete(self) -> State | None:
        if self.status in ENDED:
            self.summary = None
            self.go(State.EXPIRED)
        return self.status

    def resend(self, lost_s: float) -> Sequence[str]:
        if self.status not in OPEN:
            return []
        waiting = {shard: place for shard, place in self.places.items() if isinstance(place, Waiting)}
        lost = [shard for shard, place in waiting.items() if place.hours * HOUR_S > lost_s]
        if lost:
            self.wait(lost)
        return lost

    def expire_due(self, result_h: float, tombstone_h: float) -> None:
        if self.status is State.EXPIRED:
            self.status = None if self.hours_over > tombstone_h else self.status
        elif self.hours_over > result_h:
            self.delete()

    def grow_old(self, hours: int) -> None:
        self.hours_over += hours if self.status in TERMINAL else 0
        self.hours_refused += hours if self.refusals else 0
        self.turn_hours = None if self.turn_hours is None else self.turn_hours + hours
        for place in self.places.values():
            place.hours += hours

    def is_young(self) -> bool:
        """Whether it makes a difference if an hour passes."""
        return any(not place.hours for place in self.places.values()) or (
            self.status in TERMINAL and self.hours_over < 3
        )

    def progress(self) -> Progress:
        fractions = [place.fraction for place in self.places.values() if isinstance(place, Lease)]
        done = self.n_done if self.status in TERMINAL else len(self.those(Done)) + sum(fractions)
        return Progress(done=min(done, len(self.shards)), total=len(self.shards))


def next_shard(line: list[Job], turn_s: float, unfit: Collection[str]) -> tuple[str, str] | None:
    """Whose turn it is. Those that have had theirs go to the end of the line."""
    behind = []
    for job in [one for one in line if one.id not in unfit]:
        if not job.those(Waiting):
            line.remove(job)
        elif (job.turn_hours or 0) * HOUR_S >= turn_s:
            job.turn_hours = None
            line.remove(job)
            behind.append(job)
        else:
            break
    line += sorted(behind, key=lambda job: job.id)
    for job in [one for one in line if one.id not in unfit][:1]:
        job.turn_hours = job.turn_hours or 0
        return job.id, job.those(Waiting)[0]
    return None


# --- what may happen -------------------------------------------------------------------------------------------------


class StammeringStore(JobStore):
    """A store whose client sends the next script twice, as it does where the connection breaks before the answer."""

    stammers = False

    def _run(self, *arguments: Any) -> Any:
        if self.stammers:
            super()._run(*arguments)
        return super()._run(*arguments)


# Whose verbs these are: None is the worker that holds the lease, if there is one.
owners = st.sampled_from([None, None, None, "a", "b", "c"])
numbers = st.integers(0, 99)
Asked = tuple[int, bool, str | None, bool]  # shards, whether it is planned at once, key, whether it is asked twice
asked_for = st.tuples(
    st.sampled_from([*TOYS]),
    st.sampled_from([True, True, False]),
    st.sampled_from([None, "one", "another"]),
    st.booleans(),
)


def while_jobs_are(*states: State) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule for times when there is a job in one of these states."""
    return precondition(lambda self: any(job.status in states for job in self.made))


def while_shards_are(*kinds: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule for times when there is a shard in such a place."""
    return precondition(lambda self: any(job.those(kind) for job in self.made for kind in kinds))


class Service(RuleBasedStateMachine):
    """Some jobs, some workers and whoever else may do something to them, on a real Redis.

    Of five verbs four are said where they have an effect, as far as there is such a place, and one is said anywhere.
    """

    def __init__(self, store: StammeringStore) -> None:
        super().__init__()
        self.store = store
        self.world = World()
        self.made: list[Job] = []
        self.posted: dict[str, tuple[Job, int]] = {}  # key -> job, hours ago
        self.n_drafts = 0  # left by those who died while they wrote
        self.last: Mapping[str, State] = {}
        store.client.flushall()
        store.stammers = False

    def both(self, verb: str, job: Job, *arguments: Any) -> Any:
        """The store's answer, which is the model's; to the second question where the connection broke."""
        said = getattr(self.store, verb)(job.id, *arguments)
        expected = [getattr(job, verb)(*arguments) for _ in range(1 + self.store.stammers)][-1]
        self.store.stammers = False
        assert said == expected, f"{verb}{arguments} says {said!r}, not {expected!r}"
        return said

    def known(self, key: str | None) -> Job | None:
        """The job that this key made, as long as both are kept."""
        job, hours = self.posted.get(key or "", (None, 0))
        return job if job and job.status and hours * HOUR_S < IDEMPOTENCY_S else None

    def job(self, number: int, *states: State) -> Job:
        """A job, most often in one of these states."""
        fit = [job for job in self.made if job.status in states]
        return choose(number, fit, self.made)

    def shard(self, number: int, *kinds: type) -> tuple[Job, str]:
        """A shard, most often one in such a place."""
        fit = [(job, shard) for job in self.made for kind in kinds for shard in job.those(kind)]
        anything = (keys.PLAN, keys.FINALIZE, SHARD)
        return choose(number, fit, [(job, shard) for job in self.made for shard in (*job.places, *anything)])

    def n_unfinished(self) -> int:
        return sum(job.status in LIVE for job in self.made)

    @initialize(asked=asked_for, n_steps=st.integers(0, 9))
    def begin(self, asked: Asked, n_steps: int) -> None:
        self.create(asked, max_jobs=1)
        self.work(0, n_steps, [Waiting, Lease])

    @precondition(lambda self: self.n_unfinished() < 3 and sum(job.status is not None for job in self.made) < 7)
    @rule(asked=asked_for, max_jobs=st.sampled_from([9, 9, 2]))
    def create(self, asked: Asked, max_jobs: int) -> None:
        n_shards, is_planned, key, self.store.stammers = asked
        spec, plan = TOYS[n_shards]
        known, is_full = self.known(key), self.n_unfinished() >= max_jobs
        with pytest.raises(TooManyJobs) if is_full and not known else nullcontext():
            record = self.store.create(spec, plan if is_planned else None, max_jobs=max_jobs, idempotency_key=key)
            assert (record is None) == (known is not None)
            if record:
                self.made.append(Job(self.world, record, plan, is_planned))
                self.posted |= {key: (self.made[-1], 0)} if key else {}
        self.store.stammers = False

    @precondition(lambda self: not self.store.stammers and any(job.those(Lease) for job in self.made))
    @rule()
    def break_the_connection(self) -> None:
        self.store.stammers = True

    @precondition(lambda self: self.world.line)
    @rule(unfit=st.integers(0, 9))
    def next_shard(self, unfit: int) -> None:
        jobs = [job.id for job in self.made[unfit : unfit + 1]]
        assert self.store.next_shard(LONG_S, jobs) == next_shard(self.world.line, LONG_S, jobs)

    @while_shards_are(Waiting)
    @rule(number=numbers, owner=owners)
    def claim(self, number: int, owner: str | None) -> None:
        job, shard = self.shard(number, Waiting)
        self.both("claim", job, shard, owner or "a")

    @while_jobs_are(State.FINALIZING)
    @rule(number=numbers, owner=owners)
    def claim_finalize(self, number: int, owner: str | None) -> None:
        self.both("claim_finalize", self.job(number, State.FINALIZING), owner or "a")

    @while_shards_are(Lease)
    @rule(number=numbers, owner=owners)
    def refuse(self, number: int, owner: str | None) -> None:
        job, shard = self.shard(number, Lease)
        self.both("refuse", job, shard, owner or job.holder(shard), ERROR)

    @precondition(lambda self: any(keys.PLAN in job.places for job in self.made))
    @rule(number=numbers, owner=owners)
    def set_plan(self, number: int, owner: str | None) -> None:
        job = choose(number, [job for job in self.made if keys.PLAN in job.places], self.made)
        self.both("set_plan", job, owner or job.holder(keys.PLAN), job.plan)

    @while_jobs_are(State.RUNNING)
    @rule(number=numbers, is_late=st.sampled_from([False, False, True]))
    def cut_again(self, number: int, is_late: bool) -> None:
        job = self.job(number, State.RUNNING)
        if job.is_planned:
            n_cut = job.n_cut - is_late
            shards = [shard.model_copy(update={"id": f"{shard.id}-{n_cut}"}) for shard in TOYS[2][1].shards]
            self.both("cut_again", job, n_cut, job.plan.model_copy(update={"shards": tuple(shards)}))

    @while_shards_are(Lease)
    @rule(number=numbers, owner=owners, fraction=st.sampled_from([0.0, 0.25, 1.0]))
    def beat(self, number: int, owner: str | None, fraction: float) -> None:
        job, shard = self.shard(number, Lease)
        self.both("beat", job, shard, owner or job.holder(shard), fraction)

    @while_shards_are(Lease)
    @rule(number=numbers, owner=owners)
    def release(self, number: int, owner: str | None) -> None:
        job, shard = self.shard(number, Lease)
        self.both("release", job, shard, owner or job.holder(shard))

    @while_shards_are(Lease)
    @rule(number=numbers, owner=owners)
    def retry(self, number: int, owner: str | None) -> None:
        job, shard = self.shard(number, Lease)
        self.both("retry", job, shard, owner or job.holder(shard), MAX_ATTEMPTS, ERROR)

    @while_shards_are(Lease)
    @rule(number=numbers)
    def retry_stale(self, number: int) -> None:
        job, shard = self.shard(number, Lease)
        self.both("retry_stale", job, shard, LONG_S, *CAPS, ERROR)

    @while_shards_are(Lease, Done)
    @rule(number=numbers, owner=owners)
    def complete(self, number: int, owner: str | None) -> None:
        job, shard = self.shard(number, Lease, Waiting, Done)
        if shard not in (keys.PLAN, keys.FINALIZE):
            by = owner or job.holder(shard)
            self.both("complete", job, shard, by, f"of {shard} by {by}".encode())

    @while_shards_are(Lease)
    @rule(number=numbers)
    def complete_by_half(self, number: int) -> None:
        """What is stored is less than the worker says that it sent: an error where it would count."""
        job, shard = self.shard(number, Lease)
        draft, n_chunks = self.store._write_draft(job.id, shard, [b"half"])
        self.store.stammers = False
        with pytest.raises(ResponseError, match="incomplete") if job.takes(shard) else nullcontext():
            assert not self.store._run(scripts.COMPLETE, job.id, shard, draft, n_chunks + 1, "nobody")
        self.n_drafts += job.takes(shard)

    @while_jobs_are(State.FINALIZING, State.CANCELLING)
    @rule(number=numbers, owner=owners)
    def save_table(self, number: int, owner: str | None) -> None:
        job = self.job(number, State.FINALIZING, State.CANCELLING)
        by = owner or job.holder(keys.FINALIZE)
        self.both("save_table", job, by, {}, {"by": by}, BLOCKS)

    @while_jobs_are(*OPEN)
    @rule(number=numbers, n_steps=st.integers(1, 6), kinds=st.permutations([Waiting, Lease]))
    def work(self, number: int, n_steps: int, kinds: Sequence[type]) -> None:
        """Act as undisturbed workers: claim and complete one shard after the other, or first claim all."""
        job = self.job(number, *OPEN)
        for _ in range(n_steps):
            shard = next((shard for kind in kinds for shard in job.those(kind)), None)
            if not shard:
                return
            owner = job.holder(shard)
            if not job.lease(shard):
                self.both("claim", job, shard, owner)
            elif shard == keys.PLAN:
                self.both("set_plan", job, owner, job.plan)
            elif shard == keys.FINALIZE:
                self.both("save_table", job, owner, {}, {"by": owner}, BLOCKS)
            else:
                self.both("complete", job, shard, owner, f"of {shard} by {owner}".encode())
            self.all_is_as_it_must_be()

    @while_shards_are(Lease)
    @rule(owner=owners)
    def leave(self, owner: str | None) -> None:
        """Act as a worker that is told to stop."""
        by = owner or "a"
        held = [(job, shard) for job in self.made for shard in job.places if job.lease(shard, by)]
        assert sorted(self.store.leases_of(by)) == sorted((job.id, shard) for job, shard in held)
        for job, shard in held:
            self.both("release", job, shard, by)
        self.store.drop_worker(by)
        self.world.workers.pop(by, None)

    @while_shards_are(Lease)
    @rule()
    def sweep(self) -> None:
        """Act as the sweeper: shards with stale leases wait again, and jobs that all workers have refused fail."""
        leases = [(job, shard, job.lease(shard)) for job in self.made for shard in job.places]
        stale = [(job, shard) for job, shard, lease in leases if lease and lease.hours * HOUR_S > LONG_S]
        found = sorted(self.store.stale_leases(LONG_S))
        assert found == sorted((job.id, shard) for job, shard in stale)
        for job, shard in stale:
            self.both("retry_stale", job, shard, LONG_S, *CAPS, ERROR)
        alive = {owner for owner, hours in self.world.workers.items() if hours == 0}
        refused = [job for job in self.made if job.refusals and job.hours_refused and not job.those(Lease)]
        by_all = [job for job in refused if alive and alive <= job.refusals.keys()]
        assert dict(self.store.refused_by_all(LONG_S, LONG_S)) == {job.id: ERROR for job in by_all}
        for job in by_all:
            self.both("fail", job, ERROR)

    @precondition(lambda self: self.n_unfinished() > 1)
    @rule(number=numbers)
    def fail(self, number: int) -> None:
        self.both("fail", self.job(number, *OPEN), ERROR)

    @while_shards_are(Lease)
    @rule(number=numbers)
    def cancel(self, number: int) -> None:
        job, _ = self.shard(number, Lease)
        self.both("cancel", job)

    @while_jobs_are(*ENDED)
    @rule(number=numbers)
    def delete(self, number: int) -> None:
        self.both("delete", self.job(number, *ENDED))

    @precondition(lambda self: any(place.hours for job in self.made for place in job.places.values()))
    @rule(number=numbers)
    def resend(self, number: int) -> None:
        job, _ = self.shard(number, Waiting)
        self.both("resend", job, LONG_S)

    @precondition(lambda self: any(job.hours_over for job in self.made if job.status))
    @rule(result_h=st.sampled_from([0.5, 2.5]), tombstone_h=st.sampled_from([0.5, 2.5]))
    def expire_due(self, result_h: float, tombstone_h: float) -> None:
        self.store.expire_due(result_h * HOUR_S, tombstone_h * HOUR_S)
        self.store.stammers = False
        for job in self.made:
            job.expire_due(result_h, tombstone_h)

    @precondition(lambda self: any(job.is_young() for job in self.made))
    @rule(hours=st.sampled_from([1, 1, 2, IDEMPOTENCY_S // HOUR_S]), alive=st.sets(st.sampled_from("abc")))
    def hours_pass(self, hours: int, alive: Collection[str]) -> None:
        """All times in Redis are as they would be then; of the workers some are still seen."""
        client, seconds = self.store.client, hours * HOUR_S
        for job in self.made:
            job.grow_old(hours)
            if client.hexists(keys.job(job.id), "turn_began"):
                client.hincrbyfloat(keys.job(job.id), "turn_began", -seconds)
        zsets = [key(job.id) for job in self.made for key in (keys.waiting, keys.leases)]
        for zset in (*zsets, keys.FINISHED, keys.TOMBSTONES, keys.TURNS, keys.REFUSED, keys.WORKERS):
            for member in client.zrange(zset, 0, -1):
                client.zincrby(zset, -seconds, member)
        self.world.workers = {worker: ago + hours for worker, ago in self.world.workers.items()}
        for worker in alive:
            self.store.note_worker(worker)
            self.world.workers[worker] = 0
        assert self.store.n_workers(LONG_S) == len(alive)
        for key, (job, ago) in self.posted.items():
            self.posted[key] = job, ago + hours
            client.expire(keys.posted(key), client.ttl(keys.posted(key)) - seconds)

    @invariant()
    def all_is_as_it_must_be(self) -> None:
        seen, seconds_left = look(self.store)
        states = {job.id: State(seen[keys.job(job.id)]["status"]) for job in self.made if job.status}
        check_moves(self.last, states)
        check_indexes(seen, states)
        check_lifetimes(seconds_left, self.n_drafts)
        assert in_order(seen.get(keys.TURNS, {})) == [job.id for job in self.world.line]
        for job in self.made:
            check_places(seen, job.id, states.get(job.id))
            check_leftovers(seen, job.id, states.get(job.id))
            check_work(seen, job)
        check_records(self.store, [job for job in self.made if job.status])
        for key in self.posted:
            known = self.known(key)
            assert self.store.posted(key) == (known.first if known else None)
        self.last = states


def choose(number: int, fit: Sequence[T], anything: Sequence[T]) -> T:
    """One of these; four times of five one that fits, if there is any."""
    pool = fit if fit and number % 5 < 4 else anything
    return pool[number // 5 % len(pool)]


# --- the rules of the house, on what is in Redis ---------------------------------------------------------------------


def look(store: JobStore) -> tuple[Seen, Mapping[str, int]]:
    """Every key of ours with what it holds, all as text but for lists; and with the seconds that it will be kept."""
    rows = [(key.decode(), kind, value, seconds) for key, kind, value, seconds in store.client.eval(LOOK, 0)]
    return {key: TEXTS[kind](value) for key, kind, value, _ in rows}, {key: seconds for key, _, _, seconds in rows}


LOOK = """
local read = {
  hash = function(key) return redis.call('HGETALL', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  string = function(key) return redis.call('GET', key) end,
}
local rows = {}
for i, key in ipairs(redis.call('KEYS', 'ablation:*')) do
  local kind = redis.call('TYPE', key).ok
  rows[i] = {key, kind, read[kind](key), redis.call('TTL', key)}
end
return rows
"""

TEXTS: Mapping[bytes, Callable[[Any], Any]] = {
    b"hash": lambda flat: {name.decode(): text.decode() for name, text in zip(flat[::2], flat[1::2], strict=True)},
    b"zset": lambda flat: {member.decode(): float(score) for member, score in zip(flat[::2], flat[1::2], strict=True)},
    b"set": lambda members: {member.decode() for member in members},
    b"list": list,
    b"string": bytes.decode,
}


def in_order(zset: Mapping[str, float]) -> list[str]:
    return sorted(zset, key=lambda member: (zset[member], member))


def check_moves(before: Mapping[str, State], after: Mapping[str, State]) -> None:
    """A job stays, makes one move of the table, is cancelled at once, or is forgotten once it has expired."""
    for job_id, state in before.items():
        if job_id not in after:
            assert state is State.EXPIRED, f"{state} and gone"
        elif after[job_id] is not state:
            at_once = after[job_id] is State.CANCELLED and State.CANCELLING in MOVES[state]
            assert after[job_id] in MOVES[state] or at_once, f"{state} to {after[job_id]}"


def check_indexes(seen: Seen, states: Mapping[str, State]) -> None:
    """Every index holds the jobs that it is for, those of states by the number that says which was first."""
    numbers = {job_id: float(seen[keys.job(job_id)]["seq"]) for job_id in states}
    assert [*numbers.values()] == sorted(set(numbers.values()))
    for state in State:
        there = {job_id: number for job_id, number in numbers.items() if states[job_id] is state}
        assert seen.get(keys.in_state(state), {}) == there, state
    assert seen.get(keys.JOBS, {}) == {one: number for one, number in numbers.items() if states[one] != State.EXPIRED}
    assert set(seen.get(keys.FINISHED, ())) == {job_id for job_id in states if states[job_id] in ENDED}
    assert set(seen.get(keys.TOMBSTONES, ())) == {job_id for job_id in states if states[job_id] is State.EXPIRED}
    assert set(seen.get(keys.REFUSED, ())) == {job_id for job_id in states if keys.refusals(job_id) in seen}
    taking_turns = {job_id for job_id in states if states[job_id] in (State.QUEUED, State.RUNNING)}
    in_line = set(seen.get(keys.TURNS, ()))
    assert {job_id for job_id in taking_turns if keys.waiting(job_id) in seen} <= in_line <= taking_turns


def check_places(seen: Seen, job_id: str, state: State | None) -> None:
    """A shard of a job that goes on is in one place; of one that is cancelled it may be dropped."""
    waiting, leases, done = (set(seen.get(key(job_id), ())) for key in (keys.waiting, keys.leases, keys.done))
    found = waiting | leases | done
    assert len(found) == len(waiting) + len(leases) + len(done), f"in two places: {waiting}, {leases}, {done}"
    assert set(seen.get(keys.owners(job_id), ())) == leases
    assert set(seen.get(keys.fractions(job_id), ())) <= leases
    partials = {key for key in seen if key.startswith(keys.partial(job_id, ""))}
    assert partials == {keys.partial(job_id, shard) for shard in done}
    if state in OPEN:
        record = seen[keys.job(job_id)]
        plan = Plan.model_validate_json(record["plan"]) if record["plan"] else None
        shards = {shard.id for shard in plan.shards} if plan else {keys.PLAN}
        assert int(record["n_shards"]) == len(shards)
        assert found == (shards | {keys.FINALIZE} if state is State.FINALIZING else shards)
    assert leases or state is not State.CANCELLING, "nobody works on it, so it is cancelled"


def check_leftovers(seen: Seen, job_id: str, state: State | None) -> None:
    """Only the record and the table of an ended job are kept, and nothing of a forgotten one."""
    found = {key for key in seen if job_id in key and ":draft:" not in key}
    if state is None:
        assert found == set()
    elif state in TERMINAL:
        table = {keys.result(job_id), keys.table(job_id)} if state is State.SUCCEEDED else set()
        assert found == {keys.job(job_id), *table}


def check_lifetimes(seconds_left: Mapping[str, int], n_drafts: int) -> None:
    """What was left half written goes away by itself, and what a key has made; nothing else does."""
    limits = {key: DRAFT_S for key in seconds_left if ":draft:" in key}
    assert len(limits) == n_drafts
    limits |= {key: IDEMPOTENCY_S for key in seconds_left if key.startswith(keys.posted(""))}
    for key, seconds in seconds_left.items():
        assert 0 <= seconds <= limits[key] if key in limits else seconds == -1, f"{key} has {seconds} s"


def check_records(store: JobStore, jobs: Sequence[Job]) -> None:
    """Jobs are listed, newest first, as the model has them."""
    listed, tombstones = store.list(limit=100)[0], store.list(State.EXPIRED, limit=100)[0]
    assert [record.id for record in listed] == [job.id for job in jobs[::-1] if job.status is not State.EXPIRED]
    records = {record.id: record for record in (*listed, *tombstones)}
    assert len(records) == len(jobs)
    for job in jobs:
        record = records[job.id]
        error = None if job.status is State.EXPIRED else job.error
        assert (record.status, record.error, record.progress) == (job.status, error, job.progress())
        assert (record.plan, record.n_cut) == (job.plan if job.is_planned else None, job.n_cut)
        assert (record.started_at is not None) == job.is_started
        assert (record.finished_at is not None) == (job.status in TERMINAL)


def check_work(seen: Seen, job: Job) -> None:
    """The job's keys hold what the model has."""
    assert in_order(seen.get(keys.waiting(job.id), {})) == job.those(Waiting)
    leases = {shard: place.owner for shard, place in job.places.items() if isinstance(place, Lease)}
    assert seen.get(keys.owners(job.id), {}) == leases
    partials = {shard: [place.partial] for shard, place in job.places.items() if isinstance(place, Done)}
    assert {shard: seen[keys.partial(job.id, shard)] for shard in seen.get(keys.done(job.id), ())} == partials
    assert seen.get(keys.attempts(job.id), {}) == {shard: str(n) for shard, n in job.attempts.items()}
    assert set(seen.get(keys.refusals(job.id), ())) == set(job.refusals)
    if job.summary:
        assert json.loads(seen[keys.result(job.id)]["summary"]) == job.summary
        assert seen[keys.table(job.id)] == BLOCKS


QUICK = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.reuse, Phase.generate, Phase.shrink],
)
THOROUGH = settings(QUICK, max_examples=3000, derandomize=False, print_blob=True)


@pytest.mark.parametrize(
    "effort",
    [pytest.param(QUICK, id="quick"), pytest.param(THOROUGH, id="thorough", marks=pytest.mark.slow)],
)
@pytest.mark.timeout(3600)  # to find the shortest way to a failure takes up to five minutes
def test_jobs_are_as_the_model_says_whatever_happens(store: JobStore, effort: settings) -> None:
    stammering = StammeringStore(store.client)
    run_state_machine_as_test(lambda: Service(stammering), settings=effort)  # type: ignore[arg-type]  # it calls it

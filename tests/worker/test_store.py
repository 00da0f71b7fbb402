from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from redis import Redis

from ablation.errors import ServiceError, SpecError
from ablation.inputs.catalog import Registered
from ablation.machine import Machine
from ablation.plan import Plan
from ablation.table import ImportanceTable
from tests.worker.conftest import FACTS, about_of, make_partial, make_toy
from worker import codec, keys
from worker.settings import Settings
from worker.states import MOVES, TERMINAL, State
from worker.store import JobRecord, JobStore, connect

ERROR = {"type": "test", "title": "A test.", "detail": "failed on purpose"}
MakeJob = Callable[..., JobRecord]


def first_shard(job: JobRecord) -> str:
    return job.plan.shards[0].id


def payload(number: int = 0) -> bytes:
    return codec.encode_partial(make_partial(number))


def make_table(n_rows: int = 5) -> ImportanceTable:
    columns = {
        "index": np.arange(n_rows, dtype=np.int64),
        "weight": np.arange(n_rows) / 7,
        "utility": np.arange(n_rows) * 3.0,
    }
    return ImportanceTable(columns, {"seconds": 2.5})


def save(store: JobStore, job_id: str, owner: str = "a", table: ImportanceTable | None = None) -> bool:
    table = table or make_table()
    return store.save_table(job_id, owner, table.about, {"n_sites": len(table)}, codec.encode_blocks(table))


def finish_shards(store: JobStore, job: JobRecord, owner: str = "a") -> list[bool]:
    """Claim and complete every shard; what `complete` said each time."""
    said = []
    for number, shard in enumerate(job.plan.shards):
        assert store.claim(job.id, shard.id, owner)
        said.append(store.complete(job.id, shard.id, owner, payload(number)))
    return said


def bring_to(store: JobStore, state: State, make_job: MakeJob) -> JobRecord:
    """A job of one shard in this state, by the verbs that lead there; a worker `a` holds its lease where one can."""
    job = make_job(1)
    if state in (State.RUNNING, State.CANCELLING):
        store.claim(job.id, first_shard(job), "a")
    if state in (State.FINALIZING, State.SUCCEEDED, State.EXPIRED):
        finish_shards(store, job)
        store.claim_finalize(job.id, "a")
    if state in (State.SUCCEEDED, State.EXPIRED):
        save(store, job.id)
    if state in (State.CANCELLING, State.CANCELLED):
        store.cancel(job.id)
    if state is State.FAILED:
        store.fail(job.id, ERROR)
    if state is State.EXPIRED:
        store.delete(job.id)
    assert status(store, job) == state
    return job


def reload(store: JobStore, job: JobRecord) -> JobRecord:
    record = store.get(job.id)
    assert record
    return record


def status(store: JobStore, job: JobRecord) -> State:
    return reload(store, job).status


VERBS: dict[str, Callable[[JobStore, JobRecord], object]] = {
    "claim": lambda store, job: store.claim(job.id, first_shard(job), "b"),
    "claim_finalize": lambda store, job: store.claim_finalize(job.id, "b"),
    "beat": lambda store, job: store.beat(job.id, first_shard(job), "a", 0.5),
    "release": lambda store, job: store.release(job.id, first_shard(job), "a"),
    "complete": lambda store, job: store.complete(job.id, first_shard(job), "a", payload()),
    "save_table": lambda store, job: save(store, job.id),
    "retry": lambda store, job: store.retry(job.id, first_shard(job), "a", 1, ERROR),
    "retry_stale": lambda store, job: store.retry_stale(job.id, first_shard(job), 0, 1, 1, ERROR),
    "fail": lambda store, job: store.fail(job.id, ERROR),
    "cancel": lambda store, job: store.cancel(job.id),
    "delete": lambda store, job: store.delete(job.id),
}

# Where each verb leads from each state; what is not named stays as it is.
LEADS_TO: dict[State, dict[str, State]] = {
    State.QUEUED: {"claim": State.RUNNING, "fail": State.FAILED, "cancel": State.CANCELLED},
    State.RUNNING: {
        "complete": State.FINALIZING,
        "retry": State.FAILED,
        "retry_stale": State.FAILED,
        "fail": State.FAILED,
        "cancel": State.CANCELLING,
    },
    State.FINALIZING: {"save_table": State.SUCCEEDED, "fail": State.FAILED, "cancel": State.CANCELLING},
    State.CANCELLING: {
        "complete": State.CANCELLED,
        "release": State.CANCELLED,
        "retry": State.CANCELLED,
        "retry_stale": State.CANCELLED,
    },
    State.SUCCEEDED: {"delete": State.EXPIRED},
    State.FAILED: {"delete": State.EXPIRED},
    State.CANCELLED: {"delete": State.EXPIRED},
    State.EXPIRED: {},
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", State)
def test_every_verb_in_every_state(store: JobStore, toy_job: MakeJob, state: State, verb: str) -> None:
    job = bring_to(store, state, toy_job)
    VERBS[verb](store, job)
    assert status(store, job) == LEADS_TO[state].get(verb, state)
    assert [*store.jobs_in(*State)] == [job.id], "the job is in one state's index"


def test_no_verb_leads_where_no_move_is() -> None:
    for origin, verbs in LEADS_TO.items():
        for target in verbs.values():
            by_way_of_cancelling = target is State.CANCELLED and State.CANCELLING in MOVES[origin]
            assert target in MOVES[origin] or by_way_of_cancelling


def test_a_new_job_is_queued_and_reads_back(store: JobStore) -> None:
    spec, plan = make_toy(3)
    job = store.create(spec, plan)
    assert job == store.get(job.id)
    assert (job.spec, job.plan, job.status) == (spec, plan, State.QUEUED)
    assert (job.progress.done, job.progress.total) == (0, 3)
    assert abs(job.created_at.timestamp() - store.now()) < 5
    assert job.started_at is job.finished_at is job.error is None


def test_what_nobody_made_is_unknown(store: JobStore) -> None:
    assert store.get("nothing") is store.cancel("nothing").state is store.delete("nothing") is None
    assert not store.claim("nothing", "test-0-0", "a")
    assert not store.fail("nothing", ERROR)
    assert [*store.client.scan_iter("ablation:*")] == []


def test_the_life_of_a_job(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(3)
    assert finish_shards(store, job) == [False, False, True]
    assert store.claim_finalize(job.id, "a")
    assert [*store.partials(job.id, job.plan)] == [payload(0), payload(1), payload(2)]
    assert save(store, job.id)
    record = reload(store, job)
    assert record.started_at
    assert record.finished_at
    assert record.status is State.SUCCEEDED
    assert record.created_at <= record.started_at <= record.finished_at
    assert record.progress.done == record.progress.total == 3
    assert about_of(store, job.id) == {"seconds": 2.5}
    assert store.summary(job.id) == {"n_sites": 5}


def test_only_the_result_is_kept_of_a_job_that_succeeded(store: JobStore, toy_job: MakeJob) -> None:
    job = bring_to(store, State.SUCCEEDED, toy_job)
    left = {key.decode() for key in store.client.scan_iter(f"{keys.job(job.id)}*")}
    assert left == {keys.job(job.id), keys.result(job.id), keys.table(job.id)}


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED, State.EXPIRED])
def test_nothing_but_the_record_is_kept_of_other_ends(store: JobStore, toy_job: MakeJob, state: State) -> None:
    job = bring_to(store, state, toy_job)
    assert [key.decode() for key in store.client.scan_iter(f"{keys.job(job.id)}*")] == [keys.job(job.id)]


def test_what_is_half_written_goes_and_what_is_whole_stays(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(1)
    draft, _ = store._write_draft(job.id, "test-0-0", [b"half"])
    assert 0 < store.client.ttl(draft) <= 3600
    store.claim(job.id, first_shard(job), "a")
    store.complete(job.id, first_shard(job), "a", payload())
    assert store.client.ttl(keys.partial(job.id, first_shard(job))) == -1


def test_a_shard_is_worked_on_by_one(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(2)
    one, two = (shard.id for shard in job.plan.shards)
    assert store.claim(job.id, one, "a")
    assert not store.claim(job.id, one, "a")
    assert not store.claim(job.id, one, "b")
    assert not store.claim(job.id, "no-such-shard", "b")
    assert store.claim(job.id, two, "b")
    store.complete(job.id, one, "a", payload())
    assert not store.claim(job.id, one, "b"), "it is done"


def test_a_beat_reports_progress_and_the_state(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(2)
    one, two = (shard.id for shard in job.plan.shards)
    store.claim(job.id, one, "a")
    store.complete(job.id, one, "a", payload())
    store.claim(job.id, two, "a")
    assert store.beat(job.id, two, "a", 0.25) is State.RUNNING
    assert store.beat(job.id, two, "b", 0.9) is None, "not the owner's"
    record = reload(store, job)
    assert record.progress.done == 1.25
    store.cancel(job.id)
    assert store.beat(job.id, two, "a", 0.5) is State.CANCELLING


def test_the_pace_is_measured_from_the_first_progress_to_the_last(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(4)
    one, two, *_ = (shard.id for shard in job.plan.shards)

    def pace_after(shard: str, fraction: float) -> float | None:
        store.beat(job.id, shard, "a", fraction)
        return reload(store, job).shards_per_s

    store.claim(job.id, one, "a")
    store.claim(job.id, two, "a")
    assert pace_after(one, 0.0) is None, "reading model and data is no progress"
    assert pace_after(one, 0.25) is None, "one point has no pace"
    store.client.hincrbyfloat(keys.job(job.id), "first_done_at", -2)
    store.client.hincrbyfloat(keys.job(job.id), "last_done_at", -1)
    assert reload(store, job).shards_per_s is None
    assert pace_after(one, 0.25) is None, "a beat alone is no progress"
    assert pace_after(one, 0.75) == pytest.approx(0.5 / 2, rel=0.05)
    assert pace_after(two, 0.5) == pytest.approx(1.0 / 2, rel=0.05)
    store.complete(job.id, one, "a", payload())
    assert reload(store, job).shards_per_s == pytest.approx(1.25 / 2, rel=0.05)
    store.release(job.id, two, "a")
    store.client.hset(keys.job(job.id), "first_done", 1)
    assert reload(store, job).shards_per_s is None, "a worker was lost, and with it what it had done"


def test_a_released_shard_waits_again(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(1)
    shard = first_shard(job)
    store.claim(job.id, shard, "a")
    assert not store.release(job.id, shard, "b"), "not b's to release"
    assert [*store.leases_of("a")] == [(job.id, shard)]
    assert store.release(job.id, shard, "a")
    assert [*store.leases_of("a")] == []
    assert store.beat(job.id, shard, "a", 0.5) is None
    assert store.claim(job.id, shard, "b")


def test_a_partial_is_overwritten_never_added_to(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(2)
    shard = first_shard(job)
    store.client.rpush(keys.partial(job.id, shard), b"left by something else")
    store.claim(job.id, shard, "a")
    store.complete(job.id, shard, "a", payload(1))
    store.complete(job.id, shard, "a", payload(1))
    assert next(iter(store.partials(job.id, job.plan))) == payload(1)
    record = reload(store, job)
    assert record.progress.done == 1


def test_a_partial_that_comes_late_counts_once(store: JobStore, toy_job: MakeJob) -> None:
    """The lease of `a` went stale and `b` took over, but `a` lives and is first."""
    job = toy_job(1)
    shard = first_shard(job)
    store.claim(job.id, shard, "a")
    assert store.retry_stale(job.id, shard, 0, 3, 3, ERROR)
    assert store.claim(job.id, shard, "b")
    assert store.complete(job.id, shard, "a", payload())
    assert store.beat(job.id, shard, "b", 0.5) is None
    assert not store.complete(job.id, shard, "b", payload())
    assert status(store, job) is State.FINALIZING


def test_large_partials_travel_in_chunks(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(2)
    large = np.random.default_rng(0).bytes(2 * codec.MAX_CHUNK_BYTES + 5)
    store.claim(job.id, first_shard(job), "a")
    store.complete(job.id, first_shard(job), "a", large)
    assert store.client.llen(keys.partial(job.id, first_shard(job))) == 3
    assert next(iter(store.partials(job.id, job.plan))) == large


def test_attempts_are_counted_and_capped(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(1)
    shard = first_shard(job)
    for left in (True, True, False):
        assert store.claim(job.id, shard, "a")
        assert store.retry(job.id, shard, "a", 3, ERROR) is left
    record = reload(store, job)
    assert record.status is State.FAILED
    assert record.error == ERROR


def test_a_fresh_lease_is_not_taken_away(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(1)
    store.claim(job.id, first_shard(job), "a")
    assert [*store.stale_leases(60)] == []
    assert not store.retry_stale(job.id, first_shard(job), 60, 3, 3, ERROR)
    assert [*store.stale_leases(0)] == [(job.id, first_shard(job))]


def test_lost_shards_are_sent_again_sparingly(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(2)
    store.claim(job.id, first_shard(job), "a")
    assert store.resend(job.id, 60) == []
    assert store.resend(job.id, 0) == [job.plan.shards[1].id]
    assert store.resend(job.id, 1) == [], "it has been sent just now"


def test_the_list_is_newest_first_and_pages(store: JobStore, toy_job: MakeJob) -> None:
    ids = [toy_job(1).id for _ in range(5)][::-1]
    page, cursor = store.list(limit=2)
    assert [job.id for job in page] == ids[:2]
    newer = toy_job(1)  # does not shift the pages
    page, cursor = store.list(limit=2, cursor=cursor)
    assert [job.id for job in page] == ids[2:4]
    page, cursor = store.list(limit=2, cursor=cursor)
    assert ([job.id for job in page], cursor) == (ids[4:], None)
    store.cancel(ids[3])
    assert [job.id for job in store.list(State.CANCELLED)[0]] == [ids[3]]
    assert [job.id for job in store.list(State.QUEUED, limit=2)[0]] == [newer.id, ids[0]]
    store.delete(ids[3])
    assert ids[3] not in [job.id for job in store.list(limit=100)[0]]
    assert [job.id for job in store.list(State.EXPIRED)[0]] == [ids[3]]


def test_a_cursor_that_is_not_ours_is_refused(store: JobStore) -> None:
    with pytest.raises(SpecError, match="cursor"):
        store.list(cursor="-inf")


def test_rows_are_read_from_the_blocks_they_are_in(store: JobStore, toy_job: MakeJob) -> None:
    job = bring_to(store, State.FINALIZING, toy_job)
    table = make_table(1_500_000)
    save(store, job.id, table=table)
    n_first = len(codec.decode_block(next(store.table_blocks(job.id)))["index"])
    assert len([*store.table_blocks(job.id)]) == 3
    assert store.n_rows(job.id) == 1_500_000
    reads: tuple[tuple[int, int], ...] = (
        (0, 3),
        (n_first - 2, 4),
        (n_first, 1),
        (1_499_999, 9),
        (2_000_000, 9),
        (5, 0),
    )
    for offset, limit in reads:
        rows = store.read_rows(job.id, offset, limit)
        for name, values in table.columns.items():
            np.testing.assert_array_equal(
                rows[name], values[offset : offset + limit], err_msg=f"{name} {offset} {limit}"
            )


def test_a_table_that_goes_while_it_is_read_says_so(store: JobStore, toy_job: MakeJob) -> None:
    job = bring_to(store, State.FINALIZING, toy_job)
    save(store, job.id, table=make_table(800_000))
    blocks = store.table_blocks(job.id)
    next(blocks)
    store.delete(job.id)
    with pytest.raises(ServiceError, match="expired"):
        next(blocks)


def test_results_expire_and_tombstones_go(store: JobStore, toy_job: MakeJob) -> None:
    ended, running = bring_to(store, State.SUCCEEDED, toy_job), bring_to(store, State.RUNNING, toy_job)
    store.expire_due(result_s=60, tombstone_s=60)
    assert status(store, ended) is State.SUCCEEDED
    store.expire_due(result_s=-1, tombstone_s=60)
    assert status(store, ended) is State.EXPIRED
    record = reload(store, ended)
    assert record.finished_at
    assert record.spec == ended.spec
    store.expire_due(result_s=60, tombstone_s=-1)
    assert store.get(ended.id) is None
    assert [*store.client.scan_iter(f"*{ended.id}*")] == []
    assert [*store.jobs_in(*State)] == [running.id]


def test_workers_are_seen(store: JobStore) -> None:
    assert store.n_workers() == 0
    store.note_worker("a")
    store.note_worker("a")
    store.note_worker("b")
    assert store.n_workers() == 2
    assert store.n_workers(within_s=-1) == 0
    store.drop_worker("a")
    assert store.n_workers() == 1


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call answers when all begin together."""
    barrier = Barrier(len(calls))

    def begin(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(begin, call) for call in calls]]


@pytest.fixture
def stores(settings: Settings, store: JobStore) -> Iterable[list[JobStore]]:
    """Four connections of their own, as four processes have."""
    clients: list[Redis] = [connect(settings) for _ in range(4)]
    yield [JobStore(client) for client in clients]
    for client in clients:
        client.close()


@pytest.mark.parametrize("attempt", range(5))
def test_of_many_claims_one_is_granted(stores: list[JobStore], toy_job: MakeJob, attempt: int) -> None:
    job = toy_job(1)
    claims = [lambda s=s, n=n: s.claim(job.id, first_shard(job), f"w{n}") for n, s in enumerate(stores)]
    assert sorted(at_once(*claims)) == [False, False, False, True]


@pytest.mark.parametrize("attempt", range(5))
def test_of_many_completions_one_counts(stores: list[JobStore], toy_job: MakeJob, attempt: int) -> None:
    job = toy_job(2)
    one, two = (shard.id for shard in job.plan.shards)
    stores[0].claim(job.id, one, "a")
    stores[0].claim(job.id, two, "a")
    completions = [
        lambda s=s, i=i: s.complete(job.id, i, "a", payload())
        for i, s in zip([one, one, two, two], stores, strict=True)
    ]
    assert sorted(at_once(*completions)) == [False, False, False, True]
    assert status(stores[0], job) is State.FINALIZING


@pytest.mark.parametrize("attempt", range(10))
def test_cancel_against_the_last_completion(stores: list[JobStore], toy_job: MakeJob, attempt: int) -> None:
    job = toy_job(1)
    stores[0].claim(job.id, first_shard(job), "a")
    last, (state, _) = at_once(
        lambda: stores[0].complete(job.id, first_shard(job), "a", payload()), lambda: stores[1].cancel(job.id)
    )
    # Before the completion the worker is still in mid-shard; after it nobody works on the job.
    assert state in ((State.CANCELLED,) if last else (State.CANCELLING,))
    assert status(stores[0], job) is State.CANCELLED
    assert [key.decode() for key in stores[0].client.scan_iter(f"*{job.id}*")] == [keys.job(job.id)]


@pytest.mark.parametrize("attempt", range(5))
def test_of_many_tables_one_is_kept(stores: list[JobStore], toy_job: MakeJob, attempt: int) -> None:
    job = bring_to(stores[0], State.FINALIZING, toy_job)
    assert sorted(at_once(*[lambda s=s: save(s, job.id) for s in stores])) == [False, False, False, True]
    assert stores[0].n_rows(job.id) == 5
    assert len([*stores[0].table_blocks(job.id)]) == 1


@pytest.mark.parametrize("attempt", range(5))
def test_save_against_cancel_against_delete(stores: list[JobStore], toy_job: MakeJob, attempt: int) -> None:
    job = bring_to(stores[0], State.FINALIZING, toy_job)
    at_once(lambda: save(stores[0], job.id), lambda: stores[1].cancel(job.id), lambda: stores[2].delete(job.id))
    end = status(stores[0], job)
    assert end in TERMINAL
    if end is State.SUCCEEDED:
        assert stores[0].n_rows(job.id) == 5
    else:
        assert [key.decode() for key in stores[0].client.scan_iter(f"*{job.id}*")] == [keys.job(job.id)]


# --- jobs that a worker has to plan ----------------------------------------------------------------------------------


def make_unplanned(store: JobStore) -> tuple[JobRecord, Plan]:
    """A job without a plan, and the one that it would get."""
    spec, plan = make_toy(2)
    job = store.create(spec, None)
    assert job is not None
    return job, plan


def test_a_plan_cuts_the_job_once(store: JobStore) -> None:
    job, plan = make_unplanned(store)
    assert not store.set_plan(job.id, "a", plan)  # nobody holds the lease
    assert store.claim(job.id, keys.PLAN, "a")
    assert not store.set_plan(job.id, "b", plan)
    assert store.set_plan(job.id, "a", plan)
    assert not store.set_plan(job.id, "a", plan)
    planned = store.get(job.id)
    assert planned is not None
    assert (planned.plan, planned.status, planned.progress.total) == (plan, State.RUNNING, 2)
    assert finish_shards(store, planned) == [False, True]


def test_a_planning_whose_worker_is_gone_is_sent_again(store: JobStore) -> None:
    job, plan = make_unplanned(store)
    store.claim(job.id, keys.PLAN, "a")
    assert store.retry_stale(job.id, keys.PLAN, -1, 3, 3, ERROR)
    assert not store.set_plan(job.id, "a", plan)
    assert store.claim(job.id, keys.PLAN, "b")
    assert store.set_plan(job.id, "b", plan)


def test_a_job_cancelled_while_it_is_planned_stays_so(store: JobStore) -> None:
    job, plan = make_unplanned(store)
    store.claim(job.id, keys.PLAN, "a")
    assert store.cancel(job.id) == (State.CANCELLING, True)
    assert not store.set_plan(job.id, "a", plan)
    assert store.get(job.id).status is State.CANCELLED


def test_what_is_registered_is_what_was_published_last(store: JobStore) -> None:
    assert (dict(store.registered().models), store.registered().datasets) == ({}, ())
    store.publish(Registered({"toy": FACTS}, ("mine", "also")), Machine(2.5, 10))
    assert store.machine() == Machine(pace=2.5, memory_bytes=10)
    assert (dict(store.registered().models), store.registered().datasets) == ({"toy": FACTS}, ("also", "mine"))
    store.publish(Registered({}, ("mine",)), Machine(1.0, 20))
    assert (dict(store.registered().models), store.registered().datasets) == ({}, ("mine",))

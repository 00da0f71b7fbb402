"""Whose shard is next: jobs take turns, so that a huge one starves nobody; and a worker that is unfit gets none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from celery import Celery

from tests.worker.conftest import make_toy
from tests.worker.real_jobs import plan_real
from tests.worker.test_queue import messages
from worker import keys, runner, sweeper
from worker.queue import make_celery
from worker.runner import Worker
from worker.settings import Settings
from worker.states import State
from worker.store import PACKAGE, JobRecord, JobStore

MakeJob = Callable[..., JobRecord]
FOREVER, AT_ONCE = 3600.0, 0.0  # seconds that a turn lasts


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return make_celery(settings)


@pytest.fixture(autouse=True)
def another_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the workers of other tests, in this process, have found out is forgotten; and nobody waits."""
    monkeypatch.setattr(runner, "_unfit", set())
    monkeypatch.setattr(runner, "UNFIT_S", 0.0)


def take(store: JobStore, turn_s: float, owner: str = "a") -> tuple[str, str] | None:
    """What a worker does with a message: look whose turn it is, and claim."""
    turn = store.next_shard(turn_s)
    assert turn is None or store.claim(*turn, owner)
    return turn


def test_shards_come_in_the_order_of_the_plan(store: JobStore) -> None:
    spec, plan = make_toy(12)
    job = store.create(spec, plan)
    assert job
    assert [take(store, FOREVER) for _ in range(13)] == [*((job.id, shard.id) for shard in plan.shards), None]
    assert store.client.zcard(keys.TURNS) == 0


def test_a_job_is_done_in_one_go_while_its_turn_lasts(store: JobStore, toy_job: MakeJob) -> None:
    jobs = [toy_job(3), toy_job(2)]
    taken = [take(store, FOREVER) for _ in range(5)]
    assert [turn and turn[0] for turn in taken] == [jobs[0].id] * 3 + [jobs[1].id] * 2


def test_a_huge_job_lets_small_ones_go_first_when_its_turn_is_over(store: JobStore, toy_job: MakeJob) -> None:
    huge = toy_job(50)
    assert take(store, AT_ONCE)
    small = [toy_job(1), toy_job(2)]
    store.client.hset(keys.job(huge.id), "turn_began", 0)  # long ago
    names = {huge.id: "huge", small[0].id: "one", small[1].id: "two"}
    taken = []
    for _ in range(6):
        turn = take(store, 60.0)
        assert turn
        taken.append(names[turn[0]])
        store.client.hset(keys.job(turn[0]), "turn_began", 0)
    assert taken == ["one", "two", "huge", "two", "huge", "huge"]


def test_a_shard_that_comes_back_finds_its_job_in_the_line(store: JobStore, toy_job: MakeJob) -> None:
    job = toy_job(1)
    turn = take(store, FOREVER)
    assert turn == (job.id, make_toy(1)[1].shards[0].id)
    assert store.next_shard(FOREVER) is None
    assert store.release(*turn, "a")
    assert take(store, FOREVER, "b") == turn


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_a_job_that_is_over_has_no_turn(store: JobStore, toy_job: MakeJob, end: str) -> None:
    over, other = toy_job(3), toy_job(1)
    store.cancel(over.id) if end == "cancel" else store.fail(over.id, {})
    turn = take(store, FOREVER)
    assert turn
    assert turn[0] == other.id
    assert take(store, FOREVER) is None


def test_messages_of_cancelled_jobs_hold_nobody_up(store: JobStore, celery: Celery, settings: Settings) -> None:
    """The first message that comes is good for whoever has work, whatever it was sent for."""
    cancelled = store.create(*make_toy(50))
    assert cancelled
    store.cancel(cancelled.id)
    spec, plan = plan_real(settings, 60, sites={"count": 5})
    job = store.create(spec, plan)
    assert job
    runner.run_next(Worker(store, celery, settings, "a"))
    record = store.get(job.id)
    assert record
    assert record.progress.done == 1


# --- workers that must not work on a job -----------------------------------------------------------------------------


def test_a_worker_of_another_version_is_refused_and_others_are_not(
    store: JobStore, celery: Celery, settings: Settings
) -> None:
    spec, plan = plan_real(settings, 60, sites={"count": 5})
    newer, same = store.create(spec, plan), store.create(spec, plan)
    assert newer
    assert same
    store.client.hset(keys.job(newer.id), "package", "99.0")
    for _ in plan.shards:
        runner.run_next(Worker(store, celery, settings, "a"))
    progress = [record.progress.done for job in (newer, same) if (record := store.get(job.id))]
    assert progress == [0, len(plan.shards)]
    runner.run_next(Worker(store, celery, settings, "a"))
    assert messages(store.client, keys.SHARD_QUEUE) == [("worker.run_shard", [])], "it is for others to take"
    refusal = store.client.hget(keys.refusals(newer.id), "a")
    assert refusal
    assert f"the API is weight-ablation 99.0, the worker {PACKAGE}" in refusal.decode()
    runner.finalize(Worker(store, celery, settings, "a"), same.id)
    record = store.get(same.id)
    assert record
    assert record.status is State.SUCCEEDED


def test_a_worker_with_other_weights_is_refused_its_shard(
    store: JobStore, celery: Celery, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the same name has other numbers on the second host."""
    from ablation.inputs.models import load_model

    module, _ = load_model("digits_alexnet", folders=settings.folders)
    hosts = []
    for number, scale in enumerate((1.0, 1.0, 1.001)):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save({name: value * scale for name, value in module.state_dict().items()}, folder / "mine.pt")
        hosts.append(settings.model_copy(update={"checkpoint_dir": folder}))
    spec, plan = plan_real(hosts[0], 0.05, model={"name": "digits_alexnet", "weights": "mine.pt"}, sites={"count": 5})
    job = store.create(spec, plan)
    assert job
    shards = [shard.id for shard in plan.shards]
    for here, owner, done in ((hosts[0], "a", 1), (hosts[2], "c", 1), (hosts[1], "b", 2), (hosts[2], "c", 2)):
        runner._loaded.clear()
        monkeypatch.setattr(runner, "_unfit", {job.id} if owner == "c" and done == 2 else set())
        runner.run_next(Worker(store, celery, here, owner))
        record = store.get(job.id)
        assert record
        assert (record.status, record.progress.done) == (State.RUNNING, done)
    assert store.client.hkeys(keys.refusals(job.id)) == [b"c"]
    assert store.client.exists(keys.attempts(job.id)) == 0, "to be refused is no failed attempt"
    assert len(shards) > 2


def test_where_every_worker_refuses_a_job_it_fails_with_the_reason(
    store: JobStore, celery: Celery, settings: Settings
) -> None:
    spec, plan = plan_real(settings, 60, sites={"count": 5})
    job = store.create(spec, plan)
    assert job
    store.client.hset(keys.job(job.id), "package", "99.0")
    for worker in ("a", "b"):
        store.note_worker(worker)
    runner.run_next(Worker(store, celery, settings, "a"))
    at_once = settings.model_copy(update={"lost_s": -1.0})
    sweeper.sweep(store, celery, at_once)
    record = store.get(job.id)
    assert record
    assert record.status is State.QUEUED, "worker b may be fit"
    runner._unfit.clear()
    runner.run_next(Worker(store, celery, settings, "b"))
    sweeper.sweep(store, celery, settings)
    record = store.get(job.id)
    assert record
    assert record.status is State.QUEUED, "one that is fit may be about to start"
    sweeper.sweep(store, celery, at_once)
    record = store.get(job.id)
    assert record
    assert record.status is State.FAILED
    assert record.error
    assert record.error["type"] == "no-worker-fits"
    assert "99.0" in record.error["detail"]


def test_the_same_data_are_told_from_others() -> None:
    from ablation.cache import hash_of
    from ablation.inputs.data import draw_examples, load_data, tell_apart

    test, train = load_data("digits", split="test"), load_data("digits", split="train")
    every = draw_examples("all", None, 100)
    hashes = [
        hash_of(tell_apart(*given)) for given in ((test, every), (test, every), (train, every), (test, every[1:]))
    ]
    assert hashes[0] == hashes[1]
    assert len({*hashes}) == 3

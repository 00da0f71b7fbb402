import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ablation.errors import Cancelled, DataError, ProofError, SpecError
from ablation.inputs.catalog import NOTHING
from ablation.job import load_job, say_date
from ablation.machine import Machine
from ablation.run import finish_job
from ablation.shard import run_shard
from ablation.spec import make_spec
from ablation.statistics import make_summary
from tests.ablation.inputs.test_mnist_and_cifar import write_mnist
from tests.worker.conftest import about_of
from tests.worker.real_jobs import encode, plan_real, run_undisturbed
from tests.worker.test_queue import messages
from worker import codec, keys, planner, runner
from worker.queue import make_celery
from worker.runner import Worker
from worker.settings import Settings
from worker.states import State
from worker.store import JobRecord, JobStore
from worker.watchdog import Progress

MakeJob = Callable[..., JobRecord]
SITES = {"count": 5, "seed": 0}


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return make_celery(settings)


@pytest.fixture
def quick_job(store: JobStore, settings: Settings) -> JobRecord:
    """A real job of a few shards that take a blink."""
    spec, plan = plan_real(settings, 0.05, sites=SITES)
    assert len(plan.shards) >= 4
    return store.create(spec, plan)


def reload(store: JobStore, job: JobRecord) -> JobRecord:
    record = store.get(job.id)
    assert record
    return record


def test_shards_in_any_order_give_the_table_of_one_process(
    store: JobStore, celery: Celery, settings: Settings, quick_job: JobRecord
) -> None:
    ids = [shard.id for shard in quick_job.plan.shards]
    for shard_id in [ids[2], ids[0], ids[2], *ids[:0:-1]]:
        runner.run_shard(Worker(store, celery, settings, "a"), quick_job.id, shard_id)
    assert reload(store, quick_job).status is State.FINALIZING
    assert messages(store.client, keys.FINALIZE_QUEUE) == [("worker.finalize", [quick_job.id])]
    runner.finalize(Worker(store, celery, settings, "b"), quick_job.id)
    runner.finalize(Worker(store, celery, settings, "b"), quick_job.id)

    assert reload(store, quick_job).status is State.SUCCEEDED
    expected = run_undisturbed(settings, quick_job.spec, quick_job.plan)
    assert b"".join(store.table_blocks(quick_job.id)) == encode(expected)
    told, about = about_of(store, quick_job.id), dict(expected.about)
    assert 0 < told.pop("seconds") < 60
    about.pop("seconds")
    assert told.pop("date") == say_date(quick_job.created_at)
    assert about.pop("date") is about["command"] is None
    assert told == json.loads(codec.encode_json(about))
    summary = make_summary(expected)
    assert store.summary(quick_job.id)["splits"] == json.loads(codec.encode_json(summary["splits"]))
    assert [*store.leases_of("a"), *store.leases_of("b")] == []


def test_a_whole_layer_by_its_rows_takes_no_more_of_redis_than_was_planned(
    store: JobStore, celery: Celery, settings: Settings
) -> None:
    spec, plan = plan_real(settings, 60, layer="fc2", sites="all", engine="response")
    job = store.create(spec, plan)
    n_bytes = held_bytes(store)
    for shard in reversed(plan.shards):
        runner.run_shard(Worker(store, celery, settings, "a"), job.id, shard.id)
    n_bytes = held_bytes(store) - n_bytes
    assert len({shard.examples for shard in plan.shards if shard.split == "test"}) == 1
    runner.finalize(Worker(store, celery, settings, "b"), job.id)
    assert reload(store, job).status is State.SUCCEEDED
    table = run_undisturbed(settings, spec, plan)
    assert b"".join(store.table_blocks(job.id)) == encode(table)
    assert len(table) == store.n_rows(job.id) == 256 * 256
    rows = store.read_rows(job.id, 256 * 200, 3)
    assert (rows["out"].tolist(), rows["in"].tolist()) == ([200] * 3, [0, 1, 2])
    assert [*rows] == [*table.columns]
    together = n_bytes + sum(map(len, store.table_blocks(job.id)))
    assert 0.97 <= together / plan.estimate.redis_bytes <= 1.25  # servers' allocators round up by up to a quarter


def held_bytes(store: JobStore) -> int:
    """What Redis holds in all keys."""
    return sum(store.client.memory_usage(key, samples=0) for key in store.client.scan_iter("*"))


def test_the_model_is_loaded_once_for_shards_of_one_job(
    settings: Settings, quick_job: JobRecord, store: JobStore, celery: Celery
) -> None:
    other, worker = store.create(quick_job.spec, quick_job.plan), Worker(store, celery, settings, "a")
    first = runner.load(worker, quick_job)
    assert runner.load(worker, quick_job) is first
    assert runner.load(worker, other) is not first
    assert len(runner._loaded) == 1
    runner._loaded.clear()


def test_a_task_that_is_not_wanted_does_nothing(
    store: JobStore, celery: Celery, settings: Settings, quick_job: JobRecord
) -> None:
    shard_id = quick_job.plan.shards[0].id
    store.claim(quick_job.id, shard_id, "somebody else")
    before = reload(store, quick_job)
    runner.run_shard(Worker(store, celery, settings, "a"), quick_job.id, shard_id)
    runner.run_shard(Worker(store, celery, settings, "a"), quick_job.id, "no-such-shard")
    runner.run_shard(Worker(store, celery, settings, "a"), "no-such-job", shard_id)
    runner.finalize(Worker(store, celery, settings, "a"), quick_job.id)
    assert reload(store, quick_job) == before


def test_cancelling_takes_effect_within_one_batch(
    store: JobStore, celery: Celery, settings: Settings, quick_job: JobRecord
) -> None:
    shard_id = quick_job.plan.shards[0].id
    store.claim(quick_job.id, shard_id, "a")
    batches = []
    with runner.settled(Worker(store, celery, settings, "a"), quick_job.id, shard_id) as heart:
        for batch in range(10):
            if batch == 3:
                assert store.cancel(quick_job.id).state is State.CANCELLING
            heart.on_batch(batch / 10)
            batches.append(batch)
    assert batches == [0, 1, 2]
    assert reload(store, quick_job).status is State.CANCELLED


def test_a_lease_that_is_taken_away_stops_the_shard(
    store: JobStore, celery: Celery, settings: Settings, quick_job: JobRecord
) -> None:
    shard_id = quick_job.plan.shards[0].id
    store.claim(quick_job.id, shard_id, "a")
    stopped = True
    with runner.settled(Worker(store, celery, settings, "a"), quick_job.id, shard_id) as heart:
        assert store.release(quick_job.id, shard_id, "a")
        heart.on_batch(0.5)
        stopped = False
    assert stopped
    assert store.claim(quick_job.id, shard_id, "b"), "it waits for another"


def test_data_that_are_damaged_later_are_named_as_they_were_given(
    store: JobStore, celery: Celery, settings: Settings, tmp_path: Path
) -> None:
    here = settings.model_copy(update={"data_dir": tmp_path})
    write_mnist(tmp_path / "deep" / "er")
    data = {"name": "mnist", "root": "deep/er", "test": "all"}
    spec = make_spec({"model": {"name": "digits_alexnet"}, "layer": "fc2", "data": data, "sites": SITES})
    plan = planner.plan_job(spec, here, NOTHING)
    assert plan
    job = store.create(spec, plan)
    (tmp_path / "deep" / "er" / "t10k-labels-idx1-ubyte").unlink()
    runner.run_shard(Worker(store, celery, here, "a"), job.id, plan.shards[0].id)
    error = reload(store, job).error
    assert error
    assert error["detail"].startswith(
        "data.root: got 'deep/er'; allowed: a folder with MNIST/raw/ and in it t10k-labels"
    )
    with pytest.raises(SpecError, match=r"^data\.root: got 'deep/er'; allowed"):
        planner.plan_job(spec, here, NOTHING)


def test_an_error_of_ours_fails_the_job_with_its_words(store: JobStore, celery: Celery, settings: Settings) -> None:
    """The data were there when the job was planned and are gone now."""
    spec, plan = plan_real(settings, 60, sites=SITES)
    gone = spec.model_dump() | {"data": {"name": "imagefolder", "root": "gone", "test": "all"}}
    job = store.create(make_spec(gone), plan)
    runner.run_shard(Worker(store, celery, settings, "a"), job.id, plan.shards[0].id)
    record = reload(store, job)
    assert record.status is State.FAILED
    assert record.error
    assert set(record.error) == {"type", "title", "detail"}
    assert record.error["type"] in ("data-error", "spec-error")
    assert "gone" in record.error["detail"]
    assert str(settings.home) not in str(record.error)
    assert "Traceback" not in str(record.error)


def test_an_unexpected_error_is_tried_again_then_fails_the_job(
    store: JobStore,
    celery: Celery,
    settings: Settings,
    quick_job: JobRecord,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One partial has been damaged in Redis."""
    for shard in quick_job.plan.shards:
        store.claim(quick_job.id, shard.id, "a")
        store.complete(quick_job.id, shard.id, "a", b"not a partial, but a /secret/path")
    with caplog.at_level(logging.ERROR):
        for _ in range(settings.max_attempts):
            assert reload(store, quick_job).status is State.FINALIZING
            runner.finalize(Worker(store, celery, settings, "a"), quick_job.id)
    assert messages(store.client, keys.FINALIZE_QUEUE) == [("worker.finalize", [quick_job.id])] * (
        settings.max_attempts - 1
    )
    record = reload(store, quick_job)
    assert record.status is State.FAILED
    assert record.error
    assert record.error["type"] == "unexpected-error"
    assert "the merge" in record.error["detail"]
    assert "secret" not in str(record.error)
    assert "Traceback" in caplog.text, "the log has what the job does not show"


def test_a_table_that_fails_its_proof_fails_the_job(
    store: JobStore, celery: Celery, settings: Settings, quick_job: JobRecord
) -> None:
    """One number of one partial is off: the reference knows better."""
    job = load_job(quick_job.spec, quick_job.plan, settings.folders)
    partials = [run_shard(job, shard) for shard in quick_job.plan.shards]
    finish_job(job, partials, seconds=1.0)
    partials[0].proof[0] += 1e-3
    with pytest.raises(ProofError):
        finish_job(job, partials, seconds=1.0)
    for shard, partial in zip(quick_job.plan.shards, partials, strict=True):
        store.claim(quick_job.id, shard.id, "a")
        store.complete(quick_job.id, shard.id, "a", codec.encode_partial(partial))
    runner.finalize(Worker(store, celery, settings, "a"), quick_job.id)
    record = reload(store, quick_job)
    assert record.status is State.FAILED
    assert record.error
    assert record.error["type"] == "proof-error"
    assert record.error["title"] == ProofError.__doc__


def test_the_heart_beats_on_while_redis_is_away(caplog: pytest.LogCaptureFixture) -> None:
    away = JobStore(Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0)))
    heart = runner.Heartbeat(away, "job", "shard", "a", Progress())
    heart.on_batch(0.5)
    assert heart.wanted
    assert "no beat" in caplog.text


def test_the_heart_keeps_the_lease_between_batches(
    store: JobStore, celery: Celery, settings: Settings, toy_job: MakeJob
) -> None:
    job = toy_job(1)
    shard_id = job.plan.shards[0].id
    store.claim(job.id, shard_id, "a")
    quick = settings.model_copy(update={"beat_s": 0.05})
    with runner.beating(Worker(store, celery, quick, "a"), job.id, shard_id) as heart:
        heart.stopping.wait(0.5)
        assert [*store.stale_leases(0.3)] == []
    heart.stopping.wait(0.5)
    store.cancel(job.id)
    with pytest.raises(Cancelled):
        heart.on_batch(1.0)


def test_host_paths_are_hidden(settings: Settings) -> None:
    text = f"{settings.data_dir}/imagenet/train/n01/x.JPEG: broken; see '/etc/a/b.conf' or https://pytorch.org/docs/x"
    assert runner.hide_paths(text, settings) == (
        "data/imagenet/train/n01/x.JPEG: broken; see 'b.conf' or https://pytorch.org/docs/x"
    )
    error = runner.make_error(DataError("1/2 of (N, C) / 3"), settings)
    assert error["detail"] == "1/2 of (N, C) / 3"
    assert error["title"] == DataError.__doc__


# --- jobs that a worker has to plan ----------------------------------------------------------------------------------

STRIPES = {
    "model": {"name": "stripe_net"},
    "layer": "3",
    "data": {"name": "stripes", "train": "all", "test": {"per_class": 4}},
    "sites": SITES,
}


@pytest.mark.usefixtures("registered")
def test_a_worker_plans_what_only_it_can_open(store: JobStore, celery: Celery, settings: Settings) -> None:
    store.publish(runner.find_registered(), Machine(1.0, 1 << 40))
    published = store.registered()
    assert {"stripe_net", "batch_net"} < set(published.models)
    assert "broken_net" not in published.models  # it can't be described
    spec = make_spec(STRIPES)
    assert planner.plan_job(spec, settings, published) is None
    job = store.create(spec, None)
    assert job is not None
    assert (job.plan, job.progress.total) == (None, 1)

    for _ in range(2):
        runner.plan_job(Worker(store, celery, settings, "a"), job.id)
    planned = reload(store, job)
    assert planned.plan is not None
    assert [(split.name, split.n_examples, split.per_class) for split in planned.plan.splits] == [
        ("train", 60, None),
        ("test", 12, 4),
    ]
    shards = [shard.id for shard in planned.plan.shards]
    assert messages(store.client, keys.SHARD_QUEUE) == [("worker.run_shard", [])] * len(shards)
    for shard in shards:
        runner.run_shard(Worker(store, celery, settings, "b"), job.id, shard)
    runner.finalize(Worker(store, celery, settings, "b"), job.id)
    assert reload(store, job).status is State.SUCCEEDED
    assert b"".join(store.table_blocks(job.id)) == encode(run_undisturbed(settings, spec, planned.plan))


@pytest.mark.usefixtures("registered")
def test_what_a_job_can_t_name_is_not_offered_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """The example package registers an `alexnet`, which is built in, and a net that can't be made."""
    offered = runner.find_registered()
    names = "stripe_net batch_net mean_net restless_net deadly_net hungry_net endless_net leaving_net"
    assert set(offered.models) == set(names.split())
    assert set(offered.datasets) == {"stripes", "broken_data"}
    said = "\n".join(caplog.messages)
    assert "not offered: the registered model 'alexnet', since a built-in one has that name; rename it" in said
    assert "not offered: the registered model 'broken_net' can't be made" in said


@pytest.mark.usefixtures("registered")
def test_what_can_not_be_planned_fails_with_the_reason(store: JobStore, celery: Celery, settings: Settings) -> None:
    job = store.create(make_spec({**STRIPES, "data": {"name": "stripes", "train": {"count": 61}}}), None)
    assert job is not None
    runner.plan_job(Worker(store, celery, settings, "a"), job.id)
    failed = reload(store, job)
    assert failed.status is State.FAILED
    assert failed.error is not None
    assert failed.error["detail"] == "data.train.count: got 61; allowed: 1 to 60, the examples of this split."

"""Shards of whole rows: all examples each, the way to the layer computed once by all of them together."""

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ablation.cache import Activations, find_next, find_start
from ablation.cost import split_s
from ablation.errors import Cancelled
from ablation.inputs import catalog
from ablation.inputs.folders import Folders
from ablation.job import Job, load_job
from ablation.partial import held
from ablation.plan import PlanOptions, ProofPlan, make_plan
from ablation.run import finish_job, run_job
from ablation.shard import N_READ_TWICE, check_examples, run_shard
from ablation.spec import make_spec
from ablation.table import ImportanceTable

PATHS = ("direct", "response")  # the first can take the cut of the second: both need only what comes to the layer
N_BATCHES = 12  # of the training split, and 5 of the test split


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def whole_job(
    home: Path, cache: Path, path: str = "direct", n_shards: int = 4, cache_bytes: int = 1 << 30, **asked: Any
) -> Job:
    """All weights of the built-in model's last layer; its own cache, and the trained model of all tests here."""
    folders = Folders(home, home, home)
    fields = {
        "model": {"name": "digits_alexnet"},
        "layer": "fc3",
        "data": {"name": "digits", "train": {"per_class": 18, "seed": 1}, "test": {"count": 70}},
        "sites": "all",
    }
    spec = make_spec(fields | asked)
    facts, counts = catalog.model_facts("digits_alexnet"), catalog.split_counts(spec.data, folders)
    options = PlanOptions(threads=1, batch_size=15, engine="response")
    layer = catalog.find_layer(facts, spec.layer)
    seconds = split_s(70, facts, layer, "response", n_sites=layer.n_weights, batch_size=15, lanes=1, threads=1)
    plan = make_plan(spec, facts, counts, replace(options, shard_s=seconds / n_shards))
    job = load_job(spec, plan.model_copy(update={"path": path}), folders, device="cpu", name="one")
    limited = Activations(cache, cache_bytes, path, 250) if cache_bytes else None
    return replace(job, activations=limited)


def assert_same_bytes(a: ImportanceTable, b: ImportanceTable) -> None:
    for name, values in a.columns.items():
        assert values.tobytes() == b.columns[name].tobytes(), name


@pytest.fixture
def read_indices(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each example is read, by its split."""
    seen: Counter[tuple[str, int]] = Counter()

    def watch(job: Job) -> Job:
        def watched(name: str, dataset: Any) -> Any:
            class Watched(torch.utils.data.Dataset):
                def __len__(self) -> int:
                    return len(dataset)

                def __getitem__(self, index: int) -> Any:
                    seen[name, index] += 1
                    return dataset[index]

            return Watched()

        splits = {name: replace(split, dataset=watched(name, split.dataset)) for name, split in job.splits.items()}
        return replace(job, splits=splits)

    seen.watch = watch  # type: ignore[attr-defined]
    return seen


@pytest.mark.parametrize("path", PATHS)
def test_with_and_without_a_cache_the_same_bytes(path: str, home: Path, tmp_path: Path) -> None:
    job = whole_job(home, tmp_path, path)
    assert len(job.plan.shards) > 4
    table = run_job(job)
    assert len([*tmp_path.glob("*/*")]) == N_BATCHES + 5  # the notes are gone with the job
    assert_same_bytes(table, run_job(replace(job, activations=None)))
    assert_same_bytes(table, run_job(replace(job, name="again")))
    assert_same_bytes(table, run_job(whole_job(home, tmp_path / "small", path, cache_bytes=2_000)))
    assert not [*(tmp_path / "small").glob("**/*")]
    assert table.about["proof"]["arithmetic_error"] <= 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_any_cut_agree_with_the_direct_path(path: str, home: Path, tmp_path: Path) -> None:
    spec = whole_job(home, tmp_path).spec
    facts, counts = catalog.model_facts("digits_alexnet"), catalog.split_counts(spec.data, Folders(home, home, home))
    job = whole_job(home, tmp_path, path, n_shards=5)
    expected = run_job(
        replace(job, plan=make_plan(spec, facts, counts, PlanOptions(1, batch_size=64, engine="direct")))
    )
    found = run_job(job).columns
    for name, values in expected.columns.items():
        scale = np.abs(values).max()
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6 * scale, err_msg=name)


@pytest.mark.parametrize(("path", "layer"), [("direct", "fc3"), ("response", "fc3"), ("response", "fc1")])
def test_an_example_is_read_once_and_not_once_a_shard(
    home: Path, tmp_path: Path, read_indices, path: str, layer: str
) -> None:
    job = read_indices.watch(whole_job(home, tmp_path, path, layer=layer))
    n_shards = len([shard for shard in job.plan.shards if shard.split == "train"])
    assert n_shards >= 4
    check_examples(job, "train")
    checked = {index for _, index in read_indices}  # these are read twice more, to see that they don't change
    assert len(checked) == N_READ_TWICE
    read_indices.clear()
    for shard in job.plan.shards:
        run_shard(job, shard)
    split = job.splits["train"]
    first = split.indices[:15]
    others = [index for index in split.indices[32:] if index not in checked]  # the model is checked on the first 32
    assert {read_indices["train", int(index)] for index in others} == {1}
    assert max(read_indices["train", int(index)] for index in first) <= 2 * n_shards + 5  # with 2 of `check_examples`
    read_indices.clear()
    for shard in job.plan.shards:  # the control: without a cache
        run_shard(replace(job, activations=None), shard)
    assert min(read_indices["train", int(index)] for index in others) == n_shards


def test_two_at_once_compute_half_each(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [whole_job(home, tmp_path, n_shards=2) for _ in range(2)]
    computed: list[str] = []
    put = Activations.put
    both = threading.Barrier(2)

    def counted(self: Activations, address: str, record: Any, n_examples: int) -> None:
        if not isinstance(record, tuple):  # which is a note
            computed.append(threading.current_thread().name)
            if len(computed) <= 2:
                both.wait(60)  # they begin at once
        put(self, address, record, n_examples)

    monkeypatch.setattr(Activations, "put", counted)
    shards = [shard for shard in jobs[0].plan.shards if shard.split == "train"][:2]
    partials: dict[str, Any] = {}

    def work(job: Job, k: int) -> None:
        partials[shards[k].id] = run_shard(job, shards[k])

    threads = [threading.Thread(target=work, args=(jobs[k], k), name=str(k)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    count = Counter(computed)
    assert N_BATCHES <= count.total() <= N_BATCHES + 4  # each may find one or two that the other is just at
    assert min(count.values()) >= 2
    for shard in shards:
        alone = run_shard(replace(jobs[0], activations=None), shard)
        assert alone.delta.tobytes() == partials[shard.id].delta.tobytes()


def test_a_cache_that_is_emptied_in_mid_job_changes_no_byte(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = whole_job(home, tmp_path)
    shard = job.plan.shards[1]
    expected = run_shard(replace(job, activations=None), shard)
    hold, held = Activations.hold, []

    def emptying(self: Activations, address: str) -> bool:
        if len(held) == 3:
            for path in tmp_path.glob("*/*"):
                path.unlink()
        held.append(hold(self, address))
        return held[-1]

    monkeypatch.setattr(Activations, "hold", emptying)
    assert run_shard(job, shard).delta.tobytes() == expected.delta.tobytes()
    assert held == [True, True, True, False]  # then there are no notes either


def test_progress_and_cancelling_go_through_the_filling(home: Path, tmp_path: Path) -> None:
    job = whole_job(home, tmp_path)
    seen: list[float] = []
    run_shard(job, job.plan.shards[0], on_batch=seen.append)
    assert seen == sorted(seen)
    assert len(seen) >= 2 * N_BATCHES
    assert (seen[0], seen[-1]) == (0, pytest.approx(1))
    again: list[float] = []
    run_shard(job, job.plan.shards[1], on_batch=again.append)
    assert again == sorted(again)
    assert len(again) < len(seen)  # nothing was missing

    def cancel(fraction: float) -> None:
        cancelled.append(fraction)
        if fraction > 0.1:
            raise Cancelled("enough")

    cancelled: list[float] = []
    with pytest.raises(Cancelled):
        run_shard(whole_job(home, tmp_path / "other"), job.plan.shards[1], on_batch=cancel)
    assert 0 < len([*(tmp_path / "other").glob("*/*")]) < 2 * N_BATCHES
    assert cancelled[-1] < 0.2


def test_places_to_begin_are_spread_and_jumps_halve_what_is_left() -> None:
    assert [find_start(k, 80) for k in range(8)] == [0, 40, 20, 60, 10, 50, 30, 70]
    assert all(0 <= find_start(k, 3) < 3 for k in range(100))
    assert find_next([2, 3, 4], 3) == 3
    assert find_next([0, 1, 5, 6, 7, 8, 9, 20], 2) == 7
    assert find_next([4], 0) == 4


def test_a_partial_holds_what_is_asked_for(home: Path, tmp_path: Path) -> None:
    plain = whole_job(home, tmp_path)
    more = replace(plain, spec=plain.spec.model_copy(update={"top1": True}))
    unproved = replace(plain, plan=plain.plan.model_copy(update={"proof": ProofPlan(n_sites=0, examples={})}))
    train, test = plain.plan.shards[0], plain.plan.shards[-1]
    assert list(held(run_shard(plain, train))) == ["delta", "delta_squared", "touched", "proof", "within"]
    assert list(held(run_shard(plain, test))) == ["delta", "delta_squared", "touched", "proof"]
    assert list(held(run_shard(more, test))) == ["delta", "delta_squared", "touched", "proof", "broken", "fixed"]
    assert list(held(run_shard(unproved, test))) == ["delta", "delta_squared", "touched"]
    assert run_shard(plain, test).touched.dtype == np.int32


def test_partials_may_come_one_at_a_time(home: Path, tmp_path: Path) -> None:
    job = whole_job(home, tmp_path)
    partials = [run_shard(job, shard) for shard in job.plan.shards]
    assert_same_bytes(finish_job(job, iter(partials), seconds=0.0), run_job(job))
    with pytest.raises(ValueError, match="shorter"):
        finish_job(job, iter(partials[:-1]), seconds=0.0)

"""Criteria beside the truth: `taylor1` in whole jobs, and a criterion that only these tests know through every door."""

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablation
from ablation import criteria
from ablation.cache import Activations
from ablation.criteria import Criterion
from ablation.errors import SpecError
from ablation.export import write_csv, write_parquet
from ablation.inputs import catalog
from ablation.inputs.folders import Folders
from ablation.job import Job, load_job
from ablation.partial import PartialSums
from ablation.plan import Plan, PlanOptions, make_plan
from ablation.run import finish_job, run_job
from ablation.shard import run_shard
from ablation.spec import make_spec
from ablation.statistics import make_summary, summary_lines
from ablation.table import ImportanceTable
from tests.ablation.tables import heavy_deltas, sums_of, table_of
from tests.api.conftest import serving
from tests.cases import Case, make_cases
from worker import runner
from worker.queue import make_celery
from worker.settings import Settings
from worker.states import State
from worker.store import JobStore


@pytest.fixture
def magnitude2(monkeypatch: pytest.MonkeyPatch) -> Criterion:
    """A criterion that needs no statistic, registered for one test."""
    criterion = Criterion("magnitude2", "the square of the weight", (), lambda weights, *_: weights * weights)
    monkeypatch.setitem(criteria.CRITERIA, criterion.name, criterion)
    return criterion


def by_autograd(model: nn.Module, parameter: str, inputs: Tensor, labels: Tensor) -> np.ndarray:
    """g of every weight: the gradient of the mean cross-entropy over all examples at once, in float64."""
    model = copy.deepcopy(model).double().eval()
    output = model(inputs.double().clone())
    loss = F.cross_entropy(output if isinstance(output, Tensor) else output.logits, labels)
    weights = model.get_parameter(parameter)
    return torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)[0].reshape(-1).numpy()


SAMPLED = {"count": 40, "seed": 3}
SOME = [case for case in make_cases() if case.name in ("convnet", "tied", "attention", "relu-mlp", "module-twice")]


@pytest.mark.parametrize(("precision", "value"), [("mixed", 0.0), ("float64", 0.75)])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_taylor1_predicts_g_times_the_step(case: Case, precision: str, value: float) -> None:
    cut = len(case.labels) // 2
    splits = {"train": (case.inputs[:cut], case.labels[:cut]), "test": (case.inputs[cut:], case.labels[cut:])}
    n_weights = case.model.get_parameter(case.parameter).numel()
    indices = np.arange(n_weights)[:: max(1, n_weights // 5)][::-1].copy()
    table = ablation.ablate(
        case.model, case.parameter, splits, indices, value=value, precision=precision, batch_size=5, verify=1,
        criteria=["taylor1"], progress=False,
    )  # fmt: skip
    assert list(table.columns)[-3:] == ["touched_test", "taylor1_train", "taylor1_test"]
    weights = case.model.get_parameter(case.parameter).detach().double().reshape(-1).numpy()
    for split, (inputs, labels) in splits.items():
        expected = by_autograd(case.model, case.parameter, inputs, labels) * (value - weights)
        scale = np.abs(expected).max()
        bound = 1e-12 if precision == "float64" else 2e-6  # what comes before the layer is float32
        found = table.columns[f"taylor1_{split}"]
        assert np.abs(found - expected[indices]).max() <= bound * scale


def test_small_steps_are_predicted_well_and_large_ones_are_not() -> None:
    """Taylor's series itself: what first order leaves out shrinks as the square of the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    data = {"test": (torch.randn(40, 5), torch.randint(3, (40,)))}
    errors = []
    for scale in (1.0, 0.1, 0.01):
        with torch.no_grad():
            model[0].weight.fill_(0.3 * scale).mul_(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)))
        table = ablation.ablate(model, "0", data, precision="float64", criteria=["taylor1"], progress=False)
        utility, predicted = table.columns["utility_test"], table.columns["taylor1_test"]
        errors.append(np.abs(utility - predicted).max() / np.abs(utility).max())
    assert errors[0] > 1e-2
    assert errors[2] < 2e-2 * errors[0]
    found = table.summary()["criteria"]["taylor1"]["test"]
    assert found["pearson"] > 0.999
    assert found["spearman"] > 0.99
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, utility)[0, 1])
    assert ("test: utility with taylor1", "Pearson 1.000") in [
        (label, said[:13]) for label, said in summary_lines(table.summary())
    ]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Shared by the tests of this file, so that the demo model is trained once."""
    home = tmp_path_factory.mktemp("home")
    return Folders(data=home / "data", checkpoints=home / "checkpoints", cache=home / "cache")


def digits_job(folders: Folders, *, shard_s: float = 60.0, **asked: Any) -> Job:
    """A planned job on the built-in model; both splits have a last short batch."""
    fields = {
        "model": {"name": "digits_alexnet"},
        "layer": "fc3",
        "data": {"name": "digits", "train": {"per_class": 7, "seed": 1}, "test": {"count": 70}},
        "sites": {"count": 40, "seed": 3},
        "criteria": ["taylor1"],
    }
    return load_job((spec := make_spec(fields | asked)), plan_of(spec, folders, shard_s), folders, device="cpu")


def plan_of(spec: Any, folders: Folders, shard_s: float = 60.0, **options: Any) -> Plan:
    facts, counts = catalog.model_facts("digits_alexnet"), catalog.split_counts(spec.data, folders)
    return make_plan(spec, facts, counts, PlanOptions(1, batch_size=16, shard_s=shard_s, **options))


def examples_of(job: Job, split: str) -> tuple[Tensor, Tensor]:
    part = job.splits[split]
    pairs = [part.dataset[int(index)] for index in part.indices]
    return torch.stack([pair[0] for pair in pairs]), torch.tensor([pair[1] for pair in pairs])


@pytest.mark.parametrize(
    ("layer", "sites", "shard_s"), [("fc3", SAMPLED, 3e-4), ("conv2", SAMPLED, 3e-2), ("fc3", "all", 1e-5)]
)
def test_shards_on_any_worker_in_any_order_give_the_same_bytes(
    folders: Folders, layer: str, sites: Any, shard_s: float
) -> None:
    job = digits_job(folders, layer=layer, sites=sites, shard_s=shard_s)
    assert len(job.plan.shards) >= 6
    assert len({shard.sites for shard in job.plan.shards if shard.examples[0] == 0}) >= (3 if sites == "all" else 1)
    partials = {}
    for shard in reversed(job.plan.shards):  # each on a worker of its own, which has loaded the job itself
        partials[shard.id] = run_shard(replace(job, name=shard.id, activations=None), shard)
    table = finish_job(job, [partials[shard.id] for shard in job.plan.shards], seconds=0.0)
    together = run_job(job)
    for name, values in table.columns.items():
        assert values.tobytes() == together.columns[name].tobytes(), name
    for split in ("train", "test"):
        g = by_autograd(job.model, f"{layer}.weight", *examples_of(job, split))[table.columns["index"]]
        found, expected = table.columns[f"taylor1_{split}"], -g * table.columns["weight"]
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    # One shard alone: other batches of the prefix round otherwise, and nothing else differs.
    alone = run_job(digits_job(folders, layer=layer, sites=sites, shard_s=1e6))
    scale = np.abs(table.columns["taylor1_test"]).max()
    np.testing.assert_allclose(alone.columns["taylor1_test"], table.columns["taylor1_test"], rtol=0, atol=1e-6 * scale)


def test_with_activations_from_the_cache_the_same_bytes(folders: Folders, tmp_path: Path) -> None:
    """Shards of rows find batches in the cache without reading them; gradients need the inputs, which are read then."""
    job = digits_job(folders, sites="all", shard_s=1e-5)
    cached = replace(job, activations=Activations(tmp_path, 1 << 30, "these tests", 140))
    expected, filled, found = run_job(job), run_job(cached), run_job(cached)
    assert [*tmp_path.glob("*/*")]
    for name, values in expected.columns.items():
        assert values.tobytes() == filled.columns[name].tobytes() == found.columns[name].tobytes(), name


def test_a_job_without_criteria_has_the_plan_and_the_partials_of_before(folders: Folders) -> None:
    plain, asked = digits_job(folders, criteria=[]), digits_job(folders)
    assert plain.plan.gradient_batch_size is None
    assert asked.plan.gradient_batch_size == 16
    assert run_shard(plain, plain.plan.shards[0]).statistics == {}
    assert list(run_shard(asked, asked.plan.shards[0]).statistics) == ["gradient"]
    table = run_job(plain)
    assert not [name for name in table.columns if name.startswith("taylor1")]
    assert make_summary(table)["criteria"] == {}


@pytest.mark.parametrize("sites", [{"count": 40}, "all"])
def test_the_plan_counts_what_gradients_take(folders: Folders, sites: Any) -> None:
    plain, asked = (
        plan_of(digits_job(folders, sites=sites, criteria=names).spec, folders, is_shared=False)
        for names in ([], ["taylor1"])
    )
    assert [shard.sites for shard in asked.shards] == [shard.sites for shard in plain.shards]
    more_bytes = sum(8 * (shard.sites[1] - shard.sites[0]) for shard in asked.shards) + asked.n_sites * 2 * 8
    assert asked.estimate.redis_bytes - plain.estimate.redis_bytes == more_bytes
    assert asked.estimate.memory_bytes - plain.estimate.memory_bytes > asked.n_sites * 4 * 8
    assert asked.estimate.passes >= plain.estimate.passes + 1  # forward, and back from the layer on


def test_every_shard_of_rows_counts_its_passes(folders: Folders) -> None:
    spec = digits_job(folders, sites="all", layer="fc2").spec
    few, many = (plan_of(spec, folders, shard_s) for shard_s in (60.0, 1e-4))
    assert len(many.shards) > 4 * len(few.shards)
    assert many.estimate.passes - few.estimate.passes >= 0.9 * (len(many.shards) - len(few.shards)) / 2


def test_columns_stand_in_the_order_of_the_registry_and_last(magnitude2: Criterion) -> None:
    deltas = {"train": heavy_deltas(5, 40), "test": heavy_deltas(5, 30)}
    sums = {name: with_gradient(sums_of(part), k) for k, (name, part) in enumerate(deltas.items())}
    table = table_of(sums, top1=True, criteria=["magnitude2", "taylor1"])
    assert list(table.columns)[11:] == [
        *("broken_train", "fixed_train", "broken_test", "fixed_test"),
        *("taylor1_train", "magnitude2_train", "taylor1_test", "magnitude2_test"),
    ]
    weights = table.columns["weight"]
    np.testing.assert_array_equal(table.columns["magnitude2_test"], weights * weights)
    expected = -weights * sums["test"].statistics["gradient"] / 30
    np.testing.assert_allclose(table.columns["taylor1_test"], expected, rtol=1e-15)
    assert [*make_summary(table)["criteria"]] == ["taylor1", "magnitude2"]


def with_gradient(sums: PartialSums, seed: int) -> PartialSums:
    return replace(sums, statistics={"gradient": np.random.default_rng(seed).standard_normal(len(sums.delta))})


def test_sites_that_were_not_run_and_gradients_that_are_not_finite_have_no_prediction() -> None:
    sums = sums_of(heavy_deltas(5, 30))
    sums = replace(sums, statistics={"gradient": np.array([1.0, np.nan, np.inf, 0.0, 2.0])})
    not_finite = np.array([True, False, False, False, False])
    table = table_of({"test": sums}, criteria=["taylor1"], not_finite=not_finite)
    found = table.columns["taylor1_test"]
    assert np.isnan(found).tolist() == [True, True, True, False, False]
    assert not np.signbit(found[3])  # no prediction is -0.0
    sink = io.BytesIO()
    write_csv(table, sink)
    assert sink.getvalue().splitlines()[2].endswith(b",")  # an empty field


def test_a_name_that_is_not_registered_is_refused_with_those_that_are(magnitude2: Criterion) -> None:
    data = {"test": (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))}
    with pytest.raises(SpecError, match=r"criteria\.0: got 'magnitude'; allowed: one of taylor1, magnitude2\. Did you"):
        ablation.ablate(nn.Linear(3, 2), "weight", data, criteria=["magnitude"], progress=False)
    with pytest.raises(SpecError, match="'taylor1' is given twice"):
        ablation.ablate(nn.Linear(3, 2), "weight", data, criteria=["taylor1"] * 2, progress=False)


def test_a_registered_criterion_reaches_every_file(magnitude2: Criterion, tmp_path: Path) -> None:
    data = {"test": (torch.randn(9, 4), torch.randint(3, (9,)))}
    table = ablation.ablate(nn.Linear(4, 3), "weight", data, criteria=["magnitude2"], progress=False)
    assert table.about["plan"]["gradient_batch_size"] is None  # it needs nothing, and nothing is computed for it
    table.to_csv(tmp_path / "utility.csv")
    table.to_parquet(tmp_path / "utility.parquet")
    for frame in (
        table.to_pandas(), pd.read_csv(tmp_path / "utility.csv"), pd.read_parquet(tmp_path / "utility.parquet")
    ):  # fmt: skip
        assert list(frame.columns)[-1] == "magnitude2_test"
        np.testing.assert_array_equal(frame["magnitude2_test"], table.columns["weight"] ** 2)
    assert set(table.summary()["criteria"]["magnitude2"]["test"]) == {
        "pearson", "spearman", "pearson_touched", "spearman_touched"
    }  # fmt: skip


def test_a_registered_criterion_goes_through_the_whole_service(
    magnitude2: Criterion, store: JobStore, settings: Settings
) -> None:
    """The application over HTTP, partials and table through a real Redis, the worker's own functions in between."""
    worker = runner.Worker(store, make_celery(settings), settings, "a")
    asked = {
        "model": {"name": "digits_alexnet"}, "layer": "fc3", "sites": {"count": 12},
        "data": {"name": "digits", "train": {"count": 30}, "test": {"count": 20}},
        "criteria": ["magnitude2", "taylor1"],
    }  # fmt: skip
    with serving(settings) as api:
        answer = api.post("/v1/jobs", json=asked)
        assert answer.status_code == 202, answer.text
        assert answer.json()["spec"]["criteria"] == ["magnitude2", "taylor1"]
        url, job = answer.json()["urls"], store.get(answer.json()["id"])
        assert job
        assert job.plan
        for shard in job.plan.shards:
            runner.run_shard(worker, job.id, shard.id)
        runner.finalize(worker, job.id)
        done = store.get(job.id)
        assert done
        assert done.status is State.SUCCEEDED, done.error
        results = api.get(url["results"]).json()
        csv, parquet = api.get(url["csv"]).content, api.get(url["parquet"]).content
    runner._loaded.clear()
    columns = ["taylor1_train", "magnitude2_train", "taylor1_test", "magnitude2_test"]
    assert results["columns"][-4:] == columns
    assert set(results["summary"]["criteria"]) == {"taylor1", "magnitude2"}
    frame = pd.DataFrame(results["rows"], columns=results["columns"])
    for name in ("magnitude2_train", "magnitude2_test"):
        np.testing.assert_array_equal(frame[name], frame["weight"] ** 2)
    assert (frame["taylor1_train"] != frame["taylor1_test"]).any()
    for other in (pd.read_csv(io.BytesIO(csv)), pd.read_parquet(io.BytesIO(parquet))):
        pd.testing.assert_frame_equal(other, frame)
    expected = run_job(load_job(job.spec, job.plan, settings.folders))
    assert csv == to_csv(expected)
    assert json.loads(json.dumps(make_summary(expected)["criteria"])) == results["summary"]["criteria"]


def to_csv(table: ImportanceTable) -> bytes:
    sink, parquet = io.BytesIO(), io.BytesIO()
    write_csv(table, sink)
    write_parquet(table, parquet)
    assert parquet.getvalue()
    return sink.getvalue()


@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("engine", ["direct", "response", "finite", "rerun", "reference"])
def test_under_inference_mode_as_elsewhere(engine: str, precision: str) -> None:
    if (engine, precision) == ("response", "float64"):
        engine = "auto"
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = {"test": (torch.randn(19, 4), torch.randint(3, (19,)))}
    options: dict[str, Any] = {"engine": engine, "precision": precision, "criteria": ["taylor1"], "progress": False}
    expected = ablation.ablate(model, "0", data, [3, 1, 9], **options)
    with torch.inference_mode():
        found = ablation.ablate(model, "0", data, [3, 1, 9], **options)
    for name, values in expected.columns.items():
        assert values.tobytes() == found.columns[name].tobytes(), name

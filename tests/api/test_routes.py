"""Tests of the HTTP routes against docs/04-service.md, on a real Redis."""

import csv
import io
import json
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from ablation.spec import JobSpec
from tests.api import conftest as jobs
from worker import keys
from worker.settings import Settings
from worker.store import JobStore


def test_posted_job_is_stored_and_every_shard_is_queued(api: httpx.Client, store: JobStore) -> None:
    answer = api.post("/v1/jobs", json=jobs.FIELDS)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["urls"]["self"]
    assert int(answer.headers["retry-after"]) >= 1
    assert job["status"] == "queued"
    assert job["spec"]["sites"] == {"count": 11, "seed": 0}
    record = store.get(job["id"])
    assert record is not None
    assert record.plan is not None
    messages = [json.loads(message) for message in store.client.lrange(keys.SHARD_QUEUE, 0, -1)]
    assert {message["headers"]["task"] for message in messages} == {"worker.run_shard"}
    assert len(messages) == len(record.plan.shards)


def test_a_full_store_takes_nothing_in_and_still_tells_what_it_knows(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.running(store, settings, spec)
    store.client.config_set("maxmemory", 1)
    try:
        refused = api.post("/v1/jobs", json=jobs.FIELDS)
        told = [api.get(path).status_code for path in ("/v1/jobs", f"/v1/jobs/{job.id}", "/v1/models")]
    finally:
        store.client.config_set("maxmemory", 0)
    assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
    assert int(refused.headers["retry-after"]) >= 1
    assert "has no room" in refused.json()["detail"]
    assert told == [200] * 3
    assert api.post("/v1/jobs", json=jobs.FIELDS).status_code == 202


def test_job_says_how_it_is_doing(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec) -> None:
    job = jobs.running(store, settings, spec)
    assert job.plan
    answer = api.get(f"/v1/jobs/{job.id}")
    body = answer.json()
    assert answer.status_code == 200
    assert set(body) == {
        "id", "status", "progress", "eta_seconds", "created_at", "started_at", "finished_at",
        "spec", "plan", "error", "urls",
    }  # fmt: skip
    assert body["status"] == "running"
    assert body["progress"] == {"done": 0.25, "total": len(job.plan.shards)}
    assert body["eta_seconds"] is None  # it has been seen at one place only
    assert body["created_at"].endswith(("Z", "+00:00"))
    assert body["plan"]["path"] == job.plan.path
    assert body["plan"]["n_shards"] == len(job.plan.shards)


def test_unknown_job_is_404_and_a_deleted_one_410(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    assert api.get("/v1/jobs/nothing").status_code == 404
    job = jobs.succeeded(store, settings, spec)
    deleted = api.delete(f"/v1/jobs/{job.id}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    for path in ("", "/results", "/results.csv", "/results.parquet"):
        answer = api.get(f"/v1/jobs/{job.id}{path}")
        assert answer.status_code == 410
        assert "has expired or was deleted" in answer.json()["detail"]


def test_running_job_is_not_deleted(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec) -> None:
    job = jobs.running(store, settings, spec)
    assert api.delete(f"/v1/jobs/{job.id}").status_code == 409
    assert api.get(f"/v1/jobs/{job.id}").json()["status"] == "running"


def test_list_is_newest_first_in_pages_and_by_status(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    made = [jobs.queued(store, settings, spec).id for _ in range(3)] + [jobs.cancelled(store, settings, spec).id]
    first = api.get("/v1/jobs", params={"limit": 3}).json()
    second = api.get("/v1/jobs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in first["data"] + second["data"]] == made[::-1]
    assert second["next_cursor"] is None
    only = api.get("/v1/jobs", params={"status": "cancelled"}).json()["data"]
    assert [job["id"] for job in only] == made[3:]


def test_cancel(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec) -> None:
    job = jobs.running(store, settings, spec)
    first = api.post(f"/v1/jobs/{job.id}/cancel")
    again = api.post(f"/v1/jobs/{job.id}/cancel")
    assert (first.status_code, first.json()["status"]) == (202, "cancelling")
    assert (again.status_code, again.json()["status"]) == (200, "cancelling")


@pytest.mark.parametrize("make", [jobs.succeeded, jobs.failed])
def test_cancel_is_too_late(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, make) -> None:  # type: ignore[no-untyped-def]
    job = make(store, settings, spec)
    assert api.post(f"/v1/jobs/{job.id}/cancel").status_code == 409


@pytest.mark.parametrize("path", ["results", "results.csv", "results.parquet"])
def test_poll_before_the_end(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, path: str) -> None:
    job = jobs.running(store, settings, spec)
    answer = api.get(f"/v1/jobs/{job.id}/{path}")
    assert answer.status_code == 202
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["status"] == "running"
    assert answer.json()["progress"]["done"] == 0.25


@pytest.mark.parametrize("path", ["results", "results.csv", "results.parquet"])
@pytest.mark.parametrize(("make", "says"), [(jobs.failed, "0.1 is more than 1e-4"), (jobs.cancelled, "cancelled")])
def test_poll_that_will_never_succeed(  # type: ignore[no-untyped-def]
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, path: str, make, says: str
) -> None:
    job = make(store, settings, spec)
    answer = api.get(f"/v1/jobs/{job.id}/{path}")
    assert answer.status_code == 409
    assert says in answer.json()["detail"]
    assert not answer.json()["detail"].endswith("..")


def test_results_are_rows(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec) -> None:
    job = jobs.succeeded(store, settings, spec)
    body = api.get(f"/v1/jobs/{job.id}/results").json()
    assert body == {
        "columns": ["index", "weight", "utility_test"],
        "rows": [[5, 0.1, None], [2, -1e-300, 1 / 3], [9, 3.0, -2.5e-8]],
        "total_rows": 3,
        "summary": jobs.SUMMARY,
    }
    page = api.get(f"/v1/jobs/{job.id}/results", params={"offset": 1, "limit": 1}).json()
    assert page["rows"] == body["rows"][1:2]
    assert api.get(f"/v1/jobs/{job.id}/results", params={"limit": 0}).json()["rows"] == []
    assert api.get(f"/v1/jobs/{job.id}/results", params={"offset": 3}).json()["rows"] == []


def test_csv_reads_back_to_the_same_bits(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec) -> None:
    job = jobs.succeeded(store, settings, spec)
    answer = api.get(f"/v1/jobs/{job.id}/results.csv")
    assert answer.headers["content-type"].startswith("text/csv")
    name = f"utility-digits_alexnet-fc2-{job.id}.csv"
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
    header, *rows = csv.reader(io.StringIO(answer.text))
    table = jobs.make_table()
    assert header == list(table.columns)
    for column, values in zip(zip(*rows, strict=True), table.columns.values(), strict=True):
        np.testing.assert_array_equal([float(cell or "nan") for cell in column], values)
    by_accept = api.get(f"/v1/jobs/{job.id}/results", headers={"Accept": "text/csv"})
    assert by_accept.content == answer.content


def test_parquet_reads_back_to_the_same_bits(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.succeeded(store, settings, spec)
    answer = api.get(f"/v1/jobs/{job.id}/results.parquet")
    name = f"utility-digits_alexnet-fc2-{job.id}.parquet"
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
    read = pq.read_table(io.BytesIO(answer.content))
    assert json.loads(read.schema.metadata[b"about"]) == store.about(job.id) == {"seconds": 1.5}
    assert api.get(f"/v1/jobs/{job.id}/results.parquet").content == answer.content
    for name, values in jobs.make_table().columns.items():
        np.testing.assert_array_equal(read[name].to_numpy(), values)


def test_plan_says_the_cost_and_queues_nothing(api: httpx.Client, store: JobStore) -> None:
    answer = api.post("/v1/plans", json=jobs.FIELDS)
    plan = answer.json()
    assert answer.status_code == 200
    assert plan["path"] == "direct"
    assert plan["n_shards"] >= 2
    assert set(plan["estimate"]) == {"n_examples", "passes", "seconds", "memory_bytes", "redis_bytes"}
    assert store.client.llen(keys.SHARD_QUEUE) == 0
    assert api.get("/v1/jobs").json()["data"] == []


def test_catalog(api: httpx.Client) -> None:
    models = {model["name"]: model for model in api.get("/v1/models").json()["data"]}
    assert {"digits_alexnet", "alexnet", "resnet18"} <= set(models)
    layers = {layer["name"]: layer for layer in api.get(models["alexnet"]["layers_url"]).json()["data"]}
    assert layers["classifier.4"] == {
        "name": "classifier.4",
        "parameter": "classifier.4.weight",
        "kind": "Linear",
        "shape": [4096, 4096],
        "n_weights": 4096**2,
        "path": "direct",
        "whole_layer_path": "response",
    }
    paths = {name: (layer["path"], layer["whole_layer_path"]) for name, layer in layers.items()}
    assert paths["classifier.4.bias"] == ("direct", "direct")  # no response functions for biases
    assert paths["classifier.1"] == ("finite", "response")  # three Linears
    assert paths["features.3"] == ("finite", "finite")
    assert api.get("/v1/models/alexnett/layers").status_code == 404
    data = {dataset["name"] for dataset in api.get("/v1/datasets").json()["data"]}
    assert {"digits", "imagefolder"} <= data


def test_health_and_readiness(api: httpx.Client, store: JobStore) -> None:
    assert api.get("/healthz").json() == {"status": "ok", "checks": {}}
    waiting = api.get("/readyz")
    assert (waiting.status_code, waiting.headers["content-type"]) == (503, "application/problem+json")
    assert waiting.json()["checks"] == {"redis": "ok", "workers": "0"}
    assert int(waiting.headers["retry-after"]) >= 1
    store.note_worker("a-worker")
    ready = api.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ok", "checks": {"redis": "ok", "workers": "1"}})


def test_readiness_without_redis(tmp_path: Path) -> None:
    with jobs.serving(Settings(redis_url=f"unix://{tmp_path}/nobody.sock", home=tmp_path)) as api:
        answer = api.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]) == (503, {"redis": "away", "workers": "unknown"})

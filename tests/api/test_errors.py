"""Every error is a problem document that says what was given and what is allowed."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from ablation.spec import JobSpec
from tests.api.conftest import FIELDS, serving, succeeded
from worker.settings import Settings
from worker.store import JobStore


@pytest.mark.parametrize(
    ("change", "field", "given", "allowed"),
    [
        ({"sites": {"count": 0}}, "sites.count", 0, "greater than or equal to 1"),
        ({"sites": {"count": True}}, "sites.count", True, "integer"),
        ({"sites": {"count": "5"}}, "sites.count", "5", "integer"),
        ({"sites": {"count": 10**6}}, "sites.count", 10**6, "1 to "),
        ({"sites": "some"}, "sites", "some", "{'count': k, 'seed': s}"),
        ({"layer": "fc22"}, "layer", "fc22", "fc2"),
        ({"model": {"name": "digits_alexnett"}}, "model.name", "digits_alexnett", "models"),
        ({"model": {"name": "digits_alexnet", "weights": "no.pt"}}, "model.weights", "no.pt", "checkpoint"),
        ({"data": {"name": "digit", "train": "all"}}, "data.name", "digit", "digits"),
        ({"data": {"name": "digits", "test": {"per_class": 999}}}, "data.test.per_class", 999, "1 to "),
        ({"surprise": 1}, "surprise", 1, "model, layer, data"),
        ({"data": {"name": "digits"}}, "data", {"name": "digits"}, "'train', 'test' or both"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/plans"])
def test_wrong_spec_is_422(
    api: httpx.Client, url: str, change: dict[str, Any], field: str, given: object, allowed: str
) -> None:
    answer = api.post(url, json={**FIELDS, **change})
    problem = answer.json()
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert (problem["status"], problem["instance"]) == (422, url)
    assert (problem["field"], problem["given"]) == (field, given)
    assert allowed in problem["allowed"]
    assert "next_step" in problem
    assert field in problem["detail"]
    assert api.get("/v1/jobs").json()["data"] == []


def test_nearest_names_are_offered(api: httpx.Client) -> None:
    problem = api.post("/v1/jobs", json={**FIELDS, "model": {"name": "digits_alexnett"}}).json()
    assert "'digits_alexnet'" in problem["next_step"]


def test_nearest_models_are_offered(api: httpx.Client) -> None:
    answer = api.get("/v1/models/alexnt/layers")
    assert answer.status_code == 404
    assert "'alexnet'" in answer.json()["detail"]


def test_what_is_sent_back_is_short(api: httpx.Client) -> None:
    answer = api.post("/v1/jobs", json={**FIELDS, "layer": "x" * 5000})
    assert answer.status_code == 422
    assert len(answer.content) < 2000


def test_more_than_redis_may_hold_is_refused(settings: Settings) -> None:
    small = settings.model_copy(update={"max_redis_bytes": 100})
    with serving(small) as api:
        answer = api.post("/v1/jobs", json=FIELDS)
    assert (answer.status_code, answer.json()["field"]) == (422, "sites")
    assert "100 bytes" in answer.json()["allowed"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"limit": -1}, "limit"),
        ({"limit": "9" * 5000}, "limit"),
        ({"status": "lost"}, "status"),
        ({"status": ""}, "status"),
        ({"cursor": "x"}, "cursor"),
        ({"cursor": "-1"}, "cursor"),
        ({"cursor": "٣"}, "cursor"),
        ({"cursor": "\ud800".encode("utf-8", "surrogatepass")}, "cursor"),
        ({"cursor": "1" * 201}, "cursor"),
        ({"cursor": ""}, "cursor"),
    ],
)
def test_wrong_query_is_422(api: httpx.Client, query: dict[str, Any], field: str) -> None:
    answer = api.get("/v1/jobs", params=query)
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 2000


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": 10_001}, "limit"), ({"limit": -1}, "limit"), ({"offset": -1}, "offset"), ({"offset": "a"}, "offset"),
        ({"offset": 1.5}, "offset"),
    ],
)  # fmt: skip
def test_wrong_page_of_results_is_422(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, query: dict[str, Any], field: str
) -> None:
    job = succeeded(store, settings, spec)
    answer = api.get(f"/v1/jobs/{job.id}/results", params=query)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_far_beyond_the_last_row_there_is_nothing(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = succeeded(store, settings, spec)
    answer = api.get(f"/v1/jobs/{job.id}/results", params={"offset": 10**30})
    assert (answer.status_code, answer.json()["rows"], answer.json()["total_rows"]) == (200, [], 3)


def test_a_very_long_id_is_422(api: httpx.Client) -> None:
    answer = api.get(f"/v1/jobs/{'a' * 101}")
    assert (answer.status_code, answer.json()["field"]) == (422, "job_id")


@pytest.mark.parametrize(
    ("method", "url", "status", "allow"),
    [
        ("GET", "/nowhere", 404, None),
        ("GET", "/v1/jobs/", 404, None),
        ("GET", "/static-offline-docs/nothing.js", 404, None),
        ("PUT", "/v1/jobs", 405, "GET, POST"),
        ("PATCH", "/v1/jobs/abc", 405, "DELETE, GET"),
        ("GET", "/v1/plans", 405, "POST"),
        ("POST", "/docs", 405, "GET"),
        ("QQQ", "/healthz", 405, "GET"),
    ],
)
def test_what_there_is_not(api: httpx.Client, method: str, url: str, status: int, allow: str | None) -> None:
    answer = api.request(method, url)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers.get("allow") == allow
    assert (allow or url) in answer.json()["detail"]


@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/jobs/abc"])
def test_redis_away_is_503(tmp_path: Path, url: str) -> None:
    nobody = Settings(redis_url=f"unix://{tmp_path}/nobody.sock", home=tmp_path)
    with serving(nobody) as api:
        answer = api.get(url)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert str(tmp_path) not in answer.text

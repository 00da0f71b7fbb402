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
        ({"sites": {"count": 0}}, "sites.count", 0, "1 or more"),
        ({"sites": {"count": True}}, "sites.count", True, "a whole number"),
        ({"sites": {"count": "5"}}, "sites.count", "5", "a whole number"),
        ({"sites": {"count": 10**6}}, "sites.count", 10**6, "1 to "),
        ({"sites": "some"}, "sites", "some", '{"count": k, "seed": s}'),
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


@pytest.mark.parametrize("root", ["deep/er", "./deep//er", "deep"])
@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/plans"])
def test_a_root_is_shown_as_it_was_given(api: httpx.Client, settings: Settings, url: str, root: str) -> None:
    (settings.data_dir / "deep" / "er" / "test" / "empty").mkdir(parents=True, exist_ok=True)
    problem = api.post(url, json={**FIELDS, "data": {"name": "imagefolder", "root": root, "test": "all"}}).json()
    assert (problem["field"], problem["given"]) == ("data.root", root)
    assert problem["detail"].startswith(f"data.root: got '{root}'; allowed: ")
    assert ("Add pictures to test/empty" in problem["next_step"]) == root.endswith("er")
    assert str(settings.data_dir) not in str(problem)


def test_nearest_names_are_offered(api: httpx.Client) -> None:
    problem = api.post("/v1/jobs", json={**FIELDS, "model": {"name": "digits_alexnett"}}).json()
    assert "'digits_alexnet'" in problem["next_step"]


@pytest.mark.parametrize(
    ("change", "address"),
    [
        ({"model": {"name": "qqqq"}}, "GET /v1/models"),
        ({"layer": "qqqq"}, "GET /v1/models/NAME/layers"),
        ({"data": {"name": "qqqq", "test": "all"}}, "GET /v1/datasets"),
    ],
)
def test_where_no_name_is_near_it_says_who_lists_them(api: httpx.Client, change: dict[str, Any], address: str) -> None:
    problem = api.post("/v1/jobs", json={**FIELDS, **change}).json()
    assert problem["next_step"].startswith(f"{address} lists")
    assert problem["detail"].endswith(f". {problem['next_step']}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top1": None}, "top1: got null; allowed: true or false."),
        ({"sites": {"count": True}}, "sites.count: got true; allowed: a whole number."),
        ({"layer": "x" * 501}, f"layer: got '{'x' * 197}...'; allowed: at most 500 characters."),
        ({"data": {"name": "digits"}}, """data: got {"name": "digits"}; allowed: 'train', 'test' or both."""),
    ],
)
def test_what_was_given_is_shown_as_json(api: httpx.Client, change: dict[str, Any], said: str) -> None:
    assert api.post("/v1/jobs", json={**FIELDS, **change}).json()["detail"].startswith(said)


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
    ("method", "url", "name", "said"),
    [
        ("GET", "/v1/jobs", "limt", "only the parameters status, limit, cursor. There is no such parameter. Did you"),
        ("GET", "/v1/jobs/nothing/results", "page", "only the parameters offset, limit. There is no such parameter."),
        ("POST", "/v1/jobs", "key", "no parameters. There is no such parameter."),
        ("DELETE", "/v1/jobs/nothing", "force", "no parameters"),
        ("GET", "/v1/jobs/nothing/events", "since", "no parameters"),
        ("GET", "/v1/models", "name", "no parameters"),
        ("GET", "/healthz", "verbose", "no parameters"),
    ],
)
def test_an_unknown_parameter_is_422(api: httpx.Client, method: str, url: str, name: str, said: str) -> None:
    answer = api.request(method, url, params={name: "3"}, json=FIELDS if method == "POST" else None)
    assert (answer.status_code, answer.json()["field"], answer.json()["given"]) == (422, name, "3")
    assert said in answer.json()["detail"]


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
        ("PUT", "/v1/jobs", 405, "GET, HEAD, POST"),
        ("PATCH", "/v1/jobs/abc", 405, "DELETE, GET, HEAD"),
        ("GET", "/v1/plans", 405, "POST"),
        ("POST", "/docs", 405, "GET, HEAD"),
        ("QQQ", "/healthz", 405, "GET, HEAD"),
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


@pytest.mark.parametrize("url", ["/v1/models", "/v1/datasets", "/v1/models/alexnet/layers"])
def test_what_is_built_in_is_listed_without_redis(api: httpx.Client, tmp_path: Path, url: str) -> None:
    with serving(Settings(redis_url=f"unix://{tmp_path}/nobody.sock", home=tmp_path)) as alone:
        answer = alone.get(url)
    complete = api.get(url).json()
    assert answer.status_code == 200
    assert answer.json()["data"] == complete["data"]  # nothing is registered here
    assert answer.elapsed.total_seconds() < 1
    if "is_complete" in complete:
        assert (answer.json()["is_complete"], complete["is_complete"]) == (False, True)


def test_what_is_built_in_is_planned_without_redis(api: httpx.Client, tmp_path: Path) -> None:
    with serving(Settings(redis_url=f"unix://{tmp_path}/nobody.sock", home=tmp_path, threads=1)) as alone:
        answer = alone.post("/v1/plans", json=FIELDS)
        refused = alone.post("/v1/plans", json={**FIELDS, "layer": "fc22"})
        unknown = alone.post("/v1/plans", json={**FIELDS, "model": {"name": "perhaps-registered"}})
    assert answer.json() == api.post("/v1/plans", json=FIELDS).json()
    assert (refused.status_code, refused.json()["field"]) == (422, "layer")
    assert unknown.status_code == 503

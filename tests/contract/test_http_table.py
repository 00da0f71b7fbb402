"""The HTTP table of the service, row by row, by a plain HTTP client against the real service."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from tests.contract.conftest import PATIENCE_S, QUICK, SLOW, Service, serve
from tests.contract.test_refusals import check_problem

Say = Callable[[str], None]
JOB_MEMBERS = {
    *("id", "status", "progress", "eta_seconds", "created_at", "started_at", "finished_at"),
    *("spec", "plan", "error", "urls"),
}
COLUMNS = [
    *("index", "out", "in", "weight", "magnitude"),
    *("utility_train", "stderr_train", "touched_train", "utility_test", "stderr_test", "touched_test"),
]


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_post_gives_the_job_and_says_where_it_is(service: Service, say: Say) -> None:
    answer = service.client.post("/v1/jobs", json=QUICK)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert set(job) == JOB_MEMBERS
    assert (job["status"], job["started_at"], job["finished_at"], job["error"]) == ("queued", None, None, None)
    assert job["spec"]["sites"] == {"count": 23, "seed": 0}
    assert (job["plan"]["path"], job["plan"]["n_sites"]) == ("direct", 23)
    say("POST /v1/jobs: 202, Location, Retry-After, the job in state queued")


def test_the_same_key_gives_the_first_answer_again(service: Service, say: Say) -> None:
    headers = {"Idempotency-Key": f"key-{time.time_ns()}"}

    def post(_: int) -> httpx.Response:
        return service.client.post("/v1/jobs", json=QUICK, headers=headers)

    with ThreadPoolExecutor(10) as pool:
        answers = [*pool.map(post, range(50))]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers["location"] for answer in answers}) == 1
    service.wait(answers[0].headers["location"], "succeeded")
    assert post(0).content == answers[0].content
    spelled_out = {**QUICK, "precision": "mixed", "sites": {"count": 23, "seed": 0}}
    assert service.client.post("/v1/jobs", json=spelled_out, headers=headers).content == answers[0].content
    other = service.client.post("/v1/jobs", json={**QUICK, "sites": {"count": 22}}, headers=headers)
    assert check_problem(other, 422)["field"] == "Idempotency-Key"
    say("POST /v1/jobs with one Idempotency-Key, 50 at once and later: 202, one job, the same bytes; another spec: 422")


def test_too_many_jobs_are_told_to_come_back(small: Service, say: Say) -> None:
    urls = [small.post(SLOW) for _ in range(2)]
    answer = small.client.post("/v1/jobs", json=QUICK)
    problem = check_problem(answer, 429)
    assert int(answer.headers["retry-after"]) >= 1
    for url in urls:
        small.client.post(f"{url}/cancel")
        small.wait(url, "cancelled")
    small.post(QUICK)
    say(f"POST /v1/jobs beyond the quota: 429, Retry-After, {problem['detail']}")


def test_get_is_200_in_every_state(service: Service, busy: str, done: str, failed: str, say: Say) -> None:
    waiting = service.post(SLOW)
    states = {}
    for url in (waiting, busy, done, failed):
        answer = service.client.get(url)
        assert answer.status_code == 200
        assert set(answer.json()) == JOB_MEMBERS
        states[answer.json()["status"]] = answer
    cancelled = service.client.post(f"{waiting}/cancel")
    assert cancelled.status_code == 202
    assert service.client.get(waiting).json()["status"] == "cancelled"
    assert set(states) == {"queued", "running", "succeeded", "failed"}
    assert states["succeeded"].json()["progress"] == {"done": 2.0, "total": 2}
    for state, answer in states.items():
        assert ("retry-after" in answer.headers) == (state in ("queued", "running"))
    say("GET /v1/jobs/{id}: 200 when queued, running, succeeded, failed, cancelled; Retry-After until it is over")


def test_a_job_that_has_not_changed_is_not_sent_again(service: Service, done: str, say: Say) -> None:
    tag = service.client.get(done).headers["etag"]
    for match in (tag, "*", f'"other", {tag}', tag.removeprefix("W/")):
        again = service.client.get(done, headers={"If-None-Match": match})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert service.client.get(done, headers={"If-None-Match": '"other"'}).status_code == 200
    say("GET /v1/jobs/{id} with If-None-Match: 304 as long as it is the same, else 200 with the ETag")


def test_the_etag_changes_with_the_job(service: Service, say: Say) -> None:
    url = service.post(QUICK)
    first = service.client.get(url).headers["etag"]
    service.wait(url, "succeeded")
    assert service.client.get(url, headers={"If-None-Match": first}).status_code == 200
    say("GET /v1/jobs/{id} once it has moved on: another ETag")


@pytest.mark.parametrize("path", ["", "/results", "/results.csv", "/results.parquet", "/events"])
def test_an_unknown_job_is_404(service: Service, say: Say, path: str) -> None:
    check_problem(service.client.get(f"/v1/jobs/unheard-of{path}"), 404)
    say(f"GET /v1/jobs/{{unknown}}{path}: 404")


def test_long_lists_of_a_spec_are_cut_and_can_be_had_whole(service: Service, say: Say) -> None:
    spec = {**QUICK, "sites": {"indices": list(range(2000))}}
    url = service.post(spec)
    shown = service.client.get(url).json()["spec"]
    assert (shown["sites"]["indices"], shown["lengths"]) == (list(range(10)), {"sites.indices": 2000})
    assert service.client.get(shown["full"]).json()["sites"] == spec["sites"]
    service.wait(url, "succeeded")
    results = service.client.get(f"{url}/results").json()
    assert (results["total_rows"], results["summary"]["about"]["spec"]["full"]) == (2000, shown["full"])
    say("GET /v1/jobs/{id}/spec: 200, the whole spec; elsewhere lists of more than 1,000 entries are cut")


def test_jobs_are_listed_newest_first_page_by_page(service: Service, done: str, say: Say) -> None:
    newest = [service.post(QUICK) for _ in range(3)]
    for url in newest:
        service.wait(url, "succeeded")
    pages, query = [], {"limit": 2}
    while True:
        page = service.client.get("/v1/jobs", params=query).json()
        pages.append([job["id"] for job in page["data"]])
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    ids = [job_id for page in pages for job_id in page]
    assert len(set(ids)) == len(ids)
    assert ids[:3] == [url.rpartition("/")[2] for url in newest[::-1]]
    assert done.rpartition("/")[2] in ids
    assert all(len(page) == 2 for page in pages[:-1])
    listed = service.client.get("/v1/jobs", params={"status": "succeeded", "limit": 100}).json()["data"]
    assert {job["status"] for job in listed} == {"succeeded"}
    assert len(service.client.get("/v1/jobs").json()["data"]) <= 20
    for wrong in ({"limit": 0}, {"limit": 101}, {"cursor": "x"}, {"status": "lost"}, {"limit": "two"}, {"limt": 3}):
        assert check_problem(service.client.get("/v1/jobs", params=wrong), 422)["field"] == next(iter(wrong))
    say("GET /v1/jobs: newest first, next_cursor through all pages; a wrong or unknown parameter: 422")


# --- cancel, delete, expiry ------------------------------------------------------------------------------------------


def test_cancel_in_every_state(service: Service, done: str, failed: str, say: Say) -> None:
    running, waiting = service.post(SLOW), service.post(SLOW)
    service.wait(running, "running")
    for url in (waiting, running):
        first = service.client.post(f"{url}/cancel")
        assert first.status_code == 202
        assert first.json()["status"] in ("cancelling", "cancelled")
        assert service.client.post(f"{url}/cancel").status_code == 200
        assert service.wait(url, "cancelled")["finished_at"]
        assert service.client.post(f"{url}/cancel").status_code == 200
        check_problem(service.client.get(f"{url}/results"), 409)
    for url in (done, failed):
        check_problem(service.client.post(f"{url}/cancel"), 409)
    check_problem(service.client.post("/v1/jobs/unheard-of/cancel"), 404)
    say("POST /v1/jobs/{id}/cancel: 202, again 200; succeeded or failed: 409; unknown: 404")


def test_delete_in_every_state(service: Service, busy: str, say: Say) -> None:
    waiting = service.post(SLOW)
    for url in (busy, waiting):
        check_problem(service.client.delete(url), 409)
    service.client.post(f"{waiting}/cancel")
    service.wait(waiting, "cancelled")
    answer = service.client.delete(waiting)
    assert (answer.status_code, answer.content) == (204, b"")
    for path in ("", "/results", "/results.csv"):
        check_problem(service.client.get(f"{waiting}{path}"), 410)
    check_problem(service.client.delete("/v1/jobs/unheard-of"), 404)
    say("DELETE /v1/jobs/{id}: queued or running 409, terminal 204, and then everything of it 410; unknown: 404")


def test_a_job_expires_to_a_tombstone(small: Service, say: Say) -> None:
    url, _ = small.over(QUICK)
    deadline = time.monotonic() + PATIENCE_S
    while (answer := small.client.get(url)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "has expired or was deleted" in check_problem(answer, 410)["detail"]
    check_problem(small.client.get(f"{url}/results"), 410)
    say("GET /v1/jobs/{id} after its results' days: 410")


# --- results ---------------------------------------------------------------------------------------------------------


def test_results_are_202_until_they_are_there(service: Service, busy: str, say: Say) -> None:
    for path in ("results", "results.csv", "results.parquet"):
        answer = service.client.get(f"{busy}/{path}")
        assert answer.status_code == 202
        assert int(answer.headers["retry-after"]) >= 1
        assert set(answer.json()) == {"id", "status", "progress", "eta_seconds"}
        assert answer.json()["status"] == "running"
    say("GET /v1/jobs/{id}/results, .csv, .parquet while it runs: 202, Retry-After, status and progress")


def test_results_come_in_pages(service: Service, done: str, say: Say) -> None:
    answer = service.client.get(f"{done}/results", params={"offset": 20, "limit": 10})
    body = answer.json()
    assert answer.status_code == 200
    assert set(body) == {"columns", "rows", "total_rows", "summary"}
    assert set(body["summary"]["splits"]) == set(body["summary"]["magnitude"]) == {"train", "test"}
    assert body["columns"] == COLUMNS
    assert (len(body["rows"]), body["total_rows"]) == (3, 23)
    assert body["rows"] == service.client.get(f"{done}/results").json()["rows"][20:]
    assert service.client.get(f"{done}/results", params={"offset": 99}).json()["rows"] == []
    assert service.client.get(f"{done}/results", params={"limit": 0}).json()["rows"] == []
    for wrong in ({"offset": -1}, {"limit": 10_001}, {"limit": -1}, {"offset": "x"}):
        assert check_problem(service.client.get(f"{done}/results", params=wrong), 422)["field"] == next(iter(wrong))
    say("GET /v1/jobs/{id}/results?offset=&limit=: 200, columns, rows, total_rows, summary; wrong numbers: 422")


def test_what_is_not_a_number_is_null_and_an_empty_field(service: Service, say: Say) -> None:
    url, _ = service.over({**QUICK, "data": {"name": "digits", "test": {"count": 1}}})  # one example has no stderr
    body = service.client.get(f"{url}/results").json()
    assert {row[body["columns"].index("stderr_test")] for row in body["rows"]} == {None}
    lines = service.client.get(f"{url}/results.csv").text.splitlines()
    assert {line.split(",")[lines[0].split(",").index("stderr_test")] for line in lines[1:]} == {""}
    say("GET /v1/jobs/{id}/results of a job with NaN: null in JSON, an empty field in CSV")


def test_each_weight_has_its_own_replacement(service: Service, say: Say) -> None:
    files = {}
    for name, value in (("zero", "zero"), ("flip", "flip_sign"), ("scale", {"scale": -1}), ("half", {"scale": 0.5})):
        url, job = service.over({**QUICK, "value": value})
        assert job["spec"]["value"] == value
        files[name] = service.client.get(f"{url}/results.csv").content
    assert files["flip"] == files["scale"]
    assert len(set(files.values())) == 3
    say('POST /v1/jobs with "value": "flip_sign" or {"scale": -1}: the same table; {"scale": 0.5}: another')


def test_a_replacement_that_is_not_finite_is_not_run(service: Service, say: Say) -> None:
    model = {"name": "digits_alexnet", "weights": "unheard.safetensors"}
    spec = {**QUICK, "model": model, "sites": {"indices": [0, 3, 300, 700]}, "value": {"scale": 1e280}}
    url, job = service.over(spec)
    assert job["status"] == "succeeded", job
    body = service.client.get(f"{url}/results").json()
    for split, n in (("train", 50), ("test", 40)):
        utility, touched = (body["columns"].index(f"{name}_{split}") for name in ("utility", "touched"))
        assert [row[utility] is None for row in body["rows"]] == [True, True, False, False]
        assert [row[touched] for row in body["rows"]][:2] == [n, n]
    assert body["summary"]["not_finite"] == 2
    assert body["summary"]["proof"]["n_sites"] == 2
    say("GET /v1/jobs/{id}/results where 1e280 w is infinite: null utility, touched = N, not_finite counted")


def test_the_table_comes_as_a_file(service: Service, done: str, say: Say) -> None:
    csv = service.client.get(f"{done}/results.csv")
    assert csv.status_code == 200
    assert csv.headers["content-type"].startswith("text/csv")
    assert csv.headers["content-disposition"].startswith("attachment")
    assert csv.text.splitlines()[0] == ",".join(COLUMNS)
    assert csv.content.count(b"\n") == 24
    assert b"\r" not in csv.content
    parquet = service.client.get(f"{done}/results.parquet")
    assert parquet.headers["content-disposition"].startswith("attachment")
    table = pq.read_table(io.BytesIO(parquet.content))
    assert table.column_names == COLUMNS
    values = [[float(cell) for cell in line.split(",")] for line in csv.text.splitlines()[1:]]
    assert [[float(row[name]) for name in COLUMNS] for row in table.to_pylist()] == values
    for accept in ("text/csv", "text/csv, application/json;q=0.5"):
        assert service.client.get(f"{done}/results", headers={"Accept": accept}).content == csv.content
    for accept in ("application/json", "text/csv;q=0.1, application/json", "*/*"):
        assert "rows" in service.client.get(f"{done}/results", headers={"Accept": accept}).json()
    say("GET /v1/jobs/{id}/results.csv, .parquet: attachments with the same numbers; Accept: text/csv: the same bytes")


def test_results_of_what_failed_are_409(service: Service, failed: str, say: Say) -> None:
    for path in ("results", "results.csv", "results.parquet"):
        problem = check_problem(service.client.get(f"{failed}/{path}"), 409)
    say(f"GET /v1/jobs/{{id}}/results of a failed job: 409 {problem['detail']}")


# --- events ----------------------------------------------------------------------------------------------------------


def read_events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """The server-sent events in a stream of lines."""
    event: dict[str, str] = {}
    for line in lines:
        if not line and event:
            yield event
            event = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(":")
            event[name] = value.strip()


def test_events_tell_the_job_from_beginning_to_end(service: Service, say: Say) -> None:
    url = service.post(QUICK)
    with service.client.stream("GET", f"{url}/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [*read_events(answer.iter_lines())]
    kinds = [event["event"] for event in events]
    assert set(kinds) == {"progress", "status", "done"}
    assert kinds.count("done") == 1
    assert kinds[-1] == "done"
    assert json.loads(events[-1]["data"])["status"] == "succeeded"
    with service.client.stream("GET", f"{url}/events", headers={"Last-Event-ID": events[-2]["id"]}) as answer:
        assert [event["event"] for event in read_events(answer.iter_lines())] == ["done"]
    say("GET /v1/jobs/{id}/events: progress, status, done; with Last-Event-ID only what came after")


# --- catalog, plans --------------------------------------------------------------------------------------------------


def test_models_and_their_layers_are_listed(service: Service, say: Say) -> None:
    models = service.client.get("/v1/models").json()
    by_name = {model["name"]: model for model in models["data"]}
    assert models["next_cursor"] is None
    assert len(by_name) >= 82
    assert by_name["alexnet"]["weights"] == ["IMAGENET1K_V1"]
    layers = service.client.get("/v1/models/alexnet/layers").json()["data"]
    layer = next(layer for layer in layers if layer["name"] == "classifier.4")
    assert (layer["shape"], layer["n_weights"]) == ([4096, 4096], 16_777_216)
    assert (layer["path"], layer["whole_layer_path"]) == ("direct", "response")
    registered = service.client.get("/v1/models/stripe_net/layers").json()["data"]
    assert {layer["name"] for layer in registered} == {"0", "0.bias", "3", "3.bias", "5", "5.bias"}
    assert "alexnet" in check_problem(service.client.get("/v1/models/alexnett/layers"), 404)["detail"]
    say("GET /v1/models, /v1/models/{name}/layers: weights, shapes, counts, paths, registered ones too; unknown: 404")


def test_data_sets_are_listed(service: Service, say: Say) -> None:
    listed = {data["name"]: data for data in service.client.get("/v1/datasets").json()["data"]}
    names = {"digits", "mnist", "fashionmnist", "cifar10", "cifar100", "imagenet", "imagefolder", "stripes"}
    assert names <= set(listed)
    assert listed["digits"]["n_examples"] == {"train": 1297, "test": 500}
    say("GET /v1/datasets: the built-in ones and those that are registered")


def test_a_plan_is_what_a_job_would_get_and_queues_nothing(service: Service, say: Say) -> None:
    before = service.client.get("/v1/jobs", params={"limit": 1}).json()["data"]
    plan = service.client.post("/v1/plans", json=QUICK)
    assert plan.status_code == 200
    assert service.client.get("/v1/jobs", params={"limit": 1}).json()["data"] == before
    url = service.post(QUICK)
    assert service.client.get(url).json()["plan"] == plan.json()
    assert {"path", "n_shards", "estimate"} <= set(plan.json())
    assert {"passes", "seconds", "memory_bytes"} <= set(plan.json()["estimate"])
    say("POST /v1/plans: 200, path, shards, passes, time, memory; nothing is queued")


def test_registered_parts_give_a_job_like_any_other(service: Service, say: Say) -> None:
    spec = {
        "model": {"name": "stripe_net"}, "layer": "3",
        "data": {"name": "stripes", "train": {"per_class": 9}, "test": "all"}, "sites": {"count": 11},
    }  # fmt: skip
    url, job = service.over(spec)
    assert job["status"] == "succeeded", job
    assert [split["n_examples"] for split in job["plan"]["splits"]] == [27, 30]
    assert service.client.get(f"{url}/results").json()["total_rows"] == 11
    assert check_problem(service.client.post("/v1/plans", json=spec), 422)["field"] == "data.name"
    say("POST /v1/jobs on a registered model and data set: 202, planned by a worker, succeeded")


def test_real_files_of_an_operator_are_counted_and_run(service: Service, say: Say) -> None:
    first_three = {"class00": 0, "class01": 1, "class02": "2"}
    for name, root, n, classes in (("mnist", "digits-like", 50, None), ("imagefolder", "pets", 6, first_three)):
        _, job = service.over({**QUICK, "data": {"name": name, "root": root, "test": "all", "classes": classes}})
        assert job["status"] == "succeeded", job
        assert job["plan"]["splits"][0]["n_examples"] == n
    say("POST /v1/jobs on IDX files and on a folder of JPEGs: 202, counted at once, succeeded")


def test_checkpoints_of_both_kinds_give_the_same_table(service: Service, say: Say) -> None:
    tables = []
    for weights in ("good.safetensors", "good.pth", "two.pth:model"):
        url, job = service.over({**QUICK, "model": {"name": "digits_alexnet", "weights": weights}})
        assert job["status"] == "succeeded", job
        tables.append(service.client.get(f"{url}/results.csv").content)
        assert job["plan"]["inputs"]["weights"] == f"file {weights}"
    assert tables[0] == tables[1] == tables[2]
    say("POST /v1/jobs with a checkpoint, safetensors, torch.save or one of several in a file: 202, the same table")


def test_a_fine_tuned_head_is_known_when_its_job_is_posted(service: Service, say: Say) -> None:
    classes = {str(digit): digit % 7 for digit in range(10)}
    spec = {**QUICK, "model": {"name": "digits_alexnet", "weights": "seven.safetensors"}, "layer": "fc3"}
    url, job = service.over({**spec, "data": {"name": "digits", "test": {"count": 20}, "classes": classes}})
    assert job["status"] == "succeeded", job
    assert (job["plan"]["n_classes"], job["plan"]["shape"]) == (7, [7, 256])
    summary = service.client.get(f"{url}/results").json()["summary"]
    assert summary["weights"] == "file seven.safetensors"
    assert summary["notes"] == ["seven.safetensors: its head has 7 classes instead of 10"]
    assert "the network does not know this data" in summary["warnings"][0]
    say("POST /v1/jobs with a fine-tuned head: 202, the plan has its classes, the summary says so and warns")


def test_label_smoothing_and_class_weights_change_the_loss(service: Service, done: str, say: Say) -> None:
    loss = {"name": "cross_entropy", "label_smoothing": 0.25, "class_weights": [2.0] * 10}
    url, job = service.over({**QUICK, "loss": loss})
    assert job["status"] == "succeeded", job
    assert (job["spec"]["loss"], job["plan"]["path"]) == (loss, "direct")
    summary = service.client.get(f"{url}/results").json()["summary"]
    plain = service.client.get(f"{done}/results").json()["summary"]
    assert service.client.get(done).json()["spec"]["loss"] == "cross_entropy"
    assert summary["splits"]["test"]["loss"] > 2 * plain["splits"]["test"]["loss"]
    assert summary["proof"]["arithmetic_error"] <= summary["proof"]["arithmetic_bound"]
    say("POST /v1/jobs with label smoothing and class weights: 202, succeeded, proved")


# --- health, metrics, docs -------------------------------------------------------------------------------------------


def test_health_readiness_metrics_and_documentation(service: Service, done: str, say: Say) -> None:
    assert service.client.get("/healthz").json()["status"] == "ok"
    assert service.client.get("/readyz").json()["status"] == "ok"
    metrics = service.client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'route="/v1/jobs/{job_id}"' in metrics.text
    assert service.client.get("/openapi.json").json()["openapi"].startswith("3.")
    docs = service.client.get("/docs")
    assert docs.status_code == 200
    assert "http://" not in docs.text
    assert "https://" not in docs.text
    say("GET /healthz, /readyz, /metrics, /openapi.json, /docs: 200, and /docs refers to nothing outside")


def test_head_is_answered_wherever_get_is(service: Service, done: str, say: Say) -> None:
    for path in ("/v1/jobs", done, f"{done}/results.csv", f"{done}/events", "/v1/models", "/healthz", "/openapi.json"):
        head = service.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    say("HEAD at every address that has GET: its status and headers, no body")


def test_what_is_not_there_is_a_problem_too(service: Service, say: Say) -> None:
    check_problem(service.client.get("/v2/jobs"), 404)
    answer = service.client.put("/v1/jobs", json=QUICK)
    check_problem(answer, 405)
    assert {"GET", "POST"} & set(answer.headers["allow"].replace(" ", "").split(","))
    say("an unknown address: 404; a method that it has not: 405 with Allow; both application/problem+json")


def test_without_redis_the_api_says_when_to_come_back(without_redis: httpx.Client, say: Say) -> None:
    assert without_redis.get("/healthz").status_code == 200
    requests = [("GET", "/v1/jobs"), ("GET", "/v1/jobs/any"), ("POST", "/v1/jobs"), ("GET", "/readyz")]
    for method, path in requests:
        answer = without_redis.request(method, path, json=QUICK if method == "POST" else None)
        check_problem(answer, 503)
        assert int(answer.headers["retry-after"]) >= 1
    for path in ("/v1/models", "/v1/datasets"):
        listed = without_redis.get(path)
        assert (listed.status_code, listed.json()["is_complete"]) == (200, False)
    assert without_redis.post("/v1/plans", json=QUICK).status_code == 200
    say("what needs Redis while it is away: 503 with Retry-After; /healthz stays 200, and what is built in is told")


# --- services --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def failed(service: Service) -> str:
    """The address of a job that has failed."""
    spec = {**QUICK, "model": {"name": "digits_alexnet", "weights": "missing.safetensors"}}
    url, job = service.over(spec)
    assert job["status"] == "failed", job
    return url


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, home: Path, example_package: Path) -> Iterator[Service]:
    """A service that takes two jobs at once and keeps results for two seconds."""
    settings = {"ABLATION_MAX_JOBS": "2", "ABLATION_RESULT_DAYS": str(2 / 86400), "ABLATION_SWEEP_S": "0.2"}
    with serve(tmp_path_factory.mktemp("small"), home / "cache", example_package, **settings) as service:
        yield service


@pytest.fixture(scope="module")
def without_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of an API whose Redis is away."""
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as listener:
        away, port, fd = free.getsockname()[1], listener.getsockname()[1], listener.fileno()
        free.close()
        settings = {"REDIS_URL": f"redis://127.0.0.1:{away}/0", "ABLATION_FD": str(fd)}
        env = {**os.environ, **settings, "ABLATION_HOME": str(tmp_path_factory.mktemp("away"))}
        with subprocess.Popen([sys.executable, "-m", "api"], env=env, pass_fds=[fd]) as process:
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, trust_env=False) as client:
                    yield client
            finally:
                process.terminate()

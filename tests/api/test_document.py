"""OpenAPI says exactly what happens: every address, every status, every example."""

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from ablation.spec import JobSpec
from tests.api import conftest as jobs
from worker.settings import Settings
from worker.store import JobStore

PROBLEM = {"application/problem+json"}


@pytest.fixture
def document(api: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = api.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_every_address_and_every_status(document: dict[str, Any]) -> None:
    found = {name: " ".join(sorted(operation["responses"])) for name, operation in operations(document)}
    assert found == {
        "POST /v1/jobs": "202 400 405 408 413 415 422 429 500 503",
        "GET /v1/jobs": "200 405 408 413 422 500 503",
        "GET /v1/jobs/{job_id}": "200 304 404 405 408 410 413 422 500 503",
        "GET /v1/jobs/{job_id}/spec": "200 404 405 408 410 413 422 500 503",
        "DELETE /v1/jobs/{job_id}": "204 404 405 408 409 410 413 422 500 503",
        "POST /v1/jobs/{job_id}/cancel": "200 202 404 405 408 409 410 413 422 500 503",
        "GET /v1/jobs/{job_id}/results": "200 202 404 405 408 409 410 413 422 500 503",
        "GET /v1/jobs/{job_id}/results.csv": "200 202 404 405 408 409 410 413 422 500 503",
        "GET /v1/jobs/{job_id}/results.parquet": "200 202 404 405 408 409 410 413 422 500 503",
        "GET /v1/jobs/{job_id}/events": "200 204 404 405 408 410 413 422 500 503",
        "POST /v1/plans": "200 400 405 408 413 415 422 500 503",
        "GET /v1/models": "200 405 408 413 422 500 503",
        "GET /v1/models/{name}/layers": "200 404 405 408 413 422 500 503",
        "GET /v1/datasets": "200 405 408 413 422 500 503",
        "GET /healthz": "200 405 408 413 422 500 503",
        "GET /readyz": "200 405 408 413 422 500 503",
        "GET /metrics": "200 405 408 413 422 500 503",
    }


def test_every_error_is_a_problem(document: dict[str, Any]) -> None:
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])
    for name, operation in operations(document):
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                assert set(answer["content"]) == PROBLEM, (name, status)
                schema = answer["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (name, status)
                headers = set(answer.get("headers", {}))
                wanted = {"429": {"Retry-After"}, "503": {"Retry-After"}, "405": {"Allow"}}
                assert headers == wanted.get(status, set()), (name, status)


def test_problems_are_sent_as_they_are_documented(api: httpx.Client, document: dict[str, Any]) -> None:
    for sent in (
        api.get("/v1/jobs", params={"limit": 0}), api.get("/readyz"), api.get("/nowhere"), api.put("/v1/jobs"),
    ):  # fmt: skip
        check(sent.json(), {"$ref": "#/components/schemas/Problem"}, document)
        assert set(sent.json()) <= set(document["components"]["schemas"]["Problem"]["properties"])


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every content of every request and answer."""
    for name, operation in operations(document):
        yield from ((name, content) for content in operation.get("requestBody", {}).get("content", {}).values())
        for status, answer in operation["responses"].items():
            yield from ((f"{name} {status}", content) for content in answer.get("content", {}).values())


def check(value: object, schema: dict[str, Any], document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def test_every_example_is_as_its_schema_says(document: dict[str, Any]) -> None:
    shown = set()
    for name, content in bodies(document):
        for example in content.get("examples", {}).values():
            key = example["$ref"].removeprefix("#/components/examples/")
            check(document["components"]["examples"][key]["value"], content["schema"], document)
            shown.add(key)
        assert "examples" in content or name.endswith((".parquet 200", "/metrics 200")), name
    assert shown == set(document["components"]["examples"])


def test_a_wrong_example_is_noticed(document: dict[str, Any]) -> None:
    wrong = {**document["components"]["examples"]["job"]["value"], "status": "asleep"}
    with pytest.raises(jsonschema.ValidationError, match="asleep"):
        check(wrong, {"$ref": "#/components/schemas/JobView"}, document)


def test_the_example_of_a_spec_is_accepted_and_comes_back_as_the_example_of_a_job_says(
    api: httpx.Client, document: dict[str, Any]
) -> None:
    examples = {name: example["value"] for name, example in document["components"]["examples"].items()}
    answer = api.post("/v1/jobs", json=examples["spec"])
    assert answer.status_code == 202
    assert answer.json()["spec"] == examples["job"]["spec"]
    assert answer.json().keys() == examples["job"].keys()
    assert answer.json()["urls"].keys() == examples["job"]["urls"].keys()
    for name in ("shape", "splits", "n_shards", "proof"):
        assert answer.json()["plan"][name] == examples["plan"][name]
    assert api.post("/v1/jobs", json=answer.json()["spec"]).status_code == 202  # what comes back may be sent again


@pytest.mark.parametrize("make", [jobs.queued, jobs.running, jobs.succeeded, jobs.failed, jobs.cancelled])
def test_what_is_sent_is_as_the_schema_says(  # type: ignore[no-untyped-def]
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, document: dict[str, Any], make
) -> None:
    job = make(store, settings, spec)
    for path in (
        "/v1/jobs", "/v1/jobs/{job_id}", "/v1/jobs/{job_id}/results", "/v1/jobs/{job_id}/results.csv",
        "/v1/jobs/{job_id}/results.parquet", "/v1/models", "/v1/datasets", "/healthz", "/metrics",
    ):  # fmt: skip
        sent = api.get(path.format(job_id=job.id))
        if sent.headers["content-type"] == "application/json":
            said = document["paths"][path]["get"]["responses"][str(sent.status_code)]
            check(sent.json(), said["content"]["application/json"]["schema"], document)


def test_an_answer_that_is_not_documented_is_noticed(api: httpx.Client, document: dict[str, Any]) -> None:
    """The client of these tests checks every answer."""
    sent = api.get("/v1/models/nothing/layers")
    del document["paths"]["/v1/models/{name}/layers"]["get"]["responses"]["404"]
    with pytest.raises(AssertionError, match="404 is not documented"):
        jobs.check_documented(sent, document["paths"])

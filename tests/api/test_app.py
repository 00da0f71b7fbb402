"""The application as a whole: light, torch-free, counted."""

import subprocess
import sys

import httpx

HEAVY = (
    "torch",
    "torchvision",
    "numba",
    "pandas",
    "matplotlib",
    "sklearn",
    "worker.tasks",
    "worker.runner",
    "ablation.run",
)


def test_api_never_reaches_torch() -> None:
    script = f"import sys, api.app, api.__main__; print(*[name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_the_check_sees_what_is_there() -> None:
    script = f"import sys, worker.runner; print(*[name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["worker.runner"]


def test_requests_are_counted_by_route(api: httpx.Client) -> None:
    api.get("/v1/jobs/qqq1")
    api.get("/v1/jobs/qqq2")
    text = api.get("/metrics").text
    assert 'ablation_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 2.0' in text
    assert "qqq" not in text


def test_every_address_is_documented(api: httpx.Client) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert {
        "/v1/jobs", "/v1/jobs/{job_id}", "/v1/jobs/{job_id}/cancel", "/v1/jobs/{job_id}/results",
        "/v1/jobs/{job_id}/results.csv", "/v1/jobs/{job_id}/results.parquet", "/v1/plans", "/v1/models",
        "/v1/models/{name}/layers", "/v1/datasets", "/healthz", "/readyz", "/metrics",
    } == set(paths)  # fmt: skip


def test_errors_are_documented_as_they_are_sent(api: httpx.Client) -> None:
    document = api.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    sent = api.get("/v1/jobs", params={"limit": 0}).json()
    assert set(sent) <= set(document["components"]["schemas"]["Problem"]["properties"])
    responses = document["paths"]["/v1/jobs/{job_id}/cancel"]["post"]["responses"]
    assert set(responses) == {"200", "202", "404", "409", "410", "422", "503"}
    for status in ("404", "409", "410", "422", "503"):
        reference = {"$ref": "#/components/schemas/Problem"}
        assert responses[status]["content"] == {"application/problem+json": {"schema": reference}}

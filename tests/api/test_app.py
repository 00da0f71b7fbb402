"""The application as a whole: light, torch-free, counted."""

import subprocess
import sys

import pytest

from tests.api.conftest import serving
from worker import keys
from worker.settings import Settings
from worker.store import JobStore

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


def test_requests_are_counted_by_route(settings: Settings, store: JobStore) -> None:
    with serving(settings) as api:
        api.get("/v1/jobs/qqq1")
        api.get("/v1/jobs/qqq2")
        api.request("QQQ", "/v1/jobs")
        text = api.get("/metrics").text
    assert 'ablation_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 2.0' in text
    assert 'ablation_http_requests_total{method="other",route="/v1/jobs",status="405"} 1.0' in text
    assert "qqq" not in text.lower()


def test_a_fault_is_a_problem_and_counted(
    settings: Settings, store: JobStore, capfd: pytest.CaptureFixture[str]
) -> None:
    store.client.set(keys.JOBS, "not a sorted set")
    with serving(settings) as api:
        answer = api.get("/v1/jobs")
        text = api.get("/metrics").text
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert answer.json()["instance"] == "/v1/jobs"
    assert not {"Traceback", "WRONGTYPE", "/", "redis"} & set(answer.json()["detail"].split())
    assert "WRONGTYPE" in capfd.readouterr().err  # the log has the details
    assert 'ablation_http_requests_total{method="GET",route="/v1/jobs",status="500"} 1.0' in text

"""When will it be done, and when should a client ask again?"""

from datetime import UTC, datetime, timedelta

import pytest

from ablation.catalog import NOTHING
from ablation.spec import JobSpec
from api.schemas import MAX_POLL_S, eta_s, retry_after_s
from worker.planner import plan_job
from worker.settings import Settings
from worker.states import State
from worker.store import JobRecord, Progress


def make_job(spec: JobSpec, settings: Settings, status: State, done: float, elapsed_s: float | None) -> JobRecord:
    now = datetime.now(UTC)
    started = None if elapsed_s is None else now - timedelta(seconds=elapsed_s)
    progress = Progress(done=done, total=8)
    return JobRecord(
        id="a",
        status=status,
        progress=progress,
        created_at=now,
        started_at=started,
        spec=spec,
        plan=plan_job(spec, settings, NOTHING),
    )


def test_before_it_starts_the_plan_says(spec: JobSpec, settings: Settings) -> None:
    job = make_job(spec, settings, State.QUEUED, 0, None)
    assert job.plan
    assert eta_s(job) == job.plan.estimate.seconds


def test_then_its_own_pace_says(spec: JobSpec, settings: Settings) -> None:
    job = make_job(spec, settings, State.RUNNING, 2, 100)
    assert eta_s(job) == pytest.approx(300, rel=0.01)
    assert retry_after_s(job) == MAX_POLL_S
    assert retry_after_s(make_job(spec, settings, State.RUNNING, 7.9, 100)) == 1


def test_the_first_seconds_of_a_job_say_little_of_its_pace(spec: JobSpec, settings: Settings) -> None:
    job = make_job(spec, settings, State.RUNNING, 8e-4, 1)  # at this pace: 10,000 s
    assert job.plan
    planned = job.plan.model_copy(update={"estimate": job.plan.estimate.model_copy(update={"seconds": 100.0})})
    assert 100 < (eta_s(job.model_copy(update={"plan": planned})) or 0) < 300


def test_when_it_is_over_there_is_nothing_to_wait_for(spec: JobSpec, settings: Settings) -> None:
    assert eta_s(make_job(spec, settings, State.FAILED, 2, 100)) is None

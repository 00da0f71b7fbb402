"""When will it be done, when should a client ask again, and what does a summary say?"""

from datetime import UTC, datetime

import jsonschema
import pytest

from ablation.inputs.catalog import NOTHING
from ablation.plan import Plan, PlanOptions
from ablation.run import run_spec
from ablation.spec import JobSpec, make_spec
from ablation.statistics import make_summary
from ablation.views import PlanView
from api.examples import EXAMPLES
from api.schemas import MAX_POLL_S, eta_s, retry_after_s
from api.summary import Summary
from tests.api.conftest import FIELDS
from worker.planner import plan_job
from worker.settings import Settings
from worker.states import State
from worker.store import JobRecord, Progress


def make_job(
    spec: JobSpec, settings: Settings, status: State, *, done: float = 2, shards_per_s: float | None = None
) -> JobRecord:
    return JobRecord(
        id="a",
        status=status,
        progress=Progress(done=done, total=8),
        shards_per_s=shards_per_s,
        created_at=datetime.now(UTC),
        spec=spec,
        plan=plan_job(spec, settings, NOTHING),
    )


def test_the_measured_pace_says_when_it_will_be_done(spec: JobSpec, settings: Settings) -> None:
    job = make_job(spec, settings, State.RUNNING, shards_per_s=0.02)
    assert eta_s(job) == pytest.approx(300)
    assert retry_after_s(job) == MAX_POLL_S
    assert retry_after_s(make_job(spec, settings, State.RUNNING, done=7.9, shards_per_s=0.02)) == 1


@pytest.mark.parametrize("status", [State.QUEUED, State.RUNNING])
def test_until_there_is_a_pace_nobody_knows_and_the_plan_says_when_to_ask(
    spec: JobSpec, settings: Settings, status: State
) -> None:
    job = make_job(spec, settings, status)
    assert job.plan
    estimate = job.plan.estimate.model_copy(update={"seconds": 100.0})
    planned = job.model_copy(update={"plan": job.plan.model_copy(update={"estimate": estimate})})
    assert (eta_s(planned), retry_after_s(planned)) == (None, 10)


@pytest.mark.parametrize("status", sorted(set(State) - {State.QUEUED, State.RUNNING}))
def test_where_nothing_is_left_to_run_there_is_nothing_to_reckon(
    spec: JobSpec, settings: Settings, status: State
) -> None:
    job = make_job(spec, settings, status, done=8, shards_per_s=0.02)
    assert (eta_s(job), retry_after_s(job)) == (None, 1)


def test_a_view_of_a_plan_leaves_out_the_shards_and_nothing_else() -> None:
    assert set(PlanView.model_fields) - {"n_shards"} == set(Plan.model_fields) - {"shards"}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"data": {"name": "digits", "test": {"count": 1}}},
        {"sites": {"count": 1}, "verify": 0},
        {"precision": "float32", "top1": True},
    ],
    ids=["two splits", "one example", "one site, no proof", "float32"],
)
def test_a_real_summary_is_what_the_schema_says_and_nothing_else(settings: Settings, change: dict[str, object]) -> None:
    asked = {**FIELDS, "data": {"name": "digits", "train": {"per_class": 3}, "test": {"per_class": 7}}, **change}
    summary = make_summary(run_spec(make_spec(asked), settings.folders, PlanOptions(threads=1)))
    jsonschema.Draft202012Validator(Summary.model_json_schema()).validate(summary)
    assert Summary.model_validate(summary).model_dump(exclude_unset=True) == summary
    n_splits = len(make_spec(asked).data.splits)
    assert summary.keys() == EXAMPLES["results"]["summary"].keys() - ({"train_test"} if n_splits == 1 else set())


@pytest.mark.parametrize("path", [("more",), ("proof", "more"), ("splits", "test", "more"), ("train_test", "more")])
def test_a_summary_that_says_more_is_noticed(path: tuple[str, ...]) -> None:
    """The control of the test above."""
    *way, last = path
    wrong = summary = Summary.model_validate(EXAMPLES["results"]["summary"]).model_dump()
    for name in way:
        summary = summary[name]
    summary[last] = 1
    with pytest.raises(jsonschema.ValidationError, match="more"):
        jsonschema.Draft202012Validator(Summary.model_json_schema()).validate(wrong)

"""A spec of megabytes is not sent with every answer, and can still be had."""

from typing import Any

import httpx
import pytest

from ablation.spec import JobSpec, make_spec
from api.short_spec import shorten_fields, shorten_spec
from tests.api import conftest as jobs
from tests.api.conftest import FIELDS
from worker.settings import Settings
from worker.store import JobStore

N = 5000
MANY = {**FIELDS, "sites": {"indices": list(range(N))}}
CUT = {"indices": list(range(10))}


def test_a_long_list_of_indices_is_cut_in_every_answer_but_one(api: httpx.Client, store: JobStore) -> None:
    posted = api.post("/v1/jobs", json=MANY, headers={"Idempotency-Key": "long"})
    url = posted.headers["location"]
    shown = posted.json()["spec"]
    assert shown["sites"] == CUT
    assert (shown["lengths"], shown["full"]) == ({"sites.indices": N}, f"{url}/spec")
    answers = [api.get(url), api.get("/v1/jobs"), api.post("/v1/jobs", json=MANY, headers={"Idempotency-Key": "long"})]
    assert [answers[0].json()["spec"], answers[1].json()["data"][0]["spec"]] == [shown, shown]
    assert answers[2].content == posted.content
    assert api.post(f"{url}/cancel").json()["spec"] == shown
    assert max(len(answer.content) for answer in answers) < 5000
    whole = api.get(f"{url}/spec")
    assert make_spec(whole.json()) == make_spec(MANY)
    assert api.get(url, headers={"If-None-Match": api.get(url).headers["etag"]}).status_code == 304


def test_a_cut_spec_is_not_taken_for_a_spec(api: httpx.Client, store: JobStore) -> None:
    shown = api.post("/v1/jobs", json=MANY).json()["spec"]
    refused = api.post("/v1/jobs", json=shown)
    assert (refused.status_code, refused.json()["field"]) == (422, "lengths")


def test_a_short_spec_is_shown_whole(api: httpx.Client, store: JobStore) -> None:
    posted = api.post("/v1/jobs", json={**FIELDS, "sites": {"indices": list(range(1000))}}).json()
    assert posted["spec"] == api.get(posted["urls"]["self"] + "/spec").json()
    assert "full" not in posted["spec"]


def test_the_spec_in_a_result_is_cut_too(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {**jobs.SUMMARY["about"], "spec": make_spec(MANY).model_dump(mode="json")}
    monkeypatch.setattr(jobs, "SUMMARY", {**jobs.SUMMARY, "about": about})
    job = jobs.succeeded(store, settings, spec)
    answer = api.get(f"/v1/jobs/{job.id}/results")
    shown = answer.json()["summary"]["about"]["spec"]
    assert (shown["sites"], shown["lengths"]) == (CUT, {"sites.indices": N})
    assert shown["full"] == f"/v1/jobs/{job.id}/spec"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sites": {"indices": [*range(N)]}}, "sites.indices"),
        ({"data": {**FIELDS["data"], "classes": {str(k): k for k in range(N)}}}, "data.classes"),
        ({"loss": {"name": "cross_entropy", "class_weights": [1.0] * N}}, "loss.class_weights"),
    ],
)
def test_every_long_list_is_cut(change: dict[str, Any], name: str) -> None:
    spec = make_spec({**FIELDS, **change})
    cut = shorten_spec(spec, "/there").model_dump(mode="json")
    assert cut == shorten_fields(spec.model_dump(mode="json"), "/there")
    assert (cut["lengths"], cut["full"]) == ({name: N}, "/there")
    record, field = name.split(".")
    assert len(cut[record][field]) == 10
    assert cut.keys() - {"lengths", "full"} == set(JobSpec.model_fields)

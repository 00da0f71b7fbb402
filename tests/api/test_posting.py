"""One job for many requests with one key, and not more jobs than there may be."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ablation.spec import JobSpec
from tests.api import conftest as jobs
from tests.api.conftest import FIELDS, OWNER, serving
from worker import keys
from worker.settings import Settings
from worker.store import IDEMPOTENCY_S, JobStore


def post(api: httpx.Client, key: str | None = None, **change: object) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return api.post("/v1/jobs", json={**FIELDS, **change}, headers=headers)


def n_messages(store: JobStore) -> int:
    return int(store.client.llen(keys.SHARD_QUEUE))


def told(answer: httpx.Response) -> tuple[int, bytes, dict[str, str]]:
    return answer.status_code, answer.content, {k: v for k, v in answer.headers.items() if k != "date"}


def test_the_same_key_gets_the_first_answer_again(api: httpx.Client, store: JobStore) -> None:
    first = post(api, "a-key")
    sent = n_messages(store)
    assert first.status_code == 202
    assert told(post(api, "a-key")) == told(first)
    assert len(api.get("/v1/jobs").json()["data"]) == 1
    assert n_messages(store) == sent
    assert post(api, "another").json()["id"] != first.json()["id"]
    assert post(api).json()["id"] != first.json()["id"]


@pytest.mark.parametrize("after", ["running", "succeeded", "failed", "cancelled", "deleted"])
def test_the_first_answer_also_when_the_job_has_moved_on(api: httpx.Client, store: JobStore, after: str) -> None:
    first = post(api, "a-key")
    job = store.get(first.json()["id"])
    assert job
    store.claim(job.id, job.plan.shards[0].id, OWNER)
    store.beat(job.id, job.plan.shards[0].id, OWNER, 0.25)
    if after in ("succeeded", "deleted"):
        jobs.succeed(store, job)
    elif after == "failed":
        store.fail(job.id, {"type": "a-type", "title": "A title.", "detail": "why"})
    elif after == "cancelled":
        store.cancel(job.id)
    if after == "deleted":
        store.delete(job.id)
    assert told(post(api, "a-key")) == told(first)


def test_the_first_answer_of_a_job_that_a_worker_plans(store: JobStore, settings: Settings, spec: JobSpec) -> None:
    first = store.create(spec, None, idempotency_key="a-key")
    assert first
    assert first.plan is None
    assert store.claim(first.id, keys.PLAN, OWNER)
    planned = jobs.queued(store, settings, spec).plan
    assert store.set_plan(first.id, OWNER, planned)
    assert store.get(first.id).plan == planned
    assert store.posted("a-key") == first


def test_the_same_payload_is_the_same_job_however_it_is_written(api: httpx.Client) -> None:
    first = post(api, "a-key")
    assert told(post(api, "a-key", verify=8, value="zero", criteria=[], loss="cross_entropy")) == told(first)
    spaced = json.dumps(dict(reversed(FIELDS.items())), indent=3)
    assert told(api.post("/v1/jobs", content=spaced, headers={"Idempotency-Key": "a-key"})) == told(first)


def test_another_payload_under_the_same_key_is_422(api: httpx.Client) -> None:
    first = post(api, "a-key")
    answer = post(api, "a-key", sites={"count": 12})
    assert (answer.status_code, answer.json()["field"], answer.json()["given"]) == (422, "Idempotency-Key", "a-key")
    assert [job["id"] for job in api.get("/v1/jobs").json()["data"]] == [first.json()["id"]]


def test_a_refused_spec_leaves_its_key_unused(api: httpx.Client) -> None:
    assert post(api, "a-key", layer="nothing").status_code == 422
    assert post(api, "a-key").status_code == 202


@pytest.mark.parametrize("key", ["", "a b", "\x7f", "é".encode(), "a" * 256], ids=repr)
def test_a_key_that_is_none_is_422(api: httpx.Client, key: str) -> None:
    answer = post(api, key)
    assert (answer.status_code, answer.json()["field"]) == (422, "Idempotency-Key")
    assert answer.json()["allowed"] == "1 to 255 visible ASCII characters"


@pytest.mark.parametrize("key", ["!", "~" * 255, '"quoted"', "a:b/{c}*?[d]"])
def test_every_visible_character_may_be_in_a_key(api: httpx.Client, key: str) -> None:
    assert told(post(api, key)) == told(post(api, key))


def test_a_key_is_kept_for_a_day(api: httpx.Client, store: JobStore) -> None:
    first = post(api, "a-key")
    assert 0 < store.client.ttl(keys.posted("a-key")) <= IDEMPOTENCY_S == 24 * 3600
    store.client.delete(keys.posted("a-key"))  # what Redis does by itself then
    assert post(api, "a-key").json()["id"] != first.json()["id"]


def test_a_key_whose_job_is_forgotten_makes_a_new_one(api: httpx.Client, store: JobStore) -> None:
    first = post(api, "a-key").json()["id"]
    store.cancel(first)
    store.delete(first)
    store.expire_due(0, 0)
    assert store.get(first) is None
    new = post(api, "a-key")
    assert new.status_code == 202
    assert new.json()["id"] != first
    assert told(post(api, "a-key")) == told(new)


def test_fifty_at_once_make_one_job(api: httpx.Client, store: JobStore) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: told(post(api, "a-key")), range(50)))
    assert answers[0][0] == 202
    assert all(answer == answers[0] for answer in answers)
    assert store.client.zcard(keys.JOBS) == 1
    assert n_messages(store) == json.loads(answers[0][1])["plan"]["n_shards"]


def test_of_two_who_looked_before_one_makes_the_job(store: JobStore, settings: Settings, spec: JobSpec) -> None:
    plan = jobs.queued(store, settings, spec).plan
    made = store.create(spec, plan, idempotency_key="a-key")
    assert made
    assert store.create(spec, plan, idempotency_key="a-key") is None
    assert store.posted("a-key") == made
    assert store.client.zcard(keys.JOBS) == 2


@pytest.fixture
def small(settings: Settings, store: JobStore) -> Iterator[httpx.Client]:
    with serving(settings.model_copy(update={"max_jobs": 3})) as api:
        yield api


def test_more_jobs_than_there_may_be_are_429(
    small: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    for make in (jobs.succeeded, jobs.failed, jobs.cancelled):  # those are over, and don't count
        make(store, settings, spec)
    jobs.finalizing(store, settings, spec)
    cancelling = jobs.running(store, settings, spec)
    store.cancel(cancelling.id)
    last = post(small, "a-key")
    assert last.status_code == 202

    refused = post(small, "another")
    assert (refused.status_code, refused.headers["content-type"]) == (429, "application/problem+json")
    assert int(refused.headers["retry-after"]) >= 1
    assert "3 jobs" in refused.json()["detail"]
    assert "ABLATION_MAX_JOBS" in refused.json()["detail"]
    assert told(post(small, "a-key")) == told(last)  # that one is there already

    store.cancel(last.json()["id"])
    assert post(small, "another").status_code == 202


def test_at_once_there_are_not_more_either(small: httpx.Client, store: JobStore) -> None:
    with ThreadPoolExecutor(12) as pool:
        statuses = sorted(pool.map(lambda _: post(small).status_code, range(12)))
    assert statuses == [202] * 3 + [429] * 9
    assert store.client.zcard(keys.JOBS) == 3


def test_a_job_that_leaves_out_bad_pictures_is_planned_by_a_worker(api: httpx.Client, settings: Settings) -> None:
    """Only who opens the files knows how many are left."""
    folder = settings.folders.data / "skipping"
    for label in range(10):
        (folder / "test" / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / "test" / str(label) / "a.png").touch()
    data = {"name": "imagefolder", "root": "skipping", "test": "all"}
    body = {"model": {"name": "digits_alexnet"}, "layer": "fc2", "data": data, "sites": {"count": 3}}
    assert api.post("/v1/plans", json=body).json()["splits"][0]["n_examples"] == 10
    body["data"] = {**data, "bad_images": "skip"}
    posted = api.post("/v1/jobs", json=body)
    assert (posted.status_code, posted.json()["plan"]) == (202, None)
    assert posted.json()["spec"]["data"]["check_images"] == "headers"
    refused = api.post("/v1/plans", json=body)
    assert (refused.status_code, refused.json()["field"]) == (422, "data.bad_images")
    assert "POST /v1/jobs" in refused.json()["next_step"]
    body["data"] = {**data, "bad_images": "drop"}
    assert api.post("/v1/jobs", json=body).json()["field"] == "data.bad_images"

"""Another format, only what is new: what the headers of a request choose."""

import httpx
import pytest

from ablation.spec import JobSpec
from api.headers import choose_type, is_known
from tests.api import conftest as jobs
from worker.settings import Settings
from worker.store import JobStore

JSON, CSV = "application/json", "text/csv"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", JSON),
        ("*/*", JSON),
        (JSON, JSON),
        (CSV, CSV),
        ("TEXT/CSV; header=present", CSV),
        ("text/*", CSV),
        ("text/csv, application/json", JSON),  # both as much: the first one offered
        ("text/csv, application/json;q=0.9", CSV),
        ("text/csv;q=0.9, application/json", JSON),
        ("text/csv;q=0.5, application/json;q=0.4, */*;q=0.1", CSV),
        ("text/csv, */*", CSV),  # named exactly
        ("text/csv;q=0.1, */*", JSON),
        ("text/csv;q=0, */*", JSON),
        ("application/json;q=0, */*", CSV),
        ("application/*;q=0.2, text/*;q=0.3", CSV),
        ("text/csv;q=0", JSON),
        ("image/png", JSON),  # neither
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", JSON),  # a browser
        (",;,q=1", JSON),
        ("text/csv;q=much", CSV),
    ],
)
def test_accept(accept: str, chosen: str) -> None:
    assert choose_type(accept, (JSON, CSV)) == chosen


def test_results_in_either_format(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec) -> None:
    url = f"/v1/jobs/{jobs.succeeded(store, settings, spec).id}/results"
    table = api.get(f"{url}.csv")
    by_accept = api.get(url, headers={"Accept": "text/csv, application/json;q=0.5"}, params={"limit": 1})
    assert by_accept.content == table.content
    for name in ("content-type", "content-disposition"):
        assert by_accept.headers[name] == table.headers[name]
    rows = api.get(url, headers={"Accept": "text/csv;q=0.5, application/json"})
    assert rows.json()["total_rows"] == 3
    assert by_accept.headers["vary"] == rows.headers["vary"] == "Accept"


def test_accept_changes_nothing_while_there_is_no_table(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.running(store, settings, spec)
    answer = api.get(f"/v1/jobs/{job.id}/results", headers={"Accept": CSV})
    assert (answer.status_code, answer.json()["status"], answer.headers["vary"]) == (202, "running", "Accept")


@pytest.mark.parametrize(
    ("given", "known"),
    [
        (['W/"a"'], True),
        (['"a"'], True),
        (['W/"b", W/"a"'], True),
        (['"b"', '"a"'], True),
        (["*"], True),
        ([" * "], True),
        (['W/"b"'], False),
        (["a"], False),
        (['"*"'], False),
        (['"b,a"'], False),
        ([""], False),
        ([], False),
    ],
)
def test_if_none_match(given: list[str], known: bool) -> None:
    assert is_known('W/"a"', given) == known


def test_a_job_that_did_not_change_is_304(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.running(store, settings, spec)
    url = f"/v1/jobs/{job.id}"
    first = api.get(url)
    etag = first.headers["etag"]
    assert etag.startswith('W/"')
    again = api.get(url, headers={"If-None-Match": f'"other", {etag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert {name: again.headers[name] for name in ("etag", "retry-after")} == {
        name: first.headers[name] for name in ("etag", "retry-after")
    }
    several = api.get(url, headers=[("If-None-Match", '"other"'), ("If-None-Match", etag)])
    assert several.status_code == 304

    store.beat(job.id, job.plan.shards[0].id, jobs.OWNER, 0.5)
    news = api.get(url, headers={"If-None-Match": etag})
    assert (news.status_code, news.json()["progress"]["done"]) == (200, 0.5)
    assert news.headers["etag"] != etag
    assert api.get("/v1/jobs/nothing", headers={"If-None-Match": "*"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/jobs", 200), ("/v1/jobs/{job}", 200),
        ("/v1/jobs/{job}/results", 200), ("/v1/jobs/{job}/results.csv", 200),
        ("/v1/jobs/{job}/results.parquet", 200), ("/v1/jobs/{job}/events", 200), ("/v1/models", 200),
        ("/v1/models/alexnet/layers", 200), ("/v1/datasets", 200), ("/healthz", 200), ("/readyz", 503), ("/docs", 200),
        ("/openapi.json", 200), ("/v1/jobs/nothing", 404), ("/v1/jobs?limit=0", 422), ("/v1/plans", 405),
    ],
)  # fmt: skip
def test_head_is_get_without_its_body(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, path: str, status: int
) -> None:
    url = path.replace("{job}", jobs.succeeded(store, settings, spec).id)
    head, get = api.head(url), api.get(url)
    assert (head.status_code, get.status_code, head.content) == (status, status, b"")
    left_out = {"date", "transfer-encoding"}  # the latter is of the body alone
    headers = [{name: one.headers[name] for name in set(one.headers) - left_out} for one in (head, get)]
    assert headers[0] == headers[1]


def test_head_of_a_stream_of_events_ends_at_once(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.running(store, settings, spec)
    answer = api.head(f"/v1/jobs/{job.id}/events")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.elapsed.total_seconds() < 1


def test_time_alone_changes_no_etag(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec) -> None:
    job = jobs.running(store, settings, spec)
    store.beat(job.id, job.plan.shards[0].id, jobs.OWNER, 0.5)
    one, other = (api.get(f"/v1/jobs/{job.id}") for _ in range(2))
    assert one.json()["eta_seconds"] == other.json()["eta_seconds"] > 0
    assert one.headers["etag"] == other.headers["etag"]

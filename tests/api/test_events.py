"""What happens to a job, told as it happens, from wherever the client was cut off."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import fastapi.routing
import httpx
import pytest

from ablation.spec import JobSpec
from api.events import POLL_S, Told, read_event_id
from tests.api import conftest as jobs
from tests.worker.waiting import wait_for
from worker.redis_server import start_redis
from worker.settings import Settings
from worker.store import JobStore, connect

Event = dict[str, Any]


def read(lines: Iterator[str]) -> Iterator[Event]:
    """Every event of a stream; a comment is one too."""
    event: Event = {}
    for line in lines:
        if line.startswith(":"):
            yield {"comment": line}
        elif line:
            name, _, value = line.partition(": ")
            event[name] = json.loads(value) if name == "data" else value
        elif event:
            yield event
            event = {}


@contextmanager
def listening(api: httpx.Client, job_id: str, last: str | None = None) -> Iterator[Iterator[Event]]:
    headers = {} if last is None else {"Last-Event-ID": last}
    with api.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        yield read(answer.iter_lines())


def told(events: Iterator[Event]) -> list[tuple[str, str, float]]:
    return [(one["event"], one["data"]["status"], one["data"]["progress"]["done"]) for one in events]


def test_a_job_from_its_beginning_to_its_end(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.queued(store, settings, spec)
    n = float(len(job.plan.shards))
    with listening(api, job.id) as events:
        assert told([next(events), next(events)]) == [("status", "queued", 0.0), ("progress", "queued", 0.0)]
        store.claim(job.id, job.plan.shards[0].id, jobs.OWNER)
        assert told([next(events)]) == [("status", "running", 0.0)]
        store.beat(job.id, job.plan.shards[0].id, jobs.OWNER, 0.25)
        assert told([next(events)]) == [("progress", "running", 0.25)]
        jobs.succeed(store, job)
        rest = list(events)
    assert told(rest)[-3:] == [("status", "succeeded", n), ("progress", "succeeded", n), ("done", "succeeded", n)]
    assert rest[-1]["data"] == {
        "id": job.id,
        "status": "succeeded",
        "progress": {"done": n, "total": n},
        "eta_seconds": None,
        "error": None,
    }


def test_every_event_has_an_id_of_its_own(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.succeeded(store, settings, spec)
    with listening(api, job.id) as events:
        ids = [event["id"] for event in events]
    assert len(ids) == len(set(ids)) == 3


@pytest.mark.parametrize("make", [jobs.failed, jobs.cancelled])
def test_what_is_over_is_told_and_ends(  # type: ignore[no-untyped-def]
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, make
) -> None:
    job = make(store, settings, spec)
    with listening(api, job.id) as events:
        *_, last = events
    assert (last["event"], last["data"]["error"]) == ("done", store.get(job.id).error)


def test_after_the_last_event_id_only_what_is_new(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.running(store, settings, spec)
    with listening(api, job.id) as events:
        first, second = next(events), next(events)
    with listening(api, job.id, first["id"]) as events:
        assert next(events) == second
    jobs.succeed(store, job)
    with listening(api, job.id, second["id"]) as events:
        later = list(events)
    assert [event["event"] for event in later] == ["status", "progress", "done"]
    for i, event in enumerate(later[:-1], 1):
        with listening(api, job.id, event["id"]) as events:
            assert list(events) == later[i:]


def test_after_done_there_is_nothing_to_come_back_for(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.succeeded(store, settings, spec)
    with listening(api, job.id) as events:
        *_, last = events
    again = api.get(f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": last["id"]})
    assert (again.status_code, again.content) == (204, b"")  # so a browser stops


@pytest.mark.parametrize("last", ["", "1", "nonsense", "running", "a:b:c", ":done", "{}", "queued:0.0:done:done"])
def test_an_id_of_somebody_else_begins_at_the_beginning(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, last: str
) -> None:
    job = jobs.succeeded(store, settings, spec)
    with listening(api, job.id, last) as events:
        assert [event["event"] for event in events] == ["status", "progress", "done"]


@pytest.mark.parametrize("told", [Told(), Told("running"), Told("running", "2.25"), Told("failed", "0.0", True)])
def test_ids_read_back(told: Told) -> None:
    assert read_event_id(told.event_id) == told


def test_a_stream_ends_when_its_job_is_deleted_behind_its_back(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec
) -> None:
    job = jobs.running(store, settings, spec)
    with listening(api, job.id) as events:
        next(events)
        next(events)
        store.cancel(job.id)
        store.release(job.id, job.plan.shards[0].id, jobs.OWNER)
        store.delete(job.id)  # quicker than anybody looks
        assert "expired" not in [event["data"]["status"] for event in events]


def test_unknown_and_deleted_jobs(api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec) -> None:
    job = jobs.cancelled(store, settings, spec)
    store.delete(job.id)
    for job_id, status in (("nothing", 404), (job.id, 410)):
        answer = api.get(f"/v1/jobs/{job_id}/events")
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


def test_nothing_new_is_told_by_comments(
    api: httpx.Client, store: JobStore, settings: Settings, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fastapi.routing._PING_INTERVAL == 15
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", POLL_S / 5)
    job = jobs.queued(store, settings, spec)
    with listening(api, job.id) as events:
        assert ["event" in next(events) for _ in range(4)] == [True, True, False, False]


def test_many_streams_hold_no_thread(settings: Settings, store: JobStore, spec: JobSpec) -> None:
    job = jobs.queued(store, settings, spec)
    with jobs.serving(settings) as api, ExitStack() as stack:
        streams = [stack.enter_context(listening(api, job.id)) for _ in range(60)]  # more than there are threads
        for events in streams:
            next(events)
        assert api.get(f"/v1/jobs/{job.id}").status_code == 200
        store.cancel(job.id)
        for events in streams:
            assert [event["event"] for event in events][-1] == "done"


def test_a_client_that_goes_away_ends_its_stream(settings: Settings, store: JobStore, spec: JobSpec) -> None:
    def n_looks() -> int:
        return int(store.client.info("commandstats")["cmdstat_hgetall"]["calls"])

    job = jobs.queued(store, settings, spec)
    with jobs.serving(settings) as api:
        with listening(api, job.id) as events:
            next(events)
            before = n_looks()
            wait_for(lambda: n_looks() >= before + 3, 30)
        seen = [-1, n_looks()]
        while seen[-1] != seen[-2]:
            assert len(seen) < 10, "somebody still looks"
            time.sleep(3 * POLL_S)
            seen.append(n_looks())


def test_a_stream_outlives_redis(
    tmp_path_factory: pytest.TempPathFactory, home: object, spec: JobSpec, settings: Settings
) -> None:
    folder = tmp_path_factory.mktemp("redis")
    server = start_redis(folder / "run", folder / "data")
    own = settings.model_copy(update={"redis_url": server.url})
    try:
        with connect(own) as client, jobs.serving(own) as api:
            store = JobStore(client)
            job = jobs.queued(store, own, spec)
            with listening(api, job.id) as events:
                next(events)
                next(events)
                server.stop()
                for _ in range(2):  # so long that the stream has failed to look at least once, too
                    assert api.get(f"/v1/jobs/{job.id}").status_code == 503
                server = start_redis(folder / "run", folder / "data")
                store.cancel(job.id)
                assert [event["event"] for event in events][-1] == "done"
    finally:
        server.stop()

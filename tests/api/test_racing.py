"""Many clients at once, and every verb in every state: over HTTP, by two API processes on one Redis."""

import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.api import conftest as jobs
from tests.api.conftest import OWNER, SUMMARY, check_documented, make_table
from tests.api.test_main import COMMAND, PATIENCE_S, environment
from tests.api.test_posting import n_messages, post, told
from tests.stopping import stopping
from tests.worker.test_store import at_once
from worker import codec, keys
from worker.redis_server import RedisServer
from worker.settings import Settings
from worker.states import TERMINAL, State
from worker.store import JobRecord, JobStore

Apis = tuple[httpx.Client, httpx.Client]
N_CLIENTS = 50
FORGOTTEN = "forgotten"
ERROR = {"type": "a-type", "title": "A title.", "detail": "why"}


@contextmanager
def api_process(settings: Settings) -> Iterator[httpx.Client]:
    """A client of an API process of its own; every answer must be one that OpenAPI knows."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd, (host, port) = listener.fileno(), listener.getsockname()
        variables = {**environment(settings), "ABLATION_FD": str(fd)}
        with (
            subprocess.Popen(COMMAND, env=variables, pass_fds=[fd], stderr=subprocess.DEVNULL) as process,
            stopping(process),
            httpx.Client(base_url=f"http://{host}:{port}", timeout=2 * PATIENCE_S, trust_env=False) as client,
        ):
            paths = client.get("/openapi.json").json()["paths"]
            client.event_hooks["response"] = [lambda answer: check_documented(answer, paths)]
            yield client


@pytest.fixture(scope="module")
def processes(redis_server: RedisServer, home: Path) -> Iterator[Apis]:
    settings = Settings(redis_url=redis_server.url, home=home, threads=1)
    with api_process(settings) as one, api_process(settings) as another:
        yield one, another


@pytest.fixture
def apis(processes: Apis, store: JobStore) -> Apis:
    """Clients of two processes of a service without jobs: `store` has emptied Redis."""
    return processes


# --- many at once ----------------------------------------------------------------------------------------------------


def only_job(store: JobStore) -> JobRecord:
    [job], _ = store.list()
    return job


@pytest.mark.parametrize("attempt", range(3))
def test_of_fifty_with_one_key_one_makes_the_job(apis: Apis, store: JobStore, attempt: int) -> None:
    answers = at_once(*[lambda api=apis[i % 2]: told(post(api, "a-key")) for i in range(N_CLIENTS)])
    assert answers[0][0] == 202
    assert answers == [answers[0]] * N_CLIENTS
    job = only_job(store)
    assert job.plan
    assert n_messages(store) == len(job.plan.shards)


@pytest.mark.parametrize("attempt", range(3))
def test_of_two_payloads_with_one_key_one_wins(apis: Apis, store: JobStore, attempt: int) -> None:
    specs = [{"sites": {"count": 11 + i // 2 % 2, "seed": 0}} for i in range(N_CLIENTS)]  # each to both processes
    posts = [lambda api=apis[i % 2], spec=spec: post(api, "a-key", **spec) for i, spec in enumerate(specs)]
    answers = at_once(*posts)
    job = only_job(store)
    won = [answer for answer in answers if answer.status_code == 202]
    lost = [answer for answer in answers if answer.status_code == 422]
    sites = {"sites": job.spec.model_dump(mode="json")["sites"]}
    assert (len(won), len(lost)) == (specs.count(sites), N_CLIENTS - specs.count(sites))
    assert all(told(answer) == told(won[0]) for answer in won)
    assert won[0].json()["id"] == job.id
    assert {(answer.json()["field"], answer.json()["given"]) for answer in lost} == {("Idempotency-Key", "a-key")}
    assert job.plan
    assert n_messages(store) == len(job.plan.shards)


# Of a cancel, a DELETE and a completion at once: how they may end, and where the job is then. Each is what some order
# of the three gives.
ENDS = {
    (202, 409, False): State.CANCELLED,  # cancel, completion; DELETE before the job was over
    (202, 204, False): State.EXPIRED,  # cancel, completion, DELETE
    (409, 409, True): State.SUCCEEDED,  # DELETE, completion, cancel
    (409, 204, True): State.EXPIRED,  # completion, cancel, DELETE
    (410, 204, True): State.EXPIRED,  # completion, DELETE, cancel
}


@pytest.mark.parametrize("attempt", range(20))
def test_cancel_against_delete_against_completion(
    apis: Apis, store: JobStore, settings: Settings, spec: jobs.JobSpec, attempt: int
) -> None:
    job = jobs.finalizing(store, settings, spec)
    assert store.claim_finalize(job.id, OWNER)
    url, table = f"/v1/jobs/{job.id}", make_table()
    delays_s = [random.Random(3 * attempt + i).uniform(0, 0.01) for i in range(3)]  # so that each is first at times

    def save() -> bool:
        return store.save_table(job.id, OWNER, table.about, SUMMARY, codec.encode_blocks(table))

    def cancel() -> int:
        return apis[0].post(f"{url}/cancel").status_code

    def delete() -> int:
        return apis[1].delete(url).status_code

    def late(delay_s: float, act: Callable[[], int]) -> int:
        time.sleep(delay_s)
        return act()

    ended = tuple(
        at_once(*[lambda d=d, a=a: late(d, a) for d, a in zip(delays_s, (cancel, delete, save), strict=True)])
    )
    record = store.get(job.id)
    assert record
    assert ended in ENDS
    assert record.status == ENDS[ended]
    answers = {api.get(url).status_code for api in apis} | {api.get(f"{url}/results").status_code for api in apis}
    assert answers == {State.CANCELLED: {200, 409}, State.EXPIRED: {410}, State.SUCCEEDED: {200}}[record.status]
    kept = {keys.result(job.id), keys.table(job.id)} if record.status == State.SUCCEEDED else set()
    assert {key.decode() for key in store.client.scan_iter(f"*{job.id}*")} == {keys.job(job.id), *kept}


@pytest.mark.parametrize("attempt", range(3))
def test_of_many_cancels_one_has_stopped_the_job_and_the_others_are_told_that_it_stops(
    apis: Apis, store: JobStore, settings: Settings, spec: jobs.JobSpec, attempt: int
) -> None:
    job = jobs.running(store, settings, spec)
    answers = at_once(*[lambda api=apis[i % 2]: api.post(f"/v1/jobs/{job.id}/cancel") for i in range(20)])
    assert sorted(answer.status_code for answer in answers) == [200] * 19 + [202]
    assert {answer.json()["status"] for answer in answers} == {"cancelling"}


@pytest.mark.parametrize("attempt", range(3))
def test_whoever_reads_while_it_is_deleted_gets_all_or_is_told_that_it_is_gone(
    apis: Apis, store: JobStore, settings: Settings, spec: jobs.JobSpec, attempt: int
) -> None:
    job = jobs.succeeded(store, settings, spec)
    url = f"/v1/jobs/{job.id}"
    whole = apis[0].get(f"{url}/results").content
    deletes = [lambda api=api: api.delete(url) for api in apis]
    reads = [lambda api=apis[i % 2]: api.get(f"{url}/results") for i in range(30)]
    said = at_once(*reads[:15], *deletes, *reads[15:])
    assert {answer.content for answer in said if answer.status_code == 200} <= {whole}
    assert {answer.status_code for answer in said} <= {200, 204, 410}
    assert 204 in {answer.status_code for answer in said}


# --- every verb in every state ---------------------------------------------------------------------------------------


def bring_to(store: JobStore, job_id: str, state: str) -> None:
    """Let a job that was posted get into this state, as workers, clients and time do it."""
    job = store.get(job_id)
    assert job
    assert job.plan
    if state not in (State.QUEUED, State.CANCELLED, State.EXPIRED, FORGOTTEN):
        assert store.claim(job.id, job.plan.shards[0].id, OWNER)
    if state == State.FINALIZING:
        jobs.bring_partials(store, job)
        assert store.claim_finalize(job.id, OWNER)
    if state == State.SUCCEEDED:
        jobs.succeed(store, job)
    if state == State.FAILED:
        assert store.fail(job.id, ERROR)
    if state in (State.CANCELLING, State.CANCELLED, State.EXPIRED, FORGOTTEN):
        store.cancel(job.id)
    if state in (State.EXPIRED, FORGOTTEN):
        store.delete(job.id)
    if state == FORGOTTEN:
        store.expire_due(result_s=60, tombstone_s=-1)
    assert state_of(store, job.id) == state


def state_of(store: JobStore, job_id: str) -> str:
    job = store.get(job_id)
    return job.status if job else FORGOTTEN


VERBS: dict[str, Callable[[httpx.Client, str], httpx.Response]] = {
    "cancel": lambda api, url: api.post(f"{url}/cancel"),
    "delete": lambda api, url: api.delete(url),
    "get": lambda api, url: api.get(url),
    "results": lambda api, url: api.get(f"{url}/results"),
    "csv": lambda api, url: api.get(f"{url}/results.csv"),
}
ANSWERS: dict[str, tuple[int, ...]] = {  # in the order of VERBS
    State.QUEUED: (202, 409, 200, 202, 202),
    State.RUNNING: (202, 409, 200, 202, 202),
    State.FINALIZING: (202, 409, 200, 202, 202),
    State.CANCELLING: (200, 409, 200, 409, 409),
    State.CANCELLED: (200, 204, 200, 409, 409),
    State.SUCCEEDED: (409, 204, 200, 200, 200),
    State.FAILED: (409, 204, 200, 409, 409),
    State.EXPIRED: (410, 410, 410, 410, 410),
    FORGOTTEN: (404, 404, 404, 404, 404),
}
# Where a verb that did something leads; all else leaves the job where it was.
LEADS_TO = {
    ("cancel", State.QUEUED): State.CANCELLED,
    ("cancel", State.RUNNING): State.CANCELLING,
    ("cancel", State.FINALIZING): State.CANCELLING,
    ("delete", State.CANCELLED): State.EXPIRED,
    ("delete", State.SUCCEEDED): State.EXPIRED,
    ("delete", State.FAILED): State.EXPIRED,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", ANSWERS)
def test_every_verb_in_every_state(apis: Apis, store: JobStore, state: str, verb: str) -> None:
    job_id = post(apis[0]).json()["id"]
    bring_to(store, job_id, state)
    answer = VERBS[verb](apis[1], f"/v1/jobs/{job_id}")
    assert answer.status_code == ANSWERS[state][[*VERBS].index(verb)]
    after = LEADS_TO.get((verb, State(state)), state) if state != FORGOTTEN else state
    assert state_of(store, job_id) == after
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
    elif verb in ("cancel", "get"):
        assert answer.json()["status"] == after


@pytest.mark.parametrize("state", ANSWERS)
def test_resubmission_in_every_state(apis: Apis, store: JobStore, state: str) -> None:
    first = post(apis[0], "a-key")
    job_id = first.json()["id"]
    bring_to(store, job_id, state)
    sent = n_messages(store)
    if state == FORGOTTEN:
        again = post(apis[1], "a-key", sites={"count": 12})
        assert again.status_code == 202
        assert again.json()["id"] != job_id
    else:
        assert post(apis[1], "a-key", sites={"count": 12}).status_code == 422
        assert told(post(apis[1], "a-key")) == told(first)
        assert n_messages(store) == sent
    assert state_of(store, job_id) == state


@pytest.mark.parametrize("state", ANSWERS)
def test_only_what_is_over_expires(apis: Apis, store: JobStore, state: str) -> None:
    job_id = post(apis[0]).json()["id"]
    bring_to(store, job_id, state)
    before = apis[1].get(f"/v1/jobs/{job_id}").status_code
    store.expire_due(result_s=-1, tombstone_s=60)  # every result is too old, and no tombstone
    is_over = state in TERMINAL
    assert apis[1].get(f"/v1/jobs/{job_id}").status_code == (410 if is_over else before)
    assert state_of(store, job_id) == (State.EXPIRED if is_over else state)

"""Redis in trouble, but not away: whatever it refuses is 503 with a reason, and no traceback is written."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from redis import Redis
from redis.connection import DefaultParser

from api.redis_errors import reason_of
from tests.api.conftest import FIELDS, serving
from tests.worker.waiting import wait_for
from worker.redis_server import RedisServer, start_redis
from worker.settings import Settings
from worker.store import JobStore, connect


@contextmanager
def own_redis() -> Iterator[RedisServer]:
    """A server that a test may ruin."""
    with tempfile.TemporaryDirectory(prefix="ablation-test-") as folder:
        server = start_redis(Path(folder) / "run", Path(folder) / "data")
        try:
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGCONT)
            server.process.kill()
            server.stop()


@pytest.fixture
def own(settings: Settings) -> Iterator[tuple[RedisServer, Settings]]:
    with own_redis() as server:
        yield server, settings.model_copy(update={"redis_url": server.url})


def become_a_replica(client: Redis) -> None:
    client.replicaof("127.0.0.1", 1)


def lose_the_master(client: Redis) -> None:
    client.config_set("replica-serve-stale-data", "no")
    client.replicaof("127.0.0.1", 1)


def fail_to_save(client: Redis) -> None:
    """The disk takes no snapshot."""
    client.config_set("appendonly", "no")
    shutil.rmtree(client.config_get("dir")["dir"])
    client.config_set("save", "3600 1")
    client.set("a", 1)
    client.bgsave()
    wait_for(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", 10)


def fill(client: Redis) -> None:
    client.config_set("maxmemory", 1)


def take_rights(client: Redis) -> None:
    client.execute_command("ACL", "SETUSER", "default", "-@scripting")


def take_keys(client: Redis) -> None:
    client.execute_command("ACL", "SETUSER", "default", "-@all", "+@connection", "+acl")


def take_rights_in_scripts(client: Redis) -> None:
    client.execute_command("ACL", "SETUSER", "default", "-hset", "-zadd", "-incr")


def change_password(client: Redis) -> None:
    client.config_set("requirepass", "secret")
    client.client_kill_filter(_type="normal", skipme=True)


def take_no_clients(client: Redis) -> None:
    client.client_kill_filter(_type="normal", skipme=True)
    client.config_set("maxclients", 1)


def want_replicas(client: Redis) -> None:
    client.config_set("min-replicas-to-write", 3)


TROUBLES = {
    become_a_replica: "replica that takes no writes",
    lose_the_master: "replica that has lost its master",
    fail_to_save: "can't write to its disk",
    fill: "has no room",
    take_rights: "refuses this service",
    take_keys: "refuses this service",
    take_rights_in_scripts: "refuses this service",
    change_password: "refuses this service",
    take_no_clients: "Redis",
    want_replicas: "too few replicas",
}


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
def test_whatever_redis_refuses_is_503_with_a_reason(
    own: tuple[RedisServer, Settings],
    trouble: Callable[[Redis], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    server, settings = own
    with Redis(unix_socket_path=str(server.socket), single_connection_client=True) as client, serving(settings) as api:
        known = api.post("/v1/jobs", json=FIELDS).json()["urls"]
        trouble(client)
        refused = api.post("/v1/jobs", json=FIELDS)
        others = [
            api.get("/v1/jobs"), api.get(known["self"]), api.post(known["cancel"]), api.get("/readyz"),
            api.get("/v1/models"), api.post("/v1/plans", json=FIELDS), api.get(known["events"] + "?x=1"),
            api.get("/healthz"), api.get("/metrics"),
        ]  # fmt: skip
    assert refused.status_code == 503, refused.text
    assert TROUBLES[trouble] in refused.json()["detail"]
    for answer in (refused, *others):
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        assert ("retry-after" in answer.headers) or answer.status_code != 503
        assert answer.elapsed.total_seconds() < 10
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)", "interrupted"),
        ("LOADING Redis is loading the dataset in memory", "reading its data back"),
        ("MISCONF Errors writing to the AOF file: No space left on device", "can't write to its disk"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "no room"),
        ("NOAUTH Authentication required.", "refuses this service"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "refuses this service"),
        ("NOPERM this user has no permissions to run the 'get' command", "refuses this service"),
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "lost its master"),
        ("BUSY Redis is busy running a script.", "busy with a script"),
        ("CLUSTERDOWN The cluster is down", "cluster is down"),
        ("EXECABORT Transaction discarded because of previous errors.", "refuses the request"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "refuses the request"),
        ("ERR max number of clients reached", "as many clients"),
        ("ERR DB index is out of range", "refuses the request"),
        ("NEWCODE something that later versions say", "refuses the request (NEWCODE)"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", None),
        ("ERR user_script:3: attempt to index a nil value", None),
    ],
)
def test_every_error_has_a_reason_but_those_of_this_program(said: str, reason: str | None) -> None:
    """The texts are those of a server, read by redis-py's own parser; a pipeline adds its command."""
    error = DefaultParser.parse_error(said)
    assert (reason_of(error) is None) == (reason is None)
    assert (reason or "") in (reason_of(error) or "")
    piped = type(error)(f"Command # 1 (GET a) of pipeline caused error: {error}")
    assert (reason_of(piped) is None) == (reason is None)


def test_a_job_that_was_stored_is_accepted_even_if_its_messages_are_refused(
    own: tuple[RedisServer, Settings], capfd: pytest.CaptureFixture[str]
) -> None:
    """The sweeper sends them later."""
    server, settings = own
    with Redis(unix_socket_path=str(server.socket)) as client, serving(settings) as api:
        assert api.post("/v1/jobs", json=FIELDS).status_code == 202
        client.execute_command("ACL", "SETUSER", "default", "-lpush", "-rpush", "-multi")
        answer = api.post("/v1/jobs", json=FIELDS)
        assert answer.status_code == 202
        assert api.get(answer.headers["location"]).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


# --- settings of Redis -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("maxmemory-policy", "allkeys-lru", "maxmemory-policy allkeys-lru"),
        ("appendonly", "no", "nothing of its data"),
    ],
)
def test_a_redis_that_may_lose_jobs_is_named(
    own: tuple[RedisServer, Settings], name: str, value: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, settings = own
    with connect(settings) as client:
        client.config_set(name, value)
        JobStore(client).note_worker("a-worker")
        with serving(settings) as api:
            wait_for(lambda: "warnings" in api.get("/readyz").json(), 10)
            answer = api.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    (warning,) = answer.json()["warnings"]
    assert said in warning
    assert warning in caplog.text


def test_a_redis_that_keeps_everything_is_not_warned_of(own: tuple[RedisServer, Settings]) -> None:
    _, settings = own
    with connect(settings) as client:
        assert JobStore(client).doubts() == []
        client.execute_command("ACL", "SETUSER", "default", "-info")
        assert JobStore(client).doubts() == []  # and one that tells nothing, neither


# --- a frozen server -------------------------------------------------------------------------------------------------

N_CLIENTS = 60
NO_REDIS = ("/healthz", "/metrics", "/v1/models", "/docs", "/v1/models/alexnet/layers", "/openapi.json")


def ask(url: str) -> tuple[int, float]:
    start = time.perf_counter()
    with httpx.Client(timeout=30, trust_env=False) as client:
        return client.get(url).status_code, time.perf_counter() - start


def test_a_frozen_redis_holds_nobody_up(own: tuple[RedisServer, Settings]) -> None:
    server, settings = own
    with serving(settings) as api, ThreadPoolExecutor(N_CLIENTS + len(NO_REDIS)) as pool:
        assert api.get("/v1/jobs").status_code == 200
        os.kill(server.pid, signal.SIGSTOP)
        base = str(api.base_url)
        waiting = [pool.submit(ask, f"{base}/v1/jobs") for _ in range(N_CLIENTS)]
        time.sleep(0.2)
        free = [pool.submit(ask, base + path) for path in NO_REDIS]
        assert {one.result()[0] for one in free} == {200}
        assert max(one.result()[1] for one in free) < 2.5
        assert {one.result()[0] for one in waiting} == {503}
        assert max(one.result()[1] for one in waiting) < 5
        status, seconds = ask(f"{base}/v1/jobs")  # by now it is known
        assert (status, seconds < 1) == (503, True)
        os.kill(server.pid, signal.SIGCONT)
        wait_for(lambda: api.get("/v1/jobs").status_code == 200, 10)


def test_healthz_is_quick_while_redis_is_frozen(own: tuple[RedisServer, Settings]) -> None:
    server, settings = own
    with serving(settings) as api, ThreadPoolExecutor(N_CLIENTS) as pool:
        os.kill(server.pid, signal.SIGSTOP)
        base = str(api.base_url)
        waiting = [pool.submit(ask, f"{base}/v1/jobs/{k}") for k in range(N_CLIENTS)]
        times = []
        while not all(one.done() for one in waiting):
            start = time.perf_counter()
            assert api.get("/healthz").status_code == 200
            times.append(time.perf_counter() - start)
            time.sleep(0.02)
        os.kill(server.pid, signal.SIGCONT)
    assert sorted(times)[len(times) // 2] < 0.1  # of the others, some fall on the pauses of a busy machine
    assert max(times) < 1

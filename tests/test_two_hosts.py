"""Several workers, several machines: the same bytes. What a cut link stops, what goes on, and what comes back.

The first host has Redis, an API and a worker, the second an API and a worker that reach Redis through the link.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.network import Host, Network, joined_hosts, why_not
from tests.stopping import stopping
from tests.test_end_to_end import ABLATION, JOB, SLOW_SPEC, environment
from tests.worker.real_jobs import encode, plan_real, run_undisturbed, submit
from tests.worker.waiting import wait_for
from worker import keys
from worker.queue import make_celery
from worker.server_socket import listen, url_of
from worker.settings import Settings
from worker.states import TERMINAL
from worker.store import JobStore, connect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

START_S = 180.0
JOB_S = 300.0
TAKEN_S = 15.0  # a lease lasts 2 s here, and a sweep comes every half second
AWAY_S = 60.0  # until the API says that Redis is away
BACK_S = 120.0  # the kernel would wait for an answer for 15 minutes

# `SLOW_SPEC` as options, of which the last ones count.
SLOW_JOB = [*JOB, "--layer", "conv2", "--sites", "2000", "--precision", "float64"]
CUTS = ["down", "silent", "moved"]  # what `Network` has


@dataclass(frozen=True)
class Service:
    """Two hosts at work; the test itself is on neither, and no cut comes between it and the three below."""

    network: Network
    store: JobStore
    near: httpx.Client  # of the API on the first host
    far: httpx.Client  # and on the second


@contextmanager
def starting(command: Sequence[str], environ: Mapping[str, str], pass_fds: Sequence[int] = ()) -> Iterator[None]:
    with subprocess.Popen(command, env=environ, pass_fds=pass_fds) as process, stopping(process):
        yield


@contextmanager
def serving_api(host: Host, environ: Mapping[str, str]) -> Iterator[httpx.Client]:
    """A client of an API on `host`, which is given a socket of the test's own network to listen on."""
    with listen("127.0.0.1", 0, "", "") as listener:
        fd = listener.fileno()
        with (
            starting(host.command(sys.executable, "-m", "api"), {**environ, "ABLATION_FD": str(fd)}, [fd]),
            httpx.Client(base_url=url_of(listener), timeout=START_S, trust_env=False) as client,
        ):
            yield client


@contextmanager
def running_redis(host: Host) -> Iterator[tuple[str, str]]:
    """The installed server, on TCP with a password: its URL for the hosts, and that of its socket for the test."""
    with tempfile.TemporaryDirectory(prefix="ablation-test-") as folder:
        socket = f"{folder}/redis.sock"
        options = {"bind": host.address, "requirepass": "secret", "unixsocket": socket, "dir": folder, "save": ""}
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        with starting(host.command("redis-server", *arguments), os.environ):
            yield f"redis://:secret@{host.address}:6379/0", f"unix://:secret@{socket}"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    if not shutil.which("redis-server"):  # the embedded one never listens on TCP
        pytest.skip("two hosts need redis-server on PATH (apt-get install redis-server)")
    with joined_hosts() as network:
        yield network


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, home: Path) -> bytes:
    """The CSV of the job by one process without a service."""
    out = tmp_path_factory.mktemp("undisturbed")
    command = [*ABLATION, "run", *SLOW_JOB, "--out", str(out)]
    subprocess.run(command, check=True, env=environment(home), stdout=subprocess.PIPE)
    return (out / "utility.csv").read_bytes()


@pytest.fixture(scope="module")
def service(
    network: Network, tmp_path_factory: pytest.TempPathFactory, home: Path, undisturbed: bytes
) -> Iterator[Service]:
    """The service on two hosts, each with a home of its own. (`undisturbed` has trained the model by then.)"""
    with ExitStack() as stack:
        url, socket_url = stack.enter_context(running_redis(network.first))
        store = JobStore(stack.enter_context(connect(Settings(redis_url=socket_url), n_retries=20)))
        clients = []
        for host in (network.first, network.second):
            own = tmp_path_factory.mktemp(host.name)
            shutil.copytree(home / "cache", own / "cache")
            environ = environment(own) | {"REDIS_URL": url, "ABLATION_HOME": str(own)}
            clients.append(stack.enter_context(serving_api(host, environ)))
            stack.enter_context(starting(host.command(sys.executable, "-m", "worker"), environ))
        wait_for_workers(store, 2)
        yield Service(network, store, *clients)


def wait_for_workers(store: JobStore, n: int) -> None:
    wait_for(lambda: store.n_workers() == n, START_S)


def post(service: Service) -> str:
    """The id of a new job of several shards."""
    posted = service.near.post("/v1/jobs", json=SLOW_SPEC)
    assert posted.status_code == 202, posted.text
    return str(posted.json()["id"])


def shards_of(service: Service, host: Host, job_id: str) -> dict[str, float]:
    """The shards that the worker on `host` holds the lease of, and how much of each is done."""
    owners = service.store.client.hgetall(keys.owners(job_id))
    fractions = service.store.client.hgetall(keys.fractions(job_id))
    ours = [shard for shard, owner in owners.items() if owner.decode().startswith(f"{host.name}:")]
    return {shard.decode(): float(fractions.get(shard, 0)) for shard in ours if shard != keys.FINALIZE.encode()}


def is_in_mid_shard(service: Service, host: Host, job_id: str) -> bool:
    return any(0 < fraction < 0.5 for fraction in shards_of(service, host, job_id).values())


def is_over(service: Service, job_id: str) -> bool:
    job = service.store.get(job_id)
    assert job
    return job.status in TERMINAL


def finish(service: Service, job_id: str) -> bytes:
    """The CSV of a job once it is over."""
    wait_for(lambda: is_over(service, job_id), JOB_S)
    csv = service.near.get(f"/v1/jobs/{job_id}/results.csv")
    assert csv.status_code == 200, csv.text
    return csv.content


def post_until_at_work(service: Service, host: Host) -> str:
    """A job that the worker on `host` has a shard of: the first of as many as it takes, one after the other."""
    jobs = [post(service)]

    def is_at_work() -> bool:
        if is_over(service, jobs[-1]):
            jobs.append(post(service))
        return bool(shards_of(service, host, jobs[-1]))

    wait_for(is_at_work, BACK_S)
    return jobs[-1]


@pytest.mark.parametrize("cut", CUTS)
def test_a_link_cut_in_mid_job_changes_no_byte(service: Service, undisturbed: bytes, cut: str) -> None:
    first, second = service.network.first, service.network.second
    job_id = post_until_at_work(service, second)
    wait_for(lambda: shards_of(service, first, job_id) and is_in_mid_shard(service, second, job_id), JOB_S)
    with getattr(service.network, cut)():
        assert shards_of(service, second, job_id), "it has no shard that it could lose"
        wait_for(lambda: not shards_of(service, second, job_id), TAKEN_S)
        assert not is_over(service, job_id)
        assert finish(service, job_id) == undisturbed
    assert finish(service, post_until_at_work(service, second)) == undisturbed


@pytest.mark.parametrize("cut", CUTS)
def test_an_api_beyond_a_cut_link_says_so_until_it_is_back(service: Service, cut: str) -> None:
    assert service.far.get("/v1/jobs").status_code == 200
    with getattr(service.network, cut)():
        for _connection in ("the one it has", "a new one"):
            answer = service.far.get("/v1/jobs", timeout=AWAY_S)
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) > 0
        assert service.near.get("/v1/jobs").status_code == 200
    wait_for(lambda: service.far.get("/v1/jobs").status_code == 200, BACK_S)


def test_one_two_and_four_workers_give_the_same_bytes(store: JobStore, settings: Settings, home: Path) -> None:
    spec, plan = plan_real(settings, 0.2, sites={"count": 1000, "seed": 3})
    assert len(plan.shards) >= 8
    undisturbed = encode(run_undisturbed(settings, spec, plan))
    environ = environment(home) | {"REDIS_URL": settings.redis_url, "ABLATION_HOME": str(home)}
    with ExitStack() as stack:
        for n_workers, n_more in ((1, 1), (2, 1), (4, 2)):
            for _ in range(n_more):
                stack.enter_context(starting([sys.executable, "-m", "worker"], environ))
            wait_for_workers(store, n_workers)
            job = submit(store, make_celery(settings), spec, plan)
            assert len(owners_of(store, job.id)) == n_workers
            assert b"".join(store.table_blocks(job.id)) == undisturbed


def owners_of(store: JobStore, job_id: str) -> set[bytes]:
    """Every worker that had a shard of a job, once it is over."""
    owners: set[bytes] = set()

    def is_over() -> bool:
        owners.update(store.client.hvals(keys.owners(job_id)))
        job = store.get(job_id)
        return job is not None and job.status in TERMINAL

    wait_for(is_over, JOB_S)
    return owners

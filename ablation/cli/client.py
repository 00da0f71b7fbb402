"""HTTP client: post a job, poll it, download its files.

In: a base URL and a spec. Out: plain JSON and files. Problem documents are raised as this package's errors.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from ablation.cli.files import write_results
from ablation.errors import AblationError, ServiceError, SpecError
from ablation.spec import JobSpec

TIMEOUT_S = 30.0
POLL_TIMEOUT_S = 5.0  # the socket of a dead API stays open, so requests wait until it is restarted
LONGEST_WAIT_S = 2.0  # shorter than the server's Retry-After, since a person watches; at 429 the server's is kept
AWAY_S = 60.0  # how long a server may be away, for instance to restart, before polling gives up


class Client:
    """A connection to one server."""

    def __init__(self, server: str, *, trust_env: bool = True) -> None:
        """Connect to `server`; `trust_env`: use the proxy that the environment names, if any.

        Raises:
            SpecError: `server` is not the address of a server.
        """
        self.server = server.rstrip("/")
        try:
            is_address = httpx.URL(self.server).scheme in ("http", "https") and httpx.URL(self.server).host
        except httpx.InvalidURL:
            is_address = False
        if not is_address:
            raise SpecError("--server", server, "a base URL such as http://127.0.0.1:8000")
        self._http = httpx.Client(base_url=self.server, timeout=TIMEOUT_S, trust_env=trust_env)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def post(self, spec: JobSpec) -> dict[str, Any]:
        """Post a job and return it."""
        return self._ask("POST", "/v1/jobs", json=spec.model_dump(mode="json")).json()

    def wait(
        self,
        job: dict[str, Any],
        on_poll: Callable[[dict[str, Any]], None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Poll until the job is done, and return its results without rows; `on_poll` gets every answer before that.

        `meanwhile` is called before every poll, whether the server answers or not.

        Raises:
            AblationError: the job failed or was cancelled.
            ServiceError: the server has been away for too long.
        """
        last_seen = time.monotonic()
        while True:
            meanwhile()
            try:
                answer = self._ask("GET", job["urls"]["results"], params={"limit": 0}, timeout=POLL_TIMEOUT_S)
            except ServiceError:
                if time.monotonic() - last_seen > AWAY_S:
                    raise
                time.sleep(1)
                continue
            last_seen = time.monotonic()
            if answer.status_code == httpx.codes.OK:
                return self._with_whole_spec(answer.json())
            on_poll(answer.json())
            time.sleep(_pause_s(answer.json()))

    def _with_whole_spec(self, results: dict[str, Any]) -> dict[str, Any]:
        """The results with the whole spec, of which the server cuts long lists."""
        about = results["summary"].get("about") or {"spec": {}}
        if "full" in about["spec"]:
            about["spec"] = self._ask("GET", about["spec"]["full"]).json()
        return results

    def download(self, job: dict[str, Any], results: dict[str, Any], folder: Path) -> None:
        """Write the job's CSV, Parquet and summary into `folder`."""
        urls = job["urls"]
        write_results(
            folder, csv=self._reader(urls["csv"]), parquet=self._reader(urls["parquet"]), summary=results["summary"]
        )

    def is_ready(self) -> bool:
        """Whether the server reports that it is ready for jobs."""
        try:
            return self._http.get("/readyz", timeout=2.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _reader(self, url: str) -> Callable[[BinaryIO], None]:
        """Make a function that writes a file of the server to a stream.

        That function raises a ServiceError if the file is incomplete.
        """

        def read(stream: BinaryIO) -> None:
            try:
                with self._http.stream("GET", url) as answer:
                    for piece in _check(answer).iter_bytes():
                        stream.write(piece)
            except httpx.HTTPError as error:
                raise ServiceError(
                    f"the download of {self.server}{url} broke off ({error}); the table is still there, "
                    f"fetch it with `curl -O {self.server}{url}`"
                ) from None

        return read

    def _ask(self, method: str, url: str, **content: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, url, **content)
        except httpx.TransportError as error:
            raise ServiceError(
                f"no answer from {self.server} ({error}); start a server with `ablation serve`, "
                "or name yours with --server"
            ) from None
        return _check(answer)


def _check(answer: httpx.Response) -> httpx.Response:
    """Return the answer, or raise the error of its problem document."""
    if answer.is_success:
        return answer
    answer.read()
    try:
        problem = answer.json()
        detail = problem["detail"]
    except (ValueError, KeyError, TypeError):
        raise ServiceError(f"{answer.url} answered {answer.status_code}: {answer.text[:200]}") from None
    if answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY and "field" in problem:
        raise SpecError(problem["field"], problem["given"], problem["allowed"], problem["next_step"])
    raise (ServiceError if answer.status_code >= 500 else AblationError)(detail)


def _pause_s(answer: dict[str, Any]) -> float:
    """Seconds until the next poll: a tenth of the remaining time, from 0.2 to 2."""
    return min(LONGEST_WAIT_S, max(0.2, (answer.get("eta_seconds") or 0.0) / 10))

"""Talking to a server that misbehaves: what breaks off leaves nothing behind, what fails is told and ends with 1."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner

from ablation.cli.commands import commands

JOB = ["--model", "digits_alexnet", "--layer", "fc2", "--data", "digits", "--test", "all", "--sites", "4"]
URLS = {"self": "/v1/jobs/7", "results": "/results", "csv": "/results.csv", "parquet": "/p", "cancel": "/cancel"}
Answers = dict[str, tuple[int, bytes, int]]  # path -> status, body, how much longer it says the body is


class Handler(BaseHTTPRequestHandler):
    """Answers what the test says."""

    answers: ClassVar[Answers] = {}

    def do_GET(self) -> None:
        status, body, missing = self.answers[self.path.partition("?")[0]]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.answers = {"/v1/jobs": (202, json.dumps({"id": "7", "urls": URLS}).encode(), 0)}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_download_that_breaks_off_leaves_nothing_and_says_how_to_go_on(server: str, tmp_path: Path) -> None:
    Handler.answers |= {"/results": (200, b'{"summary": {}}', 0), "/results.csv": (200, b"index,weight\n1,", 100)}
    ended = CliRunner().invoke(commands, ["submit", *JOB, "--server", server, "--out", str(tmp_path / "out")])
    assert ended.exit_code == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"Error: the download of {server}/results.csv broke off (")
    assert last.endswith(f"`curl -O {server}/results.csv`")
    assert [*tmp_path.iterdir()] == []


def test_a_job_that_failed_is_one_line_and_code_1(server: str, tmp_path: Path) -> None:
    problem = {"detail": "Job 7 is failed and has no results: example 3 has a loss of nan."}
    Handler.answers |= {"/results": (409, json.dumps(problem).encode(), 0)}
    ended = CliRunner().invoke(commands, ["submit", *JOB, "--server", server, "--out", str(tmp_path / "out"), "--json"])
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[1:] == [f"Error: {problem['detail']}"]


def test_what_is_no_service_of_ours_is_told(server: str, tmp_path: Path) -> None:
    Handler.answers = {"/v1/jobs": (404, b"<h1>Not\nhere</h1>", 0)}
    ended = CliRunner().invoke(commands, ["submit", *JOB, "--server", server, "--out", str(tmp_path / "out")])
    assert ended.exit_code == 1
    assert ended.stderr == f"Error: {server}/v1/jobs answered 404: <h1>Not | here</h1>\n"


@pytest.mark.parametrize("address", ["here", "ftp://here", "http://[::1", "http://"])
def test_what_is_no_address_is_bad_input(address: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(commands, ["submit", *JOB, "--server", address, "--out", str(tmp_path / "out")])
    assert ended.exit_code == 2
    assert ended.stderr.startswith(f"Error: --server: got {address!r}; allowed: a base URL")

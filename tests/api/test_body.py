"""What may be sent, and how much of it: every wrong body has its answer, also for a client that does not listen."""

import http.client
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from api.body import MAX_BODY_BYTES
from tests.api.conftest import FIELDS

HUGE = 1600 * 2**16  # 100 MB
BODY = json.dumps(FIELDS).encode()


def send(api: httpx.Client, url: str, pieces: Iterable[bytes], **headers: str) -> tuple[int, str, dict[str, Any]]:
    """Status, content type and body of the answer to a client that sends all of the pieces before it listens."""
    with closing(http.client.HTTPConnection(api.base_url.host, api.base_url.port, timeout=60)) as line:
        line.putrequest("POST", url)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            line.putheader(name, value)
        line.endheaders()
        for piece in pieces:
            line.send(piece)
        answer = line.getresponse()
        return answer.status, answer.headers["Content-Type"], json.load(answer)


def chunked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/plans", "/v1/jobs/abc/cancel", "/nowhere"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["with its length", "chunked"])
def test_a_huge_body_is_413_also_for_who_goes_on_sending(api: httpx.Client, url: str, is_chunked: bool) -> None:
    pieces = itertools.repeat(b" " * 2**16, HUGE // 2**16)
    if is_chunked:
        answer = send(api, url, chunked(pieces), **{"Transfer-Encoding": "chunked"})
    else:
        answer = send(api, url, pieces, **{"Content-Length": str(HUGE)})
    status, kind, problem = answer
    assert (status, kind) == (413, "application/problem+json")
    assert (problem["status"], problem["instance"]) == (413, url)
    assert str(MAX_BODY_BYTES) in problem["detail"]


def test_413_does_not_wait_for_the_body(api: httpx.Client) -> None:
    assert send(api, "/v1/jobs", [], **{"Content-Length": str(HUGE)})[0] == 413


def test_413_comes_as_soon_as_it_is_too_large(api: httpx.Client) -> None:
    begun = b"%x\r\n" % HUGE + b" " * (MAX_BODY_BYTES + 1)  # and no more: the chunk is never completed
    assert send(api, "/v1/jobs", [begun], **{"Transfer-Encoding": "chunked"})[0] == 413


def test_the_limit_itself_is_allowed(api: httpx.Client) -> None:
    body = BODY + b" " * (MAX_BODY_BYTES - len(BODY))
    assert api.post("/v1/plans", content=body).status_code == 200
    assert api.post("/v1/plans", content=body + b" ").status_code == 413
    assert api.post("/v1/plans", content=iter([body, b" "])).status_code == 413


def test_huge_body_of_a_get(api: httpx.Client) -> None:
    assert api.request("GET", "/healthz", content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413
    assert api.request("GET", "/healthz", content=b" " * 10).status_code == 200


@pytest.mark.parametrize(
    "kind",
    ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.spec+json", None],
)
def test_json_by_any_of_its_names(api: httpx.Client, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert api.post("/v1/jobs", content=BODY, headers=headers).status_code == 202


@pytest.mark.parametrize(
    "kind",
    ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", "text/json+json", "json", "", ";"],
)
@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/plans"])
def test_anything_else_is_415(api: httpx.Client, url: str, kind: str) -> None:
    answer = api.post(url, content=BODY, headers={"Content-Type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (415, "application/problem+json")
    assert kind in answer.json()["detail"]
    assert "-H 'Content-Type: application/json'" in answer.json()["detail"]
    assert api.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "line 1 column 0"),
        (b"{", "line 1 column 1"),
        (b'{"model": }', "line 1 column 11"),
        (b'{\n "model": nothing\n}', "line 2 column 12"),
        (BODY + b"}", f"line 1 column {len(BODY) + 1}"),
        (b"[" * 10**6, "recursion"),
        (b'{"layer":' * 10**5, "recursion"),
        (b"\xff\xfe{}", "line 1 column 1"),
        (b'{"layer": "\xff"}', "unicode"),
        (b'{"layer": "\\ud800"}', "hex escape"),
        (b'{"verify": %b}' % (b"9" * 5000), "out of range"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else value,
)
@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/plans"])
def test_what_is_not_json_is_400_with_the_place(api: httpx.Client, url: str, body: bytes, says: str) -> None:
    answer = api.post(url, content=body)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert says in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ('"value": NaN', "value.constant"),
        ('"value": {"constant": Infinity}', "value.constant"),
        ('"sites": {"count": NaN}', "sites.count"),
        ('"sites": {"count": 1e400}', "sites.count"),
        ('"sites": NaN', "sites"),
        ('"sites": {"count": %s}' % ("9" * 4000), "sites.count"),
        ('"layer": "\\u0000"', "layer"),
        ('"layer": {"a": [NaN]}', "layer"),
        ('"\\u0000\\n": 1', "\0\n"),
    ],
    ids=lambda value: value[:30],
)
def test_strange_values_are_422(api: httpx.Client, change: str, field: str) -> None:
    body = BODY.decode().removesuffix("}") + f", {change}}}"  # of two fields with one name, the last counts
    answer = api.post("/v1/jobs", content=body)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


@pytest.mark.parametrize("body", ["[]", "null", "3", '"all"', "NaN"])
def test_json_that_is_no_object_is_422(api: httpx.Client, body: str) -> None:
    answer = api.post("/v1/jobs", content=body)
    assert (answer.status_code, answer.json()["field"]) == (422, "spec")


def test_the_largest_list_of_indices_is_read(api: httpx.Client) -> None:
    sites: dict[str, Any] = {"indices": list(range(16_384))}
    assert api.post("/v1/plans", json={**FIELDS, "sites": sites}).json()["n_sites"] == 16_384

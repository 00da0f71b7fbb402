"""Reading the body of a request: up to a limit, in time, as JSON only.

In: what a client sends. Out: the bytes, then a `JobSpec`; or 408, 413, 415, 503, 400 with the position, 422 with the
field. `LimitBody` applies to every address, also to those without a body. The framework's own limit answers in plain
text and lets handlers run first; its JSON parser fails without a reason on deep nesting and lone surrogates.
"""

import asyncio
import time
from email.message import Message as Headers
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ablation.spec import JobSpec, spec_error
from api.errors import make_problem
from api.slots import Slots

MAX_BODY_BYTES = 8 << 20


FREE_BYTES = 16 << 10  # of each body; small ones are read however many large ones there are
MIN_BYTES_PER_S = 8 << 10  # a body that comes slower than that is given up, too

CROWDED = "The bodies of other requests take all the room that there is for them."


class LimitBody:
    """Read the whole body before the application runs; refuse it as soon as it is known to be too large, or late.

    All bodies together take a limited number of bytes (`room`), from their arrival to the end of the answer. After 413
    and 503 the connection stays open: the server reads and drops the rest, so that a client that sends before it
    listens still gets its answer.
    """

    def __init__(self, app: ASGIApp, room: Slots, seconds: float) -> None:
        self.app, self.room, self.seconds = app, room, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, body = Request(scope, receive), Body(self.room)
        try:
            await self._read(request, body)
            await self.app(scope, body.then(receive), send)
        except ClientDisconnect:
            return None
        except _Refusal as error:
            await make_problem(request, error.status_code, error.detail, headers=error.headers)(scope, receive, send)
        finally:
            body.give_back()

    async def _read(self, request: Request, body: "Body") -> None:
        """Read the whole body.

        Raises:
            _Refusal: it is too large (413), late (408), or there is no room (503).
        """
        if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
            raise _too_large()
        pieces, start = request.stream(), time.monotonic()
        while True:
            left_s = start + self.seconds + len(body.bytes) / MIN_BYTES_PER_S - time.monotonic()
            try:
                async with asyncio.timeout(min(self.seconds, left_s)):
                    body.add(await anext(pieces))
            except StopAsyncIteration:
                return
            except TimeoutError:
                detail = f"The body has not come on for {self.seconds:g} seconds, or too slowly. Send it again."
                raise _Refusal(408, detail, headers={"Connection": "close"}) from None


class Body:
    """The body of one request, and the room that it has taken."""

    def __init__(self, room: Slots) -> None:
        self.bytes, self._room, self._n_taken = bytearray(), room, 0

    def add(self, piece: bytes) -> None:
        """Add the next bytes.

        Raises:
            _Refusal: that is too many, for one or for all.
        """
        self.bytes += piece
        if len(self.bytes) > MAX_BODY_BYTES:
            raise _too_large()
        n_more = max(0, len(self.bytes) - FREE_BYTES) - self._n_taken
        try:
            self._room.take(n_more)
        except HTTPException as error:
            raise _Refusal(error.status_code, error.detail, headers=error.headers) from None
        self._n_taken += n_more

    def then(self, receive: Receive) -> Receive:
        """Make the channel that gives the whole body first, and then what comes from `receive`."""
        unread: list[Message] = [{"type": "http.request", "body": bytes(self.bytes), "more_body": False}]
        self.bytes = bytearray()  # one copy is enough

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        return receive_again

    def give_back(self) -> None:
        """Drop it."""
        self.bytes = bytearray()
        self._room.give_back(self._n_taken)
        self._n_taken = 0


class _Refusal(HTTPException):
    """The body is not taken."""


def _too_large() -> _Refusal:
    return _Refusal(
        413, f"The body is too large; allowed: {MAX_BODY_BYTES} bytes. Ask for fewer indices, or for a count."
    )


async def read_json(request: Request) -> bytes:
    """The body, if its content type is JSON or absent.

    Raises:
        HTTPException: 415, the content type is another.
    """
    given = request.headers.get("content-type", "application/json")
    headers = Headers()
    headers["content-type"] = given
    kind = headers.get_content_type()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPException(
            415,
            f"Content-Type: got {given[:200]!r}; allowed: application/json, application/*+json. "
            "Set the content type, e.g. curl -H 'Content-Type: application/json'.",
        )
    return await request.body()


def read_spec(body: Annotated[bytes, Depends(read_json)]) -> JobSpec:
    """The job spec in the body, parsed in a thread, since large ones take a while.

    Raises:
        HTTPException: 400, the body is not JSON; the message says where.
        SpecError: the body is not a job spec; the error names the first fault.
    """
    try:
        return JobSpec.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        where = errors[0]["msg"].removeprefix("Invalid JSON: ")
        raise HTTPException(400, f"The body is not JSON: {where}. Send a job spec; /docs shows one.")
    raise spec_error(errors)


SpecDep = Annotated[JobSpec, Depends(read_spec)]

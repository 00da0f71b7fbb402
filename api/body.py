"""Reading the body of a request: up to a limit, as JSON only.

In: what a client sends. Out: the bytes, then a `JobSpec`; or 413, 415, 400 with the position, 422 with the field.
`LimitBody` applies to every address, also to those without a body. The framework's own limit answers in plain text
and lets handlers run first; its JSON parser fails without a reason on deep nesting and lone surrogates.
"""

from email.message import Message as Headers
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ablation.spec import JobSpec, spec_error
from api.errors import make_problem

MAX_BODY_BYTES = 8 << 20


class LimitBody:
    """Read the whole body before the application runs; answer 413 as soon as it is known to be too large.

    The connection stays open: the server reads and drops the rest, so that a client that sends before it listens still
    gets its answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        try:
            body = await _read_limited(request)
        except ClientDisconnect:
            return None
        if body is None:
            detail = f"The body is too large; allowed: {MAX_BODY_BYTES} bytes. Ask for fewer indices, or for a count."
            return await make_problem(request, 413, detail)(scope, receive, send)
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_again, send)


async def _read_limited(request: Request) -> bytes | None:
    """The whole body; None where it is too large."""
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        return None
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


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

"""Request headers: another format (`Accept`), only what is new (`If-None-Match`), or the first answer again
(`Idempotency-Key`).

In: header values and an answer. Out: a choice. RFC 9110, sections 8.8.3, 12.5.1 and 13.1.2.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import Header
from pydantic import AfterValidator, WithJsonSchema

from api.schemas import JobView

_VISIBLE = r"[!-~]{1,255}"


def _check_key(key: str | None) -> str | None:
    if key is not None and not re.fullmatch(_VISIBLE, key):
        raise ValueError("1 to 255 visible ASCII characters")
    return key


IdempotencyKey = Annotated[
    str | None,
    AfterValidator(_check_key),
    WithJsonSchema({"type": "string", "pattern": f"^{_VISIBLE}$"}),
    Header(
        alias="Idempotency-Key",
        description="of all requests with the same key within 24 hours, the first makes the job, and the others get "
        "its answer again",
    ),
]


def choose_type(accept: str, offered: Sequence[str]) -> str:
    """The media type that `accept` prefers: by quality, then by how exactly it is named, then the one offered first.

    Where it accepts none of them, the one offered first.
    """
    ranges = [_read_range(part) for part in (accept or "*/*").split(",")]
    return max(offered, key=lambda kind: _liking(kind, ranges))


def _read_range(part: str) -> tuple[str, float]:
    """Parse `text/csv;q=0.5` to (`text/csv`, 0.5); an invalid quality counts as 1."""
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = next((one[2:] for one in parameters if one.startswith("q=")), "1")
    return kind, float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 1.0


def _liking(kind: str, ranges: Sequence[tuple[str, float]]) -> tuple[float, int]:
    """The quality of `kind`, by the range that names it most exactly, and how exactly that is (-1: not accepted)."""
    names = ("*/*", f"{kind.partition('/')[0]}/*", kind)
    exactness, quality = max(((names.index(one), q) for one, q in ranges if one in names), default=(-1, 0.0))
    return (quality, exactness) if quality else (0.0, -1)


def make_etag(job: JobView) -> str:
    """Weak entity tag of a job's whole answer."""
    return f'W/"{hashlib.sha256(job.model_dump_json().encode()).hexdigest()[:32]}"'


def is_known(etag: str, if_none_match: Sequence[str]) -> bool:
    """Whether the client has this version already (weak comparison)."""
    values = ",".join(if_none_match)
    return values.strip() == "*" or etag.removeprefix("W/") in re.findall(r'"[^"]*"', values)

"""The exceptions of this package; each message has the value given, what is allowed, and what to do next.

AblationError
├── SpecError         the spec is not possible; `.field` names the part of it that is wrong
│   └── NoColumn      a table has no such column, or no such row; a KeyError too
├── ModelError        the model can't be measured exactly (or at all); the message says why
├── DataError         a data set or an example can't be used; the message says which
│   └── ExampleError  one example can't be used; `.position` says which
├── CheckpointError   a checkpoint file can't be loaded into the model
├── WriteError        a file can't be written (a full disk); the message names it
├── ProofError        the job's own check against the reference failed; both numbers are in the message
├── OutOfMemory       memory ran out, and no smaller batch would help
├── Unfit             this worker's model, data or versions differ from those that the job was begun with
├── Cancelled         the job was cancelled while it ran; not a fault
└── ServiceError      a part of the service is missing or unreachable (Redis, a server), or set up wrongly (a folder)
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

LONGEST_SHOWN = 200  # longest value that a message repeats, in characters


class AblationError(Exception):
    """Base of every error that this project raises on purpose."""


class SpecError(AblationError, ValueError):
    """The spec is not possible.

    `field` is the dotted place in the job spec (``"sites.count"``), so that the API can name it.
    """

    def __init__(self, field: str, given: object, allowed: str, next_step: str = "") -> None:
        self.field = field
        self.given = shorten(given)
        self.allowed = allowed
        self.next_step = next_step
        super().__init__(f"{field}: got {say_given(given)}; allowed: {allowed}. {next_step}".rstrip())

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        return (type(self), (self.field, self.given, self.allowed, self.next_step))


class NoColumn(SpecError, KeyError):
    """A table has no such column, or no such row."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


@contextmanager
def as_given(given: Mapping[str, object]) -> Iterator[None]:
    """Make errors about these fields show the values given, where the code inside has converted ones."""
    try:
        yield
    except SpecError as error:
        if error.field not in given:
            raise
        raise SpecError(error.field, given[error.field], error.allowed, error.next_step) from None


class ModelError(AblationError):
    """The model can't be measured exactly, or not at all."""


class DataError(AblationError):
    """A data set or one of its examples can't be used."""


class ExampleError(DataError):
    """One example can't be used. `what` completes a sentence; `position` counts within a batch or a split."""

    def __init__(self, position: int, what: str) -> None:
        self.position = position
        self.what = what
        super().__init__(f"example {position} {what}")

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return (type(self), (self.position, self.what))


class CheckpointError(AblationError):
    """A checkpoint file can't be loaded into the model."""


class WriteError(AblationError, OSError):
    """A file can't be written: a full disk, a folder that is missing or that may not be written to."""

    def __init__(self, path: object, error: OSError) -> None:
        super().__init__(
            f"{path} can't be written: {error.strerror or error}. Make room for it, or choose another place."
        )
        self.path, self.cause, self.errno = path, error, error.errno

    def __reduce__(self) -> tuple[type, tuple[object, OSError]]:
        return (type(self), (self.path, self.cause))


class ProofError(AblationError):
    """The job's own check against the reference went beyond its bound."""


class OutOfMemory(AblationError):
    """Memory ran out, and no smaller batch would help."""


class Unfit(AblationError):
    """This worker's model, data or versions differ from those that a job was begun with."""


class Cancelled(AblationError):
    """The job was cancelled while it ran."""


class ServiceError(AblationError):
    """A part of the service is missing, can't be reached, or is set up wrongly."""


def say_given(given: object) -> str:
    """Format a given value for a message: text in quotes, everything else as JSON."""
    short = shorten(given)
    return repr(short) if isinstance(given, str) else _as_json(short)


def shorten(given: object) -> object:
    """Return the given value, or the beginning of its text if that is too long for a message."""
    text = given if isinstance(given, str) else _as_json(given)
    return given if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def say_cause(error: BaseException) -> str:
    """Describe another library's error in one short line: its type, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(".:") if lines else ""
    if len(text) > LONGEST_SHOWN:
        text = f"{text[: LONGEST_SHOWN - 3]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _as_json(given: object) -> str:
    if isinstance(given, str):
        return given
    try:
        return json.dumps(given)
    except (TypeError, ValueError):
        return " ".join(repr(given).split())


def nearest(given: str, allowed: Iterable[str], n: int = 3) -> str:
    """The allowed names closest to `given`, as the tail of an error message."""
    names = difflib.get_close_matches(given, list(allowed), n=n, cutoff=0.5)
    return f"Did you mean {' or '.join(repr(name) for name in names)}?" if names else ""

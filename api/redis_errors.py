"""What an error of Redis means: a sentence for clients, or a fault of this program.

In: errors of redis-py. Out: the reason why the request can't be answered now. A server in trouble refuses in many ways
(a replica after a failover, a full disk, no memory, a password that has changed), and each of them passes. So every
error counts as trouble, unless only this program can have caused it.
"""

import re

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    DataError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)

# Errors that mean that Redis can't be reached.
AWAY = (ConnectionError, TimeoutError)

# Codes of the errors that redis-py has classes for; it cuts the code off their texts. The first that fits counts.
_CODES: tuple[tuple[type[RedisError], str], ...] = (
    (OutOfMemoryError, "OOM"),
    (ReadOnlyError, "READONLY"),
    (BusyLoadingError, "LOADING"),
    (MasterDownError, "MASTERDOWN"),
    (ClusterDownError, "CLUSTERDOWN"),
    (NoPermissionError, "NOPERM"),
    (AuthenticationError, "NOAUTH"),
    (AuthorizationError, "NOAUTH"),
    (NoScriptError, "NOSCRIPT"),
)
_LOGIN = "Redis refuses this service: the operator must set its password or its rights."
_REASONS = {
    "OOM": "The store has no room: nothing was changed. Delete jobs that are over.",
    "MISCONF": "Redis can't write to its disk, which may be full: nothing was changed.",
    "READONLY": "Redis is a replica that takes no writes, as after a failover: nothing was changed.",
    "LOADING": "Redis is reading its data back after a start.",
    "MASTERDOWN": "Redis is a replica that has lost its master.",
    "CLUSTERDOWN": "The Redis cluster is down.",
    "NOREPLICAS": "Redis has too few replicas to take writes: nothing was changed.",
    "UNBLOCKED": "Redis has interrupted the request.",
    "BUSY": "Redis is busy with a script.",
    "NOAUTH": _LOGIN,
    "WRONGPASS": _LOGIN,
    "NOPERM": _LOGIN,
    "DENIED": "Redis takes connections from its own machine only (protected mode).",
}
_CROWDED = "Redis has as many clients as it takes."
_FAULTS = ("WRONGTYPE", "NOSCRIPT")
_RIGHTS = re.compile(r"can't (run this command|access at least one of the keys)")  # in a script, before version 7


class Refused(ConnectionError):
    """Redis is known to be away, or to refuse everything, so it was not asked; the message is the reason."""


def code_of(error: Exception) -> str:
    """The word in capitals that Redis' errors begin with; empty where there is none, or `ERR`."""
    known = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    found = re.match(r"([A-Z]{2,})\b", _text(error))
    code = known or (found[1] if found else "")
    return "" if code == "ERR" else code


def reason_of(error: Exception) -> str | None:
    """Say why Redis can't do now what it was asked; None where the error is a fault of this program."""
    code, text = code_of(error), _text(error)
    if isinstance(error, Refused):
        return text
    if "max number of clients" in text:
        return _CROWDED
    if code in _REASONS:
        return _REASONS[code]
    if isinstance(error, TimeoutError):
        return "Redis does not answer."
    if isinstance(error, ConnectionError):
        return "Redis can't be reached."
    if _RIGHTS.search(text):
        return _LOGIN
    if code in _FAULTS or isinstance(error, DataError) or "user_script" in text:
        return None
    return f"Redis refuses the request ({code})." if code else "Redis refuses the request."


def _text(error: Exception) -> str:
    """What Redis said; a pipeline puts the command before it."""
    return str(error).rpartition(" of pipeline caused error: ")[2]

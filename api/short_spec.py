"""Specs as answers show them: whole, unless a list in them is long.

In: a job's spec. Out: the same, or one whose long lists are cut, with their lengths and the address of the whole spec.
A spec may have megabytes, and every poll would send them again. A cut one can't be sent back by mistake: it has fields
that a spec has not.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from pydantic import Field

from ablation.spec import JobSpec

LONG = 1000  # entries; a longer list is cut
SHOWN = 10  # entries of a list that is cut

# Every list of a spec whose length the client chooses, and each record that it is in.
LISTS = ("sites.indices", "data.classes", "loss.class_weights")


class ShortSpec(JobSpec):
    """A spec with long lists, of which the first entries are shown; it is not taken as a spec."""

    lengths: dict[str, int] = Field(description="by field, how many entries each list has that is cut here")
    full: str = Field(description="the address of the whole spec")


def shorten_spec(spec: JobSpec, full: str) -> JobSpec | ShortSpec:
    """The spec without the rest of its long lists; `full` is where the whole can be had."""
    found = {name: _value(spec, name) for name in LISTS}
    long = {name: value for name, value in found.items() if value is not None and len(value) > LONG}
    if not long:
        return spec
    parts = dict(spec)
    for name, value in long.items():
        record, field = name.split(".")
        parts[record] = parts[record].model_copy(update={field: _first(value)})
    return ShortSpec.model_construct(**parts, lengths={name: len(value) for name, value in long.items()}, full=full)


def shorten_fields(fields: Mapping[str, Any], full: str) -> dict[str, Any]:
    """Cut the long lists in a spec of plain fields, as a result holds it; it may be of an earlier version."""
    parts, lengths = dict(fields), {}
    for name in LISTS:
        record, field = name.split(".")
        inside = parts.get(record)
        value = inside.get(field) if isinstance(inside, Mapping) else None
        if value is not None and len(value) > LONG:
            parts[record] = {**parts[record], field: _first(value)}
            lengths[name] = len(value)
    return {**parts, "lengths": lengths, "full": full} if lengths else parts


def _value(spec: JobSpec, name: str) -> Any:
    record, field = name.split(".")
    return getattr(getattr(spec, record), field, None)


def _first(value: Any) -> Any:
    """The first entries of a list, or of a dictionary."""
    if isinstance(value, Mapping):
        return dict(islice(value.items(), SHOWN))
    return type(value)(islice(value, SHOWN))

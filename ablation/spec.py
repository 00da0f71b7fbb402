"""The job spec: the same fields in Python, on the command line and over HTTP.

In: JSON or keyword arguments. Out: a frozen, checked `JobSpec`. Whatever depends on the model or on the data (whether
the layer exists and has that many weights) is checked in `plan.py`.
Torch-free: the API reads specs too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from ablation.criteria import CRITERIA
from ablation.errors import SpecError, nearest

Precision = Literal["mixed", "float32", "float64"]
SPLITS = ("train", "test")  # every split that a job can have, in column order

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1)]


class Record(BaseModel):
    """A frozen record that refuses unknown fields and takes numbers as numbers (`true` and `"5"` are not 5)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSpec(Record):
    """The network and its weights."""

    name: str = Field(min_length=1, max_length=200)
    weights: str | None = Field(
        default=None,
        max_length=500,
        description="a torchvision weights name; a checkpoint's file name (FILE:KEY where it holds several); or "
        "`none`: initialised from the seed. Absent: the model's own, which torchvision's models don't have",
    )
    seed: Seed = 0


class PerClass(Record):
    """A number of examples of every class, drawn without replacement."""

    per_class: Count
    seed: Seed = 0


class CountOfExamples(Record):
    """A number of examples, drawn uniformly without replacement."""

    count: Count
    seed: Seed = 0


SplitSpec = Literal["all"] | PerClass | CountOfExamples


def _class_numbers(given: object) -> object:
    if not isinstance(given, Mapping):
        raise PydanticCustomError("model_type", "an object")
    wrong = next((name for name, value in given.items() if not _is_class(value) or not isinstance(name, str)), None)
    if wrong is not None:
        raise ValueError(f"a class number or a class name for each class; {wrong!r} has {given[wrong]!r}")
    return given


def _is_class(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


MAX_CLASSES = 100_000  # of a data set
ClassNumbers = Annotated[
    dict[str, int | str], Field(min_length=1, max_length=MAX_CLASSES), BeforeValidator(_class_numbers)
]


class DataSpec(Record):
    """The data set, and the part of each split."""

    name: str = Field(min_length=1, max_length=200)
    root: str | None = Field(default=None, max_length=1000, description="relative to the operator's data folder")
    classes: ClassNumbers | None = Field(
        default=None,
        description="the model's class, by number or name, for each class of the data set; absent: matched by name "
        "where both are known, else there must be as many",
    )
    exif: Literal["ignore", "apply"] = Field(
        default="ignore", description="whether picture files are turned as their EXIF orientation says"
    )
    train: SplitSpec | None = None
    test: SplitSpec | None = None
    bad_images: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="what becomes of picture files that can't be read: the job is refused, or they are left out, "
        "counted and listed in the result",
    )
    check_images: Literal["headers", "full"] = Field(
        default="headers",
        description="how picture files are checked before the work: their headers and ends, or whole",
    )

    @model_validator(mode="after")
    def _has_a_split(self) -> "DataSpec":
        if self.train is None and self.test is None:
            raise ValueError("'train', 'test' or both")
        return self

    @property
    def splits(self) -> dict[str, SplitSpec]:
        """The splits that were asked for, in column order."""
        asked = {name: getattr(self, name) for name in SPLITS}
        return {name: split for name, split in asked.items() if split is not None}


class CountOfSites(Record):
    """A number of sites, drawn uniformly without replacement."""

    count: Count
    seed: Seed = 0


class SiteIndices(Record):
    """Explicit flat indices into the parameter tensor, in the order of the table's rows."""

    # fail_fast: report the first wrong index of a million
    indices: Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(strict=False, min_length=1, fail_fast=True)]

    @field_validator("indices")
    @classmethod
    def _distinct(cls, indices: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(indices)) != len(indices):
            seen: set[int] = set()
            twice = next(i for i in indices if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            raise ValueError(f"distinct indices; {twice} is given twice")
        return indices


SitesSpec = Literal["all"] | CountOfSites | SiteIndices


def _finite_number(given: object) -> object:
    try:
        if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given):
            return given
    except OverflowError:  # a whole number beyond float64
        pass
    raise ValueError("a finite number")


FiniteNumber = Annotated[float, Field(strict=False), BeforeValidator(_finite_number)]


class Constant(Record):
    """Replace every weight by this number."""

    constant: FiniteNumber


class Scale(Record):
    """Replace every weight by its product with this number."""

    scale: FiniteNumber


ValueWord = Literal["zero", "flip_sign"]
ValueSpec = ValueWord | Constant | Scale  # what each form replaces a weight by is in `sites.replace_weights`


class CrossEntropySpec(Record):
    """Cross-entropy in nats, with label smoothing and class weights as `torch.nn.CrossEntropyLoss` defines them."""

    name: Literal["cross_entropy"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="one for each class of the model; absent: all 1"
    )

    @field_validator("class_weights")
    @classmethod
    def _some_weigh(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None:
            wrong = next((weight for weight in weights if not 0 <= weight < math.inf), None)
            if wrong is not None:
                raise ValueError(f"finite numbers of at least 0; {wrong} is not one")
            if not any(weights):
                raise ValueError("at least one number above 0")
        return weights

    @property
    def is_plain(self) -> bool:
        """Whether it is cross-entropy without smoothing and weights."""
        return self.label_smoothing == 0 and self.class_weights is None


class LossObject(Record):
    """A loss object that the caller of `ablation.ablate` holds: the name of its class."""

    object: str


LossSpec = Literal["cross_entropy"] | CrossEntropySpec | SkipJsonSchema[LossObject]


def check_cross_entropy(options: Mapping[str, Any]) -> CrossEntropySpec:
    """The checked record of cross-entropy's options.

    Raises:
        SpecError: the first option that is wrong.
    """
    try:
        return CrossEntropySpec.model_validate({"name": "cross_entropy", **options})
    except ValidationError as error:
        raise spec_error(
            [{**each, "loc": ("loss", *each["loc"])} for each in error.errors(include_url=False)]
        ) from None


def _find_criterion(name: str) -> str:
    if name not in CRITERIA:
        about = {"names": ", ".join(CRITERIA), "next_step": nearest(name, CRITERIA)}
        raise PydanticCustomError("unknown_criterion", "one of {names}", about)
    return name


# The schema has the names, for whoever reads it; that they are known is checked when a spec is made.
CriterionName = Annotated[
    str, AfterValidator(_find_criterion), WithJsonSchema({"type": "string", "enum": list(CRITERIA)})
]


class JobSpec(Record):
    """One job: how much does the loss change when these weights of this layer are replaced, on this data?"""

    model: ModelSpec
    layer: str = Field(
        min_length=1, max_length=500, description="a module's name (its weight) or a parameter's full name"
    )
    data: DataSpec
    sites: SitesSpec
    value: ValueSpec = Field(
        default="zero",
        description="what replaces each weight w: `zero`; `flip_sign` (-w); a number, the same for all; or a number "
        "times w (`scale`)",
    )
    precision: Precision = "mixed"
    verify: Annotated[int, Field(ge=0, le=1024)] = 8
    top1: bool = False
    criteria: Annotated[
        tuple[CriterionName, ...],
        Field(
            strict=False,
            description="cheap criteria to compute beside, a column of each split: "
            + "; ".join(f"{criterion.name}: {criterion.description}" for criterion in CRITERIA.values()),
            json_schema_extra={"uniqueItems": True},
        ),
    ] = ()
    loss: LossSpec = "cross_entropy"

    @property
    def has_plain_loss(self) -> bool:
        """Whether the loss is cross-entropy without smoothing and weights: what the compiled loops compute."""
        return self.loss == "cross_entropy" or (isinstance(self.loss, CrossEntropySpec) and self.loss.is_plain)

    @field_validator("criteria")
    @classmethod
    def _each_once(cls, criteria: tuple[str, ...]) -> tuple[str, ...]:
        twice = next((name for name in criteria if criteria.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"distinct names; {twice!r} is given twice")
        return criteria

    @field_validator("value", mode="before", json_schema_input_type=ValueSpec | float)
    @classmethod
    def _number_is_constant(cls, value: object) -> object:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"constant": value} if is_number else value


def make_spec(fields: dict[str, Any]) -> JobSpec:
    """Make a checked spec from plain fields.

    Raises:
        SpecError: a field is wrong; the error names the first of them, with its dotted name.
    """
    try:
        return JobSpec.model_validate(fields)
    except ValidationError as error:
        raise spec_error(error.errors(include_url=False)) from None


# Allowed alternatives of fields that take one of several, for messages where none of them matches.
_SPLIT_FORMS = '"all", {"per_class": k, "seed": s} or {"count": k, "seed": s}'
FORMS = {
    "sites": '"all", {"count": k, "seed": s} or {"indices": [...]}',
    "value": '"zero", "flip_sign", a number, {"constant": number} or {"scale": number}',
    "data.train": _SPLIT_FORMS,
    "data.test": _SPLIT_FORMS,
    "loss": '"cross_entropy" or {"name": "cross_entropy", "label_smoothing": s, "class_weights": [...]}',
}
# The names that such a form may have: a word, or the one key of an object.
_NAMES = {"value": [*get_args(ValueWord), *Constant.model_fields, *Scale.model_fields]}
# Records of a spec in fields that take nothing else.
_RECORDS: dict[str, type[Record]] = {"": JobSpec, "model": ModelSpec, "data": DataSpec}
# Texts of what is allowed, by the type of pydantic's error; names in braces are from that error's context.
_ALLOWED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("string_type", "string_unicode"), "text"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("model_type", "model_attributes_type"), "an object"),
    **dict.fromkeys(("literal_error", "enum"), "{expected}"),
    "string_too_short": "{min_length} or more characters",
    "string_too_long": "at most {max_length} characters",
    "too_short": "{min_length} or more of them",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "value_error": "{error}",
    "unknown_criterion": "one of {names}",
}
# Errors that say only that a value is not this alternative (the last is FastAPI's).
_OTHER_FORM = ("literal_error", "missing", "extra_forbidden", "model_type", "model_attributes_type")


def spec_error(errors: Sequence[Mapping[str, Any]]) -> SpecError:
    """Convert the first of pydantic's errors to a `SpecError`.

    Where a field takes one of several alternatives, pydantic reports an error for each; the one that was meant counts.
    """
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"])
    union, several, _ = field.partition(".literal[")
    if several:
        depth = union.count(".") + 1
        meant = [e for e in errors if e["loc"][:depth] == first["loc"][:depth] and e["type"] not in _OTHER_FORM]
        if not meant:
            return SpecError(union, first["input"], FORMS.get(union, "one of its forms"), _nearest_form(union, first))
        first = meant[0]
        field = ".".join([union, *(str(part) for part in first["loc"][depth + 1 :])])
    if first["type"] == "missing":
        return SpecError(field or "spec", None, "a value; it is required")
    if first["type"] == "extra_forbidden":
        return _unknown_field(field, first["input"])
    next_step = first.get("ctx", {}).get("next_step", "")
    return SpecError(field or "spec", first.get("input"), allowed_by(first), next_step)


def allowed_by(error: Mapping[str, Any]) -> str:
    """Describe what is allowed where pydantic found this error (with its context)."""
    return _ALLOWED[error["type"]].format(**error.get("ctx", {})) if error["type"] in _ALLOWED else error["msg"]


def _nearest_form(field: str, error: Mapping[str, Any]) -> str:
    """The names of forms closest to the word or the key that was given."""
    given = error["input"]
    if isinstance(given, Mapping) and len(given) == 1:
        given = next(iter(given))
    return nearest(given, _NAMES.get(field, ())) if isinstance(given, str) else ""


def _unknown_field(field: str, given: object) -> SpecError:
    place, _, name = field.rpartition(".")
    names = [*_RECORDS.get(place, JobSpec).model_fields]
    next_step = f"There is no such field. {nearest(name, names)}".rstrip()
    return SpecError(field, given, f"only the fields {', '.join(names)}", next_step)

"""What is wrong with a spec is said in the words of the spec."""

import json
from typing import Any

import jsonschema
import pytest

from ablation.errors import SpecError
from ablation.spec import JobSpec, make_spec

FIELDS: dict[str, Any] = {
    "model": {"name": "digits_alexnet"}, "layer": "fc2", "data": {"name": "digits", "test": "all"}, "sites": "all"
}  # fmt: skip


def smoothed(smoothing: Any) -> dict[str, Any]:
    return {"name": "cross_entropy", "label_smoothing": smoothing}


def weighted(*weights: Any) -> dict[str, Any]:
    return {"name": "cross_entropy", "class_weights": list(weights)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"foo": 1}, "foo: got 1; allowed: only the fields model, layer, data, sites, "),
        ({"foo": 1}, "There is no such field."),
        ({"layr": "fc2"}, "There is no such field. Did you mean 'layer'?"),
        ({"data": {"name": "digits", "tets": "all", "train": "all"}}, "data.tets: got 'all'; allowed: only the fields"),
        ({"data": {"name": "digits", "tets": "all", "train": "all"}}, "Did you mean 'test'"),
        ({"data": {"name": "digits"}}, "data: got {\"name\": \"digits\"}; allowed: 'train', 'test' or both."),
        ({"model": {}}, "model.name: got null; allowed: a value; it is required."),
        ({"sites": {"count": 3, "foo": 1}}, 'allowed: "all", {"count": k, "seed": s} or {"indices": [...]}'),
        ({"sites": {"indices": [5, 5]}}, "allowed: distinct indices; 5 is given twice."),
        ({"value": float("nan")}, "allowed: a finite number."),
        ({"value": 10**400}, "allowed: a finite number."),
        ({"value": {"scale": float("inf")}}, "value.scale: got Infinity; allowed: a finite number."),
        ({"value": {"scale": "2"}}, "value.scale: got '2'; allowed: a finite number."),
        ({"value": {"scale": True}}, "value.scale: got true; allowed: a finite number."),
        (
            {"value": {"scale": 2, "constant": 1}},
            'allowed: "zero", "flip_sign", a number, {"constant": number} or {"sc',
        ),
        ({"value": "flipsign"}, 'value: got \'flipsign\'; allowed: "zero", "flip_sign", a number, '),
        ({"value": "flipsign"}, "Did you mean 'flip_sign'?"),
        ({"value": {"scael": 2}}, "Did you mean 'scale'?"),
        ({"layer": ""}, "layer: got ''; allowed: 1 or more characters."),
        ({"layer": 5}, "layer: got 5; allowed: text."),
        ({"layer": "x" * 501}, f"layer: got '{'x' * 197}...'; allowed: at most 500 characters."),
        ({"model": "alexnet"}, "model: got 'alexnet'; allowed: an object."),
        ({"sites": {"indices": []}}, "sites.indices: got []; allowed: 1 or more of them."),
        ({"sites": {"indices": [True]}}, "sites.indices.0: got true; allowed: a whole number."),
        ({"sites": {"count": 1.5}}, "sites.count: got 1.5; allowed: a whole number."),
        ({"sites": {"count": 5, "seed": 2**63}}, "allowed: less than 9223372036854775808."),
        ({"verify": 1025}, "verify: got 1025; allowed: 1024 or less."),
        ({"top1": "yes"}, "top1: got 'yes'; allowed: true or false."),
        ({"criteria": "taylor1"}, "criteria: got 'taylor1'; allowed: a list."),
        ({"criteria": [1]}, "criteria.0: got 1; allowed: text."),
        ({"loss": "hinge"}, 'loss: got \'hinge\'; allowed: "cross_entropy" or {"name": "cross_entropy", "label_smooth'),
        ({"loss": {"name": "hinge"}}, 'allowed: "cross_entropy" or {"name": "cross_entropy", "label_smoothing": s'),
        ({"loss": {"name": "cross_entropy", "smoothing": 0.1}}, 'allowed: "cross_entropy" or {"name": "cross_entropy"'),
        ({"loss": {"label_smoothing": 0.1}}, 'allowed: "cross_entropy" or {"name": "cross_entropy", "label_smoothing"'),
        ({"loss": smoothed(1.0)}, "loss.label_smoothing: got 1.0; allowed: less than 1"),
        ({"loss": smoothed(-0.1)}, "loss.label_smoothing: got -0.1; allowed: 0"),
        ({"loss": smoothed(float("nan"))}, "loss.label_smoothing: got NaN; allowed: "),
        ({"loss": smoothed(True)}, "loss.label_smoothing: got true; allowed: a number."),
        ({"loss": smoothed("0.1")}, "loss.label_smoothing: got '0.1'; allowed: a number."),
        ({"loss": weighted(1.0, -0.5)}, "loss.class_weights: got [1.0, -0.5]; allowed: finite numbers of at least 0"),
        ({"loss": weighted(1.0, float("inf"))}, "allowed: finite numbers of at least 0; inf is not one."),
        ({"loss": weighted(1.0, float("nan"))}, "allowed: finite numbers of at least 0; nan is not one."),
        ({"loss": weighted(0.0, 0)}, "loss.class_weights: got [0.0, 0]; allowed: at least one number above 0."),
        ({"loss": weighted()}, "loss.class_weights: got []; allowed: 1 or more of them."),
        ({"loss": weighted(True, 1.0)}, "loss.class_weights.0: got true; allowed: a number."),
    ],
)
def test_an_error_says_what_was_given_and_what_is_allowed(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as error:
        make_spec({**FIELDS, **change})
    assert said in str(error.value)


def test_the_schema_allows_every_form_of_a_value_that_is_taken_and_no_other() -> None:
    schema = jsonschema.Draft202012Validator(JobSpec.model_json_schema())
    for value in ("zero", "flip_sign", 0.5, -3, {"constant": 0.5}, {"scale": -2}):
        schema.validate({**FIELDS, "value": value})
        spec = make_spec({**FIELDS, "value": value})
        schema.validate(json.loads(spec.model_dump_json()))  # what comes back may be sent again
    for value in ("one", True, None, [0.5], {"constant": "0.5"}, {"scale": None}, {"scale": 1, "constant": 1}, {}):
        assert not schema.is_valid({**FIELDS, "value": value})
        with pytest.raises(SpecError):
            make_spec({**FIELDS, "value": value})


def test_losses_that_may_be_asked_for() -> None:
    schema = jsonschema.Draft202012Validator(JobSpec.model_json_schema())
    forms = ["cross_entropy", {"name": "cross_entropy"}, smoothed(0), smoothed(0.25), weighted(1, 0.0, 2.5)]
    for loss in forms:
        schema.validate({**FIELDS, "loss": loss})
        spec = make_spec({**FIELDS, "loss": loss})
        assert make_spec(json.loads(spec.model_dump_json())) == spec
        schema.validate(json.loads(spec.model_dump_json()))
        assert spec.has_plain_loss == (loss in forms[:3])
    assert make_spec(FIELDS).loss == "cross_entropy"
    assert not schema.is_valid({**FIELDS, "loss": {"object": "Focal"}})  # only `ablate` has objects


def test_an_old_spec_without_a_loss_is_one_of_cross_entropy() -> None:
    old = {name: value for name, value in make_spec(FIELDS).model_dump(mode="json").items() if name != "loss"}
    assert make_spec(old).loss == "cross_entropy"

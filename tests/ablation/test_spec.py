"""What is wrong with a spec is said in the words of the spec."""

from typing import Any

import pytest

from ablation.errors import SpecError
from ablation.spec import make_spec

FIELDS: dict[str, Any] = {
    "model": {"name": "digits_alexnet"}, "layer": "fc2", "data": {"name": "digits", "test": "all"}, "sites": "all"
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"foo": 1}, "foo: got 1; allowed: only the fields model, layer, data, sites, "),
        ({"foo": 1}, "There is no such field."),
        ({"layr": "fc2"}, "There is no such field. Did you mean 'layer'?"),
        ({"data": {"name": "digits", "tets": "all", "train": "all"}}, "data.tets: got 'all'; allowed: only the fields"),
        ({"data": {"name": "digits", "tets": "all", "train": "all"}}, "Did you mean 'test'"),
        ({"data": {"name": "digits"}}, "data: got {'name': 'digits'}; allowed: 'train', 'test' or both."),
        ({"model": {}}, "model.name: got None; allowed: a value; it is required."),
        ({"sites": {"count": 3, "foo": 1}}, "allowed: 'all', {'count': k, 'seed': s} or {'indices': [...]}"),
        ({"sites": {"indices": [5, 5]}}, "allowed: distinct indices; 5 is given twice."),
        ({"value": float("nan")}, "allowed: a finite number."),
    ],
)
def test_an_error_says_what_was_given_and_what_is_allowed(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as error:
        make_spec({**FIELDS, **change})
    assert said in str(error.value)

"""Every form of a replacement value, on every path, against an independent brute force."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ablation
from ablation.spec import Constant, Scale, ValueSpec
from ablation.table import ImportanceTable
from tests.ablation.engine.responses.test_rows import Convs, make_data, make_deep, make_head
from tests.ablation.engine.test_paths import is_convolution, run, some
from tests.cases import Case, make_cases
from tests.compare import BOUND, brute_force, count_moved, utility_error


@dataclass(frozen=True)
class Form:
    """A replacement value, and what it makes of a weight in plain Python."""

    value: ValueSpec
    replace: Callable[[float], float]


FORMS = {
    "flip_sign": Form("flip_sign", lambda w: -w),
    "scale 0": Form(Scale(scale=0), lambda w: 0.0),
    "scale 0.5": Form(Scale(scale=0.5), lambda w: w / 2),
    "scale 1": Form(Scale(scale=1), lambda w: w),
    "scale 2": Form(Scale(scale=2), lambda w: w + w),
    "scale -1": Form(Scale(scale=-1), lambda w: -w),
    "scale 1000": Form(Scale(scale=1e3), lambda w: 1e3 * w),
    "scale -0.3": Form(Scale(scale=-0.3), lambda w: -0.3 * w),
}
CHANGING = [name for name in FORMS if name != "scale 1"]


@cache
def find_truth(case: Case, form: str) -> np.ndarray:
    return brute_force(case.model, case.parameter, some(case), case.inputs, case.labels, FORMS[form].replace)


def can_take(case: Case, path: str, form: str, precision: str) -> bool:
    """Whether the plan would let a job take the path."""
    if path != "direct":
        return True
    has_loops = not is_convolution(case) or (precision == "mixed" and form != "scale 1000")
    return case.path == "direct" and has_loops


@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("path", ["direct", "finite", "rerun", "reference"])
@pytest.mark.parametrize("case", make_cases(), ids=str)
def test_single_weights_equal_brute_force(case: Case, path: str, precision: str) -> None:
    n = len(case.labels)
    few = ("flip_sign", "scale 1000") if path in ("direct", "finite") else ("scale 0.5",)
    for form in CHANGING if precision == "mixed" and path in ("direct", "finite") else few:
        if not can_take(case, path, form, precision):
            continue
        truth = find_truth(case, form)
        partial = run(case, path, precision, some(case), cut=8, value=FORMS[form].value)
        loss = partial.loss / n
        error = utility_error(partial.delta / n, truth, precision, loss)
        assert error <= BOUND[precision], f"{case} {path} {precision} {form}: error {error:.3g}"
        assert (partial.touched >= (np.abs(truth) > 1e-13 * (1 + np.abs(truth).max())).sum(axis=1)).all()
        if precision == "float64":
            moved = count_moved(case.model, case.parameter, some(case), case.inputs, FORMS[form].replace)
            np.testing.assert_array_equal(partial.touched, moved)


@dataclass(frozen=True)
class Layer:
    """A layer with response functions, and data."""

    model: nn.Module
    name: str
    inputs: torch.Tensor
    labels: torch.Tensor


def make_layers() -> dict[str, Layer]:
    """One of each kind: rows of a head behind ReLU and GELU, logits, three Linears, averaged convolutions."""
    generator = torch.Generator().manual_seed(3)
    images, classes = torch.randn(29, 3, 6, 7, generator=generator), torch.randint(5, (29,), generator=generator)
    x, labels = make_data(61)
    return {
        "relu rows": Layer(make_head(), "0", x, labels),
        "gelu rows": Layer(make_head(function=nn.GELU), "0", x, labels),
        "logits": Layer(make_head(), "2", x, labels),
        "three linears": Layer(make_deep(), "0", x, labels),
        "averaged relu": Layer(Convs("plain").eval(), "target", images, classes),
        "averaged silu": Layer(Convs("silu").eval(), "target", images, classes),
    }


LAYERS = make_layers()


def ablate(layer: Layer, form: str | Any, engine: str = "response", **options: Any) -> Any:
    value = FORMS[form].value if form in FORMS else form
    given = value if isinstance(value, str) else value.model_dump()
    data = {"test": (layer.inputs, layer.labels)}
    options = {"sites": "all", "batch_size": 16, "progress": False, **options}
    return ablation.ablate(layer.model, layer.name, data, value=given, engine=engine, **options)


@cache
def find_layer_truth(name: str, form: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some weights of a layer; their true deltas; and on how many examples each moves a logit."""
    layer = LAYERS[name]
    n_weights = layer.model.get_parameter(f"{layer.name}.weight").numel()
    rows = np.sort(np.random.default_rng(0).choice(n_weights, min(n_weights, 70), replace=False))
    given = layer.model, f"{layer.name}.weight", rows, layer.inputs
    replace = FORMS[form].replace
    return rows, brute_force(*given, layer.labels, replace), count_moved(*given, replace)


def check_layer(table: ImportanceTable, name: str, form: str) -> None:
    """The rows of a whole layer's table equal brute force."""
    rows, truth, moved = find_layer_truth(name, form)
    columns = table.columns
    error = utility_error(columns["utility_test"][rows], truth, "mixed")
    assert error <= BOUND["mixed"], f"{name} {form}: error {error:.3g}"
    stderr = truth.std(axis=1, ddof=1) / np.sqrt(truth.shape[1])
    np.testing.assert_allclose(columns["stderr_test"][rows], stderr, rtol=1e-4, atol=1e-6 * stderr.max())
    np.testing.assert_array_equal(columns["touched_test"][rows], moved)


@pytest.mark.parametrize("form", CHANGING)
@pytest.mark.parametrize("name", LAYERS)
def test_whole_layers_equal_brute_force(name: str, form: str) -> None:
    table = ablate(LAYERS[name], form, engine="auto")
    usual = {
        "scale 1000": "direct" if table.about["plan"]["kind"] == "Linear" and name != "three linears" else "finite"
    }
    assert table.about["plan"]["path"] == usual.get(form, "response")
    check_layer(table, name, form)
    proof = table.about["proof"]
    assert proof["n_sites"] == 8
    assert proof["arithmetic_error"] <= BOUND["mixed"]


@pytest.mark.parametrize("name", LAYERS)
def test_one_constant_for_all_would_be_caught(name: str) -> None:
    """The control: what the first weight is replaced by does not do for the others, on any loop."""
    layer = LAYERS[name]
    first = FORMS["scale 2"].replace(layer.model.get_parameter(f"{layer.name}.weight").flatten()[0].item())
    table = ablate(layer, Constant(constant=first))
    with pytest.raises(AssertionError, match="error"):
        check_layer(table, name, "scale 2")


@pytest.mark.parametrize("engine", ["response", "direct", "finite", "rerun", "reference"])
@pytest.mark.parametrize("name", ["relu rows", "three linears", "averaged relu"])
def test_forms_that_mean_the_same_give_the_same_bytes(name: str, engine: str) -> None:
    """Also where a weight is 0 or -0.0."""
    layer = LAYERS[name]
    if name == "three linears" and engine == "direct":
        return
    options = {"sites": "all" if engine == "response" else 14, "seed": 1, "verify": 0}
    with torch.no_grad():
        weights = layer.model.get_parameter(f"{layer.name}.weight").view(-1)
        kept = weights.clone()
        weights[::5], weights[::10] = 0.0, -0.0
    try:
        for form, same in (("scale 0", "zero"), ("scale -1", "flip_sign")):
            one, other = ablate(layer, form, engine, **options), ablate(layer, same, engine, **options)
            for column, values in one.columns.items():
                assert values.tobytes() == other.columns[column].tobytes(), (form, column)
    finally:
        with torch.no_grad():
            weights.copy_(kept)


@pytest.mark.parametrize("precision", ["mixed", "float32", "float64"])
@pytest.mark.parametrize("engine", ["response", "direct", "finite", "rerun", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_replaced_by_itself_has_no_effect(name: str, engine: str, precision: str) -> None:
    """Exactly 0, and no example touched: scale 1 of any weight, and the other sign of 0 and of -0.0."""
    layer = LAYERS[name]
    is_convolution = layer.model.get_parameter(f"{layer.name}.weight").dim() > 2
    if (engine == "direct" and name == "three linears") or (
        precision == "float64" and (engine == "response" or (engine == "direct" and is_convolution))
    ):
        return  # no such path
    sites = "all" if engine == "response" else np.arange(20)
    weights = layer.model.get_parameter(f"{layer.name}.weight").data.view(-1)
    kept = weights.clone()
    try:
        weights[7], weights[11] = 0.0, -0.0
        for form, rows in (("scale 1", slice(None)), ("flip_sign", [7, 11]), ("scale 1000", [7, 11])):
            if form == "scale 1000" and (engine == "response" or (engine == "direct" and is_convolution)):
                continue  # the plan takes another path
            columns = ablate(layer, form, engine, sites=sites, precision=precision, verify=0).columns
            assert not columns["utility_test"][rows].any(), form
            assert not columns["touched_test"][rows].any(), form
            assert form == "scale 1" or columns["touched_test"].any()
    finally:
        weights.copy_(kept)

"""The engine on real architectures: a few are run here, of all of them the kept results are read."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from ablation.engine.carried.dispatch import Rule
from ablation.engine.carried.products import RULES
from ablation.inputs.catalog import DEMO_MODEL, model_names
from ablation.reference import reference_deltas
from ablation.sites import make_sites
from tests import compare
from tools import check_torchvision
from tools.check_torchvision import (
    BOUND,
    N_SITES,
    PAGE,
    PLACES,
    brute_force,
    check_and_keep,
    check_model,
    enliven,
    errors_of,
    is_done,
    is_within,
    keys_of,
    load_entries,
    make_live_model,
    make_page,
    run_engine,
)


def require_within(entries: list[dict]) -> None:
    for entry in entries:
        assert is_within(entry), entry
        assert min(entry["effects"]) > 1e-8, f"nothing moves: {entry}"


def test_the_middle_of_squeezenet() -> None:
    entries = list(check_model("squeezenet1_1", ("middle",)))
    assert [(entry["precision"], entry["rules"]) for entry in entries] == [
        ("float64", "special"),
        ("float64", "general"),
        ("mixed", "special"),
        ("mixed", "general"),
    ]
    assert [len(entry["effects"]) for entry in entries] == [3, 2, 3, 2]
    assert not any(entry["one_by_one"] for entry in entries)
    require_within(entries)


def test_many_weights_of_alexnets_last_convolution_at_once() -> None:
    """Enough weights for the loops of `linear_relu.py`, which the tool's three weights a layer don't reach."""
    model, inputs = make_live_model("alexnet")
    labels = torch.tensor([3, 977])
    layer = "features.10.weight"
    indices = np.random.default_rng(0).choice(model.get_parameter(layer).numel(), 48, replace=False)
    sites = make_sites(model.get_parameter(layer), indices, "zero")
    truth = reference_deltas(model, layer, sites, inputs, labels).numpy()
    assert np.count_nonzero(truth.any(axis=1)) > 20
    delta, how = run_engine(model, layer, indices, inputs, labels, "mixed", RULES)
    assert how == {"one_by_one": False, "wide": False}
    assert errors_of(delta, truth, "mixed", 7.0)[0] <= BOUND["mixed"]
    assert errors_of(delta[::-1], truth, "mixed", 7.0)[0] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18"])
def test_first_middle_and_last_layer(name: str) -> None:
    entries = list(check_model(name))
    assert len(entries) == len(keys_of(name))
    require_within(entries)


def test_the_page_has_every_layer_of_every_model_and_all_are_within_bounds() -> None:
    names = [name for name in model_names() if name != DEMO_MODEL]
    assert len(names) == 80
    entries = load_entries()
    assert set(entries) == {key for name in names for key in keys_of(name)}
    assert [entry for entry in entries.values() if not is_within(entry)] == []
    assert [entry for entry in entries.values() if entry["one_by_one"]] == []
    page = PAGE.read_text("utf-8")
    assert page == make_page(entries)
    rows = re.findall(r"^\| (\w+) \| `[\w.-]+` \|", page, re.MULTILINE)
    assert rows == [name for name in sorted(names) for _ in PLACES]


# --- what the tool says can be believed ------------------------------------------------------------------------------


def test_its_brute_force_is_the_tests_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 6)).double()
    inputs, labels = torch.randn(7, 3, 5, 5).double(), torch.randint(6, (7,))
    delta = brute_force(model, "0.weight", inputs, labels)
    indices = [0, 31, 107]
    expected = compare.brute_force(model, "0.weight", indices, inputs, labels)
    np.testing.assert_array_equal([delta(index) for index in indices], expected)


@pytest.mark.parametrize("precision", ["mixed", "float64"])
def test_a_wrong_delta_is_seen(precision: str) -> None:
    truth = np.array([[3e-4, -1e-4], [2e-5, 2e-5]])
    bound = compare.BOUND[precision]

    def error(delta: np.ndarray) -> float:
        return errors_of(delta, truth, precision, loss=7.0)[0]

    assert error(truth) == 0
    assert error(truth * (1 + bound / 10)) <= bound
    assert error(truth * (1 + bound * 3)) > bound
    assert error(truth[::-1]) > bound
    assert error(truth[:, ::-1]) > bound  # the sums are right, the examples are not


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLU as if it let everything through."""
    wrong = Rule(lambda call, result, value: [call.delta(value)], lambda *args: None)
    monkeypatch.setitem(check_torchvision.RULE_SETS, "special", {**RULES, torch.ops.aten.relu: wrong})
    for entry in check_model("squeezenet1_1", ("middle",)):
        assert is_within(entry) == (entry["rules"] == "general"), entry


def test_a_silent_network_is_refused() -> None:
    class Silent(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * 0)

    silent = Silent(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 1000))
    with pytest.raises(ValueError, match="standard deviation"):
        enliven(silent, torch.randn(8, 3, 2, 2), torch.Generator())


def test_a_model_that_fails_is_shown_and_run_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_torchvision, "RESULTS", tmp_path / "results.json")

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(check_torchvision, "make_live_model", fail)
    entries: dict = {}
    check_and_keep("resnet18", entries)
    assert set(entries) == set(keys_of("resnet18"))
    assert load_entries() == entries
    assert not is_done("resnet18", entries)
    page = make_page(entries)
    assert "**0 of 12 results within bounds" in page
    assert page.count("**failed**") == 3 * 4
    assert "RuntimeError: out of order" in page
    assert N_SITES["special"] > N_SITES["general"]

"""The summary: right against direct computations, truthful at heavy tails, and never a crash at the edges."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ablation.statistics import (
    Ranked,
    Variation,
    ceiling_at,
    compare_splits,
    examples_for,
    find_warnings,
    make_summary,
    measure_variation,
    pearson,
    ranks_of_sorted,
    summary_lines,
)
from tests.ablation.tables import LOSS, PROOF, heavy_deltas, sums_of, table_of


def two_splits(n_sites: int = 400, n_train: int = 60, n_test: int = 40, **options):
    train = heavy_deltas(n_sites, n_train, seed=1)
    test = np.abs(train).mean(axis=1, keepdims=True) * heavy_deltas(n_sites, n_test, seed=2, share_dead=0.1) * 1e7
    return table_of({"train": train, "test": test}, **options)


def test_the_summary_of_a_two_split_job() -> None:
    table = two_splits()
    summary = make_summary(table)
    assert summary == json.loads(json.dumps(summary, allow_nan=False))
    told = {
        "sites": 400, "weights_in_layer": 97 * 89, "layer": "fc2", "parameter": "fc2.weight", "path": "direct",
        "precision": "mixed",
    }  # fmt: skip
    assert {name: summary[name] for name in told} == told
    assert (summary["proof"], summary["not_finite"], summary["seconds"]) == (PROOF, 0, 3.25)
    for split in ("train", "test"):
        utility, found = table.columns[f"utility_{split}"], summary["splits"][split]
        assert {name: found[name] for name in ("n_examples", "loss", "accuracy", "series_bound")} == table.about[
            "baseline"
        ][split]
        assert found["provably_without_effect"] == (table.columns[f"touched_{split}"] == 0).sum() > 0
        assert found["negative"] == (utility < 0).sum() > 0
        assert found["mean_utility"] == pytest.approx(utility.mean(), rel=1e-12)


GUESSING = math.log(10)


@pytest.mark.parametrize(
    ("n", "n_right", "loss", "reasons"),
    [
        (500, 50, 2.0, 1),  # at chance
        (500, 0, 2.0, 1),
        (500, 57, 2.0, 1),  # as many by luck
        (500, 90, 2.0, 0),
        (500, 450, 2.5, 1),  # right, but for a few answers that are given with false certainty
        (500, 50, 2.5, 2),
        (500, 450, GUESSING, 0),
        (1, 0, 2.0, 0),  # bad luck
        (3, 0, 2.0, 0),
        (4, 1, 2.0, 0),
        (12, 0, 2.0, 1),
        (1_281_167, 128_116, 2.0, 1),
        (1_281_167, 130_000, 2.0, 0),
    ],
)
def test_a_network_that_does_not_know_the_data_is_a_warning(n: int, n_right: int, loss: float, reasons: int) -> None:
    table = table_of({"test": heavy_deltas(5, 20)})
    table.about["baseline"]["test"].update(n_examples=n, accuracy=n_right / n, loss=loss)
    found = find_warnings(table)
    assert len(found) == (reasons > 0)
    if found:
        assert found[0].startswith("test: the network does not know this data: its ")
        assert found[0].count("; its ") == reasons - 1


@pytest.mark.parametrize(
    ("loss", "is_said"),
    [
        ("cross_entropy", True),
        ({"name": "cross_entropy", "label_smoothing": 0.1, "class_weights": None}, True),
        ({"name": "cross_entropy", "label_smoothing": 0.0, "class_weights": [3.0] * 10}, False),
        ({"object": "Hinge"}, False),
    ],
)
def test_other_losses_are_not_compared_with_log_of_the_classes(loss: Any, is_said: bool) -> None:
    table = table_of({"test": heavy_deltas(5, 20)})
    table.about["baseline"]["test"]["loss"] = 2.5
    table.about["spec"]["loss"] = loss
    assert bool(find_warnings(table)) == is_said


def test_correlations_are_scipys_over_all_and_over_touched_sites() -> None:
    table = two_splits()
    summary, columns = make_summary(table), table.columns
    for split in ("train", "test"):
        touched = columns[f"touched_{split}"] > 0
        check(summary["magnitude"][split], columns["magnitude"], np.abs(columns[f"utility_{split}"]), touched)
    either = (columns["touched_train"] > 0) | (columns["touched_test"] > 0)
    assert 0 < either.sum() < len(table)
    check(summary["train_test"], columns["utility_train"], columns["utility_test"], either)


def check(found: dict, a: np.ndarray, b: np.ndarray, touched: np.ndarray) -> None:
    for suffix, rows in (("", slice(None)), ("_touched", touched)):
        assert found[f"pearson{suffix}"] == pytest.approx(stats.pearsonr(a[rows], b[rows])[0], abs=1e-12)
        assert found[f"spearman{suffix}"] == pytest.approx(stats.spearmanr(a[rows], b[rows])[0], abs=1e-12)
    assert found["pearson"] != found["pearson_touched"]


def test_what_float32_would_call_zero() -> None:
    """With a loss of 0.25, half a float32 step is 1.5e-8 upwards and half of that downwards."""
    deltas = np.array([0.0, 1e-8, -1e-8, 1.4e-8, 1.6e-8, -1.6e-8, 1e-3, -1e-9, 1e-7])[:, None]
    truth = sum(int(np.float32(LOSS + delta) == np.float32(LOSS)) for delta in deltas[:, 0])
    found = make_summary(table_of({"test": deltas}))["splits"]["test"]
    assert found["float32_would_call_zero"] == truth == 4
    assert found["provably_without_effect"] == 1
    assert found["negative"] == 3


def test_a_utility_too_large_for_float32_is_not_zero_to_it() -> None:
    found = make_summary(table_of({"test": np.array([[0.0], [1e100]])}))["splits"]["test"]
    assert found["float32_would_call_zero"] == 1


def test_reliability_and_ceiling_by_their_formulas() -> None:
    table = two_splits()
    found, parts = compare_splits(table), []
    for split in ("train", "test"):
        noise = (table.columns[f"stderr_{split}"] ** 2).mean()
        parts.append(1 - noise / table.columns[f"utility_{split}"].var(ddof=1))
        assert make_summary(table)["splits"][split]["reliability"] == pytest.approx(parts[-1], rel=1e-9)
    assert all(0 < part < 1 for part in parts)
    assert found["ceiling"] == pytest.approx(math.sqrt(parts[0] * parts[1]), rel=1e-9)
    assert found["ratio"] == pytest.approx(found["pearson"] / found["ceiling"], rel=1e-9)


def test_the_ceiling_is_what_perfect_agreement_reaches_and_what_other_sizes_would_reach() -> None:
    """Draw both splits from the same true utilities: r must be the ceiling, and the prediction for 16 N must hold."""
    random = np.random.default_rng(5)
    true = 1e-7 * random.standard_normal(3000)

    def draw(n: int):
        deltas = [true[:, None] + 8e-7 * random.standard_normal((3000, n)) for _ in range(2)]
        return table_of({"train": deltas[0], "test": deltas[1]}, shape=(100, 100))

    small, large = draw(40), draw(640)
    found = compare_splits(small)
    assert found["pearson"] < 0.6
    assert found["ratio"] == pytest.approx(1, abs=0.06)
    predicted = ceiling_at(640, measure_variation(small, "train"), measure_variation(small, "test"))  # type: ignore[arg-type]
    assert predicted == pytest.approx(compare_splits(large)["pearson"], abs=0.03)
    assert found["ceiling_at"]["1000"] > predicted
    wanted = found["examples_for_ceiling"]
    assert 40 < wanted["0.9"] < wanted["0.99"]
    # the control: utilities that don't agree in truth stay well below their ceiling
    shuffled = {**small.columns, "utility_test": np.roll(small.columns["utility_test"], 1)}
    assert abs(compare_splits(type(small)(shuffled, small.about))["ratio"]) < 0.2


@given(
    wanted=st.floats(0.3, 0.999), noise=st.tuples(*[st.floats(0, 0.999)] * 2), n=st.tuples(*[st.integers(2, 10**6)] * 2)
)
def test_examples_for_a_ceiling_are_the_fewest_that_reach_it(wanted, noise, n) -> None:
    train, test = (Variation(1.0, part, size) for part, size in zip(noise, n, strict=True))
    needed = examples_for(wanted, train, test)
    assert needed is not None
    assert ceiling_at(needed, train, test) >= wanted * (1 - 1e-9)
    assert needed == 1 or ceiling_at(needed - 1, train, test) <= wanted * (1 + 1e-9)


def test_pure_noise_has_no_ceiling_to_reach() -> None:
    noisy = Variation(1.0, 1.2, 50)
    assert noisy.reliability == 0
    assert examples_for(0.9, noisy, Variation(1.0, 0.1, 50)) is None
    assert ceiling_at(1000, noisy, noisy) == 0


def test_stratified_standard_errors_are_used() -> None:
    deltas = heavy_deltas(50, 40, seed=3)
    deltas = deltas + np.abs(deltas).mean(axis=1, keepdims=True) * (np.arange(40) // 8)  # classes differ: no noise here
    plain, stratified = (
        make_summary(table_of({"test": sums_of(deltas, 8)}, per_class={"test": k}))["splits"]["test"]["reliability"]
        for k in (None, 8)
    )
    assert 0 < plain < stratified < 1


EDGES = {
    "one site": table_of({"train": heavy_deltas(1, 9, share_dead=0), "test": heavy_deltas(1, 8, share_dead=0)}),
    "two sites": table_of({"train": heavy_deltas(2, 9, share_dead=0), "test": heavy_deltas(2, 8, share_dead=0)}),
    "nothing touched": table_of({"train": np.zeros((30, 9)), "test": np.zeros((30, 8))}),
    "one touched": table_of({"train": np.eye(30, 9)[:, :1], "test": np.eye(30, 8)}),
    "one example": table_of({"train": heavy_deltas(30, 1, 3, 0.0), "test": heavy_deltas(30, 1, 4, 0.0)}),
    "one of each class": table_of({"test": sums_of(heavy_deltas(30, 5), 1)}, per_class={"test": 1}),
    "constant utility": table_of({"train": np.full((30, 9), 1e-7), "test": np.full((30, 8), -1e-7)}),
    "constant weights": table_of({"test": heavy_deltas(30, 9)}, weights=np.full(30, 0.1)),
    "all weights zero": table_of({"test": heavy_deltas(30, 9)}, weights=np.zeros(30)),
    "no proof": table_of({"test": heavy_deltas(30, 9)}, proof=None),
    "nothing run": table_of({"test": heavy_deltas(30, 9)}, not_finite=np.ones(30, bool)),
    "some not run": two_splits(30, not_finite=np.arange(30) % 3 == 0),
    "tiny": table_of({"train": 1e-300 * heavy_deltas(30, 9), "test": 1e-300 * heavy_deltas(30, 8)}),
    "float32 proof": table_of(
        {"test": heavy_deltas(30, 9)}, proof=PROOF | {"arithmetic_bound": None, "arithmetic_error": math.inf}
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_give_plain_json_and_lines_without_a_warning(name: str) -> None:
    summary = make_summary(EDGES[name])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    lines = summary_lines(summary)
    assert all(label and value and "nan" not in value and "None" not in value for label, value in lines)


@pytest.mark.parametrize("name", ["one site", "two sites", "nothing touched", "constant utility"])
def test_where_no_correlation_exists_there_is_none(name: str) -> None:
    summary = make_summary(EDGES[name])
    assert {*summary["magnitude"]["train"].values()} == {None}
    assert summary["train_test"]["pearson"] is summary["train_test"]["ratio"] is None


def test_without_standard_errors_there_is_no_ceiling() -> None:
    summary = make_summary(EDGES["one example"])
    assert summary["splits"]["train"]["reliability"] is None
    assert summary["train_test"]["ceiling"] is summary["train_test"]["examples_for_ceiling"]["0.9"] is None
    assert summary["train_test"]["pearson"] is not None


def test_sites_that_were_not_run_are_counted_and_left_out() -> None:
    table = EDGES["some not run"]
    summary, run = make_summary(table), np.arange(30) % 3 != 0
    assert (summary["sites"], summary["not_finite"]) == (30, 10)
    assert summary["splits"]["train"]["mean_utility"] == pytest.approx(table.columns["utility_train"][run].mean())
    assert summary["train_test"]["pearson"] == pytest.approx(
        pearson(table.columns["utility_train"][run], table.columns["utility_test"][run])
    )
    assert "10 of 30 (33.3%)" in dict(summary_lines(summary))["not run"]


def test_no_value_is_too_small_to_correlate() -> None:
    tiny, same = make_summary(EDGES["tiny"]), 1e-300 * heavy_deltas(30, 9)[:, 0]
    assert tiny["train_test"]["pearson"] is not None
    assert tiny["splits"]["train"]["reliability"] is not None
    assert pearson(same, 3 * same) == pytest.approx(1)


def test_the_lines_say_what_people_ask_first() -> None:
    table = two_splits()
    summary = make_summary(table)
    lines = dict(summary_lines(summary))
    assert lines["sites"] == "400 of the 8,633 weights of fc2.weight"
    assert lines["train: intact"] == "loss 0.25, accuracy 90.00% (60 examples)"
    untouched = summary["splits"]["test"]["provably_without_effect"]
    assert lines["test: provably without effect"] == f"{untouched} of 400 ({untouched / 400:.1%})"
    assert lines["test: float32 would call zero"].startswith(
        f"{summary['splits']['test']['float32_would_call_zero']} of"
    )
    assert f"Pearson {summary['magnitude']['train']['pearson']:.3f}" in lines["train: |utility| with |w|"]
    assert f"Pearson {summary['train_test']['pearson']:.3f}" in lines["utility, train with test"]
    assert lines["noise ceiling"].startswith(f"{summary['train_test']['ceiling']:.3f}; ")
    assert lines["largest error"] == "3.2e-07 against the reference, allowed 1e-04 (8 sites, 64 examples)"
    assert lines["time"] == "3.25 s"


@given(
    n=st.integers(1, 60),
    n_levels=st.integers(1, 60),
    share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 999),
)
def test_sorted_once_any_part_is_ranked_as_scipy_does(n: int, n_levels: int, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.integers(0, n_levels, n) / 3, random.standard_normal(n).round(1)
    b[random.random(n) < 0.1] = np.nan
    rows = (random.random(n) < share) & np.isfinite(b)
    found = Ranked(a, b).spearman(rows)
    if rows.sum() < 3 or np.ptp(a[rows]) == 0 or np.ptp(b[rows]) == 0:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(a[rows], b[rows]).statistic, abs=1e-12)
    in_order = np.sort(a)
    np.testing.assert_array_equal(ranks_of_sorted(in_order), stats.rankdata(in_order))


def test_ranks_of_values_in_no_order_are_not_scipys() -> None:
    assert ranks_of_sorted(np.array([3.0, 1.0, 1.0])).tolist() != stats.rankdata([3.0, 1.0, 1.0]).tolist()

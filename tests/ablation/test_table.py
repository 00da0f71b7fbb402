"""The table's columns: their names, order and types; utility and standard error against raw deltas."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ablation.table import Rows, count_rows, cut_rows
from tests.ablation.tables import heavy_deltas, merged, sums_of, table_of

HEADER = "index,out,in,weight,magnitude,utility_train,stderr_train,touched_train,utility_test,stderr_test,touched_test"
COUNTS = ("touched", "broken", "fixed")


def test_the_columns_of_a_two_split_linear_job_in_order() -> None:
    table = table_of({"train": heavy_deltas(5, 40), "test": heavy_deltas(5, 30)})
    assert ",".join(table.columns) == HEADER
    assert len(table) == 5
    for name, values in table.columns.items():
        whole = name in ("index", "out", "in") or name.startswith(COUNTS)
        assert values.dtype == (np.int64 if whole else np.float64), name
        assert values.shape == (5,), name


def test_a_split_that_was_not_asked_for_has_no_columns() -> None:
    assert list(table_of({"test": heavy_deltas(5, 30)}).columns)[5:] == ["utility_test", "stderr_test", "touched_test"]


def test_top1_columns_come_last() -> None:
    table = table_of({"train": heavy_deltas(5, 40), "test": heavy_deltas(5, 30)}, top1=True)
    assert list(table.columns)[11:] == ["broken_train", "fixed_train", "broken_test", "fixed_test"]
    np.testing.assert_array_equal(table.columns["broken_test"], (heavy_deltas(5, 30) > 1e-6).sum(axis=1))
    np.testing.assert_array_equal(table.columns["fixed_train"], (heavy_deltas(5, 40) < -1e-6).sum(axis=1))


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((11,), ["out"]),
        ((5, 7), ["out", "in"]),
        ((5, 7, 3), ["out", "in", "k"]),
        ((5, 7, 3, 2), ["out", "in", "kh", "kw"]),
        ((5, 7, 3, 2, 4), ["out", "in", "kd", "kh", "kw"]),
        ((), []),
    ],
)
def test_coordinates_find_the_weight_in_the_tensor(shape: tuple[int, ...], names: list[str]) -> None:
    tensor = np.random.default_rng(0).standard_normal(shape)
    indices = np.random.default_rng(1).permutation(tensor.size)[:9].astype(np.int64)
    weights = tensor.reshape(-1)[indices]
    columns = table_of({"test": heavy_deltas(len(indices), 6)}, indices=indices, shape=shape, weights=weights).columns
    assert list(columns)[1 : len(names) + 1] == names
    assert list(columns)[len(names) + 1] == "weight"
    np.testing.assert_array_equal(columns["weight"], tensor[tuple(columns[name] for name in names)].reshape(-1))
    np.testing.assert_array_equal(columns["magnitude"], np.abs(weights))
    np.testing.assert_array_equal(columns["index"], indices)


@given(
    deltas=arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 30)), elements=st.floats(-1e-3, 1e-3)),
)
def test_utility_and_stderr_are_those_of_the_raw_deltas(deltas: np.ndarray) -> None:
    columns = table_of({"test": deltas}).columns
    n = deltas.shape[1]
    np.testing.assert_allclose(columns["utility_test"], deltas.mean(axis=1), rtol=1e-12, atol=1e-18)
    # S2 - S^2/N keeps about 1e-16 of S2: so much of the squared standard error is rounding.
    lost = 1e-15 * (deltas**2).sum(axis=1) / (n * (n - 1))
    truth = deltas.var(axis=1, ddof=1) / n
    smallest = np.finfo(np.float64).tiny  # squares below it have lost digits
    assert np.all(np.abs(columns["stderr_test"] ** 2 - truth) <= 1e-12 * truth + n * lost + smallest)
    np.testing.assert_array_equal(columns["touched_test"], (deltas != 0).sum(axis=1))


@given(
    n_classes=st.integers(1, 6),
    per_class=st.integers(2, 9),
    seed=st.integers(0, 999),
    offset=st.sampled_from([0, 1e-6]),
)
def test_stratified_stderr_is_that_of_a_weighted_mean_of_class_means(n_classes, per_class, seed, offset) -> None:
    deltas = heavy_deltas(7, n_classes * per_class, seed) + offset
    columns = table_of({"test": sums_of(deltas, per_class)}, per_class={"test": per_class}).columns
    blocks = deltas.reshape(7, n_classes, per_class)
    weight = per_class / deltas.shape[1]
    truth = np.sqrt(sum(weight**2 * blocks[:, h].var(axis=1, ddof=1) / per_class for h in range(n_classes)))
    np.testing.assert_allclose(columns["stderr_test"], truth, rtol=1e-9, atol=1e-20)


def test_stderr_is_the_spread_of_the_utility_over_repeated_draws() -> None:
    """Draw the examples again and again, from classes that differ: each formula must predict its own design."""
    random = np.random.default_rng(4)
    n_classes, k, repeats = 5, 8, 4000
    means = np.arange(n_classes) * 3e-7
    blocks = means[:, None] + 1e-7 * random.standard_normal((repeats, n_classes, k))
    stratified = table_of({"test": sums_of(blocks.reshape(repeats, -1), k)}, per_class={"test": k}, shape=(200, 200))
    assert _predicted(stratified) == pytest.approx(stratified.columns["utility_test"].std(), rel=0.03)
    drawn = means[random.integers(n_classes, size=(repeats, 40))] + 1e-7 * random.standard_normal((repeats, 40))
    simple = table_of({"test": drawn}, shape=(200, 200))
    assert _predicted(simple) == pytest.approx(simple.columns["utility_test"].std(), rel=0.03)
    assert _predicted(stratified) < 0.5 * _predicted(simple)  # the control: they are not the same number


def _predicted(table) -> float:
    return float(np.sqrt((table.columns["stderr_test"] ** 2).mean()))


def test_stderr_is_unknown_with_one_example_or_one_of_each_class() -> None:
    one = table_of({"test": heavy_deltas(6, 1)}).columns
    assert np.isnan(one["stderr_test"]).all()
    assert np.isfinite(one["utility_test"]).all()
    deltas = heavy_deltas(6, 10)
    assert np.isnan(table_of({"test": sums_of(deltas, 1)}, per_class={"test": 1}).columns["stderr_test"]).all()
    assert np.isfinite(table_of({"test": deltas}).columns["stderr_test"]).all()


def test_equal_deltas_have_no_negative_variance() -> None:
    stderr = table_of({"test": np.full((3, 49), 0.1) * [[1], [-1], [1e-9]]}).columns["stderr_test"]
    assert np.isfinite(stderr).all()
    assert np.all(stderr <= 1e-8 * np.array([0.1, 0.1, 1e-10]))


def test_sites_that_were_not_run_say_so() -> None:
    not_finite = np.array([False, True, False, True])
    deltas = heavy_deltas(4, 30, share_dead=0.0)
    table = table_of({"train": deltas, "test": deltas[:, :20]}, not_finite=not_finite)
    for split, n in (("train", 30), ("test", 20)):
        np.testing.assert_array_equal(np.isnan(table.columns[f"utility_{split}"]), not_finite)
        np.testing.assert_array_equal(np.isnan(table.columns[f"stderr_{split}"]), not_finite)
        touched = table.columns[f"touched_{split}"]
        assert touched.dtype == np.int64
        np.testing.assert_array_equal(touched[not_finite], [n, n])
        assert (touched[~not_finite] < n).all()


def test_the_worked_example_of_the_documentation() -> None:
    """The numbers of docs/01-quantity.md, read from the page, are what the code gives."""
    page = (Path(__file__).parents[2] / "docs/01-quantity.md").read_text("utf-8")
    loss, ablated = (_numbers(page, name) for name in ("intact loss", "loss without w"))
    delta = ablated - loss
    np.testing.assert_allclose(delta, _numbers(page, "delta"), atol=1e-12)
    simple = table_of({"test": delta[None]}).columns
    blocks = table_of({"test": sums_of(delta[None], 2)}, per_class={"test": 2}).columns
    told = {name: float(value) for name, value in re.findall(r"^- `(\w+)` = .*= ([-\d.]+)", page, re.MULTILINE)}
    assert told == {
        "utility": pytest.approx(simple["utility_test"][0], abs=5e-6),
        "stderr": pytest.approx(simple["stderr_test"][0], abs=5e-6),
        "stderr_per_class": pytest.approx(blocks["stderr_test"][0], abs=5e-6),
        "touched": simple["touched_test"][0],
    }


def _numbers(page: str, row: str) -> np.ndarray:
    cells = re.search(rf"^\| {row} \|(.*)\|$", page, re.MULTILINE)
    assert cells, f"docs/01-quantity.md has no row {row!r}"
    return np.array([float(cell) for cell in cells[1].split("|")])


def test_a_merged_partial_gives_the_same_columns_as_the_whole() -> None:
    deltas = heavy_deltas(20, 60)
    whole, cut = (
        table_of({"test": sums_of(deltas, 5)}, per_class={"test": 5}),
        table_of({"test": merged([sums_of(deltas[:, :25], 5), sums_of(deltas[:, 25:], 5)])}, per_class={"test": 5}),
    )
    for name, values in whole.columns.items():
        np.testing.assert_allclose(cut.columns[name], values, rtol=1e-12, atol=1e-22, err_msg=name)


@pytest.mark.parametrize("shape", [(35,), (5, 7), (5, 7, 3, 2)])
def test_a_whole_layer_needs_no_list_of_its_weights(shape: tuple[int, ...]) -> None:
    n = int(np.prod(shape))
    deltas = {"train": heavy_deltas(n, 6), "test": heavy_deltas(n, 5)}
    listed = table_of(deltas, shape=shape, indices=np.arange(n), top1=True)
    whole = table_of(deltas, shape=shape, every_weight=True, top1=True)
    assert isinstance(whole.columns, Rows)
    assert list(whole.columns) == list(listed.columns)
    assert "index" not in whole.columns.kept
    assert len(whole) == len(listed) == n
    for name, values in listed.columns.items():
        assert (whole.columns[name].dtype, whole.columns[name].tobytes()) == (values.dtype, values.tobytes()), name
    for rows in (slice(0, 3), slice(4, 29), slice(30, 10_000), slice(n, n + 4)):
        for name, values in cut_rows(whole.columns, rows).items():
            assert values.tobytes() == listed.columns[name][rows].tobytes(), (name, rows)
        inner = whole.columns.cut(slice(2, None)).cut(rows)
        np.testing.assert_array_equal(inner["index"], np.arange(2, n)[rows])
        assert count_rows(inner) == len(inner["weight"])


def test_rows_keep_little_and_lose_nothing() -> None:
    weights = np.random.default_rng(0).standard_normal(6).astype(np.float32)
    columns = table_of({"test": heavy_deltas(6, 9)}, shape=(2, 3), every_weight=True, weights=weights).columns
    assert isinstance(columns, Rows)
    assert sum(values.nbytes for values in columns.kept.values()) == 6 * (4 + 8 + 8 + 4)
    assert columns["weight"].tolist() == weights.astype(np.float64).tolist()
    fine = weights.astype(np.float64) + 1e-12
    fine[1] = 1e300
    columns = table_of({"test": heavy_deltas(6, 9)}, shape=(2, 3), every_weight=True, weights=fine).columns
    assert columns["weight"].tobytes() == fine.tobytes()

"""Merge adds disjoint examples, join appends disjoint sites: in any cut the same as uncut, to rounding."""

from dataclasses import fields, replace
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablation.partial import PER_SITE, TOTALS, Gathered, PartialSums, held
from tests.ablation.tables import heavy_deltas, joined, merged, sums_of

COUNTS = ("n_examples", "n_correct", "touched", "broken", "fixed")


def assert_equal(a: PartialSums, b: PartialSums, rtol: float = 0.0) -> None:
    for name in (*TOTALS, *PER_SITE):
        assert (getattr(a, name) is None) is (getattr(b, name) is None), name
        if getattr(a, name) is None:
            continue
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        assert x.dtype == y.dtype, name
        assert x.shape == y.shape, name
        np.testing.assert_allclose(x, y, rtol=0 if name in COUNTS else rtol, atol=0, err_msg=name)
    assert a.statistics.keys() == b.statistics.keys()
    for name, values in a.statistics.items():
        np.testing.assert_allclose(values, b.statistics[name], rtol=rtol, atol=0, err_msg=name)


def cut(deltas: np.ndarray, ends: list[int], axis: int) -> list[np.ndarray]:
    return np.split(deltas, sorted(ends), axis=axis)


def part(deltas: np.ndarray) -> PartialSums:
    """Sums of positive numbers, so that rounding is relative; counts that differ from each other."""
    n = deltas.shape[1]
    return PartialSums(
        n_examples=n,
        n_correct=int((deltas[0] > 5e-8).sum()),
        loss=float(np.abs(deltas[:1]).sum()),
        delta=np.abs(deltas).sum(axis=1),
        delta_squared=(deltas**2).sum(axis=1),
        within=3 * (deltas**2).sum(axis=1),
        proof=np.abs(deltas**3).sum(axis=1),
        touched=(deltas != 0).sum(axis=1, dtype=np.int32),
        broken=(deltas > 0).sum(axis=1, dtype=np.int32),
        fixed=(deltas < -1e-7).sum(axis=1, dtype=np.int32),
        statistics={"gradient": np.abs(deltas).sum(axis=1) / 7},
    )


@given(ends=st.lists(st.integers(0, 53), max_size=6), seed=st.integers(0, 99))
def test_merge_in_any_cut_equals_uncut(ends: list[int], seed: int) -> None:
    deltas = heavy_deltas(11, 53, seed)
    assert_equal(merged([part(piece) for piece in cut(deltas, ends, axis=1)]), part(deltas), rtol=1e-13)


@given(ends=st.lists(st.integers(1, 30), max_size=4, unique=True), seed=st.integers(0, 99))
def test_join_in_any_cut_equals_uncut(ends: list[int], seed: int) -> None:
    deltas = heavy_deltas(31, 13, seed)
    whole = sums_of(deltas)
    assert_equal(joined([sums_of(piece) for piece in cut(deltas, ends, axis=0)]), whole, rtol=1e-13)


@given(ends=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 99))
def test_merge_of_whole_classes_keeps_the_stratified_sums(ends: list[int], seed: int) -> None:
    deltas = heavy_deltas(7, 45, seed)  # 9 classes of 5
    pieces = [piece for piece in cut(deltas, [5 * end for end in ends], axis=1) if piece.shape[1]]
    found, whole = merged([sums_of(piece, 5) for piece in pieces]), sums_of(deltas, 5)
    np.testing.assert_allclose(found.within, whole.within, rtol=1e-13)


def test_merge_and_join_commute() -> None:
    deltas = heavy_deltas(12, 30)
    blocks = [[part(piece) for piece in cut(rows, [7, 19], axis=1)] for rows in cut(deltas, [5], axis=0)]
    by_site = joined([merged(row) for row in blocks])
    by_example = merged([joined([top, bottom]) for top, bottom in zip(*blocks, strict=True)])
    for name in held(by_site):
        np.testing.assert_array_equal(held(by_site)[name], held(by_example)[name], err_msg=name)
    assert len(by_site.delta) == 12


def test_join_keeps_the_order_and_counts_the_examples_once() -> None:
    top, bottom = sums_of(heavy_deltas(3, 20, seed=1)), sums_of(heavy_deltas(5, 20, seed=2))
    both = joined([top, bottom])
    np.testing.assert_array_equal(both.delta, [*top.delta, *bottom.delta])
    assert (both.n_examples, both.n_correct, both.loss) == (top.n_examples, top.n_correct, top.loss)


def test_no_examples_change_no_bit() -> None:
    whole, nothing = part(heavy_deltas(6, 9)), part(heavy_deltas(6, 9)[:, :0])
    assert_equal(merged([nothing, whole]), whole)
    assert_equal(merged([whole, nothing]), whole)
    assert {field.name for field in fields(PartialSums)} == {*TOTALS, *PER_SITE, "statistics"}


def test_the_order_of_a_merge_decides_its_bytes() -> None:
    """Why shards are merged in plan order: float addition is not associative. The same order: the same bits."""
    deltas = heavy_deltas(200, 60, share_dead=0.0)
    parts = [part(piece) for piece in cut(deltas, [13, 29, 41], axis=1)]
    assert merged(parts).delta.tobytes() == merged(list(parts)).delta.tobytes()
    assert merged(parts).delta.tobytes() != merged(parts[::-1]).delta.tobytes()


@pytest.mark.parametrize("fields", [{}, {"within": None}, {"proof": None, "within": None, "broken": None}])
def test_blocks_of_sites_and_examples_are_added_and_put_in_their_rows_to_the_bit(fields: dict[str, None]) -> None:
    deltas = heavy_deltas(12, 30, share_dead=0.0)
    deltas[0] = 0.0
    blocks = [
        [replace(part(piece), delta=-part(piece).delta, **fields) for piece in cut(rows, [7, 19], axis=1)]
        for rows in cut(deltas, [5], axis=0)
    ]
    gathered = Gathered(12)
    for sites, parts in (((5, 12), blocks[1]), ((0, 5), blocks[0])):
        for partial in parts:
            gathered.add(sites, partial)
    whole = gathered.finish()
    for name in held(whole):
        expected = [reduce(np.add, [held(partial)[name] for partial in parts]) for parts in blocks]
        assert held(whole)[name].tobytes() == np.concatenate(expected).tobytes(), name
    assert whole.n_examples == 30
    assert np.signbit(whole.delta[0])
    assert list(held(whole)) == [*(name for name in PER_SITE if name not in fields), "gradient"]


def test_what_does_not_fit_together_is_not_gathered() -> None:
    gathered = Gathered(12)
    gathered.add((0, 5), sums_of(heavy_deltas(5, 20)))
    with pytest.raises(ValueError, match="of 6 sites for the rows 5 to 12"):
        gathered.add((5, 12), sums_of(heavy_deltas(6, 20)))
    with pytest.raises(ValueError, match="have the same fields"):
        gathered.add((5, 12), sums_of(heavy_deltas(7, 20), 5))
    gathered.add((5, 12), sums_of(heavy_deltas(7, 19)))
    with pytest.raises(ValueError, match=r"got \[20, 19\]"):
        gathered.finish()


def test_partials_of_other_sites_are_refused() -> None:
    six, seven = sums_of(heavy_deltas(6, 20)), sums_of(heavy_deltas(7, 20))
    with pytest.raises(ValueError, match="of 7 sites for the rows 0 to 6"):
        merged([six, seven])
    with pytest.raises(ValueError, match="have the same fields"):
        merged([six, replace(six, broken=None, fixed=None)])


def test_joins_of_other_examples_are_refused() -> None:
    few, many = sums_of(heavy_deltas(3, 20)), sums_of(heavy_deltas(3, 21))
    with pytest.raises(ValueError, match=r"got \[20, 21\]"):
        joined([few, many])

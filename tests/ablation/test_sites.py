"""Which sites are drawn, and what replaces them."""

import numpy as np
import pytest
import torch

from ablation.engine.loss import make_intact
from ablation.sites import BLOCK, EveryWeight, draw_indices, find_not_finite, list_sites, make_sites
from ablation.spec import Constant, CountOfSites, Scale, SiteIndices


def test_a_draw_is_distinct_sorted_and_fixed_by_its_seed() -> None:
    drawn = draw_indices(CountOfSites(count=500, seed=4), 10_000)
    assert len(set(drawn.tolist())) == 500
    assert drawn.tolist() == sorted(drawn.tolist())
    assert drawn.tolist() == draw_indices(CountOfSites(count=500, seed=4), 10_000).tolist()
    assert drawn.tolist() != draw_indices(CountOfSites(count=500, seed=5), 10_000).tolist()
    assert drawn[:5].tolist() == [19, 40, 41, 74, 79]  # frozen: the same seed means the same weights in every version


def test_draws_are_uniform() -> None:
    hits = np.bincount(
        np.concatenate([draw_indices(CountOfSites(count=3, seed=seed), 10) for seed in range(3000)]), minlength=10
    )
    assert np.abs(hits - 900).max() < 5 * np.sqrt(900 * 0.7)


def test_all_and_listed() -> None:
    assert draw_indices("all", 4).tolist() == [0, 1, 2, 3]
    assert draw_indices(SiteIndices(indices=(7, 2)), 9).tolist() == [7, 2]


def test_replacements() -> None:
    weights = torch.arange(6.0).view(2, 3)
    zero = make_sites(weights, np.array([5, 0]), "zero")
    assert zero.weights.tolist() == [5.0, 0.0]
    assert zero.replacements.tolist() == [0.0, 0.0]
    constant = make_sites(weights, np.array([1]), Constant(constant=0.1))
    assert constant.replacements.tolist() == [0.1]  # in float64, not the nearest float32
    assert constant.replacements.dtype == torch.float64


def test_each_weight_has_its_own_replacement() -> None:
    weights = torch.tensor([0.1, -3.0, 0.0, -0.0])
    own = weights.double()
    flipped = make_sites(weights, np.arange(4), "flip_sign")
    assert flipped.replacements.tolist() == [-own[0], 3.0, 0.0, 0.0]
    assert flipped.steps.tolist() == [-2 * own[0], 6.0, 0.0, 0.0]
    scaled = make_sites(weights, np.arange(4), Scale(scale=0.1))
    assert scaled.replacements.tolist() == (own * 0.1).tolist()  # in float64
    assert not scaled.not_finite.any()
    for sites in (flipped, make_sites(weights, np.arange(4), Scale(scale=0))):  # no -0.0: equal values, equal bytes
        assert not sites.replacements[2:].signbit().any()
        assert not sites.steps[2:].signbit().any()


def test_a_replacement_that_is_not_finite_leaves_the_weight() -> None:
    weights = torch.tensor([1e30, 0.0, -1e20, 1e-30], dtype=torch.float64)
    for sites in (
        make_sites(weights, np.arange(4), Scale(scale=1e300)),
        list_sites(weights, "all", Scale(scale=1e300)),
    ):
        assert sites.not_finite.tolist() == [True, False, True, False]
        assert sites.replacements.tolist() == [1e30, 0.0, -1e20, 1e-30 * 1e300]
        assert sites.steps.tolist() == [0.0, 0.0, 0.0, 1e-30 * 1e300]
        assert find_not_finite(sites).tolist() == [True, False, True, False]
        assert find_not_finite(sites.pick(np.array([1, 3]))) is None
    assert find_not_finite(list_sites(torch.randn(3, BLOCK), "all", "flip_sign")) is None


def test_steps_in_float32_are_made_block_by_block() -> None:
    weights = torch.randn(3, BLOCK - 5)
    sites = list_sites(weights, "all", Scale(scale=0.3))
    assert torch.equal(sites.steps_float32(), sites.steps.float())
    assert torch.equal(sites.listed().steps_float32(), sites.steps.float())


@pytest.mark.parametrize("value", ["zero", "flip_sign", Constant(constant=0.1), Scale(scale=3), Scale(scale=1e308)])
def test_every_weight_is_what_a_list_of_all_would_be(value) -> None:
    weights = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).T  # not as it lies in memory
    whole, listed = list_sites(weights, "all", value), make_sites(weights, np.arange(35), value)
    assert isinstance(whole, EveryWeight)
    for rows in (slice(0, 35), slice(7, 21), slice(21, 99), slice(3, 3), slice(0, None, 4)):
        assert len(whole[rows]) == len(listed[rows])
        for name in ("indices", "weights", "replacements", "not_finite", "steps"):
            for found in (whole[rows], whole[rows].listed()):
                assert torch.equal(getattr(found, name), getattr(listed[rows], name)), (rows, name)
    some, same = whole[7:35].pick(np.array([0, 27, 3])), listed[7:35].pick(np.array([0, 27, 3]))
    assert some.indices.tolist() == same.indices.tolist() == [7, 34, 10]
    assert torch.equal(some.weights, same.weights)
    assert torch.equal(some.replacements, same.replacements)
    drawn = list_sites(weights, CountOfSites(count=4, seed=1), value)
    assert drawn.indices.tolist() == draw_indices(CountOfSites(count=4, seed=1), 35).tolist()


def test_the_suite_checks_axes() -> None:
    """A swap of axes is caught where a tensor crosses a function: three examples, four labels."""
    with pytest.raises(Exception, match="labels"):
        make_intact(torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64))

"""Which sites are drawn, and what replaces them."""

import numpy as np
import pytest
import torch

from ablation.engine.loss import make_intact
from ablation.sites import draw_indices, make_sites
from ablation.spec import Constant, CountOfSites, SiteIndices


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


def test_the_suite_checks_axes() -> None:
    """A swap of axes is caught where a tensor crosses a function: three examples, four labels."""
    with pytest.raises(Exception, match="labels"):
        make_intact(torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64))

"""The power series of the loss is the loss change itself, for unsure and for sure networks, small moves and large."""

import pytest
import torch

from ablation.engine.carried.series import REACH, LossSeries
from ablation.engine.loss import loss_delta, make_intact

N_EXAMPLES, N_CLASSES, N_UNITS, N_SITES = 37, 53, 11, 29


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sureness", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-2, 1.0, 1e3])
def test_equals_the_direct_formula(sureness: float, size: float) -> None:
    logits = sureness * draw(N_EXAMPLES, N_CLASSES, seed=1)
    labels = logits.argmax(dim=1)
    labels[:5] = torch.arange(5)  # mostly wrong there
    intact = make_intact(logits, labels)
    columns = 0.3 * draw(N_UNITS, N_CLASSES, seed=2)
    unit = torch.arange(N_SITES) * 7 % N_UNITS
    t = size * draw(N_SITES, N_EXAMPLES, seed=3)
    moved = torch.ones_like(t, dtype=torch.bool)
    got = LossSeries(columns).loss_delta(intact, t, unit, moved)
    every = torch.arange(N_EXAMPLES)
    truth = torch.stack([loss_delta(intact, every, t[row, :, None] * columns[unit[row]]) for row in range(N_SITES)])
    # Of the terms that the sum is made of: where the first two orders cancel, no formula has more digits.
    from_label = columns[unit][:, None] - columns[unit][:, labels, None]
    scale = (intact.rest * torch.expm1(t[:, :, None] * from_label).abs()).sum(dim=2)
    small = t.abs() * LossSeries(columns).u_range[unit, None] <= REACH
    assert small.any() or size >= 1e3
    error = (got - truth).abs() / scale.clamp(min=1e-300)
    assert not (error[small] > 1e-9).any(), error[small].max()
    torch.testing.assert_close(got[~small], truth[~small], rtol=1e-12, atol=0)


def test_pairs_that_do_not_move_are_exactly_zero() -> None:
    intact = make_intact(draw(N_EXAMPLES, N_CLASSES, seed=4), torch.arange(N_EXAMPLES) % N_CLASSES)
    t = draw(N_SITES, N_EXAMPLES, seed=5)
    moved = draw(N_SITES, N_EXAMPLES, seed=6) > 0
    unit = torch.arange(N_SITES) % N_UNITS
    got = LossSeries(draw(N_UNITS, N_CLASSES, seed=7)).loss_delta(intact, t, unit, moved)
    assert (got[~moved] == 0).all()
    assert (got[moved] != 0).all()


def test_units_that_reach_no_class_are_known() -> None:
    columns = draw(N_UNITS, N_CLASSES, seed=8)
    columns[3] = 0
    assert LossSeries(columns).is_live.tolist() == [k != 3 for k in range(N_UNITS)]

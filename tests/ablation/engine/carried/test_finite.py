"""The path itself: float64 where float32 deltas are not enough, and the intact products once per batch."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ablation.engine.carried.finite import Finite
from ablation.engine.carried.tape import Player
from ablation.engine.interface import Setup
from ablation.sites import make_sites
from tests.compare import BOUND, brute_force, utility_error


class Cancels(nn.Module):
    """Two large branches that nearly cancel: float32 deltas lose three digits between them."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(5, 7), nn.Linear(7, 3)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        return self.out(h * (self.size + 1.1) - h * self.size)


def make(size: float, lanes: int = 35) -> tuple[nn.Module, Finite, Tensor, Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model, inputs, labels = Cancels(size).eval(), torch.randn(11, 5), torch.arange(11) % 3
    sites = make_sites(model.get_parameter("layer.weight"), np.arange(35), "zero")
    return model, Finite(Setup(model, "layer.weight", sites, lanes=lanes)), inputs, labels


def deltas(finite: Finite, inputs: Tensor, labels: Tensor) -> np.ndarray:
    _, pieces = finite.run(inputs, labels)
    return torch.cat([piece.delta for piece in pieces]).numpy()


def error(size: float, *, is_probed: bool) -> tuple[float, torch.dtype]:
    model, finite, inputs, labels = make(size)
    finite.is_probed = is_probed
    utility = deltas(finite, inputs, labels).mean(axis=1)
    truth = brute_force(model, "layer.weight", np.arange(35), inputs, labels)
    return utility_error(utility, truth, "mixed"), finite.delta_dtype


def test_deltas_are_float64_where_float32_is_not_enough() -> None:
    assert error(1e4, is_probed=True)[0] > BOUND["mixed"], "the case is not what it says"
    probed, dtype = error(1e4, is_probed=False)
    assert dtype == torch.float64
    assert probed <= BOUND["mixed"]


def test_deltas_are_float32_where_that_is_enough() -> None:
    probed, dtype = error(0.0, is_probed=False)
    assert dtype == torch.float32
    assert probed <= BOUND["mixed"]


def test_the_intact_products_are_computed_once_a_batch(monkeypatch: Any) -> None:
    """Five runs with deltas take them from the tape; what they give is what one run gives."""
    _, finite, inputs, labels = make(1.0, lanes=7)
    whole = deltas(make(1.0)[1], inputs, labels)
    played: Counter[bool] = Counter()
    own = Player.run

    def counting(self: Player, func: Any, args: Any, kwargs: Any) -> Any:
        before = self._left.__length_hint__()
        result = own(self, func, args, kwargs)
        if func.overloadpacket is torch.ops.aten.addmm:
            played[self._left.__length_hint__() < before] += 1
        return result

    monkeypatch.setattr(Player, "run", counting)
    cut = deltas(finite, inputs, labels)
    assert set(played) == {True}
    np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-9)

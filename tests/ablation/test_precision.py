"""Float64 spreads from the target on, whatever the model does with dtypes and in-place writes."""

import numpy as np
import torch
from torch import Tensor, nn

from ablation.precision import FromTargetOn, as_found, run_with
from ablation.reference import in_float64, intact_logits, reference_deltas
from ablation.sites import make_sites
from tests.cases import LateWrite


class Casting(nn.Module):
    """Casts to float32 by hand in every way people do."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.cast = cast
        self.body = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.cast:
            y = y.float().to(torch.float32).to(dtype=torch.float32).type(torch.float32)
            y = torch.softmax(y, dim=1, dtype=torch.float32).to("cpu")
            return self.out(torch.softmax(torch.log(y), 1, torch.float32))
        return self.out(torch.softmax(y, dim=1))


def test_casts_to_float32_are_not_followed() -> None:
    cast, plain = Casting(True), Casting(False)
    plain.load_state_dict(cast.state_dict())
    inputs, labels = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    sites = make_sites(cast.body.weight, np.arange(6), "zero")
    for make in (in_float64, lambda model: model):
        data = inputs.to(make(cast).body.weight.dtype)
        a = reference_deltas(make(cast), "body.weight", sites, data, labels)
        b = reference_deltas(make(plain), "body.weight", sites, data, labels)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert intact_logits(in_float64(cast), inputs.double()).dtype == torch.float64


def test_the_prefix_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.randn(7, 4)
    seen = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    target = model[2].weight.detach().double()
    logits = run_with(model, "2.weight", target, inputs)
    assert seen == [torch.float32]
    assert logits.dtype == torch.float64
    with torch.no_grad():
        x = model[1](model[0](inputs)).double()
        torch.testing.assert_close(logits.detach(), x @ target.T + model[2].bias.double(), rtol=1e-15, atol=1e-15)


def test_in_place_writes_reach_other_names_of_the_tensor() -> None:
    model, inputs = LateWrite(), torch.randn(5, 7)
    with torch.no_grad():
        lifted = run_with(model, "target.weight", model.target.weight.detach().double(), inputs)
        torch.testing.assert_close(lifted.float(), model(inputs))


def test_seen_only_once_the_target_is_used() -> None:
    model, inputs = LateWrite(), torch.randn(5, 7)
    mode = FromTargetOn(model.target.weight.detach().double())
    seen = []
    model.stem.register_forward_hook(lambda *_: seen.append(mode.seen))
    model.out.register_forward_hook(lambda *_: seen.append(mode.seen))
    run_with(model, "target.weight", mode.target, inputs, mode=mode)
    assert seen == [False, True]


def test_as_found_restores_modes_and_randomness_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Dropout())
    model.train()
    model[2].eval()
    state = torch.get_rng_state()
    try:
        with as_found(model):
            assert not model[0].training
            torch.rand(3)
            raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()

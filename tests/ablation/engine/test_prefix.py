"""The prefix runs once per batch, and replaying it changes nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablation.engine.prefix import Prefix
from ablation.precision import FromTargetOn, run_with


class Counting(nn.Module):
    """A Linear that counts its calls."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


class Net(nn.Module):
    """A ReLU module shared by prefix and rest, a functional in-place write to a remembered output, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Counting(6), nn.ReLU(), Counting(6))
        self.relu = nn.ReLU(inplace=True)
        self.target = Counting(6)
        self.out = Counting(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        skip = x
        F.relu(x.mul_(2.0), inplace=True)
        return self.out(self.relu(self.target(x)) + skip)


def test_replay() -> None:
    model, inputs = Net(), torch.randn(4, 6)
    name, target = "target.linear.weight", model.target.linear.weight.detach().double()
    with torch.no_grad():
        truth = [run_with(model, name, weight, inputs) for weight in (target, target * 2, target * 3)]
        for module in model.modules():
            if isinstance(module, Counting):
                module.calls = 0
        prefix, mode = Prefix(model), FromTargetOn(target)
        got = [prefix.first_run(lambda: run_with(model, name, target, inputs, mode=mode), mode, inputs)]
        for weight in (target * 2, target * 3):
            with prefix.replay():
                got.append(run_with(model, name, weight, inputs))
    for a, b in zip(got, truth, strict=True):
        assert torch.equal(a, b)
    assert [model.stem[0].calls, model.stem[2].calls, model.target.calls, model.out.calls] == [1, 1, 3, 3]
    assert not any("forward" in vars(module) for module in model.modules())


def test_hooks_that_change_outputs_run_once_per_output() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, args, out: out + 1)
    inputs, target = torch.randn(5, 3), model[1].weight.detach().double()
    with torch.no_grad():
        truth = run_with(model, "1.weight", target, inputs)
        prefix, mode = Prefix(model), FromTargetOn(target)
        prefix.first_run(lambda: run_with(model, "1.weight", target, inputs, mode=mode), mode, inputs)
        with prefix.replay():
            assert torch.equal(run_with(model, "1.weight", target, inputs), truth)


class InPlaceStem(nn.Module):
    """A chain of modules with an in-place ReLU, an output whose form alone is looked at, and one that is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Counting(6), Counting(6), Counting(6)
        self.relu = nn.ReLU(inplace=True)
        self.target = Counting(6)
        self.out = Counting(6)

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(self.first(x))
        second = self.second(first)
        assert second.shape[0] == len(second)
        third = self.relu(self.third(second))
        return self.out(self.target(third) + first)


def test_only_what_is_read_again_is_kept() -> None:
    model, inputs = InPlaceStem(), torch.randn(4, 6)
    name, target = "target.linear.weight", model.target.linear.weight.detach().double()
    with torch.no_grad():
        truth = run_with(model, name, target * 2, inputs)
        prefix, mode = Prefix(model), FromTargetOn(target)
        prefix.first_run(lambda: run_with(model, name, target, inputs, mode=mode), mode, inputs)
        with prefix.replay():
            assert torch.equal(run_with(model, name, target * 2, inputs), truth)
    kept = [leaf for outputs in prefix.record for output in outputs if output for leaf in [output.value]]
    assert sorted(type(value).__name__ for value in kept) == ["Layout", "Layout", "Layout", "Tensor", "Tensor"]
    assert model.first.calls == 2  # for the truth, and once to remember

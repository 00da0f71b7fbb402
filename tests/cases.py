"""The model zoo: small networks with a target parameter each, on which every path must equal brute force.

Every axis has a different size, so that a swap shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, one of its parameters, and data."""

    name: str
    model: nn.Module
    parameter: str
    inputs: Tensor
    labels: Tensor
    path: str

    def __str__(self) -> str:
        return f"{self.name}:{self.parameter}"


class ConvNet(nn.Module):
    """BatchNorm, a residual, in-place activations and additions, dropout; left in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(6 * 16, 19)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(19, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x))
        y += x
        y = F.max_pool2d(self.relu(y), 2)
        return self.fc2(self.dropout(self.relu(self.fc1(y.flatten(1)))))


class LateWrite(nn.Module):
    """Writes the target's result into a tensor of the prefix in place, and goes on with the prefix's name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 9)
        self.target = nn.Linear(7, 9)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        kept = stem
        stem.add_(self.target(x))
        return self.out(torch.tanh(kept))


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.loop(torch.relu(self.loop(x)))))


class Tied(nn.Module):
    """Two modules that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.second(torch.relu(self.first(x)))))


class Attention(nn.Module):
    """A small transformer block over (examples, tokens, channels); its out_proj is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mlp(self.norm(x))
        return self.out(x.mean(dim=1))


class SideOutput(nn.Module):
    """A layer whose output is not used, and an output object with `.logits`."""

    @dataclass
    class Output:
        """Like the outputs of transformers' models."""

        logits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(6, 3)
        self.body = nn.Linear(6, 10)
        self.out = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> "SideOutput.Output":
        self.side(x)
        return self.Output(self.out(F.silu(self.body(x))))


class WritesInto(nn.Module):
    """Writes the target's result into a tensor of the prefix, in one of the ways that people do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Linear(7, 8)
        self.target = nn.Linear(7, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, t = torch.relu(self.stem(x)), self.target(x)
        if self.how == "slice":
            h[:, :3] = t[:, :3]
        elif self.how == "mask":
            h = x.new_zeros(len(x), 8)
            h[x[:, 0] > 0] = self.target(x[x[:, 0] > 0])
        elif self.how == "view":
            h[:, :3].add_(t[:, :3])
        elif self.how == "out":
            torch.mul(h, t, out=h)
        elif self.how == "result":
            z = self.out(h)
            z.add_(torch.tanh(t[:, :4]))
            return z
        return self.out(h)


class InPlaceResidual(nn.Module):
    """An in-place ReLU module changes the tensor that the skip connection keeps; eval dropout gives its input back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        kept = self.dropout(x)
        kept.mul_(1.5)
        y = self.conv2(self.relu(self.conv1(self.relu(x))))
        return self.out((y + x).mean(dim=(2, 3)))


def _same_module_twice() -> nn.Module:
    """One Linear registered under two names."""
    linear = nn.Linear(6, 6)
    return nn.Sequential(linear, nn.ReLU(), linear, nn.ReLU(), nn.Linear(6, 4))


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


def _data(shape: tuple[int, ...], n_classes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randint(n_classes, shape[:1], generator=generator)


def _relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(11, 17), nn.ReLU(), nn.Dropout(), nn.Linear(17, 13), nn.ReLU(), nn.Linear(13, 5))


@cache
def confident_net() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network that is sure of itself: median 1 - p_y below 1e-5."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        inputs = torch.randn(240, 6)
        labels = (inputs[:, :3]).argmax(dim=1)
        model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(500):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        with torch.no_grad():
            model[-1].weight.mul_(2)
    model.zero_grad(set_to_none=True)
    return model, inputs, labels


@cache
def make_cases() -> tuple[Case, ...]:
    """Every case, in a fixed order."""
    x, y = _data((29, 11), 5)
    images, image_labels = _data((23, 3, 8, 8), 5)
    tokens, token_labels = _data((13, 7, 8), 3)
    mlp, smooth = (
        _seeded(2, _relu_mlp),
        _seeded(3, lambda: nn.Sequential(nn.Linear(11, 9), nn.GELU(), nn.Tanh(), nn.Linear(9, 5))),
    )
    convnet = _seeded(4, ConvNet)
    for _ in range(3):
        convnet(images)  # running statistics that are not 0 and 1
    sure, sure_x, sure_y = confident_net()
    six, six_y = _data((19, 6), 4)
    seven, seven_y = _data((15, 7), 4)
    eight, eight_y = _data((21, 8), 3)
    dead = _seeded(5, _relu_mlp)
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)  # all-zero activations everywhere behind
        mlp[3].weight[2, 5] = 0.0  # a weight that is exactly 0 already
    two = _seeded(6, lambda: nn.Sequential(nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 2)))
    in_place = _seeded(13, InPlaceResidual)
    in_place(images)
    channels_last = _seeded(14, ConvNet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side, attention = _seeded(7, SideOutput), _seeded(8, Attention)
    return (
        Case("relu-mlp", mlp, "5.weight", x, y, "direct"),
        Case("relu-mlp", mlp, "5.bias", x, y, "direct"),
        Case("relu-mlp", mlp, "3.weight", x, y, "direct"),
        Case("relu-mlp", mlp, "3.bias", x, y, "direct"),
        Case("relu-mlp", mlp, "0.weight", x, y, "finite"),
        Case("smooth-mlp", smooth, "0.weight", x, y, "direct"),
        Case(
            "one-linear", _seeded(9, lambda: nn.Sequential(nn.Flatten(), nn.Linear(11, 5))), "1.weight", x, y, "direct"
        ),
        Case("dead-mlp", dead, "3.weight", x, y, "direct"),
        Case("two-classes", two, "0.weight", x, y % 2, "direct"),
        Case("one-example", mlp, "3.weight", x[:1], y[:1], "direct"),
        Case("confident", sure, "2.weight", sure_x, sure_y, "direct"),
        Case("confident", sure, "0.weight", sure_x, sure_y, "finite"),
        Case("convnet", convnet, "fc1.weight", images, image_labels, "direct"),
        Case("convnet", convnet, "conv2.weight", images, image_labels, "finite"),
        Case("convnet", convnet, "norm1.weight", images, image_labels, "finite"),
        Case("late-write", _seeded(10, LateWrite), "target.weight", seven, seven_y, "finite"),
        *(
            Case(
                f"writes-{how}", _seeded(15, lambda how=how: WritesInto(how)), "target.weight", seven, seven_y, "finite"
            )
            for how in ("slice", "mask", "view", "out", "result")
        ),
        Case("in-place-residual", in_place, "conv2.weight", images, image_labels, "direct"),
        Case("in-place-residual", in_place, "conv1.weight", images, image_labels, "finite"),
        Case("channels-last", channels_last, "conv1.weight", images, image_labels, "finite"),
        Case("module-twice", _seeded(16, _same_module_twice), "0.weight", six, six_y, "finite"),
        Case("twice", _seeded(11, Twice), "loop.weight", eight, eight_y, "finite"),
        Case("tied", _seeded(12, Tied), "first.weight", six, six_y, "finite"),
        Case("attention", attention, "attention.in_proj_weight", tokens, token_labels, "finite"),
        Case("attention", attention, "attention.out_proj.weight", tokens, token_labels, "finite"),
        Case("attention", attention, "mlp.0.weight", tokens, token_labels, "finite"),
        Case("side-output", side, "side.weight", six, six_y, "finite"),
        Case("side-output", side, "body.weight", six, six_y, "direct"),
    )

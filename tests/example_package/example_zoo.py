"""A model and a data set that an operator might register beside the built-in ones (see pyproject.toml beside this)."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import Compose, Grayscale, PILToTensor, Resize, ToDtype

FEW = 32  # examples
ENDING: BaseException = SystemExit(3)  # what `leaving_net` raises

prepare = Compose([Grayscale(), Resize((9, 9)), PILToTensor(), ToDtype(torch.float32, scale=True)])


def stripe_net() -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A net for grey pictures of 9x9, in three classes."""
    convolution = nn.Conv2d(1, 5, 3)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(245, 7), nn.ReLU(), nn.Linear(7, 3)), prepare


def batch_net() -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A net whose batch norm keeps no running statistics, so an example's logits depend on the rest of its batch."""
    net, transform = stripe_net()
    net.insert(1, nn.BatchNorm2d(5, track_running_stats=False))
    return net, transform


class Restless(nn.Module):
    """Adds noise, in eval mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def restless_net() -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A net with noise, so two runs differ."""
    net, transform = stripe_net()
    net.insert(4, Restless())
    return net, transform


class MinusMean(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def mean_net() -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A net whose examples affect each other."""
    net, transform = stripe_net()
    net.insert(4, MinusMean())
    return net, transform


class Deadly(nn.Module):
    """Ends its process, as the kernel does when memory runs out, if it is given more than a few examples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > FEW:
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def deadly_net() -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A net that kills its process on large batches."""
    net, transform = stripe_net()
    net.insert(4, Deadly())
    return net, transform


class Hungry(nn.Module):
    """Wants more memory than any machine has, if it is given more than a few examples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > FEW:
            torch.empty(len(x) << 44, dtype=torch.uint8)
        return x


def hungry_net() -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A net that runs out of memory on large batches."""
    net, transform = stripe_net()
    net.insert(4, Hungry())
    return net, transform


class Endless(nn.Module):
    """Never returns, if it is given more than a few examples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while len(x) > FEW:
            time.sleep(0.1)
        return x


def endless_net() -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A net that hangs on large batches."""
    net, transform = stripe_net()
    net.insert(4, Endless())
    return net, transform


class Leaving(nn.Module):
    """Asks Python to end, if it is given more than a few examples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > FEW:
            raise ENDING
        return x


def leaving_net() -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A net that ends Python on large batches."""
    net, transform = stripe_net()
    net.insert(4, Leaving())
    return net, transform


def broken_net() -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A factory that fails."""
    raise FileNotFoundError("the weights of broken_net are not where they were")


class Stripes(Dataset):
    """Pictures with stripes: along, across, neither. How many there are, a file in the root may say."""

    def __init__(self, root: str | Path, split: str) -> None:
        told = Path(root) / "stripes.json"
        n = json.loads(told.read_text())[split] if told.exists() else {"train": 60, "test": 30}[split]
        random = np.random.default_rng([n, split == "train"])
        self.targets = np.arange(n) % 3
        self.pixels = random.integers(0, 100, (n, 18, 18), dtype=np.uint8)
        self.pixels[self.targets == 0, ::4, :] += 150
        self.pixels[self.targets == 1, :, ::4] += 150

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.targets[index])


def broken_data(root: str | Path, split: str) -> Dataset:
    """A factory that fails."""
    raise FileNotFoundError(f"there is no {split} in {Path(root).name}.")

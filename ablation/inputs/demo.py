"""The built-in model: a small AlexNet for handwritten digits, trained at first use.

`python -m ablation.inputs.demo` trains it, too.

In: the folders. Out: the checkpoint file, below the cache. Needs no network: the data comes with scikit-learn.
"""

import argparse
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from ablation.errors import ModelError
from ablation.inputs.catalog import DEMO_MODEL
from ablation.inputs.data import load_data
from ablation.inputs.folders import Folders

RECIPE = 1  # part of the file's name: increment it when the net or its training changes
SEED = 0
N_EPOCHS = 15
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
N_THREADS = 1  # fixed, since the order of sums depends on it; the net is too small for more to help
MIN_ACCURACY = 0.95


class DigitsAlexNet(nn.Module):
    """A small AlexNet (arXiv 1404.5997): convolutions with ReLU and max pooling, then three Linears with dropout."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(64 * 2 * 2, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc3 = nn.Linear(256, n_classes)

    def forward(self, pictures: Float[Tensor, "examples 1 8 8"]) -> Float[Tensor, "examples classes"]:
        """The logits of a batch of grey 8x8 pictures with values from 0 to 1."""
        x = F.max_pool2d(F.relu(self.conv1(pictures)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.dropout(torch.flatten(x, 1), 0.5, self.training)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        return self.fc3(F.relu(self.fc2(x)))


def prepare_digit(picture: Image.Image) -> Float[Tensor, "1 8 8"]:
    """Preprocess a picture for the demo model: grey, 8x8, values from 0 to 1."""
    grey = picture.convert("L")
    if grey.size != (8, 8):
        grey = grey.resize((8, 8), Image.Resampling.BOX)
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).reshape(1, 8, 8) / 255


def ensure_demo_model(folders: Folders, on_progress: Callable[[float], None] | None = None) -> Path:
    """Return the checkpoint of the demo model, which is trained first if there is none yet (a few seconds on a CPU).

    Several processes may call this at once: one trains, the others wait. `on_progress` gets the fraction done.

    Raises:
        ModelError: the trained net is not accurate enough, which means a broken installation.
    """
    path = folders.cache / f"{DEMO_MODEL}-{RECIPE}.safetensors"
    if path.exists():
        return path
    folders.cache.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not path.exists():
            model = train_demo_model(on_progress=on_progress)
            accuracy = measure_accuracy(model)
            if accuracy < MIN_ACCURACY:
                raise ModelError(f"{DEMO_MODEL} reached {accuracy:.1%} on its test split; allowed: {MIN_ACCURACY:.0%}.")
            _write(model, path)
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the system releases it if this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(model: nn.Module, path: Path) -> None:
    """Write to a temporary file (only the lock's holder does) and rename it, so no incomplete file is ever seen."""
    written = path.with_suffix(".partial")
    with written.open("wb") as file:
        file.write(save(model.state_dict()))
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)


def train_demo_model(*, n_epochs: int = N_EPOCHS, on_progress: Callable[[float], None] | None = None) -> DigitsAlexNet:
    """Train the demo model from a fixed seed; the caller's random state and threads are restored."""
    pictures, labels = _read_all("train")
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(N_THREADS)
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
            torch.default_generator.manual_seed(SEED)
            model = DigitsAlexNet()
            optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
            for epoch in range(n_epochs):
                _train_epoch(model, optimizer, pictures, labels)
                if on_progress:
                    on_progress((epoch + 1) / n_epochs)
    finally:
        torch.set_num_threads(n_threads)
    return model.eval()


def _train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, pictures: Tensor, labels: Tensor) -> None:
    for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
        optimizer.zero_grad()
        F.cross_entropy(model(pictures[batch]), labels[batch]).backward()
        optimizer.step()


def measure_accuracy(model: nn.Module) -> float:
    """Accuracy on the test split of the digits."""
    pictures, labels = _read_all("test")
    with torch.no_grad():
        return (model(pictures).argmax(1) == labels).double().mean().item()


def _read_all(split: str) -> tuple[Float[Tensor, "examples 1 8 8"], Tensor]:
    digits = load_data("digits", split=split, transform=prepare_digit)
    pairs = [digits[index] for index in range(len(digits))]  # type: ignore[arg-type]
    return torch.stack([picture for picture, _ in pairs]), torch.tensor([label for _, label in pairs])


def main() -> None:
    """Train the demo model into a cache folder, with a line of progress on a terminal."""
    parser = argparse.ArgumentParser(prog="python -m ablation.inputs.demo", description=main.__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="the folder to keep it in")
    cache = parser.parse_args().cache
    folders = Folders(data=cache, checkpoints=cache, cache=cache)
    path = ensure_demo_model(folders, _show_progress if sys.stdout.isatty() else _say_once())
    print(f"\r{DEMO_MODEL} is trained: {path}" if sys.stdout.isatty() else f"{DEMO_MODEL} is trained: {path}")


def _show_progress(done: float) -> None:
    print(f"\rtraining {DEMO_MODEL}: {done:4.0%}", end="", flush=True)


def _say_once() -> Callable[[float], None]:
    """Print one line when training begins, for a log."""
    said: list[float] = []

    def on_progress(done: float) -> None:
        if not said:
            print(f"training {DEMO_MODEL} ...", flush=True)
        said.append(done)

    return on_progress


if __name__ == "__main__":
    main()

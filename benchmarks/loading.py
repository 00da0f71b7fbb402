"""Reading pictures: JPEGs of 500x375 to normalised 224x224, by this package's threads and by torch's DataLoader.

Included are decoding, resizing, cropping, normalising (AlexNet's own preprocessing), stacking into batches of 32, and
the start of threads and processes; the network is excluded. Files are in the system's cache. Torch has one thread, so
that only the readers compete. All readers must give the same bytes in the same order.

    python -m benchmarks.loading
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models import AlexNet_Weights

from ablation.inputs.data import load_batches, load_data
from benchmarks.environment import write_result

PICTURES = 512
BATCH = 32
ROUNDS = 5


def write_pictures(folder: Path) -> float:
    """Write pictures with as much detail as photographs, judged by file size; returns the mean size in bytes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        grain = random.normal(0, 12, (375, 500, 3))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=90)
    return statistics.mean(file.stat().st_size for file in folder.iterdir())


def ways_to_read(dataset: Dataset) -> dict[str, Callable[[], Iterable[tuple[Tensor, Tensor]]]]:
    """Map the name of each reader to a function that starts it."""
    ours = {f"{n} threads": partial(load_batches, dataset, np.arange(PICTURES), BATCH, n_workers=n) for n in (0, 1, 2)}
    theirs = {f"DataLoader, {n} processes": partial(DataLoader, dataset, BATCH, num_workers=n) for n in (0, 1, 2)}
    return {**ours, **theirs}


def main() -> None:
    """Measure, print and store the results."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mean_bytes = write_pictures(Path(folder) / "test" / "a")
        dataset = load_data("imagefolder", folder, transform=AlexNet_Weights.IMAGENET1K_V1.transforms())
        ways = ways_to_read(dataset)
        expected = [inputs for inputs, _ in ways["0 threads"]()]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):  # in turn, so that other load on the machine affects all of them
            for name, start in ways.items():
                started = time.perf_counter()
                batches = [inputs for inputs, _ in start()]
                seconds[name].append(time.perf_counter() - started)
                if not all(torch.equal(*pair) for pair in zip(batches, expected, strict=True)):
                    raise RuntimeError(f"{name} gives other pictures")
    write_result(
        "loading",
        {
            "claim": "pictures a second, JPEGs of 500x375 to 224x224; every way gives the same bytes",
            "pictures": PICTURES,
            "mean_file_bytes": round(mean_bytes),
            "rounds": ROUNDS,
            "pictures_per_s": {name: PICTURES / statistics.median(times) for name, times in seconds.items()},
            "pictures_per_s_best": {name: PICTURES / min(times) for name, times in seconds.items()},
        },
    )


if __name__ == "__main__":
    main()

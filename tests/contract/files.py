"""An operator's files, of the real formats, good and bad: data sets, checkpoints."""

import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from ablation.inputs.demo import DigitsAlexNet
from ablation.inputs.folders import Folders


class Surprise:
    """What a pickle can do when it is opened."""

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return open, ("surprise.txt", "w")  # type: ignore[return-value]


def write_files(folders: Folders) -> None:
    """Everything that the tests of this folder name."""
    write_pictures(folders.data / "pets", n_classes=3)
    write_pictures(folders.data / "damaged", n_classes=3)
    damaged = folders.data / "damaged" / "train" / "class01" / "1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-150])
    write_pictures(folders.data / "many", n_classes=12)
    write_idx(folders.data / "digits-like" / "MNIST" / "raw", n=50)
    secret = folders.data.parent / "secret"
    write_pictures(secret, n_classes=3)
    (folders.data / "link").symlink_to(secret)
    write_checkpoints(folders.checkpoints)
    (folders.checkpoints / "link.safetensors").symlink_to(secret / "out.safetensors")
    save_file(DigitsAlexNet().state_dict(), secret / "out.safetensors")


def write_pictures(root: Path, *, n_classes: int, n: int = 2) -> None:
    """An image folder of JPEGs."""
    random = np.random.default_rng(n_classes)
    for split in ("train", "test"):
        for label in range(n_classes):
            folder = root / split / f"class{label:02}"
            folder.mkdir(parents=True)
            for k in range(n):
                pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.jpg")


def write_idx(folder: Path, n: int) -> None:
    """MNIST's four files, small."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(n)
    for start in ("train", "t10k"):
        labels = np.arange(n, dtype=np.uint8) % 10
        pictures = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for name, values, magic in (("labels-idx1", labels, 2049), ("images-idx3", pictures, 2051)):
            header = np.array([magic, *values.shape], dtype=">i4").tobytes()
            (folder / f"{start}-{name}-ubyte").write_bytes(header + values.tobytes())


def write_checkpoints(folder: Path) -> None:
    """State dicts of the demo net, one good and each other wrong in its own way."""
    folder.mkdir(parents=True)
    good = DigitsAlexNet().state_dict()
    without = {name: tensor for name, tensor in good.items() if name != "fc2.bias"}
    not_finite = {**good, "conv1.bias": torch.full((32,), torch.nan)}
    huge = {**good, "conv1.weight": torch.full_like(good["conv1.weight"], 3e38)}
    save_file(good, folder / "good.safetensors")
    torch.save(good, folder / "good.pth")
    save_file(without, folder / "missing.safetensors")
    save_file({**good, "fc4.weight": torch.zeros(3, 4)}, folder / "unexpected.safetensors")
    save_file(DigitsAlexNet(n_classes=7).state_dict(), folder / "seven.safetensors")
    save_file({**good, "fc2.weight": good["fc2.weight"][:, 1:].clone()}, folder / "narrow.safetensors")
    torch.save({"model": good, "model_ema": huge}, folder / "two.pth")
    save_file(not_finite, folder / "nan.safetensors")
    save_file(huge, folder / "huge.safetensors")
    unheard = {name: good[name].clone() for name in ("fc2.weight", "fc3.weight")}
    unheard["fc2.weight"][0], unheard["fc3.weight"][:, 0] = 3e30, 0.0  # large weights of a unit that no logit hears of
    save_file({**good, **unheard}, folder / "unheard.safetensors")
    torch.save({"state_dict": Surprise()}, folder / "code.pth")
    (folder / "code.pkl").write_bytes(pickle.dumps(Surprise()))
    (folder / "text.safetensors").write_text("this is no checkpoint")

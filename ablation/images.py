"""Which pictures a folder of class folders holds, and which class each is of. Torch-free.

In: the folder of a data set. Out: lists of files in a fixed order. The files themselves are not opened here.
What a picture file is and how classes are numbered are torchvision's rules (`ImageFolder`); a test holds them together.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ablation.errors import SpecError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Below the root, the folder of a split; of several, the first that is there.
SPLIT_FOLDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "imagefolder": {"train": ("train",), "test": ("test", "val")},
    "imagenet": {"train": ("train",), "test": ("val",)},
}


def find_images(name: str, root: Path, split: str, n_classes: int | None = None) -> dict[str, list[str]]:
    """The picture files of one split: class -> paths; classes and paths in the loader's order.

    Classes are numbered by sorted folder name, so every split must have the same ones: else a label would mean
    one class in one split and another in the next.

    Raises:
        SpecError: the split's folder is missing, a class has no pictures, there are not `n_classes` of them, or
            the splits have different ones.
    """
    folder = _split_folder(name, root, split)
    classes = _class_names(folder)
    if not classes or n_classes not in (None, len(classes)):
        wanted = "class folders" if n_classes is None else f"{n_classes} class folders"
        raise SpecError("data.root", root.name, f"{wanted} in each split", f"The {split} split has {len(classes)}.")
    _check_same_classes(name, root, split, classes)
    images = {label: list(_image_paths(folder / label)) for label in classes}
    if empty := [label for label, paths in images.items() if not paths]:
        allowed = f"class folders with pictures ({', '.join(IMAGE_SUFFIXES)})"
        raise SpecError("data.root", f"{folder.name}/{empty[0]}", allowed, "Add pictures to it or remove it.")
    return images


def _split_folder(name: str, root: Path, split: str) -> Path:
    candidates = [root / folder for folder in SPLIT_FOLDERS[name][split]]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    names = " or ".join(f"{candidate.name}/CLASS/*.jpg" for candidate in candidates)
    raise SpecError("data.root", root.name, f"a folder with {names}", f"The {split} split is missing; unpack it there.")


def _class_names(folder: Path) -> tuple[str, ...]:
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir()))
    except OSError as error:
        raise SpecError("data.root", folder.name, "a folder that can be read", error.strerror or "") from None


def _check_same_classes(name: str, root: Path, split: str, classes: tuple[str, ...]) -> None:
    for other, folders in SPLIT_FOLDERS[name].items():
        if other != split and any((root / folder).is_dir() for folder in folders):
            odd = sorted(set(classes).symmetric_difference(_class_names(_split_folder(name, root, other))))
            if odd:
                raise SpecError("data.root", root.name, "the same classes in every split", f"Only one has {odd[0]!r}.")


def _image_paths(folder: Path) -> Iterator[str]:
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        yield from (os.path.join(parent, name) for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES))

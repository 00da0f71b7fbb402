"""The picture files in a folder of class folders, and their classes. Torch-free.

In: the folder of a data set. Out: lists of files in a fixed order, or their numbers. The pictures themselves are not
opened here. Which files are pictures and how classes are numbered follow torchvision (`ImageFolder`, `ImageNet`);
tests compare the two. torchvision's own digest of the ImageNet devkit, `meta.bin`, is not read: it takes torch.
"""

import os
import re
import tarfile
import time
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from ablation.errors import SpecError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What archives, file managers and systems leave behind, beside names that begin with a dot (`._a.jpg`).
JUNK = frozenset(("__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found", "system volume information"))

# Folder of a split below the root: the first of these that exists.
SPLIT_FOLDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "imagefolder": {"train": ("train",), "test": ("test", "val")},
    "imagenet": {"train": ("train",), "test": ("val",)},
}

DEVKIT = "ILSVRC2012_devkit_t12"
_DEVKIT_FILES = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
_ARCHIVES = {
    "train": ("ILSVRC2012_img_train.tar", " into train/, and each archive in it into a folder of its own name"),
    "test": ("ILSVRC2012_img_val.tar", " into val/"),
}
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{1,9})\.JPEG")

RACY_NS = 2_000_000_000  # a folder may change within this time without a new timestamp; FAT's resolution is two seconds


def find_images(name: str, root: Path, split: str, n_classes: int | None = None) -> dict[str, list[str]]:
    """Find the picture files of one split: class -> paths; classes and paths in the loader's order.

    Classes are numbered by sorted folder name, so every split must have the same ones: else a label would mean
    one class in one split and another in the next. ImageNet's are numbered by its devkit where that is beside the
    pictures: then classes may be absent (their lists are empty), and the validation pictures may lie in val/ as they
    are in their archive, without class folders.

    Raises:
        SpecError: the split's folder is missing, a class has no pictures, there are not `n_classes` of them, the
            splits have different ones, or the devkit can't be read.
    """
    folder, devkit = _split_folder(name, root, split), _find_devkit(name, root, n_classes)
    if flat := _flat_names(name, root, split, folder):
        return _sort_flat(root, folder, flat, devkit)
    folders = _class_folders(name, root, split, folder, n_classes, devkit)
    images = {label: list(_image_paths(each)) if each else [] for label, each in folders.items()}
    _check_filled(root, folder, {label: len(paths) for label, paths in images.items()}, devkit)
    return images


def count_images(name: str, root: Path, split: str, n_classes: int | None = None) -> tuple[int, ...]:
    """Number of pictures that `find_images` finds in each class; folders that have not changed are not listed again.

    Raises:
        SpecError: for the reasons of `find_images`.
    """
    folder, devkit = _split_folder(name, root, split), _find_devkit(name, root, n_classes)
    if flat := _flat_names(name, root, split, folder):
        return tuple(len(paths) for paths in _sort_flat(root, folder, flat, devkit).values())
    folders = _class_folders(name, root, split, folder, n_classes, devkit)
    counts = {label: _count(str(each)) if each else 0 for label, each in folders.items()}
    _check_filled(root, folder, counts, devkit)
    return tuple(counts.values())


def class_names(name: str, root: Path, split: str, n_classes: int | None = None) -> tuple[str, ...]:
    """Names of the classes that `find_images` finds, in the order of their numbers, without listing the pictures.

    Raises:
        SpecError: for the reasons of `find_images`, but for classes without pictures.
    """
    folder, devkit = _split_folder(name, root, split), _find_devkit(name, root, n_classes)
    if devkit:
        return devkit.classes
    return tuple(_class_folders(name, root, split, folder, n_classes, devkit))


def list_skipped(name: str, root: Path, split: str) -> list[str]:
    """Files below a split's folder that are not taken for pictures, by their paths from there."""
    folder = _split_folder(name, root, split)
    skipped = []
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        inside = Path(parent).relative_to(folder)
        is_junk = any(_is_junk(part) for part in inside.parts)
        skipped += [str(inside / name) for name in sorted(names) if is_junk or not _is_picture(name)]
    return skipped


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not _is_junk(name)


def _is_junk(name: str) -> bool:
    """Whether a file or folder belongs to an archive, a file manager or a system and not to the data."""
    return name.startswith((".", "$")) or name.lower() in JUNK


def _split_folder(name: str, root: Path, split: str) -> Path:
    candidates = [root / folder for folder in SPLIT_FOLDERS[name][split]]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    names = " or ".join(f"{candidate.name}/CLASS/*.jpg" for candidate in candidates)
    archive, where = _ARCHIVES[split]
    packed = name == "imagenet" and (root / archive).is_file()
    next_step = f"Unpack {archive}{where}." if packed else f"The {split} split is missing; unpack it there."
    raise SpecError("data.root", str(root), f"a folder with {names}", next_step)


# --- class folders ---------------------------------------------------------------------------------------------------


def _class_folders(
    name: str, root: Path, split: str, folder: Path, n_classes: int | None, devkit: "Devkit | None"
) -> dict[str, Path | None]:
    """Map each class to its folder, in the order of the class numbers; None for a class of the devkit without one."""
    present = _class_names(root, folder)
    if devkit:
        if odd := sorted(set(present) - set(devkit.classes)):
            allowed = f"class folders named as in {DEVKIT} (such as {devkit.classes[0]})"
            raise SpecError("data.root", str(root), allowed, f"Rename or remove {folder.name}/{odd[0]}.")
        return {label: folder / label if label in present else None for label in devkit.classes}
    if not present or n_classes not in (None, len(present)):
        wanted = "class folders" if n_classes is None else f"{n_classes} class folders"
        some = f" To use some of the classes, place {DEVKIT}.tar.gz beside it." if name == "imagenet" else ""
        next_step = f"The {split} split has {len(present)}.{some}"
        raise SpecError("data.root", str(root), f"{wanted} in each split", next_step)
    _check_same_classes(name, root, split, present)
    return {label: folder / label for label in present}


def _class_names(root: Path, folder: Path) -> tuple[str, ...]:
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not _is_junk(entry.name)))
    except OSError as error:
        next_step = f"{folder.name}/ can't be: {error.strerror}."
        raise SpecError("data.root", str(root), "a folder that can be read", next_step) from None


def _check_same_classes(name: str, root: Path, split: str, classes: tuple[str, ...]) -> None:
    for other, folders in SPLIT_FOLDERS[name].items():
        if other != split and any((root / folder).is_dir() for folder in folders):
            odd = sorted(set(classes).symmetric_difference(_class_names(root, _split_folder(name, root, other))))
            if odd:
                raise SpecError("data.root", str(root), "the same classes in every split", f"Only one has {odd[0]!r}.")


def _check_filled(root: Path, folder: Path, counts: dict[str, int], devkit: "Devkit | None") -> None:
    empty = [label for label, count in counts.items() if not count]
    if empty and (devkit is None or len(empty) == len(counts)):
        where = f"those in {folder.name}/." if devkit else f"{folder.name}/{empty[0]}, or remove it."
        allowed = f"class folders with pictures ({', '.join(IMAGE_SUFFIXES)})"
        raise SpecError("data.root", str(root), allowed, f"Add pictures to {where}")


def _image_paths(folder: Path) -> Iterator[str]:
    for parent, _, names in sorted(_walk(folder)):
        yield from (os.path.join(parent, name) for name in sorted(names) if _is_picture(name))


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Everything below a folder, but for folders that are none of the data's."""
    for parent, inside, names in os.walk(folder, followlinks=True):
        inside[:] = [each for each in inside if not _is_junk(each)]
        yield parent, inside, names


def _count(folder: str) -> int:
    """Number of paths that `_image_paths` finds; cached per folder, since its time doesn't cover the folders inside."""
    changed_ns = os.stat(folder).st_mtime_ns
    settled = time.time_ns() - changed_ns > RACY_NS
    n, inside = (_list if settled else _list.__wrapped__)(folder, changed_ns)
    return n + sum(_count(each) for each in inside)


@lru_cache(maxsize=16384)
def _list(folder: str, changed_ns: int) -> tuple[int, tuple[str, ...]]:
    """Number of pictures directly in a folder, and the folders in it."""
    _, inside, names = next(os.walk(folder, followlinks=True), (folder, [], []))
    n = sum(_is_picture(name) for name in names)
    return n, tuple(os.path.join(folder, name) for name in inside if not _is_junk(name))


# --- ImageNet's devkit -----------------------------------------------------------------------------------------------


class Devkit(NamedTuple):
    """The classes of ImageNet's devkit: their WordNet ids in the order of their numbers."""

    classes: tuple[str, ...]
    validation: tuple[str, ...]  # the class of validation picture 1, 2, ...


def _find_devkit(name: str, root: Path, n_classes: int | None) -> Devkit | None:
    """Find the devkit in a data set's folder, unpacked or not; None where there is none."""
    folder, archive = root / DEVKIT, root / f"{DEVKIT}.tar.gz"
    files = [folder / file for file in _DEVKIT_FILES] if folder.is_dir() else [archive] if archive.is_file() else []
    if name != "imagenet" or not files:
        return None
    allowed = f"the published devkit, with {' and '.join(_DEVKIT_FILES)}"
    try:
        devkit = _read_devkit(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    except Exception as error:  # a damaged archive or MATLAB file can raise anything
        reason = f"{DEVKIT} can't be read ({type(error).__name__}). Place it again."
        raise SpecError("data.root", str(root), allowed, reason) from None
    if n_classes not in (None, len(devkit.classes)):
        reason = f"{DEVKIT} has {len(devkit.classes)} classes instead of {n_classes}."
        raise SpecError("data.root", str(root), allowed, reason)
    return devkit


@lru_cache(maxsize=4)
def _read_devkit(files: tuple[tuple[str, int, int], ...]) -> Devkit:
    """Read the devkit; classes are the synsets without children, numbered by sorted WordNet id."""
    from scipy.io import loadmat  # slow to import, and few jobs need it

    synsets, truth = _devkit_contents([path for path, _, _ in files])
    table = loadmat(BytesIO(synsets), squeeze_me=True)["synsets"]
    leaves = table[table["num_children"] == 0]
    ids = {int(number): str(wnid) for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
    return Devkit(tuple(sorted(ids.values())), tuple(ids[int(number)] for number in truth.split()))


def _devkit_contents(paths: list[str]) -> list[bytes]:
    if len(paths) > 1:
        return [Path(path).read_bytes() for path in paths]
    with tarfile.open(paths[0]) as archive:  # read in memory; nothing is extracted to disk
        return [archive.extractfile(f"{DEVKIT}/{file}").read() for file in _DEVKIT_FILES]  # type: ignore[union-attr]


def _flat_names(name: str, root: Path, split: str, folder: Path) -> list[str]:
    """Names of the validation pictures directly in val/, where it has no class folders."""
    if (name, split) != ("imagenet", "test") or _class_names(root, folder):
        return []
    return sorted(file for file in os.listdir(folder) if _VALIDATION.fullmatch(file))


def _sort_flat(root: Path, folder: Path, names: list[str], devkit: Devkit | None) -> dict[str, list[str]]:
    """Map classes to paths by the number in each picture's name, so that some pictures may be absent."""
    if devkit is None:
        allowed = f"class folders in {folder.name}/, or {DEVKIT}.tar.gz beside it"
        next_step = f"{folder.name}/ has pictures without class folders; only the devkit tells their classes."
        raise SpecError("data.root", str(root), allowed, next_step)
    images: dict[str, list[str]] = {label: [] for label in devkit.classes}
    for name in names:
        number = int(name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG"))
        if not 1 <= number <= len(devkit.validation):
            allowed = f"validation pictures 1 to {len(devkit.validation)}, which the devkit has classes for"
            raise SpecError("data.root", str(root), allowed, f"Remove {folder.name}/{name}.")
        images[devkit.validation[number - 1]].append(str(folder / name))
    return images

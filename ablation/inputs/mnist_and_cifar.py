"""The files of MNIST, FashionMNIST, CIFAR10 and CIFAR100 as published: labels, pictures, counts. Torch-free.

In: the folder they are in. Out: arrays, in the order of the files; tests compare them with torchvision's own classes.
Nothing in a file is trusted: sizes are compared with the contents, and a pickle may hold whole numbers, arrays of them
and plain containers only (docs/decisions/0012).
"""

import gzip
import math
import os
import pickle
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ablation.errors import SpecError, as_given


class _Format(NamedTuple):
    """The format in which a data set was published."""

    folders: tuple[str, ...]  # below the root; files are searched in each, and messages name the first
    files: Mapping[str, tuple[str, ...]]  # per split, in the order of its examples
    source: str  # archive or address that the files come from
    label_key: str = ""  # key of the labels in the pickles; IDX files have none


_IDX = {
    split: (f"{start}-labels-idx1-ubyte", f"{start}-images-idx3-ubyte")
    for split, start in (("train", "train"), ("test", "t10k"))
}
_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_FORMATS = {
    "mnist": _Format(("MNIST/raw", "raw", "."), _IDX, "the four .gz files of MNIST"),
    "fashionmnist": _Format(("FashionMNIST/raw", "raw", "."), _IDX, "the four .gz files of Fashion-MNIST"),
    "cifar10": _Format(("cifar-10-batches-py", "."), _BATCHES, "cifar-10-python.tar.gz, unpacked", "labels"),
    "cifar100": _Format(
        folders=("cifar-100-python", "."),
        files={"train": ("train",), "test": ("test",)},
        source="cifar-100-python.tar.gz, unpacked",
        label_key="fine_labels",
    ),
}


def read_labels(name: str, root: Path, split: str) -> np.ndarray:
    """Labels of all examples, int64, cached until a file changes; the pictures are counted, if that is cheap.

    Raises:
        SpecError: files are missing or damaged, or there are not as many labels as pictures.
    """
    with as_given({"data.root": str(root)}):
        stats = [(file, file.stat()) for file in _find_files(name, root, split)]
        return _read_labels(name, tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@lru_cache(maxsize=16)
def _read_labels(name: str, files: tuple[tuple[Path, int, int], ...]) -> np.ndarray:
    paths = [path for path, _, _ in files]
    if _FORMATS[name].label_key:
        labels = _read_cifar(paths, _FORMATS[name].label_key)[1]
    else:
        labels = _read_idx(paths[0], 1).astype(np.int64)
        pictures, n_bytes, _ = files[1]
        shape = _idx_shape(pictures, _read(pictures, 16), 3)
        _check_counts(paths[0], len(labels), shape[0])
        if pictures.suffix != ".gz":
            _check_length(pictures, n_bytes, shape)
    labels.setflags(write=False)  # every caller gets this same array
    return labels


def read_examples(name: str, root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read pictures, uint8 (examples, height, width) or (examples, height, width, 3), and labels, int64.

    Raises:
        SpecError: files are missing or damaged, or there are not as many labels as pictures.
    """
    with as_given({"data.root": str(root)}):
        files = _find_files(name, root, split)
        if _FORMATS[name].label_key:
            return _read_cifar(files, _FORMATS[name].label_key)
        labels, pixels = _read_idx(files[0], 1), _read_idx(files[1], 3)
        _check_counts(files[0], len(labels), len(pixels))
        return pixels, labels.astype(np.int64)


def published_counts(name: str, root: Path, split: str, n_classes: int) -> tuple[int, ...]:
    """Count the examples of each class in the files.

    Raises:
        SpecError: for the reasons of `read_labels`, or a label is not in 0..n_classes-1.
    """
    labels = read_labels(name, root, split)
    check_classes(name, root, labels, n_classes)
    return tuple(np.bincount(labels, minlength=n_classes).tolist())


def check_classes(name: str, root: Path, labels: np.ndarray, n_classes: int) -> None:
    """Check that every label in the files of a data set is a class number.

    Raises:
        SpecError: a label is not; the message names it.
    """
    outside = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(outside):
        allowed = f"files of {name} with labels from 0 to {n_classes - 1}"
        next_step = f"Example {outside[0]} has label {labels[outside[0]]}. Place the published files."
        raise SpecError("data.root", str(root), allowed, next_step)


def _find_files(name: str, root: Path, split: str) -> list[Path]:
    published = _FORMATS[name]
    names = published.files[split]
    found = [[_existing(root / folder / file) for file in names] for folder in published.folders]
    best = max(found, key=lambda paths: sum(path is not None for path in paths))  # the first of equals
    missing = [file for file, path in zip(names, best, strict=True) if path is None]
    if missing:
        allowed = f"a folder with {published.folders[0]}/ and in it {', '.join(names)}"
        next_step = f"Missing: {', '.join(missing)}. They are in {published.source}; place them there."
        raise SpecError("data.root", str(root), allowed, next_step)
    return [path for path in best if path]


def _existing(path: Path) -> Path | None:
    candidates = (path, path.with_name(f"{path.name}.gz"))
    return next((each for each in candidates if os.path.isfile(each)), None)


def _unusable(path: Path, wanted: str, reason: str) -> SpecError:
    """Make the error about one file; the caller names its folder."""
    next_step = f"{reason}. Place the published file again."
    return SpecError("data.root", None, f"a folder in which {path.name} {wanted}", next_step)


def _check_counts(path: Path, n_labels: int, n_pictures: int) -> None:
    if n_labels != n_pictures or not n_labels:
        raise _unusable(
            path,
            "has as many labels as there are pictures, and at least one",
            f"{n_labels} labels, {n_pictures} pictures",
        )


# --- IDX: a magic number, the sizes of the axes, then the numbers ----------------------------------------------------


def _read_idx(path: Path, n_axes: int) -> np.ndarray:
    content = _read(path)
    shape = _idx_shape(path, content, n_axes)
    _check_length(path, len(content), shape)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes).reshape(shape)


def _check_length(path: Path, n_bytes: int, shape: tuple[int, ...]) -> None:
    n_wanted = 4 + 4 * len(shape) + math.prod(shape)
    if n_bytes != n_wanted:
        sizes = "x".join(map(str, shape))
        raise _unusable(
            path, "is a whole IDX file", f"By its head, {sizes}, it has {n_wanted} bytes; there are {n_bytes}"
        )


def _idx_shape(path: Path, content: bytes, n_axes: int) -> tuple[int, ...]:
    magic = bytes((0, 0, 8, n_axes))  # 8: unsigned bytes
    if content[:4] != magic or len(content) < 4 + 4 * n_axes:
        reason = (
            f"It starts with {content[:4].hex(' ') or 'nothing'}" if content[:4] != magic else "Its head is cut off"
        )
        raise _unusable(path, f"is an IDX file that starts with {magic.hex(' ')}", reason)
    return tuple(np.frombuffer(content, ">u4", n_axes, offset=4).tolist())


def _read(path: Path, n_bytes: int = -1) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(n_bytes)
    except Exception as error:  # errors of the file system, and of gzip and zlib for damaged files
        raise _unusable(path, "can be read", _reason(error)) from None


def _reason(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)  # without the whole path
    return f"{type(error).__name__}: {said}".rstrip(".: ")


# --- CIFAR: pickles of a dictionary ----------------------------------------------------------------------------------


def _read_cifar(paths: list[Path], label_key: str) -> tuple[np.ndarray, np.ndarray]:
    parts = [_read_batch(path, label_key) for path in paths]
    pixels = np.concatenate([part for part, _ in parts])  # stored colour by colour; pictures have the colours last
    return pixels.transpose(0, 2, 3, 1), np.concatenate([labels for _, labels in parts])


def _read_batch(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    wanted = f"is a pickle of a dictionary with 'data' (bytes, 3,072 a picture) and {label_key!r} (whole numbers)"
    try:
        with path.open("rb") as file:
            entry = {_text(key): value for key, value in _Unpickler(file, encoding="bytes").load().items()}
        pixels, labels = _array(entry["data"]), _array(entry[label_key])
    except Exception as error:  # a damaged pickle can raise anything
        raise _unusable(path, wanted, _reason(error)) from None
    if pixels.dtype != np.uint8 or pixels.size % 3072 or labels.dtype.kind not in "iu" or labels.ndim != 1:
        reason = f"'data' is {pixels.dtype} {pixels.shape}, {label_key!r} is {labels.dtype} {labels.shape}"
        raise _unusable(path, wanted, reason)
    _check_counts(path, len(labels), pixels.size // 3072)
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)


class _Dtype:
    """Checked replacement for numpy's dtype, which would trust what a pickle says of an array's numbers."""

    def __init__(self, code: bytes | str, *_: Any) -> None:
        self.code = _text(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = _text(state[1]) + self.code.lstrip("<>|=")

    def make(self, raw: bytes, shape: tuple[int, ...], order: str) -> np.ndarray:
        if not re.fullmatch(r"[<>|=]?[iu][1248]", self.code):
            raise pickle.UnpicklingError(f"it holds numbers of type {self.code!r}")
        return np.frombuffer(raw, self.code).reshape(shape, order="F" if _text(order) == "F" else "C")


class _Array:
    """Array that a pickle makes in two steps: it is created, then filled."""

    def __init__(self, *_: Any) -> None:
        self.filled = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.filled = dtype.make(raw, shape, "F" if is_fortran else "C")


# Functions that a pickle may call, by the names that Python 2 and 3 with numpy 1 and 2 write; these replace numpy's.
_CALLS = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how protocol 2 writes bytes
    **{
        f"numpy.{core}.{name}": call
        for core in ("core", "_core")
        for name, call in (
            ("multiarray._reconstruct", _Array),
            ("multiarray.scalar", lambda dtype, raw: int(dtype.make(raw, (), "C"))),
            ("numeric._frombuffer", lambda raw, dtype, shape, order, *_: dtype.make(raw, shape, order)),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    """Unpickles integers, arrays of integers and plain containers; refuses everything else by name.

    Allowing numpy's own functions would not be safe: its dtype takes flags from the pickle that turn bytes into
    pointers to objects.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of the function that the pickle names."""
        call = _CALLS.get(f"{module}.{name}")
        if call is None:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array, list or number")
        return lambda *given: call(*given)  # a new function each time, since a pickle can set attributes on it


def _array(value: Any) -> np.ndarray:
    return value.filled if isinstance(value, _Array) else np.asarray(value)


def _text(value: bytes | str) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else value

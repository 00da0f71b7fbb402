"""Our readers of the published files: as torchvision's, and nothing else gets in."""

import gzip
import io
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from ablation.errors import SpecError
from ablation.inputs import mnist_and_cifar
from ablation.inputs.data import load_data
from ablation.inputs.mnist_and_cifar import published_counts, read_examples, read_labels

RANDOM = np.random.default_rng(0)
MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR10_FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CIFAR100_FILES = {"train": ["train"], "test": ["test"]}


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file."""
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, *, n_train: int = 7, n_test: int = 5, pack: Callable[[bytes], bytes] = bytes) -> None:
    """Both splits, pictures of 3x4, no two the same."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if pack is bytes else ".gz"
    for (images, labels), n in zip(MNIST_FILES.values(), (n_train, n_test), strict=True):
        (folder / f"{images}{suffix}").write_bytes(pack(idx(RANDOM.integers(0, 256, (n, 3, 4)))))
        (folder / f"{labels}{suffix}").write_bytes(pack(idx(RANDOM.integers(0, 10, n))))


def pickle_as_python_2_did(entry: dict[str, Any]) -> bytes:
    """The published form, by hand: byte strings, `numpy.core`, memory of the array as a byte string."""
    pixels, out = entry["data"], io.BytesIO()

    def text(value: bytes) -> bytes:
        return b"U" + bytes((len(value),)) + value  # SHORT_BINSTRING

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)  # BININT

    out.write(b"\x80\x02}(")
    for key, value in entry.items():
        out.write(text(key.encode()))
        if key != "data":
            out.write(b"](" + b"".join(number(each) if key != "filenames" else text(each) for each in value) + b"e")
            continue
        out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b"))
        out.write(b"\x87R(K\x01" + number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86")
        out.write(b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN")
        out.write(number(-1) + number(-1) + b"K\x00tb\x89")
        out.write(b"T" + pixels.nbytes.to_bytes(4, "little") + pixels.tobytes() + b"tb")  # BINSTRING
    out.write(b"u.")
    return out.getvalue()


def as_pickle(protocol: int, make: Callable[[list[int]], Any] = list) -> Callable[[dict[str, Any]], bytes]:
    def write(entry: dict[str, Any]) -> bytes:
        return pickle.dumps(
            {key: make(value) if key.endswith("labels") else value for key, value in entry.items()}, protocol
        )

    return write


PICKLES = {
    "Python 2": pickle_as_python_2_did,
    "protocol 2": as_pickle(2),
    "protocol 4": as_pickle(4),
    "protocol 5": as_pickle(5),
    "column by column": lambda entry: pickle.dumps({**entry, "data": np.asfortranarray(entry["data"])}, 4),
    "column by column, protocol 5": lambda entry: pickle.dumps({**entry, "data": np.asfortranarray(entry["data"])}, 5),
    "labels in an array": as_pickle(4, np.array),
    "labels in a small array": as_pickle(5, lambda labels: np.array(labels, dtype=np.uint8)),
    "labels one by one from an array": as_pickle(4, lambda labels: list(np.array(labels))),
}


def write_cifar(
    folder: Path, name: str, *, n: int = 4, write: Callable[[dict[str, Any]], bytes] = pickle_as_python_2_did
) -> None:
    """Every file of CIFAR10 or CIFAR100, `n` pictures each, no two the same."""
    key, n_classes, files = {
        "cifar10": ("labels", 10, CIFAR10_FILES),
        "cifar100": ("fine_labels", 100, CIFAR100_FILES),
    }[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*files["train"], *files["test"]):
        entry = {
            "batch_label": [1],
            key: RANDOM.integers(0, n_classes, n).tolist(),
            "data": RANDOM.integers(0, 256, (n, 3072), dtype=np.uint8),
            "filenames": [f"picture_{number}.png".encode() for number in range(n)],
        }
        if name == "cifar100":
            entry["coarse_labels"] = [label // 5 for label in entry[key]]
        (folder / file).write_bytes(write(entry))
    for file, key in (("batches.meta", "label_names"), ("meta", "fine_label_names")):  # for torchvision alone
        (folder / file).write_bytes(pickle.dumps({key: [str(label) for label in range(n_classes)]}))


class UncheckedCIFAR10(torchvision.datasets.CIFAR10):
    """torchvision's own, without the checksums of the published files."""

    train_list = [[file, None] for file in CIFAR10_FILES["train"]]  # noqa: RUF012
    test_list = [[file, None] for file in CIFAR10_FILES["test"]]  # noqa: RUF012
    meta = {**torchvision.datasets.CIFAR10.meta, "md5": None}  # noqa: RUF012


class UncheckedCIFAR100(torchvision.datasets.CIFAR100):
    train_list = [[file, None] for file in CIFAR100_FILES["train"]]  # noqa: RUF012
    test_list = [[file, None] for file in CIFAR100_FILES["test"]]  # noqa: RUF012
    meta = {**torchvision.datasets.CIFAR100.meta, "md5": None}  # noqa: RUF012


def assert_same(ours: Any, theirs: Any) -> None:
    """Pictures, with mode and size, and labels, with their types, are equal and in equal order."""
    assert len(ours) == len(theirs) > 0
    for (picture, label), (their_picture, their_label) in zip(ours, theirs, strict=True):
        assert (picture.mode, picture.size, picture.tobytes()) == (
            *(their_picture.mode, their_picture.size),
            their_picture.tobytes(),
        )
        assert (type(label), label) == (int, int(their_label))


def check_words(error: SpecError, root: Path) -> None:
    """It names the field and the root as it was given, and shows no host path beside that."""
    assert (error.field, error.given) == ("data.root", str(root))
    assert str(root) not in error.allowed + error.next_step


# --- the same as torchvision's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("name", "kind"), [("mnist", torchvision.datasets.MNIST), ("fashionmnist", torchvision.datasets.FashionMNIST)]
)
def test_idx_files_are_read_as_torchvision_does(tmp_path: Path, name: str, kind: Any, split: str) -> None:
    write_mnist(tmp_path / kind.__name__ / "raw")
    theirs = kind(tmp_path, train=split == "train")
    assert_same(load_data(name, tmp_path, split), theirs)
    pixels, labels = read_examples(name, tmp_path, split)
    assert (pixels.shape, pixels.dtype, labels.dtype) == ((len(theirs), 3, 4), np.uint8, np.int64)
    assert read_labels(name, tmp_path, split).tolist() == labels.tolist() == theirs.targets.tolist()
    assert published_counts(name, tmp_path, split, 10) == tuple(np.bincount(theirs.targets, minlength=10))


@pytest.mark.parametrize("write", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize(
    ("name", "kind", "n_classes"), [("cifar10", UncheckedCIFAR10, 10), ("cifar100", UncheckedCIFAR100, 100)]
)
def test_cifar_files_are_read_as_torchvision_does(
    tmp_path: Path, name: str, kind: Any, n_classes: int, write: Callable[[dict[str, Any]], bytes]
) -> None:
    write_cifar(tmp_path / kind.base_folder, name, write=write)
    for split in ("train", "test"):
        theirs = kind(tmp_path, train=split == "train")
        assert_same(load_data(name, tmp_path, split), theirs)
        assert read_labels(name, tmp_path, split).tolist() == [int(label) for label in theirs.targets]
        assert published_counts(name, tmp_path, split, n_classes) == tuple(
            np.bincount(theirs.targets, minlength=n_classes)
        )


def test_the_hand_made_pickle_has_what_python_2_wrote() -> None:
    """Byte strings and the old module names: else the case above would test nothing of its own."""
    entry = {"labels": [3], "data": np.zeros((1, 3072), dtype=np.uint8)}
    codes = {code.name for code, _, _ in pickletools.genops(pickle_as_python_2_did(entry))}
    assert {"BINSTRING", "SHORT_BINSTRING", "GLOBAL"} <= codes
    assert not codes & {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}


# --- where the files may be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "raw", "."])
def test_idx_files_may_be_packed_and_lie_in_three_places(
    tmp_path: Path, folder: str, pack: Callable[[bytes], bytes]
) -> None:
    write_mnist(tmp_path / folder, pack=pack)
    assert sum(published_counts("fashionmnist", tmp_path, "train", 10)) == 7
    assert len(read_examples("fashionmnist", tmp_path, "test")[0]) == 5


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_the_root_may_be_cifars_own_folder(tmp_path: Path, name: str, folder: str) -> None:
    write_cifar(tmp_path / folder, name)
    inside, outside = (read_examples(name, root, "train") for root in (tmp_path / folder, tmp_path))
    assert np.array_equal(inside[0], outside[0])
    assert np.array_equal(inside[1], outside[1])


def test_the_place_that_has_the_most_files_counts(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"left over")
    assert len(read_labels("mnist", tmp_path, "train")) == 7


MISSING = {
    "mnist": ("MNIST/raw/", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]),
    "fashionmnist": ("FashionMNIST/raw/", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]),
    "cifar10": ("cifar-10-batches-py/", ["data_batch_1", "data_batch_3", "data_batch_5", "cifar-10-python.tar.gz"]),
    "cifar100": ("cifar-100-python/", ["train", "cifar-100-python.tar.gz"]),
}


@pytest.mark.parametrize(("name", "folder", "files"), [(name, *what) for name, what in MISSING.items()], ids=MISSING)
@pytest.mark.parametrize("read", [load_data, read_labels])
def test_missing_files_say_what_to_place_where(
    tmp_path: Path, name: str, folder: str, files: list[str], read: Callable[..., Any]
) -> None:
    with pytest.raises(SpecError) as caught:
        read(name, tmp_path, "train")
    check_words(caught.value, tmp_path)
    assert folder in caught.value.allowed
    assert all(file in caught.value.next_step for file in files)


def test_only_what_is_missing_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "data_batch_2").unlink()
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(SpecError, match=r"Missing: data_batch_2, data_batch_4\. "):
        read_labels("cifar10", tmp_path, "train")
    assert len(read_labels("cifar10", tmp_path, "test")) == 4  # the other split is not asked for


# --- damaged files ---------------------------------------------------------------------------------------------------

TRAIN_IMAGES, TRAIN_LABELS = MNIST_FILES["train"]
SEVEN = np.zeros(7)
PICTURES = np.zeros((7, 3, 4))

DAMAGED_IDX = {
    "labels cut short": (TRAIN_LABELS, idx(SEVEN)[:-1], "has 15 bytes; there are 14"),
    "labels too long": (TRAIN_LABELS, idx(SEVEN) + b"x", "has 15 bytes; there are 16"),
    "pictures cut short": (TRAIN_IMAGES, idx(PICTURES)[:-1], "has 100 bytes; there are 99"),
    "a size that is not there": (TRAIN_IMAGES, idx(PICTURES)[:8] + b"\xff" * 8, "7x4294967295x4294967295"),
    "the head cut off": (TRAIN_LABELS, idx(SEVEN)[:6], "head is cut off"),
    "an empty file": (TRAIN_LABELS, b"", "starts with nothing"),
    "pictures for labels": (TRAIN_LABELS, idx(PICTURES), "starts with 00 00 08 03"),
    "labels for pictures": (TRAIN_IMAGES, idx(SEVEN), "starts with 00 00 08 01"),
    "floats": (TRAIN_LABELS, b"\0\0\x0d\1" + idx(SEVEN)[4:], "starts with 00 00 0d 01"),
    "fewer labels": (TRAIN_LABELS, idx(SEVEN[:6]), "6 labels, 7 pictures"),
    "more labels": (TRAIN_LABELS, idx(np.zeros(8)), "8 labels, 7 pictures"),
    "nothing in them": (TRAIN_LABELS, idx(SEVEN[:0]), "0 labels, 7 pictures"),
    "a label of no class": (TRAIN_LABELS, idx(np.array([0, 9, 0, 10, 0, 0, 11])), r"0 to 9\. Example 3 has label 10"),
}


@pytest.mark.parametrize(("file", "content", "message"), DAMAGED_IDX.values(), ids=DAMAGED_IDX)
def test_a_damaged_idx_file_is_refused_at_once_and_by_the_loader(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    write_mnist(tmp_path / "raw")
    (tmp_path / "raw" / file).write_bytes(content)
    for read in (
        lambda: published_counts("mnist", tmp_path, "train", 10),
        lambda: load_data("mnist", tmp_path, "train"),
    ):
        with pytest.raises(SpecError, match=message) as caught:
            read()
        check_words(caught.value, tmp_path)
        assert file in caught.value.allowed or "label" in message
    assert len(load_data("mnist", tmp_path, "test")) == 5


def test_a_split_without_examples_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, n_train=0)
    with pytest.raises(SpecError, match="0 labels, 0 pictures"):
        read_labels("mnist", tmp_path, "train")


@pytest.mark.parametrize("damage", [lambda packed: packed[:-9], lambda packed: b"no gzip"], ids=["cut", "other"])
def test_a_damaged_packed_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_mnist(tmp_path, pack=gzip.compress)
    file = tmp_path / f"{TRAIN_IMAGES}.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SpecError, match=rf"{TRAIN_IMAGES}\.gz can be read.*(EOFError|BadGzipFile)") as caught:
        load_data("mnist", tmp_path, "train")
    check_words(caught.value, tmp_path)


def test_what_the_file_system_says_is_told_without_the_path(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="IsADirectoryError: Is a directory") as caught:
        mnist_and_cifar._read(tmp_path)
    assert str(tmp_path) not in str(caught.value)


class Call:
    """What a pickle does to call a function."""

    def __init__(self, function: Callable[..., Any], *given: Any) -> None:
        self.function, self.given = function, given

    def __reduce__(self) -> Any:
        return self.function, self.given


PIXELS = np.zeros((2, 3072), dtype=np.uint8)
DAMAGED_PICKLES: dict[str, tuple[Any, str]] = {
    "code": ({"labels": Call(os.system, "touch was_here")}, r"holds posix\.system, which is no array"),
    "code by another door": ({"labels": Call(eval, "open('was_here', 'w')")}, r"holds (builtins|__builtin__)\.eval"),
    "numpy's own file reader": ({"labels": Call(np.load, "x")}, r"holds numpy\.load"),
    "an object of ours": ({"labels": io.BytesIO(b"")}, r"holds _io\.BytesIO"),
    "objects in an array": ({"labels": np.array([1, 2], dtype=object)}, "holds numbers of type '|O8'"),
    "fractions in an array": ({"labels": np.zeros(2)}, "holds numbers of type '<f8'"),
    "fractions in a list": ({"labels": [0.0, 1.0]}, "'labels' is float64"),
    "names": ({"labels": ["cat", "dog"]}, "'labels' is <U3"),
    "rows": ({"labels": [[0, 1], [0, 1]]}, r"'labels' is int64 \(2, 2\)"),
    "ragged": ({"labels": [[0], [1, 2]]}, "ValueError"),
    "other numbers": ({"data": PIXELS.astype(np.int16)}, "'data' is int16"),
    "pictures of another size": ({"data": PIXELS[:, :-1]}, r"'data' is uint8 \(2, 3071\)"),
    "fewer labels": ({"labels": [0]}, "1 labels, 2 pictures"),
    "other keys": ({"labels": None, "fine_labels": [1, 2]}, "'labels' is object"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED_PICKLES.values(), ids=DAMAGED_PICKLES)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_is_not_a_batch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": PIXELS, "labels": [0, 1], **change}, protocol))
    for read in (read_labels, load_data):
        with pytest.raises(SpecError, match=message) as caught:
            read("cifar10", tmp_path, "test")
        check_words(caught.value, tmp_path)
        assert "test_batch" in caught.value.allowed
    assert not (tmp_path / "was_here").exists()


def test_the_pickle_with_code_in_it_would_have_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(DAMAGED_PICKLES["code"][0]))
    assert (tmp_path / "was_here").exists()


# An array of objects whose type is then said to be plain memory: numpy would take the bytes for addresses.
BYTES_FOR_ADDRESSES = (
    b"\x80\x02}(U\x06labelscnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"U\x08AAAAAAAAtbu."
)

ODD_BYTES = {
    "empty": (b"", "EOFError"),
    "no pickle": (b"hello", "UnpicklingError|EOFError|ValueError"),
    "cut short": (pickle_as_python_2_did({"labels": [1], "data": PIXELS[:1]})[:-900], "UnpicklingError|EOFError"),
    "a list": (pickle.dumps([1, 2]), "AttributeError"),
    "no labels": (pickle.dumps({"data": PIXELS}), "KeyError: 'labels'"),
    "no data": (pickle.dumps({"labels": [1]}), "KeyError: 'data'"),
    "more memory said than there": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "Error"),
    "objects disguised as memory": (BYTES_FOR_ADDRESSES, r"holds numbers of type '\|O8'"),
}


@pytest.mark.parametrize(("content", "message"), ODD_BYTES.values(), ids=ODD_BYTES)
def test_bytes_that_are_no_batch_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(SpecError, match=message):
        read_labels("cifar10", tmp_path, "test")


def test_a_pickle_cant_change_what_later_ones_are_read_with(tmp_path: Path) -> None:
    """BUILD sets attributes of whatever it is given: here of a function that makes part of an array."""
    (tmp_path / "test_batch").write_bytes(b"\x80\x02c_codecs\nencode\n}X\x01\x00\x00\x00xK\x01sb.")
    with pytest.raises(SpecError):
        read_labels("cifar10", tmp_path, "test")
    assert vars(mnist_and_cifar._CALLS["_codecs.encode"]) == {}


@pytest.mark.parametrize(("name", "wrong"), [("cifar10", 10), ("cifar100", 100), ("cifar10", -1)])
def test_a_label_of_no_class_is_refused(tmp_path: Path, name: str, wrong: int) -> None:
    key, file = ("labels", "test_batch") if name == "cifar10" else ("fine_labels", "test")
    (tmp_path / file).write_bytes(pickle.dumps({"data": PIXELS, key: [0, wrong]}))
    n_classes = 10 if name == "cifar10" else 100
    for read in (lambda: published_counts(name, tmp_path, "test", n_classes), lambda: load_data(name, tmp_path)):
        with pytest.raises(SpecError, match=rf"0 to {n_classes - 1}\. Example 1 has label {wrong}\."):
            read()


# --- labels are kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_labels_are_read_again_only_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files: dict[str, list[Path]] = {"mnist": [tmp_path / TRAIN_LABELS], "cifar10": [tmp_path / "data_batch_3"]}
    write_mnist(tmp_path)
    write_cifar(tmp_path, "cifar10")
    first = read_labels(name, tmp_path, "train")
    assert read_labels(name, tmp_path, "train") is first
    assert not first.flags.writeable
    file = files[name][0]
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    again = read_labels(name, tmp_path, "train")
    assert again is not first
    assert np.array_equal(again, first)


def test_a_file_that_was_damaged_is_read_once_it_is_mended(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    whole = (tmp_path / TRAIN_LABELS).read_bytes()
    (tmp_path / TRAIN_LABELS).write_bytes(whole[:-1])
    with pytest.raises(SpecError):
        read_labels("mnist", tmp_path, "train")
    (tmp_path / TRAIN_LABELS).write_bytes(whole)
    assert len(read_labels("mnist", tmp_path, "train")) == 7

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Lambda, RandomHorizontalFlip, Resize, ToTensor
from torchvision.transforms.functional import pil_to_tensor

from ablation.errors import DataError, SpecError
from ablation.inputs.catalog import dataset_facts
from ablation.inputs.data import (
    ImageFiles,
    as_dataset,
    choose_readers,
    draw_examples,
    labels_of,
    load_batches,
    load_data,
)
from ablation.inputs.models import default_transform
from ablation.spec import CountOfExamples, PerClass


class Squares(Dataset):
    """Example k is (k^2, k mod 3); counts how often it is read."""

    def __init__(self, n: int) -> None:
        self.n, self.n_read, self.threads = n, 0, set[int]()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.n:
            raise IndexError(index)
        self.n_read += 1
        self.threads.add(threading.get_ident())
        return torch.tensor([float(index**2), 1.0]), index % 3


class WithTargets(Squares):
    def __init__(self, n: int, targets: Any, name: str = "targets") -> None:
        super().__init__(n)
        setattr(self, name, targets)


class Pairs(Dataset):
    """Any examples."""

    def __init__(self, *examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def write_images(folder: Path, *names: str) -> None:
    """Small pictures of noise, no two the same."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)


# --- by name ---------------------------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all() -> None:
    train, test = load_data("digits", split="train"), load_data("digits", split="test")
    facts = dataset_facts("digits")
    for name, part in (("train", train), ("test", test)):
        assert len(part) == facts.n_examples[name]
        assert tuple(np.bincount(part.targets)) == facts.n_per_class[name]
    ours = [
        (*pixels.ravel(), label)
        for part in (train, test)
        for pixels, label in zip(part.pixels, part.targets, strict=True)
    ]
    bundled = load_digits()
    theirs = [(*np.rint(row * 255 / 16), label) for row, label in zip(bundled.data, bundled.target, strict=True)]
    assert sorted(ours) == sorted(theirs)  # each exactly once
    assert test.targets[:12].tolist() == [1, 2, 4, 5, 6, 9, 4, 7, 8, 9, 2, 7]  # frozen: reports quote this split


def test_digits_are_pictures_until_transformed() -> None:
    picture, label = load_data("digits")[0]
    assert (picture.mode, picture.size, label) == ("L", (8, 8), 1)
    assert np.asarray(picture).max() == 255
    assert load_data("digits", transform=pil_to_tensor)[0][0].shape == (1, 8, 8)


def write_odd_pictures(folder: Path) -> None:
    """One of every kind that needs more than decoding to become RGB."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = Image.fromarray(np.random.default_rng(9).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    other = Image.fromarray(np.random.default_rng(8).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    deep = np.random.default_rng(7).integers(0, 65536, (6, 5), dtype=np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6  # Orientation: a quarter turn, which torchvision leaves undone
    colours.convert("L").save(folder / "grey.png")
    colours.convert("1").save(folder / "two-tone.png")
    colours.convert("LA").save(folder / "grey-alpha.png")
    Image.merge("RGBA", (*colours.split(), other.getchannel(0))).save(folder / "alpha.png")
    colours.quantize(7).save(folder / "palette.png")
    colours.quantize(7).save(folder / "see-through.png", transparency=3)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    Image.fromarray(deep.astype(np.float32) / 256).save(folder / "fractions.tiff")
    colours.convert("CMYK").save(folder / "cmyk.jpg")
    colours.save(folder / "turned.jpg", exif=turned)
    colours.save(folder / "animated.png", save_all=True, append_images=[other])
    colours.save(folder / "animated.webp", save_all=True, append_images=[other], lossless=True)


def test_imagefolder_reads_what_torchvision_reads(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "b/1.png", "b/2.jpg", "a/3.webp", "a/deep/4.bmp")
    write_odd_pictures(tmp_path / "train" / "odd")
    ours = load_data("imagefolder", tmp_path, "train")
    theirs = torchvision.datasets.ImageFolder(tmp_path / "train")
    assert ours.samples == theirs.samples
    assert len(ours) == 4 + 13
    names = [Path(path).name for path, _ in ours.samples]
    for name, (picture, label), (expected, expected_label) in zip(names, ours, theirs, strict=True):
        assert (label, picture.mode, picture.size) == (expected_label, "RGB", expected.size)
        if "deep." not in name:  # of these torchvision makes everything above 255 white: see test_pictures.py
            assert picture.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("name", "root", "split", "field"),
    [("nope", None, "test", "data.name"), ("mnist", None, "test", "data.root"), ("digits", None, "val", "split")],
)
def test_what_there_is_not_is_refused(name: str, root: str | None, split: str, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_data(name, root, split)
    assert caught.value.field == field


# --- which examples --------------------------------------------------------------------------------------------------

LABELS = np.array([2, 0, 5, 2, 0, 5, 5, 2, 2, 0, 5, 0], dtype=np.int64)


def test_all_examples_come_as_they_are() -> None:
    assert draw_examples("all", None, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_count_is_drawn_without_replacement_and_sorted() -> None:
    drawn = draw_examples(CountOfExamples(count=40, seed=3), None, 100)
    assert len(set(drawn.tolist())) == 40
    assert drawn.tolist() == sorted(drawn.tolist())
    assert drawn.tolist() == draw_examples(CountOfExamples(count=40, seed=3), LABELS, 100).tolist()
    assert drawn.tolist() != draw_examples(CountOfExamples(count=40, seed=4), None, 100).tolist()
    assert draw_examples(CountOfExamples(count=100), None, 100).tolist() == list(range(100))


def test_a_draw_is_the_same_for_ever() -> None:
    """Frozen: another draw would change the bytes of every job that samples examples."""
    assert draw_examples(CountOfExamples(count=6), None, 1000).tolist() == [40, 269, 307, 509, 634, 846]
    assert draw_examples(PerClass(per_class=2), LABELS, 12).tolist() == [9, 11, 3, 8, 2, 10]


def test_per_class_is_a_block_of_sorted_examples_for_each_class() -> None:
    drawn = draw_examples(PerClass(per_class=3, seed=1), LABELS, len(LABELS)).reshape(3, 3)
    assert LABELS[drawn].tolist() == [[0] * 3, [2] * 3, [5] * 3]
    assert all(block.tolist() == sorted(set(block.tolist())) for block in drawn)
    everything = draw_examples(PerClass(per_class=4), LABELS, len(LABELS))
    assert sorted(everything.tolist()) == list(range(12))


def test_every_example_is_drawn_equally_often() -> None:
    counts = np.zeros(12)
    for seed in range(600):
        counts[draw_examples(PerClass(per_class=1, seed=seed), LABELS, 12)] += 1
    assert counts.min() > 150 - 5 * np.sqrt(150 * 0.75)  # 600 draws of one in four, five standard deviations
    assert counts.max() < 150 + 5 * np.sqrt(150 * 0.75)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(SpecError, match="1 to 9"):
        draw_examples(CountOfExamples(count=10), None, 9)
    with pytest.raises(SpecError, match="1 to 4"):
        draw_examples(PerClass(per_class=5), LABELS, 12)
    with pytest.raises(DataError, match="needs the labels"):
        draw_examples(PerClass(per_class=1), None, 12)


KEPT = {
    "list": [0, 1, 2, 0, 1],
    "tensor": torch.tensor([0, 1, 2, 0, 1]),
    "uint8": np.array([0, 1, 2, 0, 1], dtype=np.uint8),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("name", ["targets", "labels"])
def test_kept_labels_are_used_without_reading_the_examples(kept: Any, name: str) -> None:
    dataset = WithTargets(5, kept, name)
    labels = labels_of(dataset)
    assert (labels.tolist(), labels.dtype) == ([0, 1, 2, 0, 1], np.int64)
    assert dataset.n_read == 2


NOT_LABELS = {
    "other labels": [1, 1, 1, 1, 1],
    "names": ["a", "b", "c", "a", "b"],
    "too few": [0, 1],
    "one-hot": np.eye(5, 3),
    "ragged": [[1], [1, 2], [], [], []],
}


@pytest.mark.parametrize("kept", NOT_LABELS.values(), ids=NOT_LABELS)
def test_kept_labels_that_are_not_the_examples_own_are_passed_over(kept: Any) -> None:
    assert labels_of(WithTargets(5, kept)).tolist() == [0, 1, 2, 0, 1]


def test_labels_that_are_transformed_are_read() -> None:
    dataset = WithTargets(5, [0, 1, 2, 0, 1])
    dataset.target_transform = str
    assert labels_of(dataset).tolist() == [0, 1, 2, 0, 1]
    assert dataset.n_read == 5


def test_labels_of_parts_and_of_tensors() -> None:
    tensors = TensorDataset(torch.zeros(4, 2), torch.tensor([7, 8, 9, 7], dtype=torch.int32))
    parts = ConcatDataset([Subset(tensors, [3, 1]), Squares(4), Pairs(("x", torch.tensor(4)), ("y", np.int8(5)))])
    assert labels_of(Subset(parts, [0, 1, 2, 4, 6, 7])).tolist() == [7, 8, 0, 2, 4, 5]


@pytest.mark.parametrize("label", [0.5, True, torch.tensor([0.5, 0.5]), torch.tensor(1.0), "cat"])
def test_labels_that_are_no_whole_numbers_are_refused(label: Any) -> None:
    dataset = Pairs((torch.zeros(2), label), (torch.ones(2), label))
    with pytest.raises(DataError, match="one whole number per example"):
        labels_of(dataset)
    with pytest.raises(DataError):
        list(load_batches(dataset, np.arange(2), 2))


# --- batches ---------------------------------------------------------------------------------------------------------

INDICES = np.array([9, 0, 4, 4, 7, 2, 1, 8, 3, 5, 6])


@pytest.mark.parametrize("n_workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_batches_are_the_exact_grid_in_the_given_order(n_workers: int, batch_size: int) -> None:
    batches = list(load_batches(Squares(10), INDICES, batch_size, n_workers=n_workers))
    expected = [INDICES[start : start + batch_size] for start in range(0, 11, batch_size)]
    assert [len(labels) for _, labels in batches] == [len(block) for block in expected]
    for (inputs, labels), block in zip(batches, expected, strict=True):
        assert inputs[:, 0].tolist() == (block.astype(float) ** 2).tolist()
        assert labels.tolist() == (block % 3).tolist()
        assert labels.dtype == torch.int64


def test_tensors_give_the_same_batches_as_their_examples_one_by_one() -> None:
    tensors = TensorDataset(torch.arange(20.0).reshape(10, 2), torch.arange(10) % 3)
    fast = load_batches(tensors, INDICES, 4)
    slow = load_batches(tensors, INDICES, 4, collate=default_collate)
    for (inputs, labels), (expected, expected_labels) in zip(fast, slow, strict=True):
        assert torch.equal(inputs, expected)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_the_callers_random_state_is_left_alone(n_workers: int) -> None:
    loader = DataLoader(Squares(10), sampler=SubsetRandomSampler(range(6)), generator=torch.Generator().manual_seed(5))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), loader.generator.get_state()
    dataset, indices, collate = as_dataset(loader)
    list(load_batches(dataset, indices, 4, n_workers=n_workers, collate=collate))
    draw_examples(CountOfExamples(count=3), None, 9)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(loader.generator.get_state(), states[2])


def test_threads_read_one_batch_ahead_and_stop_with_the_caller() -> None:
    dataset = Squares(1000)
    n_threads = threading.active_count()
    batches = load_batches(dataset, np.arange(1000), 10, n_workers=3)
    next(batches)
    assert 10 <= dataset.n_read <= 20
    next(batches)
    assert 20 <= dataset.n_read <= 30
    assert threading.get_ident() not in dataset.threads
    batches.close()
    assert threading.active_count() == n_threads


def test_only_pictures_are_read_in_threads(tmp_path: Path) -> None:
    write_images(tmp_path, "test/a/1.png")
    pictures = load_data("imagefolder", tmp_path)
    assert choose_readers(pictures) == choose_readers(Subset(pictures, [0])) == torch.get_num_threads()
    assert choose_readers(load_data("digits")) == choose_readers(Squares(3)) == 0


class Mine(ImageFiles):
    """Does what nobody knows."""


def test_only_code_that_is_known_to_keep_no_state_is_run_in_threads(tmp_path: Path) -> None:
    write_images(tmp_path, "test/a/1.png")
    known = Compose([Resize(8), ToTensor()])
    preset = default_transform("alexnet")
    n = torch.get_num_threads()
    for transform, n_readers in (
        (None, n), (known, n), (preset, n), (Compose([Lambda(lambda x: x), ToTensor()]), 0), (lambda x: x, 0),
        (Compose([RandomHorizontalFlip(), ToTensor()]), 0),
    ):  # fmt: skip
        assert choose_readers(load_data("imagefolder", tmp_path, transform=transform)) == n_readers
        assert choose_readers(Subset(ImageFolder(tmp_path / "test", transform), [0])) == n_readers
    assert choose_readers(ImageFolder(tmp_path / "test", known, loader=lambda path: Image.open(path))) == 0
    assert choose_readers(ImageFolder(tmp_path / "test", known, target_transform=int)) == 0
    assert choose_readers(Mine({"a": [str(tmp_path / "test" / "a" / "1.png")]})) == 0


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_a_truncated_picture_in_the_middle_of_a_batch_is_named(
    tmp_path: Path, n_workers: int, progressive: bool
) -> None:
    write_images(tmp_path, *(f"test/cat/{number}.jpg" for number in range(10)))
    broken = tmp_path / "test" / "cat" / "6.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (120, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(broken, progressive=progressive)
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    dataset = load_data("imagefolder", tmp_path, transform=lambda picture: pil_to_tensor(picture.resize((10, 12))))
    n_threads = threading.active_count()
    batches = load_batches(Subset(dataset, range(1, 10)), np.arange(9), 4, n_workers=n_workers)
    assert len(next(batches)[1]) == 4
    with pytest.raises(DataError, match=r"example 6 \(cat/6.jpg\) can't be read: OSError.*[Tt]runcated") as caught:
        next(batches)
    assert str(tmp_path) not in str(caught.value)
    assert threading.active_count() == n_threads


def test_a_file_that_is_no_picture_is_named_without_its_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "test/cat/1.jpg")
    (tmp_path / "test" / "cat" / "1.jpg").write_bytes(b"hello")
    with pytest.raises(DataError, match="UnidentifiedImageError") as caught:
        list(load_batches(load_data("imagefolder", tmp_path), np.arange(1), 1))
    assert str(tmp_path) not in str(caught.value)


PICTURE = Image.new("L", (4, 4))
BAD_EXAMPLES = {
    "a picture": (((PICTURE, 0), (PICTURE, 1)), "give the data set a transform"),
    "two shapes": (((torch.zeros(2), 0), (torch.zeros(3), 1)), "of one shape"),
    "no label": ((torch.zeros(2), torch.zeros(2)), r"pair \(input, label\)"),
    "three parts": (((torch.zeros(2), 0, 5), (torch.zeros(2), 1, 5)), r"pair \(input, label\)"),
    "a dictionary": (({"x": torch.zeros(2), "y": 0},) * 2, r"pair \(input, label\)"),
}


@pytest.mark.parametrize(("examples", "message"), BAD_EXAMPLES.values(), ids=BAD_EXAMPLES)
def test_examples_that_make_no_batch_are_refused(examples: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(load_batches(Pairs(*examples), np.arange(2), 2))


def test_a_collate_function_that_loses_examples_is_refused() -> None:
    with pytest.raises(DataError, match="1 labels for 4 examples"):
        list(load_batches(Squares(10), INDICES, 4, collate=lambda examples: default_collate(examples[:1])))


def test_reading_in_threads_works_where_processes_have_no_children() -> None:
    """In a daemonic process, as Celery's are; DataLoader's own workers are the control that fails there."""
    code = """
import multiprocessing
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset
from ablation.inputs.data import load_batches

def read(queue):
    dataset = TensorDataset(torch.arange(10.0), torch.arange(10))
    batches = load_batches(dataset, np.arange(10), 4, n_workers=2, collate=torch.utils.data.default_collate)
    queue.put([labels.tolist() for _, labels in batches])
    try:
        list(DataLoader(dataset, num_workers=1))
    except AssertionError as error:
        queue.put(str(error))

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=read, args=(queue,), daemon=True)
    process.start()
    print(queue.get(timeout=60), queue.get(timeout=60))
    process.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == (
        "[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] daemonic processes are not allowed to have children"
    ), done.stderr


# --- what a notebook user has ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_of_tensors(kind: type) -> None:
    dataset, indices, collate = as_dataset(kind((torch.zeros(5, 2), torch.arange(5))))
    assert (len(dataset), indices, collate) == (5, None, None)
    assert labels_of(dataset).tolist() == [0, 1, 2, 3, 4]


def test_a_map_style_dataset_is_taken_as_it_is() -> None:
    squares = Squares(4)
    assert as_dataset(squares) == (squares, None, None)
    pairs = [(torch.zeros(2), 0), (torch.ones(2), 1), (torch.ones(2), 1)]
    assert as_dataset(pairs) == (pairs, None, None)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_plain_loader_stands_for_its_whole_data_set(shuffle: bool) -> None:
    squares = Squares(10)
    assert as_dataset(DataLoader(squares, batch_size=4, shuffle=shuffle, drop_last=True)) == (squares, None, None)


def test_a_sampler_that_selects_is_kept_in_its_order() -> None:
    squares = Squares(10)
    assert as_dataset(DataLoader(squares, sampler=[7, 3, 3, 5]))[1].tolist() == [7, 3, 3, 5]
    assert as_dataset(DataLoader(squares, batch_sampler=[[7, 3], [1]]))[1].tolist() == [7, 3, 1]
    chosen = as_dataset(DataLoader(squares, sampler=SubsetRandomSampler([2, 4, 6])))[1]
    assert sorted(chosen.tolist()) == [2, 4, 6]
    assert len(as_dataset(DataLoader(squares, sampler=RandomSampler(squares, num_samples=3)))[1]) == 3
    twice = RandomSampler(squares, replacement=True, num_samples=30)
    assert len(as_dataset(DataLoader(squares, sampler=twice))[1]) == 30


def test_a_loaders_collate_function_makes_the_batches() -> None:
    def doubled(examples: list[Any]) -> Any:
        inputs, labels = default_collate([(example["x"], example["y"]) for example in examples])
        return 2 * inputs, labels

    dictionaries = Pairs(*({"x": torch.tensor([float(k)]), "y": k} for k in range(5)))
    dataset, indices, collate = as_dataset(DataLoader(dictionaries, collate_fn=doubled))
    assert indices is None
    inputs, labels = next(load_batches(dataset, np.arange(5), 5, collate=collate))
    assert inputs.flatten().tolist() == [0, 2, 4, 6, 8]
    assert labels.tolist() == [0, 1, 2, 3, 4]


NO_SPLITS = {
    "iterable": (Endless(), "an Endless.*give a map-style Dataset"),
    "loader of iterable": (DataLoader(Endless()), "an Endless.*give a map-style Dataset"),
    "loader of batches": (DataLoader(Squares(4), batch_size=None), "batch_size=None"),
    "tensor": (torch.zeros(4, 2), "a Tensor"),
    "three tensors": ((torch.zeros(4), torch.zeros(4), torch.zeros(4)), "a tuple"),
    "three arrays": ((np.zeros(4), np.zeros(4), np.zeros(4)), "a tuple"),
    "generator": ((pair for pair in [(1, 2)]), "a generator"),
    "text": ("digits", "a str"),
    "nothing": (None, "a NoneType"),
    "lengths": ((torch.zeros(4, 2), torch.zeros(5)), "4 inputs but 5 labels"),
    "empty": (Squares(0), "no examples"),
    "empty tensors": ((torch.zeros(0, 2), torch.zeros(0)), "no examples"),
}


@pytest.mark.parametrize(("split", "message"), NO_SPLITS.values(), ids=NO_SPLITS)
def test_what_has_no_examples_by_index_is_refused(split: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_dataset(split)

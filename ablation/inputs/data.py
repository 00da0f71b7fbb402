"""Data sets by name, and their examples in batches of a fixed order.

In: a name and a folder, or a Dataset, a DataLoader, or a pair of tensors. Out: a map-style Dataset, the indices of a
split's examples, and batches of (inputs, labels). The caller's random state is not used.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from ablation.errors import AblationError, DataError, SpecError, say_cause
from ablation.inputs.catalog import DatasetFacts, Registered, check_exif, dataset_facts, dataset_names
from ablation.inputs.checkpoints import say_some
from ablation.inputs.classes import listed_classes
from ablation.inputs.images import SPLIT_FOLDERS, find_images, list_skipped
from ablation.inputs.mnist_and_cifar import check_classes, read_examples
from ablation.inputs.pictures import count_oddities, read_picture, say_oddities
from ablation.inputs.registered import DATASETS, load_factory, registered_names
from ablation.spec import SPLITS, PerClass, SplitSpec

Transform = Callable[[Any], Any]
Collate = Callable[[list[Any]], Any]

LEFT_OUT = "--bad-images skip"  # how bad picture files are left out
SPLIT_SEED = 0  # seed of the demo data's train/test split


# --- by name ---------------------------------------------------------------------------------------------------------


class ImageFiles(Dataset):
    """Pictures in class folders, as RGB: example k is `samples[k]`, a path and a class number.

    Examples and order are those of torchvision's `ImageFolder` (and `ImageNet`, once it is unpacked), but the files are
    listed by the code with which the torch-free API counts them, which leaves out those of archives and file managers.
    A class may have no pictures where class numbers are known without them (ImageNet with its devkit). `exif`: whether
    pictures are turned as their EXIF orientation says (`"apply"`) or not (`"ignore"`, as torchvision does). `folder`:
    name and root of the data set and the split, to which other files may belong.
    """

    def __init__(
        self,
        images: dict[str, list[str]],
        transform: Transform | None = None,
        *,
        exif: str = "ignore",
        folder: tuple[str, Path, str] | None = None,
    ) -> None:
        self.exif, self.folder = exif, folder
        self.classes = tuple(images)
        self.samples = [(path, label) for label, paths in enumerate(images.values()) for path in paths]
        self.targets = [label for _, label in self.samples]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        with open(path, "rb") as file:
            picture = read_picture(file, self.exif)
        return (self.transform(picture) if self.transform else picture), label


class Pictures(Dataset):
    """Pictures in memory: example k is `pixels[k]`, grey (height, width) or RGB (height, width, 3), and its label."""

    def __init__(self, pixels: np.ndarray, targets: np.ndarray, transform: Transform | None = None) -> None:
        self.pixels, self.targets, self.transform = pixels, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = Image.fromarray(self.pixels[index])
        return (self.transform(picture) if self.transform else picture), int(self.targets[index])


def _load_digits(split: str, transform: Transform | None) -> Pictures:
    """Load scikit-learn's bundled handwritten digits: 1,797 grey pictures of 8x8, 50 per class in the test split."""
    pixels, labels = _read_digits()
    # RandomState and not Generator: its stream is frozen, so the split is the same in every version of numpy.
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    test = np.concatenate([shuffled[labels[shuffled] == label][:50] for label in range(10)])
    chosen = np.isin(np.arange(len(labels)), test, invert=split == "train")
    return Pictures(pixels[chosen], labels[chosen], transform)


@cache
def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read pictures and labels from the file of scikit-learn's `load_digits`, whose import takes seconds."""
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise DataError("digits come with scikit-learn, which is not installed; `pip install scikit-learn`.")
    table = np.loadtxt(Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz"), delimiter=",")
    return np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), table[:, -1].astype(np.int64)


def load_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str = "test",
    transform: Transform | None = None,
    *,
    exif: str = "ignore",
) -> Dataset:
    """Load one split of the data set `name` from the folder `root`; inputs are pictures unless `transform` is given.

    A registered data set is what its factory returns, with `transform` applied to every input. With `exif="apply"`
    picture files are turned as their EXIF orientation says; without it that is ignored, as torchvision does.

    Raises:
        SpecError: there is no such data set or split, or its folder or files are missing or damaged (the message says
            what to place).
        DataError: the factory of a registered data set failed.
    """
    facts = dataset_facts(name, Registered(datasets=registered_names(DATASETS)))
    if split not in SPLITS:
        raise SpecError("split", split, "'train' or 'test'")
    check_exif(name, exif)
    if name not in dataset_names():
        return _registered(name, root, split, transform)
    if not facts.needs_root:
        return _load_digits(split, transform)
    if root is None or not Path(root).is_dir():
        raise SpecError("data.root", root and str(root), f"the folder that {name} is in")
    if name in SPLIT_FOLDERS:
        images, folder = find_images(name, Path(root), split, facts.n_classes), (name, Path(root), split)
        return ImageFiles(images, transform, exif=exif, folder=folder)
    return _load_published(facts, Path(root), split, transform)


class Transformed(Dataset):
    """A data set with a transform on the input of every example."""

    def __init__(self, dataset: Any, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        inputs, label = _pair(self.dataset[index], f"example {index}")
        return self.transform(inputs), label


class Relabelled(Dataset):
    """A data set with the model's class numbers in place of its own labels."""

    def __init__(self, dataset: Any, numbers: Mapping[int, int]) -> None:
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        inputs, label = _pair(self.dataset[index], f"example {index}")
        number = self.numbers.get(int(label))
        if number is None:
            raise DataError(
                f"example {index} has label {int(label)}, which the mapping of classes doesn't have; allowed: "
                f"{', '.join(map(str, sorted(self.numbers)))}."
            )
        return inputs, number


def classes_of(dataset: Any) -> tuple[str, ...] | None:
    """Names of the classes of a data set in the order of its labels; None where it lists none."""
    while isinstance(dataset, Subset | Transformed | Relabelled):
        dataset = dataset.dataset
    return listed_classes(dataset)


def _registered(name: str, root: str | os.PathLike[str] | None, split: str, transform: Transform | None) -> Dataset:
    """Make a registered data set by its factory, and check it."""
    what = f"the {split} split of the registered data set {name!r}"
    try:
        dataset = load_factory(DATASETS, name)(root, split)
    except Exception as error:
        raise DataError(
            f"{what} can't be opened: {type(error).__name__}: {str(error).rstrip('.')}. Its factory takes "
            "(root, split) and gives a map-style Dataset, the same one in every worker."
        ) from error
    dataset = _checked(dataset, what, "let its factory give a map-style Dataset")
    return Transformed(dataset, transform) if transform else dataset


def _load_published(facts: DatasetFacts, root: Path, split: str, transform: Transform | None) -> Pictures:
    """Read the published files: pictures and order are those of torchvision's own classes."""
    pixels, labels = read_examples(facts.name, root, split)
    check_classes(facts.name, root, labels, facts.n_classes or 0)
    return Pictures(pixels, labels, transform)


# --- what a notebook user has ----------------------------------------------------------------------------------------


def as_dataset(split: Any) -> tuple[Dataset, Int64[np.ndarray, " examples"] | None, Collate | None]:
    """Return a user's data set, the order of its examples (None: its own), and the function that stacks them.

    A DataLoader gives its data set, its sampler's order where that selects examples, and its collate_fn. Shuffling,
    batch size and `drop_last` select no examples: every example of the split counts once.

    Raises:
        DataError: the data can't be indexed; the message says what to give instead.
    """
    if _is_pair(split):
        inputs, labels = (_as_tensor(part, name) for part, name in zip(split, ("inputs", "labels"), strict=True))
        if len(inputs) != len(labels):
            raise DataError(f"{len(inputs)} inputs but {len(labels)} labels; give one label per input.")
        return _checked(TensorDataset(inputs, labels)), None, None
    if isinstance(split, DataLoader):
        if split.batch_sampler is None and not isinstance(split.dataset, IterableDataset):
            raise DataError("a DataLoader with batch_size=None; give its data set, with one (input, label) per index.")
        collate = None if split.collate_fn is default_collate else split.collate_fn
        return _checked(split.dataset), _sampled(split), collate
    return _checked(split), None, None


def _is_pair(split: Any) -> bool:
    """Whether a split is (inputs, labels) as a whole, and no list of examples: tensors, arrays, lists in a tuple."""
    kinds = Tensor | np.ndarray | list if isinstance(split, tuple) else Tensor | np.ndarray
    return isinstance(split, tuple | list) and len(split) == 2 and all(isinstance(part, kinds) for part in split)


def _as_tensor(part: Any, name: str) -> Tensor:
    """Inputs or labels as a tensor that can be indexed.

    Raises:
        DataError: they are not numbers, one row per example.
    """
    given = f"an array of {part.dtype}" if isinstance(part, np.ndarray) else f"a {type(part).__name__}"
    allowed = "allowed: dense numbers, one row per example, as a tensor or an array"
    try:
        if isinstance(part, np.ndarray):  # torch takes native byte order, and warns of memory that can't be written
            part = np.array(part, dtype=part.dtype.newbyteorder("="), copy=None if part.flags.writeable else True)
        tensor = torch.as_tensor(part)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{name} are {given} that torch can't read ({say_cause(error)}); {allowed}.") from error
    if reason := _why_not_rows(tensor):
        raise DataError(f"{name} are a tensor {reason}; {allowed}.")
    return tensor


def _why_not_rows(tensor: Tensor) -> str:
    """Why a tensor is no rows of dense numbers; empty if it is."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return (
            "of rows of different lengths" if tensor.is_nested else f"that is sparse ({tensor.layout}); use to_dense()"
        )
    if tensor.is_meta:
        return "without numbers (device meta)"
    if tensor.is_quantized:
        return "of quantized numbers; use dequantize()"
    return "" if tensor.dim() else "of a single number"


def _checked(
    dataset: Any,
    what: str = "a split",
    next_step: str = "give a map-style Dataset, a DataLoader over one, or a pair of tensors (inputs, labels)",
) -> Dataset:
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset | str | bytes | dict | tuple | Tensor | np.ndarray) or not indexed:
        raise DataError(f"{what} is {_article(type(dataset).__name__)}, which has no examples by index; {next_step}.")
    try:
        n_examples = len(dataset)
    except Exception as error:
        raise DataError(f"{what} does not know its length ({say_cause(error)}); {next_step}.") from error
    if n_examples == 0:
        raise DataError(f"{what} has no examples; give at least one.")
    return dataset


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def _sampled(loader: DataLoader) -> Int64[np.ndarray, " examples"] | None:
    """Indices that a loader's sampler selects; None if it selects all, in whatever order."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    sampler, batches = loader.sampler, loader.batch_sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if type(batches) is BatchSampler and plain:
        return None
    generators = {id(g): g for g in (loader.generator, getattr(sampler, "generator", None)) if g is not None}.values()
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=[]):
        chosen = sampler if type(batches) is BatchSampler else (index for batch in batches or () for index in batch)
        try:
            indices = np.fromiter(chosen, np.int64)
        except Exception as error:
            raise DataError(
                f"the DataLoader's sampler gives no list of examples ({say_cause(error)}); allowed: a sampler of whole "
                "numbers. Give the data set itself."
            ) from error
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return indices


# --- which examples --------------------------------------------------------------------------------------------------


def labels_of(dataset: Dataset) -> Int64[np.ndarray, " examples"]:
    """Labels of all examples, without reading the examples if the data set has a list of its labels.

    Raises:
        DataError: a label is not a whole number, or an example can't be read.
    """
    if isinstance(dataset, Transformed | Relabelled):  # of the latter, its own labels: by them examples are drawn
        return labels_of(dataset.dataset)
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([labels_of(part) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset):
        return _whole_numbers(dataset.tensors[-1])
    kept = _kept_labels(dataset)
    if kept is not None:
        return kept
    n = len(dataset)  # type: ignore[arg-type]
    return _whole_numbers([_label(dataset, index) for index in range(n)])


def _kept_labels(dataset: Dataset) -> Int64[np.ndarray, " examples"] | None:
    """`.targets` or `.labels`, if they agree with the examples themselves (checked on the first and the last)."""
    n = len(dataset)  # type: ignore[arg-type]
    for name in ("targets", "labels"):
        kept = getattr(dataset, name, None)
        if kept is None or getattr(dataset, "target_transform", None) is not None:
            continue
        tried = {index: _label(dataset, index) for index in (0, n - 1)}
        try:
            labels, said = _whole_numbers(kept), _whole_numbers(list(tried.values()))
        except DataError:
            continue
        if len(labels) == n and (labels[list(tried)] == said).all():
            return labels
    return None


def _label(dataset: Dataset, index: int) -> Any:
    return _pair(_read(dataset, index), f"example {index}")[1]


def _whole_numbers(labels: Any) -> Int64[np.ndarray, " examples"]:
    try:
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except (ValueError, TypeError, RuntimeError):  # of different lengths; sparse; without numbers
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"labels have shape {array.shape} and type {array.dtype}; allowed: one whole number per example "
            "(no soft labels, no one-hot rows)."
        )
    return array.astype(np.int64)


def draw_examples(
    asked: SplitSpec, labels: Int64[np.ndarray, " all"] | None, n_examples: int
) -> Int64[np.ndarray, " examples"]:
    """Draw the indices of a split's examples, in its fixed order.

    "all": in the order of the data set. A count: drawn uniformly without replacement, sorted. Per class: one block of
    examples per class, in the order of the class numbers, each drawn likewise.

    Raises:
        SpecError: more examples are asked for than exist.
        DataError: `per_class` for data without labels.
    """
    if asked == "all":
        return np.arange(n_examples, dtype=np.int64)
    random = np.random.Generator(np.random.PCG64(asked.seed))
    if not isinstance(asked, PerClass):
        return _draw(random, np.arange(n_examples), asked.count, "count")
    if labels is None:
        raise DataError("a draw per class needs the labels of the data set; ask for 'all' or a count.")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([_draw(random, each, asked.per_class, "per_class") for each in members])


def _draw(random: np.random.Generator, members: np.ndarray, n: int, field: str) -> Int64[np.ndarray, " drawn"]:
    if n > len(members):
        raise SpecError(field, n, f"1 to {len(members)}, the examples there are")
    return np.sort(random.choice(members, size=n, replace=False, shuffle=False)).astype(np.int64)


# --- which data ------------------------------------------------------------------------------------------------------


def tell_apart(dataset: Dataset, indices: Int64[np.ndarray, " examples"]) -> Iterator[str | Tensor]:
    """Identify these examples, for a hash: their indices, and what is known of them without reading them all.

    Pictures in memory give their numbers; files their names below the root, sizes and classes; any other data set its
    first and last example.
    """
    if isinstance(dataset, Relabelled):
        yield str(sorted(dataset.numbers.items()))
        dataset = dataset.dataset
    yield str(len(dataset))  # type: ignore[arg-type]
    yield torch.from_numpy(np.ascontiguousarray(indices))
    if isinstance(dataset, Pictures):
        yield from (torch.from_numpy(np.ascontiguousarray(each)) for each in (dataset.pixels, dataset.targets))
    elif isinstance(dataset, ImageFiles):
        if dataset.exif != "ignore":
            yield dataset.exif
        for path, label in (dataset.samples[index] for index in indices):
            yield f"{Path(path).parent.name}/{Path(path).name} {os.path.getsize(path)} {label}"
    else:
        for index in (indices[0], indices[-1]):
            inputs, label = _pair(_read(dataset, int(index)), f"example {index}")
            yield from (torch.as_tensor(np.asarray(inputs)), str(label))


def say_pictures(dataset: Dataset, indices: Int64[np.ndarray, " examples"]) -> list[str]:
    """Sentences on what the picture files of these examples have that is left out or converted, and on skipped files.

    Headers of the files are read, and their folders listed.
    """
    while isinstance(dataset, Relabelled):
        dataset = dataset.dataset
    if not isinstance(dataset, ImageFiles):
        return []
    paths = [dataset.samples[index][0] for index in indices]
    said = say_oddities(count_oddities(paths, dataset.exif, torch.get_num_threads()), len(paths))
    skipped = list_skipped(*dataset.folder) if dataset.folder else []
    n = f"{len(skipped):,} file{'s' * (len(skipped) > 1)}"
    return said + ([f"{n} skipped, which are no pictures of the data set: {say_some(skipped)}"] if skipped else [])


# --- batches ---------------------------------------------------------------------------------------------------------


# Preprocessing that neither draws random numbers nor keeps a state, by the module and name of its type.
_STATELESS = {"Compose", "Resize", "CenterCrop", "ToTensor", "PILToTensor", "ToImage", "ToDtype", "ConvertImageDtype",
              "Normalize", "Grayscale", "Pad", "ImageClassification", "AsRGB", "Identity"}  # fmt: skip
_LOADERS = {"default_loader", "pil_loader", "accimage_loader"}  # of torchvision's folders


def choose_readers(dataset: Dataset) -> int:
    """Number of threads that read examples: as many as torch computes with if pictures are decoded, else none.

    Threads are used only where all of the code that reads an example is known to keep no state (`is_stateless`).
    """
    pictures = _innermost(dataset)
    is_decoded = type(pictures) is ImageFiles or _is_folder(pictures)
    return torch.get_num_threads() if is_decoded and is_stateless(dataset) else 0


def is_stateless(dataset: Dataset, collate: Collate | None = None) -> bool:
    """Whether reading is known to give the same examples each time, in any order and from several threads.

    It is where the data set and its preprocessing are of this package, of torch or of torchvision, and draw no random
    numbers. A subclass, or a function of a user's, may do anything.
    """
    if collate is not None:
        return False
    if type(dataset) is TensorDataset:
        return True
    if type(dataset) in (Subset, Relabelled):
        return is_stateless(dataset.dataset)  # type: ignore[attr-defined]
    if type(dataset) is Transformed:
        return is_stateless(dataset.dataset) and _keeps_no_state(dataset.transform)
    if type(dataset) in (ImageFiles, Pictures):
        return _keeps_no_state(dataset.transform)  # type: ignore[attr-defined]
    return _is_folder(dataset) and _keeps_no_state(dataset.transform)  # type: ignore[attr-defined]


def _innermost(dataset: Any) -> Any:
    while type(dataset) in (Subset, Transformed, Relabelled):
        dataset = dataset.dataset
    return dataset


def _is_folder(dataset: Any) -> bool:
    """Whether it is torchvision's own class for pictures in folders, with a loader and labels of its own."""
    folders = sys.modules.get("torchvision.datasets")
    own = tuple(getattr(folders, name, ImageFiles) for name in ("ImageFolder", "DatasetFolder"))
    if type(dataset) not in own or type(dataset) is ImageFiles:
        return False
    loader = dataset.loader
    is_known = getattr(loader, "__module__", "") == "torchvision.datasets.folder"
    return is_known and getattr(loader, "__name__", "") in _LOADERS and dataset.target_transform is None


def _keeps_no_state(transform: Any) -> bool:
    if transform is None:
        return True
    module, name = type(transform).__module__, type(transform).__name__
    if module == "builtins":  # a function
        return getattr(transform, "__module__", "") == "ablation.inputs.demo"
    if name not in _STATELESS or not module.startswith(("torchvision.transforms", "ablation.", "torch.nn.modules")):
        return False
    parts = getattr(transform, "transforms", ()) if name == "Compose" else (getattr(transform, "then", None),)
    return all(_keeps_no_state(part) for part in parts)


def load_batches(
    dataset: Dataset,
    indices: Int64[np.ndarray, " examples"],
    batch_size: int,
    *,
    n_workers: int | None = None,
    collate: Collate | None = None,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Int64[Tensor, " batch"]]]:
    """Batches (inputs, labels) of the examples at `indices`, in that order; every batch but the last is full.

    `n_workers` threads read ahead by one batch; 0: the calling thread reads; None: as `choose_readers` says. The
    batches don't depend on it.
    Threads and not torch's DataLoader: its processes can't be started from a Celery child (daemons have no children),
    don't mix with OpenMP and CUDA after a fork, want shared memory that a container has little of, and their errors
    arrive as text. Decoding, resizing and converting release the interpreter lock: two threads were no slower than two
    processes (500x375 JPEGs to 224x224, 2 cores).

    Raises:
        DataError: an example can't be read or stacked, or a label is not a whole number; the message names the example.
    """
    blocks = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    n_threads = choose_readers(dataset) if n_workers is None else n_workers
    for block, batch in zip(blocks, _batches(dataset, blocks, n_threads, collate), strict=True):
        inputs, labels = _pair(batch, f"the batch from example {block[0]} on")
        labels = torch.as_tensor(_whole_numbers(labels))
        if len(labels) != len(block):
            raise DataError(f"the batch from example {block[0]} on has {len(labels)} labels for {len(block)} examples.")
        inputs = _check_inputs(inputs, f"the batch from example {block[0]} on", len(block))
        yield (inputs.pin_memory(), labels.pin_memory()) if pin_memory else (inputs, labels)


def _batches(
    dataset: Dataset, blocks: Sequence[Int64[np.ndarray, " _"]], n_threads: int, collate: Collate | None
) -> Iterator[Any]:
    if type(dataset) is TensorDataset and collate is None:
        yield from (dataset[torch.from_numpy(block)] for block in blocks)  # one copy instead of one per example
        return
    with ThreadPoolExecutor(n_threads) if n_threads else nullcontext() as pool:

        def read(block: Int64[np.ndarray, " batch"]) -> Iterator[Any]:
            return (pool.map if pool else map)(lambda index: _read(dataset, int(index)), block)

        ahead = deque(read(block) for block in blocks[:1])
        try:
            for block, following in zip_longest(blocks, blocks[1:]):
                if following is not None:
                    ahead.append(read(following))
                yield _stack(list(ahead.popleft()), collate, block)
        finally:
            if pool:  # drop what was read ahead if the caller stopped early
                pool.shutdown(cancel_futures=True)


def _read(dataset: Dataset, index: int) -> Any:
    try:
        return dataset[index]
    except (AblationError, MemoryError):
        raise
    except Exception as error:
        name, path = _name_of(dataset, index)
        reason = str(error).replace(path, Path(path).name) if path else str(error)
        raise DataError(
            f"{name} can't be read: {type(error).__name__}: {reason}. Replace it, or leave it out of the split"
            + (f" ({LEFT_OUT}, with --check-images full)." if path else ".")
        ) from error


def _check_inputs(inputs: Any, what: str, n_examples: int) -> Tensor:
    """The inputs of a batch as one dense tensor.

    Raises:
        DataError: they are several tensors, or none; the message says what they are.
    """
    if isinstance(inputs, np.ndarray):
        inputs = _as_tensor(inputs, f"the inputs of {what}")
    if not isinstance(inputs, Tensor):
        raise DataError(
            f"the inputs of {what} are {_describe(inputs)}; allowed: one tensor. Give the data set a transform that "
            "makes tensors; where the model takes several, wrap it in a module that takes one and makes the rest."
        )
    if reason := _why_not_rows(inputs):
        raise DataError(f"the inputs of {what} are a tensor {reason}; allowed: dense numbers, one row per example.")
    if len(inputs) != n_examples:
        raise DataError(f"{what} has {len(inputs)} inputs for {n_examples} examples; allowed: one row per example.")
    return inputs


def _pair(pair: Any, what: str) -> Any:
    if isinstance(pair, tuple | list) and len(pair) == 2:
        return pair
    raise DataError(
        f"{what} is {_describe(pair)}; "
        "allowed: a pair (input, label). Wrap the data set, or give a DataLoader whose collate_fn makes the pair."
    )


def _describe(given: Any) -> str:
    """Describe what is no pair or no tensor: its type, and the names or the number of its parts."""
    text = _article(type(given).__name__)
    if isinstance(given, Mapping):
        return f"{text} with {', '.join(repr(key) for key in [*given][:5])}{', ...' * (len(given) > 5)}"
    return f"{text} of {len(given)}" if hasattr(given, "__len__") and not hasattr(given, "shape") else text


def name_example(dataset: Dataset, index: int) -> str:
    """Name of an example in a message: its index, and its file if it has one."""
    return _name_of(dataset, index)[0]


def _name_of(dataset: Dataset, index: int) -> tuple[str, str]:
    """Name of an example in a message, and the path that must not be shown in full."""
    if isinstance(dataset, Subset):
        return _name_of(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, Transformed | Relabelled):
        return _name_of(dataset.dataset, index)
    samples = getattr(dataset, "samples", None)
    sample = samples[index] if isinstance(samples, list) else None
    path = sample[0] if isinstance(sample, tuple) and isinstance(sample[0], str) else ""
    return f"example {index}" + (f" ({'/'.join(Path(path).parts[-2:])})" if path else ""), path


def _stack(examples: list[Any], collate: Collate | None, block: Int64[np.ndarray, " batch"]) -> Any:
    try:
        return (collate or default_collate)(examples)
    except (AblationError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"the examples from {block[0]} on can't be stacked into a batch ({say_cause(error)}). Every input must be "
            "a tensor of one shape: give the data set a transform (`load_model` returns its model's own)."
        ) from error


# --- pictures that can't be read -------------------------------------------------------------------------------------

N_CHECKERS = 16  # threads that check files: most of their time is the disk's
CHECKED_AT_ONCE = 1024  # files between two reports
KNOWN_FILES = 1 << 16  # whose check is remembered by this process, since a plan and a job ask for the same ones


def find_bad_pictures(
    dataset: Dataset,
    indices: Int64[np.ndarray, " examples"],
    *,
    is_full: bool,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> dict[int, str]:
    """Find the picture files among these examples that can't be read: index -> reason; none for other data.

    `is_full`: every file is decoded; else its header is read and it is looked at whether it ends as its format says,
    and only a file that doesn't is decoded. `on_progress` gets the fraction that is checked; it may raise to cancel.
    """
    paths = _picture_paths(dataset, indices)
    bad: dict[int, str] = {}
    if not paths:
        return bad
    with ThreadPoolExecutor(N_CHECKERS) as pool:
        for start in range(0, len(paths), CHECKED_AT_ONCE):
            on_progress(start / len(paths))
            some = paths[start : start + CHECKED_AT_ONCE]
            for index, fault in zip(
                indices[start:], pool.map(lambda path: _fault_of(path, is_full), some), strict=False
            ):
                if fault:
                    bad[int(index)] = fault
    return bad


def _picture_paths(dataset: Dataset, indices: Int64[np.ndarray, " examples"]) -> list[str]:
    """Paths of these examples; none where they are not picture files that this package opens."""
    while isinstance(dataset, Subset | Transformed | Relabelled):
        if isinstance(dataset, Subset):
            indices = np.asarray(dataset.indices, dtype=np.int64)[indices]
        dataset = dataset.dataset
    return [dataset.samples[index][0] for index in indices] if isinstance(dataset, ImageFiles) else []


def _fault_of(path: str, is_full: bool) -> str:
    """Why a picture can't be read; empty if it can."""
    try:
        status = os.stat(path)
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"
    return _fault(path, is_full, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=KNOWN_FILES)
def _fault(path: str, is_full: bool, n_bytes: int, changed_ns: int) -> str:
    try:
        with open(path, "rb") as file:
            is_whole = _ends_well(file, n_bytes)
            file.seek(0)
            with Image.open(file) as picture:
                if is_full or not is_whole:
                    picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise anything for a damaged file
        return f"{type(error).__name__}: {str(error).replace(path, Path(path).name)}"
    return ""


def _ends_well(file: BinaryIO, n_bytes: int) -> bool:
    """Whether a file ends as a JPEG, a PNG or a WebP does; False where it doesn't, or that is not known."""
    head = file.read(12)
    file.seek(max(0, n_bytes - 12))
    tail = file.read(12)
    if head.startswith(b"\xff\xd8"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG"):
        return tail[4:8] == b"IEND"
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return int.from_bytes(head[4:8], "little") + 8 <= n_bytes
    return False


def draw_readable(
    dataset: Dataset,
    asked: SplitSpec,
    labels: Int64[np.ndarray, " all"] | None,
    *,
    is_full: bool,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Int64[np.ndarray, " examples"], dict[int, str]]:
    """Draw a split's examples as `draw_examples` does, from those that can be read; and those that can't, by index.

    Only what is drawn is checked: where something in it is bad, that is left out, and the draw is made again from the
    rest, until all of it can be read. The same files give the same examples in every process.

    Raises:
        SpecError: more examples are asked for than can be read.
        DataError: none can be read.
    """
    n = len(dataset)  # type: ignore[arg-type]
    bad: dict[int, str] = {}
    is_checked = np.zeros(n, dtype=bool)
    while True:
        usable = np.setdiff1d(np.arange(n), np.fromiter(bad, np.int64))
        if not len(usable):
            raise DataError(f"none of the {n} pictures of the split can be read: {describe_bad(dataset, bad)}.")
        drawn = usable[draw_examples(asked, None if labels is None else labels[usable], len(usable))]
        unchecked = drawn[~is_checked[drawn]]
        is_checked[unchecked] = True
        found = find_bad_pictures(dataset, unchecked, is_full=is_full, on_progress=on_progress)
        if not found:
            return drawn, bad
        bad |= found


def describe_bad(dataset: Dataset, bad: Mapping[int, str], n_shown: int = 3) -> str:
    """The first few of the examples that can't be read, for a message."""
    shown = [f"{name_example(dataset, index)}: {bad[index]}" for index in sorted(bad)[:n_shown]]
    return "; ".join(shown) + ("; ..." if len(bad) > n_shown else "")

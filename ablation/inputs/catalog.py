"""The models, layers and data sets that a job may name, and their facts: names, shapes, counts, the path of each layer.

In: names and a `DataSpec`. Out: frozen facts and counts. Folders are listed, but data is not read.
Torch-free: the API checks a spec against these facts at once, whether or not a worker is up.
The facts of the built-in models are a generated file, `facts.jsonl` (`make facts`), one model per line. Registered
models and data sets are passed in as `Registered`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ablation.errors import SpecError, as_given, nearest
from ablation.inputs.classes import published_classes
from ablation.inputs.folders import Folders
from ablation.inputs.images import SPLIT_FOLDERS, class_names, count_images
from ablation.inputs.mnist_and_cifar import published_counts
from ablation.spec import DataSpec, Record

DEMO_MODEL = "digits_alexnet"


COSTS = (
    "flops_after",
    "flops_spread",
    "flops_flat",
    "values_after",
    "values_spread",
    "widest_spread",
)  # fields of a layer, in the order of a line of the file


class LayerFacts(Record):
    """One parameter tensor that can be a target."""

    parameter: str = Field(description="full name, e.g. classifier.4.weight")
    kind: str = Field(description="class of the module that owns it, e.g. Linear")
    shape: tuple[int, ...] = Field(strict=False)
    path: str = Field(description="how the engine computes it: direct, finite or rerun")
    response: bool = Field(default=False, description="whether all its weights at once go by response functions")
    flops_after: float = Field(description="flops per example of everything that depends on this parameter")
    flops_spread: float = Field(default=0, description="the same, from where one weight moves more than one unit on")
    flops_flat: float = Field(default=0, description="of these, in Linears on flat features")
    values_after: int = Field(default=0, description="numbers per example in the results of products behind it")
    values_spread: int = Field(default=0, description="numbers per example that are computed where flops_spread are")
    widest_spread: int = Field(default=1, description="most numbers per example that move in and out of one call there")

    @property
    def name(self) -> str:
        """Name that users give: the module's name if this is its weight, else the parameter's full name."""
        return self.parameter.removesuffix(".weight")

    @property
    def n_weights(self) -> int:
        """Number of entries of the parameter tensor."""
        n = 1
        for size in self.shape:
            n *= size
        return n


class ModelFacts(Record):
    """Facts of a model that are known without running it."""

    name: str
    weights: tuple[str, ...] = Field(default=(), strict=False, description="names of torchvision's weights enum")
    n_classes: int
    input_shape: tuple[int, ...] = Field(strict=False, description="shape of one example after preprocessing")
    flops: float = Field(description="flops per example of one forward pass")
    widest: int = Field(description="most numbers per example that go into and out of one call")
    layers: tuple[LayerFacts, ...] = Field(strict=False)
    without_weights: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(
        default={}, description="names of the modules that have no weights, by their class"
    )
    classes: tuple[str, ...] = Field(
        default=(), strict=False, description="names of the classes that its own weights were trained for, where known"
    )


class DatasetFacts(Record):
    """Facts of a data set that are known without reading it."""

    name: str
    needs_root: bool
    n_classes: int | None = Field(default=None, description="None: known once its files are read")
    n_examples: dict[str, int] = Field(default={}, description="examples per split; empty: counted when asked for")
    n_per_class: dict[str, tuple[int, ...]] = Field(default={}, strict=False, description="the same, class by class")


def find_layer(facts: ModelFacts, layer: str) -> LayerFacts:
    """Find the layer called `layer`: a module's name (its weight) or a parameter's full name.

    Raises:
        SpecError: there is no such layer; the message names the nearest ones.
    """
    for candidate in facts.layers:
        if layer in (candidate.name, candidate.parameter):
            return candidate
    names = [candidate.name for candidate in facts.layers]
    if inside := [name for name in names if name.startswith(f"{layer}.")]:
        raise SpecError(
            "layer", layer, f"one of the layers inside it ({_some(inside)})", "It is a container of layers."
        )
    for kind, idle in facts.without_weights.items():
        if layer in idle:
            raise SpecError("layer", layer, f"a layer with weights ({_some(names)})", f"A {kind} has none.")
    raise SpecError("layer", layer, f"a layer of {facts.name} ({_some(names)})", nearest(layer, names))


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


class SplitCounts(Record):
    """Number of examples of a split, in all and per class, and the names of its classes (where they are known)."""

    n_examples: int
    n_per_class: tuple[int, ...] | None = Field(default=None, strict=False)
    classes: tuple[str, ...] | None = Field(default=None, strict=False)


def _even(n_classes: int, train: int, test: int) -> dict[str, tuple[int, ...]]:
    return {"train": (train,) * n_classes, "test": (test,) * n_classes}


def _facts_of(name: str, n_per_class: dict[str, tuple[int, ...]], *, needs_root: bool = True) -> DatasetFacts:
    return DatasetFacts(
        name=name,
        needs_root=needs_root,
        n_classes=len(n_per_class["test"]),
        n_examples={split: sum(counts) for split, counts in n_per_class.items()},
        n_per_class=n_per_class,
    )


# Counts of the published data; files of an operator are counted.
_DATASETS = {
    facts.name: facts
    for facts in (
        _facts_of(
            "digits",  # 1,797 in all: 50 of each class are kept for the test split
            {"train": (128, 132, 127, 133, 131, 132, 131, 129, 124, 130), "test": (50,) * 10},
            needs_root=False,
        ),
        DatasetFacts(name="imagefolder", needs_root=True),
        _facts_of(
            "mnist",
            {
                "train": (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
                "test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
            },
        ),
        _facts_of("fashionmnist", _even(10, 6000, 1000)),
        _facts_of("cifar10", _even(10, 5000, 1000)),
        _facts_of("cifar100", _even(100, 500, 100)),
        DatasetFacts(name="imagenet", needs_root=True, n_classes=1000),
    )
}


class FactsTable(Mapping[str, ModelFacts]):
    """Facts by name, from lines that are parsed at the first access."""

    def __init__(self, lines: Mapping[str, str]) -> None:
        self.lines = lines
        self._read: dict[str, ModelFacts] = {}

    def __getitem__(self, name: str) -> ModelFacts:
        if name not in self._read:
            self._read[name] = facts_from_line(self.lines[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)


@cache
def _built_in() -> FactsTable:
    lines = files("ablation.inputs").joinpath("facts.jsonl").read_text("utf-8").splitlines()
    return FactsTable({line.split('"', 2)[1]: line for line in lines})


@dataclass(frozen=True)
class Registered:
    """Registered models and data sets; a built-in one of the same name takes precedence."""

    models: Mapping[str, ModelFacts] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()


NOTHING = Registered()


def model_names(registered: Registered = NOTHING) -> tuple[str, ...]:
    """Names of the demo model, every torchvision classification model, and the registered ones."""
    return tuple(dict.fromkeys((*_built_in(), *registered.models)))


def model_facts(name: str, registered: Registered = NOTHING) -> ModelFacts:
    """Facts of the model `name`, as built by `load_model(name)`.

    Raises:
        SpecError: there is no such model; the message names the nearest ones.
    """
    if name in _built_in():
        return _built_in()[name]
    if name in registered.models:
        return registered.models[name]
    names = model_names(registered)
    allowed = f"one of {len(names)} models ({', '.join(names[:3])}, ...)"
    raise SpecError("model.name", name, allowed, nearest(name.lower(), names))


def line_from_facts(facts: ModelFacts) -> str:
    """Encode facts as one line of the file: plain arrays; what the parameters of a module share is stored once."""
    modules = [
        (*common, [(layer.parameter.rpartition(".")[2], layer.shape) for layer in layers])
        for common, layers in groupby(facts.layers, _in_common)
    ]
    fields = (
        *(facts.name, facts.weights, facts.n_classes, facts.input_shape, facts.flops, facts.widest),
        *(modules, facts.without_weights),
        *([facts.classes] if facts.classes else []),
    )
    return json.dumps(fields, separators=(",", ":"))


def _in_common(layer: LayerFacts) -> tuple[str | float, ...]:
    costs = (getattr(layer, cost) for cost in COSTS)
    return layer.parameter.rpartition(".")[0], layer.kind, layer.path, layer.response, *costs


def facts_from_line(line: str) -> ModelFacts:
    """Decode the facts written by `line_from_facts`."""
    name, weights, n_classes, input_shape, flops, widest, modules, without_weights, *classes = json.loads(line)
    layers = tuple(
        LayerFacts(
            parameter=f"{module}.{own}" if module else own,
            kind=kind,
            shape=shape,
            path=path,
            response=response,
            **dict(zip(COSTS, costs, strict=True)),
        )
        for module, kind, path, response, *costs, parameters in modules
        for own, shape in parameters
    )
    return ModelFacts(
        name=name,
        weights=weights,
        n_classes=n_classes,
        input_shape=input_shape,
        flops=flops,
        widest=widest,
        layers=layers,
        without_weights=without_weights,
        classes=tuple(name for names in classes for name in names),
    )


def find_below(folder: Path, given: str, field: str, allowed: str) -> Path:
    """Resolve the path `given` below `folder`, following every link.

    Raises:
        SpecError: it leads out of the folder (`..`, an absolute path, a link), or is not a valid path.
    """
    try:
        top = folder.resolve()
        path = (top / given).resolve()
        inside = path.is_relative_to(top) and not Path(given).is_absolute() and ".." not in Path(given).parts
        path.exists()  # raises for a name that is too long
    except (OSError, ValueError, RuntimeError):  # NUL or surrogates; a name that is too long; a cycle of links
        inside = False
    if not inside:
        raise SpecError(field, given, allowed, "It must not lead out of that folder, by `..` or by a link.")
    return path


def dataset_names(registered: Registered = NOTHING) -> tuple[str, ...]:
    """Names of the built-in data sets, and of the registered ones."""
    return tuple(dict.fromkeys((*_DATASETS, *registered.datasets)))


def dataset_facts(name: str, registered: Registered = NOTHING) -> DatasetFacts:
    """Facts of the data set `name`.

    Raises:
        SpecError: there is no such data set; the message names the nearest ones.
    """
    if name in _DATASETS:
        return _DATASETS[name]
    if name in registered.datasets:
        return DatasetFacts(name=name, needs_root=False)
    names = dataset_names(registered)
    raise SpecError("data.name", name, f"one of {', '.join(names)}", nearest(name.lower(), names))


def find_root(data: DataSpec, folders: Folders, registered: Registered = NOTHING) -> Path | None:
    """Find a data set's folder; None for a bundled one. Without a root, a registered one gets the data folder.

    Raises:
        SpecError: the root is missing, isn't a folder, or leads out of the data folder; or the data set takes none.
    """
    facts, allowed = dataset_facts(data.name, registered), "a folder, relative to the data folder"
    if data.name in _DATASETS and not facts.needs_root:
        if data.root is not None:
            raise SpecError("data.root", data.root, f"nothing: {data.name} is bundled", "Leave root out.")
        return None
    if data.root is None and facts.needs_root:
        raise SpecError("data.root", None, allowed, f"Say where {data.name} is ('.' is the data folder itself).")
    root = find_below(folders.data, data.root or ".", "data.root", allowed)
    if data.root is not None and not root.is_dir():
        raise SpecError("data.root", data.root, allowed, "There is no such folder.")
    return root


def check_exif(name: str, exif: str) -> None:
    """Refuse to apply EXIF orientations where no picture files are read by this package.

    Raises:
        SpecError: `exif` is "apply" for such a data set, or no known word.
    """
    if exif not in ("ignore", "apply"):
        raise SpecError("data.exif", exif, "'ignore' or 'apply'")
    if exif == "apply" and name not in SPLIT_FOLDERS:
        where = " and ".join(SPLIT_FOLDERS)
        raise SpecError("data.exif", exif, f"'ignore', but for {where}", f"{name} has no picture files to turn.")


def split_counts(data: DataSpec, folders: Folders, registered: Registered = NOTHING) -> dict[str, SplitCounts] | None:
    """Count the examples of each split in the spec, in all and per class; None where the data must be opened for that.

    Registered data, and picture files of which bad ones are left out, can be opened, and so counted, by a worker only.

    Raises:
        SpecError: there is no such data set, or its root or a split's files can't be used.
    """
    facts, root = dataset_facts(data.name, registered), find_root(data, folders, registered)
    check_exif(data.name, data.exif)
    if data.name not in _DATASETS:
        return None
    with as_given({"data.root": data.root}):
        counts = {split: _count(facts, root, split) for split in data.splits}
        classes = {split: _classes(facts, root, split) for split in data.splits}
    if data.bad_images == "skip" and data.name in SPLIT_FOLDERS:
        return None
    return {
        split: SplitCounts(n_examples=sum(each), n_per_class=each, classes=classes[split])
        for split, each in counts.items()
    }


def _classes(facts: DatasetFacts, root: Path | None, split: str) -> tuple[str, ...] | None:
    if root is not None and facts.name in SPLIT_FOLDERS:
        return class_names(facts.name, root, split, facts.n_classes)
    return published_classes(facts.name, facts.n_classes or 0)


def _count(facts: DatasetFacts, root: Path | None, split: str) -> tuple[int, ...]:
    if root is None:
        return facts.n_per_class[split]
    if facts.name in SPLIT_FOLDERS:
        return count_images(facts.name, root, split, facts.n_classes)
    return published_counts(facts.name, root, split, facts.n_classes or 0)

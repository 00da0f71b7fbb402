"""Which class of the model each class of a data set is: by name where both are known, else by number. Torch-free.

In: the names of a data set's classes in the order of its labels, the number and names of the model's, and a mapping
where the user gives one. Out: the model's class number for each label, and in words how it was found.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ablation.errors import SpecError, nearest
from ablation.inputs.checkpoints import order_names
from ablation.inputs.published import imagenet_classes

ADVICE = (
    "Say which class of the model each one is: on the command line --classes FILE with lines such as `cat,281`; "
    'in a spec "classes": {"cat": 281} below "data".'
)

# Classes of published data sets, in the order of their labels. Files in a published format may hold other classes than
# those published, so their numbers count where the names don't match.
_TEN = tuple(str(digit) for digit in range(10))
PUBLISHED_CLASSES: dict[str, tuple[str, ...]] = {
    "digits": _TEN,
    "mnist": _TEN,
    "fashionmnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip

_GAP = re.compile(r"[\s_-]+")


def published_classes(name: str, n_classes: int) -> tuple[str, ...]:
    """Names of the classes of a published data set: known ones, or their numbers."""
    return PUBLISHED_CLASSES.get(name, tuple(map(str, range(n_classes))))


@dataclass(frozen=True)
class ModelClasses:
    """The classes of a model: how many, and all names of each in the order of their numbers, where they are known."""

    n: int
    names: tuple[tuple[str, ...], ...] | None = None
    source: str = ""


@dataclass(frozen=True)
class Numbering:
    """The model's class for each label of a data set (None: the label itself), and in words how it was found."""

    numbers: Mapping[int, int] | None
    text: str


def imagenet(n_classes: int) -> ModelClasses:
    """The classes of torchvision's weights."""
    return ModelClasses(n_classes, imagenet_classes(), "ImageNet's")


def listed_classes(holder: Any) -> tuple[str, ...] | None:
    """Names that an object lists as torchvision's data sets do: `wnids`, `classes` or `class_to_idx`."""
    for attribute in ("wnids", "classes", "class_to_idx"):
        names = order_names(getattr(holder, attribute, None))
        if names and len(set(names)) == len(names):
            return names
    return None


def number_classes(
    names: Sequence[str] | None,
    model: ModelClasses,
    *,
    given: Mapping[str, int | str] | None = None,
    are_folders: bool = False,
    are_published: bool = False,
) -> Numbering:
    """The model's class for each class of a data set.

    `names`: the data set's, in the order of its labels; None: it lists none. `given`: the user's mapping.
    `are_folders`: names are those of folders, so the order of labels is that of sorted text; folders whose names are
    whole numbers mean these numbers. `are_published`: labels are numbers in a file of a published format.

    Raises:
        SpecError: classes don't match by name, or their counts differ; or the mapping leaves one out or names no class.
    """
    if given is not None:
        return _by_mapping(names, model, given)
    if names is None:
        return Numbering(None, "as the data set numbers them")
    if model.names is not None:
        found, missing = _by_name(names, model.names)
        if not missing:
            return Numbering(_shortened(found), f"{len(names):,} by name, of {model.source} {model.n:,}")
    else:
        missing = []
    if are_folders and all(name.isascii() and name.isdecimal() for name in names):
        return _by_number(names, model)
    if missing and not (are_published and len(names) == model.n):
        raise _no_match(names, model, missing)
    wnids = {wnid: number for number, (wnid, _) in enumerate(imagenet_classes())}
    if are_folders and len(wnids) == model.n != len(names) and all(name in wnids for name in names):
        found = {label: wnids[name] for label, name in enumerate(names)}
        return Numbering(_shortened(found), f"{len(names):,} by WordNet id, of ImageNet's {model.n:,}")
    if len(names) != model.n:
        given_text = f"{len(names):,} classes ({_some(names)})"
        allowed = f"the {model.n:,} classes of the model, or a mapping to them"
        raise SpecError("data.classes", given_text, allowed, ADVICE)
    how = "sorted folder name" if are_folders else "number"
    return Numbering(None, f"all {model.n:,} by {how}")


def _no_match(names: Sequence[str], model: ModelClasses, missing: list[str]) -> SpecError:
    known = [name for several in model.names or () for name in several]
    near = nearest(missing[0], known)
    says = f"The model has no {missing[0]!r}. {near} {ADVICE}".replace("  ", " ")
    return SpecError(
        "data.classes",
        f"{len(names):,} classes ({_some(names)})",
        f"names of {model.source} {model.n:,} classes ({_some(known)}), or a mapping to them",
        says,
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _shortened(numbers: Mapping[int, int]) -> Mapping[int, int] | None:
    return None if all(label == number for label, number in numbers.items()) else numbers


def _plain(name: str) -> str:
    return _GAP.sub(" ", name).strip().casefold()


def _places(names: Sequence[Sequence[str]]) -> dict[str, set[int]]:
    """Class numbers of every name, as it is and without case and gaps."""
    places: dict[str, set[int]] = {}
    for number, several in enumerate(names):
        for name in several:
            for form in {name, _plain(name)}:
                places.setdefault(form, set()).add(number)
    return places


def _by_name(names: Sequence[str], known: Sequence[Sequence[str]]) -> tuple[dict[int, int], list[str]]:
    """Numbers of the names that the model has once each, and the names that it has not, or more than once."""
    places = _places(known)
    found, missing = {}, []
    for label, name in enumerate(names):
        at = places.get(name) or places.get(_plain(name)) or set()
        if len(at) == 1:
            found[label] = next(iter(at))
        else:
            missing.append(name)
    if len(set(found.values())) < len(found):  # two folders would be one class
        missing = missing or [names[label] for label in found if list(found.values()).count(found[label]) > 1]
    return found, missing


def _by_number(names: Sequence[str], model: ModelClasses) -> Numbering:
    """Folders whose names are class numbers."""
    numbers = {label: int(name) for label, name in enumerate(names)}
    beyond = [name for name in names if int(name) >= model.n]
    twice = len(set(numbers.values())) < len(numbers)
    if beyond or twice:
        why = "Two folders have one number." if twice else f"Folder {beyond[0]!r} is beyond them."
        allowed = f"folders named by class numbers of the model, 0 to {model.n - 1}, or a mapping to them"
        raise SpecError("data.classes", f"folders {_some(names)}", allowed, f"{why} {ADVICE}")
    return Numbering(_shortened(numbers), f"{len(names):,} by folder names, which are class numbers")


def _by_mapping(names: Sequence[str] | None, model: ModelClasses, given: Mapping[str, int | str]) -> Numbering:
    places = _places(model.names or ())
    wanted = {name: _class_number(name, value, model, places) for name, value in given.items()}
    if names is None:
        if odd := [name for name in wanted if not (name.isascii() and name.isdecimal())]:
            allowed = "label numbers of the data set (it lists no names of its classes)"
            raise SpecError("data.classes", odd[0], allowed)
        numbers = {int(name): number for name, number in wanted.items()}
    else:
        if absent := [name for name in names if name not in wanted]:
            allowed = f"a class of the model for each class of the data set ({_some(names)})"
            near = nearest(absent[0], wanted)
            raise SpecError("data.classes", dict(given), allowed, f"There is none for {absent[0]!r}. {near}".rstrip())
        numbers = {label: wanted[name] for label, name in enumerate(names)}
    return Numbering(numbers, f"{len(numbers):,} by the given mapping, of {model.n:,}")


def _class_number(name: str, value: int | str, model: ModelClasses, places: Mapping[str, set[int]]) -> int:
    if isinstance(value, int):
        if not 0 <= value < model.n:
            raise SpecError(f"data.classes.{name}", value, f"a class number of the model, 0 to {model.n - 1}")
        return value
    at = places.get(value) or places.get(_plain(value)) or set()
    if len(at) == 1:
        return next(iter(at))
    if len(at) > 1:
        allowed = f"one of the numbers {', '.join(map(str, sorted(at)))}"
        raise SpecError(f"data.classes.{name}", value, allowed, "The model has several classes of this name.")
    if model.names is None:
        allowed = f"a class number, 0 to {model.n - 1}"
        raise SpecError(f"data.classes.{name}", value, allowed, "The names of this model's classes are not known.")
    allowed = f"a class number, 0 to {model.n - 1}, or a name of {model.source} classes"
    known = (each for several in model.names for each in several)
    raise SpecError(f"data.classes.{name}", value, allowed, nearest(value, known))

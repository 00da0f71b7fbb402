"""Which state dict of a checkpoint file is meant, under which names, and for how many classes. Torch-free.

In: a file, or what was read from it; the names and shapes of a model's parameters. Out: the tensors by the model's own
names, and notes that say what was left out. `read_outline` reads shapes alone and runs no code of the file, so that the
API knows what a file holds; the worker makes the same choice among the tensors themselves.
"""

import json
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ablation.errors import SpecError, nearest

DEEPEST, MOST_DICTS = 5, 4096  # how far into a file state dicts are looked for
MOST_PICKLE_BYTES = 256 << 20
FEWEST_SHARE = 0.5  # of a model's parameters, in what is taken for its state dict
N_PROBES = 12  # names by which prefixes are found

# Names that torch's own wrappers add anywhere in a name; no module is called so.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# densenet's files on torchvision's server have these names, which torchvision changes in the same way.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")
_CLASS_LISTS = ("classes", "class_names", "categories", "class_to_idx", "idx_to_class")


class Outline(NamedTuple):
    """A tensor in a file, by its shape alone."""

    shape: tuple[int, ...]


class Chosen(NamedTuple):
    """The state dict that was chosen: tensors by the model's names, and notes of what was done to the names."""

    tensors: dict[str, Any]
    notes: tuple[str, ...]


class _Candidate(NamedTuple):
    """A state dict in the file: the keys that lead to it, the prefix of its names, the tensors without it."""

    keys: tuple[str, ...]
    prefix: str
    tensors: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        return ".".join((*self.keys, *([self.prefix.removesuffix(".")] if self.prefix else []))) or "."


# --- which state dict ------------------------------------------------------------------------------------------------


def choose_state_dict(tree: Any, wanted: Mapping[str, tuple[int, ...]], key: str | None, given: str) -> Chosen | None:
    """Choose the state dict of a model with these parameters from what a file holds; None where there is none.

    A state dict may be inside of dicts and lists, and its names may have a prefix. `key` (dots between its parts, list
    items by number) says where it is, or which prefix it has. `given` is what the user gave for the weights.

    Raises:
        SpecError: several state dicts fit, or `key` leads nowhere; the message names the keys there are.
    """
    where, inside = ((), tree) if key is None else _enter(tree, key, wanted, given)
    found = _find_candidates(inside, wanted)
    if key == ".":
        found = [one for one in found if one.label == "."]
    labels = [".".join((*where, one.label)).removesuffix("..").removesuffix(".") or "." for one in found]
    if len(found) > 1:
        file = given if key is None else given.removesuffix(f":{key}")
        choices = ", ".join(f"{file}:{label}" for label in labels)
        raise SpecError("model.weights", given, f"one of {choices}", "The file holds several state dicts.")
    if found:
        return Chosen(found[0].tensors, found[0].notes)
    nodes = (node for _, node in _walk(inside) if node and len(_tensors_of(node)) == len(node))
    tensors = _tensors_of(next(nodes, None))
    return Chosen(tensors, ()) if tensors else None


def _enter(tree: Any, key: str, wanted: Mapping[str, tuple[int, ...]], given: str) -> tuple[tuple[str, ...], Any]:
    """The part of the file that `key` names: a dict, a list item, or the names with a prefix."""
    inside = tree if key == "." else _follow(tree, key.split("."))
    if inside is None:
        labels = [one.label for one in _find_candidates(tree, wanted)]
        names = labels or [str(name) for name in tree][:8] if isinstance(tree, Mapping) else labels
        file = given.removesuffix(f":{key}")
        allowed = f"one of {', '.join(f'{file}:{label}' for label in names)}" if names else f"{file} alone"
        raise SpecError("model.weights", given, allowed, f"It has no {key!r}. {nearest(key, names)}".rstrip())
    return ((key,) if key != "." else ()), inside


def _follow(node: Any, parts: list[str]) -> Any:
    if not parts:
        return node
    if isinstance(node, list | tuple):
        return _follow(node[int(parts[0])], parts[1:]) if parts[0].isdecimal() and int(parts[0]) < len(node) else None
    if not isinstance(node, Mapping):
        return None
    by_text = {str(name): value for name, value in node.items()}
    for n in range(len(parts), 0, -1):  # keys may have dots of their own
        name = ".".join(parts[:n])
        if name in by_text and isinstance(by_text[name], Mapping | list | tuple):
            inside = _follow(by_text[name], parts[n:])
            if inside is not None:
                return inside
    prefix = ".".join(parts) + "."
    return {n.removeprefix(prefix): each for n, each in _tensors_of(node).items() if n.startswith(prefix)} or None


def _find_candidates(tree: Any, wanted: Mapping[str, tuple[int, ...]]) -> list[_Candidate]:
    """State dicts that have at least half of the wanted parameters, of their shapes; else of their names alone."""
    by_name = [one for keys, node in _walk(tree) for one in _prefixed(keys, _tensors_of(node), wanted)]
    by_shape = [one for one in by_name if _share(one.tensors, wanted, with_shape=True) >= FEWEST_SHARE]
    return by_shape or by_name


def _walk(tree: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Every dict in the file, outer ones first, with the keys that lead to it."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    for keys, node in waiting:
        if isinstance(node, Mapping):
            yield keys, node
        inside = node.items() if isinstance(node, Mapping) else enumerate(node) if _is_list(node) else ()
        for key, value in inside:
            if len(keys) < DEEPEST and len(waiting) < MOST_DICTS and (isinstance(value, Mapping) or _is_list(value)):
                waiting.append(((*keys, str(key)), value))


def _is_list(node: Any) -> bool:
    return isinstance(node, list | tuple) and not isinstance(node, Outline) and len(node) < MOST_DICTS


def _tensors_of(node: Any) -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {}
    return {name: each for name, each in node.items() if isinstance(name, str) and hasattr(each, "shape")}


def _prefixed(
    keys: tuple[str, ...], tensors: dict[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[_Candidate]:
    """State dicts among these tensors, one for each prefix under which most of the wanted names are found."""
    named = _plain_names(tensors)
    names = list(wanted)
    probes = names[:: max(1, len(names) // N_PROBES)]
    prefixes = Counter(
        name[: len(name) - len(probe)]
        for name in named
        for probe in probes
        if name == probe or name.endswith(f".{probe}")
    )
    for prefix, _ in prefixes.most_common(N_PROBES):
        inside = {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}
        if _share(inside, wanted) >= FEWEST_SHARE:
            others = [name for name in named if not name.startswith(prefix)]
            yield _Candidate(keys, prefix, inside, _say_names(keys, prefix, others, named is not tensors))


def _say_names(keys: tuple[str, ...], prefix: str, others: list[str], is_plain: bool) -> tuple[str, ...]:
    notes = []
    if keys:
        notes.append(f"taken from its key {'.'.join(keys)!r}")
    if is_plain:
        notes.append("parts of its names that torch's wrappers or old versions add were taken out")
    if prefix:
        notes.append(f"the prefix {prefix!r} of its names was left out")
    if prefix and others:
        notes.append(f"left out, beside that prefix: {say_some(others)}")
    return tuple(notes)


def say_some(names: Sequence[str], n: int = 3) -> str:
    """The first names, and how many there are."""
    return ", ".join(names[:n]) + (f", ... ({len(names)} in all)" if len(names) > n else "")


def _plain_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors by names without those of torch's wrappers, and with densenet's old names replaced."""
    plain = {_OLD_DENSENET.sub(r"\1\2", _WRAPPERS.sub("", name)): each for name, each in tensors.items()}
    return tensors if len(plain) < len(tensors) or plain.keys() == tensors.keys() else plain


def _share(tensors: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], with_shape: bool = False) -> float:
    found = [name for name in wanted if name in tensors]
    if with_shape:
        found = [name for name in found if tuple(tensors[name].shape) == tuple(wanted[name])]
    return len(found) / max(1, len(wanted))


# --- what a file says of its classes ---------------------------------------------------------------------------------


def find_head(shapes: Mapping[str, tuple[int, ...]], n_classes: int) -> str | None:
    """Name of the module that makes the logits: the last one whose weight has a row for each class."""
    weights = [name for name, shape in shapes.items() if name.endswith("weight") and len(shape) > 1]
    heads = [name.removesuffix("weight").removesuffix(".") for name in weights if shapes[name][0] == n_classes]
    return heads[-1] if heads else None


def count_classes(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], n_classes: int) -> int:
    """Number of classes of a state dict: rows of the head's weight, where only the number of rows is another one."""
    head = find_head(shapes, n_classes)
    name = f"{head}.weight" if head else "weight"
    if head is None or name not in tensors:
        return n_classes
    given, wanted = tuple(tensors[name].shape), tuple(shapes[name])
    return int(given[0]) if given[1:] == wanted[1:] and len(given) == len(wanted) and given[0] > 0 else n_classes


def find_classes(tree: Any, n_classes: int) -> tuple[str, ...] | None:
    """The names of the classes that a checkpoint lists, in the order of their numbers; None where it lists none."""
    for _, node in _walk(tree):
        by_key = {str(key).lower(): value for key, value in node.items()}
        for key in _CLASS_LISTS:
            names = order_names(by_key.get(key))
            if names and len(names) == n_classes:
                return names
    return None


def order_names(listed: Any) -> tuple[str, ...] | None:
    """Names in the order of their numbers, from a list, from names to numbers, or from numbers to names."""
    if isinstance(listed, Mapping):
        if not listed:
            return None
        is_by_name = all(isinstance(number, int) and not isinstance(number, bool) for number in listed.values())
        try:
            pairs = [(int(n), name) if is_by_name else (int(name), n) for name, n in listed.items()]
        except (TypeError, ValueError):
            return None
        listed = [name for _, name in sorted(pairs, key=lambda pair: pair[0])]
        if sorted(number for number, _ in pairs) != list(range(len(pairs))):
            return None
    if not isinstance(listed, list | tuple) or not listed:
        return None
    names = [each[0] if isinstance(each, list | tuple) and each else each for each in listed]
    return tuple(names) if all(isinstance(name, str) for name in names) else None


# --- the outline of a file -------------------------------------------------------------------------------------------


def read_outline(path: Path) -> Any:
    """What a checkpoint holds, with the shape in place of each tensor; None where it can't be told without torch."""
    try:
        stat = path.stat()
        return _read_outline(str(path), stat.st_size, stat.st_mtime_ns)
    except Exception:  # a damaged file can raise anything; whoever loads it will say so
        return None


@lru_cache(maxsize=16)
def _read_outline(path: str, size: int, changed_ns: int) -> Any:
    if path.endswith(".safetensors"):
        with open(path, "rb") as file:
            return _read_safetensors(file, size)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            info = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if info.file_size > MOST_PICKLE_BYTES:
                return None
            with archive.open(info) as stream:
                return _Outliner(stream).load()
    with open(path, "rb") as file:  # the format before torch 1.6: magic number, version, system, then the object
        for _ in range(3):
            _Outliner(file).load()
        return _Outliner(file).load()


def _read_safetensors(file: BinaryIO, size: int) -> dict[str, Any]:
    n_bytes = int.from_bytes(file.read(8), "little")
    if n_bytes > min(size, MOST_PICKLE_BYTES):
        raise ValueError("the header is longer than the file")
    header = json.loads(file.read(n_bytes))
    told = read_metadata(header.pop("__metadata__", None))
    return {**told, **{name: Outline(tuple(about["shape"])) for name, about in header.items()}}


def read_metadata(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Lists of classes in the metadata of a safetensors file, which are texts of JSON."""
    found = {}
    for key, text in (metadata or {}).items():
        if key.lower() in _CLASS_LISTS:
            try:
                found[key] = json.loads(text)
            except ValueError:
                continue
    return found


class _Opaque:
    """Stands for any object in a pickle but tensors and plain containers; it takes what the pickle does to it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "_Opaque":
        return _Opaque()

    def append(self, _: Any) -> None:
        """Take a list's item."""

    def extend(self, _: Any) -> None:
        """Take a list's items."""


class _Ordered(OrderedDict[Any, Any]):
    """An ordered dict without the attributes that a pickle gives it."""

    def __setstate__(self, state: Any) -> None:
        pass


def _outline_of_storage(*arguments: Any) -> Outline:
    return Outline(tuple(int(n) for n in arguments[2]))


def _outline_of_parameter(*arguments: Any) -> Any:
    return arguments[0]


_REBUILT: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _Ordered,
    **{("torch._utils", name): _outline_of_storage for name in ("_rebuild_tensor", "_rebuild_tensor_v2")},
    **{
        ("torch._utils", name): _outline_of_parameter
        for name in ("_rebuild_parameter", "_rebuild_parameter_with_state")
    },
}


class _Outliner(pickle.Unpickler):
    """Reads a pickle of torch without running anything that it names."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for whatever the pickle names."""
        return _REBUILT.get((module, name), _Opaque)

    def persistent_load(self, pid: Any) -> Any:
        """A stand-in for a tensor's storage."""
        return _Opaque()

"""Which weights a job names: torchvision's, a file's, a model's own, or none. Torch-free.

In: a model's name and facts, and what the spec gives for its weights. Out: `Weights`, which says in words what they
are, and the model's facts with them: a fine-tuned head has another number of classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ablation.errors import SpecError, nearest
from ablation.inputs.catalog import DEMO_MODEL, ModelFacts, find_below, model_names
from ablation.inputs.checkpoints import Chosen, choose_state_dict, count_classes, find_classes, find_head, read_outline
from ablation.inputs.classes import PUBLISHED_CLASSES, ModelClasses, imagenet
from ablation.inputs.folders import Folders
from ablation.inputs.published import default_weights, recognise, say_preprocessing

NONE = "none"  # the word for weights that are initialised from a seed


@dataclass(frozen=True)
class Weights:
    """What a job's weights are.

    `member`: the name in torchvision's enum whose weights these are; `like`: the one whose preprocessing is taken.
    `path` and `key`: the file, and what is meant in it. `is_own`: they come with the model. `text`,
    `preprocessing` and `notes` are for people.
    """

    text: str
    classes: ModelClasses
    member: str | None = None
    like: str | None = None
    path: Path | None = None
    key: str | None = None
    preprocessing: str | None = None
    notes: tuple[str, ...] = ()
    is_own: bool = False


def find_weights(given: str | None, facts: ModelFacts, folders: Folders, seed: int = 0) -> Weights:
    """Find the weights that `given` names for the model with these facts.

    Raises:
        SpecError: they are not there, or a model of torchvision is asked for without saying which; the message lists
            the choices. So does a file with several state dicts.
    """
    is_own, is_demo = facts.name not in model_names(), facts.name == DEMO_MODEL
    allowed = say_choices(facts)
    if given is None and not is_own and not is_demo:
        next_step = f"A network that has learned nothing is measured only where that is asked for: weights {NONE!r}."
        raise SpecError("model.weights", given, allowed, next_step)
    if given == NONE and is_own:
        raise SpecError("model.weights", given, allowed, "Its factory makes it: leave the weights out.")
    if given in facts.weights:
        return _of_member(facts, str(given), f"{given} of torchvision")
    if given == NONE:
        text = f"{NONE}: initialised from seed {seed}"
    elif given is None:
        text = f"its own, as its factory makes them after seed {seed}" if is_own else "its own, trained on the digits"
    else:
        return _of_file(given, facts, folders)
    names = (PUBLISHED_CLASSES["digits"] if is_demo else facts.classes) if given is None else ()
    names = names if len(names) == facts.n_classes else ()
    found = _of_text(facts, text, ModelClasses(facts.n_classes, _each(names), "the model's"))
    return replace(found, is_own=given is None)


def say_choices(facts: ModelFacts) -> str:
    """What may be given for the weights of a model."""
    is_own = facts.name not in model_names()
    none = () if is_own else (f"{NONE!r} (initialised from the seed)",)
    return ", ".join((*none, *facts.weights, "or a file below the checkpoint folder")).removeprefix("or ")


def find_file(given: str, facts: ModelFacts, folders: Folders) -> tuple[Path, str | None]:
    """The checkpoint file that `given` names, as FILE or FILE:KEY, and the key.

    Raises:
        SpecError: there is no such file, or it is outside of the checkpoint folder.
    """
    allowed = say_choices(facts)
    whole = find_below(folders.checkpoints, given, "model.weights", allowed)
    for file, key in () if whole.is_file() else split_key(given):
        if (path := find_below(folders.checkpoints, file, "model.weights", allowed)).is_file():
            return path, key
    if not whole.is_file():
        raise SpecError("model.weights", given, allowed, nearest(given, facts.weights) or "There is no such file.")
    return whole, None


def split_key(given: str) -> list[tuple[str, str]]:
    """Every way to read a text as FILE:KEY, the longest file first."""
    at = [place for place, letter in enumerate(given) if letter == ":" and 0 < place < len(given) - 1]
    return [(given[:place], given[place + 1 :]) for place in reversed(at)]


def _of_member(facts: ModelFacts, member: str, text: str) -> Weights:
    said = say_preprocessing(facts.name, member, is_member=True)
    return Weights(text, imagenet(facts.n_classes), member=member, like=member, preprocessing=said)


def _of_text(facts: ModelFacts, text: str, classes: ModelClasses) -> Weights:
    if facts.name == DEMO_MODEL:
        return Weights(text, classes, preprocessing="grey, 8x8, values from 0 to 1")
    if facts.name not in model_names():
        return Weights(text, classes, preprocessing="the transform of its factory")
    like = default_weights(facts.name)
    said = f"{say_preprocessing(facts.name, like, is_member=False)}, the model's default"
    return Weights(text, classes, like=like, preprocessing=said)


def _of_file(given: str, facts: ModelFacts, folders: Folders) -> Weights:
    path, key = find_file(given, facts, folders)
    if key is None and facts.weights and (member := recognise(facts.name, path)):
        found = _of_member(facts, member, f"file {given}, which is torchvision's {member}")
        return replace(found, path=path)
    tree, shapes = read_outline(path), shapes_of(facts)
    chosen = choose_state_dict(tree, shapes, key, given) if tree is not None else None
    n_classes = count_classes(chosen.tensors, shapes, facts.n_classes) if chosen else facts.n_classes
    found = _of_text(facts, f"file {given}", name_classes(tree, n_classes))
    return replace(found, path=path, key=key, notes=say_changes(path, chosen, facts.n_classes, n_classes))


def name_classes(tree: object, n_classes: int) -> ModelClasses:
    """The classes of a model with weights of a file, by the names that the file lists."""
    return ModelClasses(n_classes, _each(find_classes(tree, n_classes) or ()), "the checkpoint's")


def say_changes(path: Path, chosen: Chosen | None, n_before: int, n_classes: int) -> tuple[str, ...]:
    """Notes of what is different in a file from the plain state dict of the model."""
    notes = chosen.notes if chosen else ()
    if n_classes != n_before:
        notes = (*notes, f"its head has {n_classes:,} classes instead of {n_before:,}")
    return tuple(f"{path.name}: {note}" for note in notes)


def _each(names: tuple[str, ...]) -> tuple[tuple[str, ...], ...] | None:
    return tuple((name,) for name in names) or None


def with_head(facts: ModelFacts, n_classes: int) -> ModelFacts:
    """The facts of a model whose head makes logits of `n_classes`; costs stay those of the model as published."""
    if n_classes == facts.n_classes:
        return facts
    head = find_head(shapes_of(facts), facts.n_classes)
    layers = tuple(
        layer.model_copy(update={"shape": (n_classes, *layer.shape[1:])})
        if layer.parameter.rpartition(".")[0] == head and layer.shape[0] == facts.n_classes
        else layer
        for layer in facts.layers
    )
    return facts.model_copy(update={"n_classes": n_classes, "layers": layers})


def shapes_of(facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter, in the order of the model."""
    return {layer.parameter: layer.shape for layer in facts.layers}

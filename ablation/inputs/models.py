"""Models by name: the module in eval mode, and the preprocessing that its inputs want.

In: a name, and weights: torchvision's by their enum name, a checkpoint file, or none (initialised from a seed).
Out: (module, transform), and what the weights are. Models and their facts are in `catalog.py`, the choice of weights
in `weights.py`, the choice among what a file holds in `checkpoints.py`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ablation.errors import CheckpointError, ModelError
from ablation.inputs.catalog import DEMO_MODEL, LayerFacts, ModelFacts, Registered, model_facts, model_names
from ablation.inputs.checkpoints import choose_state_dict, count_classes, find_head, read_metadata, say_some
from ablation.inputs.classes import ModelClasses, listed_classes
from ablation.inputs.demo import RECIPE, DigitsAlexNet, ensure_demo_model, prepare_digit
from ablation.inputs.folders import Folders
from ablation.inputs.published import TRANSFORMS_INPUT, hash_file, recognise
from ablation.inputs.registered import MODELS, load_factory, registered_names
from ablation.inputs.weights import Weights, find_weights, name_classes, say_changes

Transform = Callable[[Any], Tensor]

# What profilers and averages of weights add to a state dict, and counters that only training reads.
_HARMLESS = ("total_ops", "total_params", "num_batches_tracked", "n_averaged")
_AUXILIARY = ("aux1", "aux2", "AuxLogits")  # GoogLeNet's and Inception's classifiers for training, idle in eval mode


@dataclass(frozen=True)
class AsRGB:
    """Preprocessing for three channels: grey pictures become RGB first."""

    then: Transform

    def __call__(self, picture: Image.Image | Tensor) -> Tensor:
        """The model's input, of shape (3, height, width)."""
        if isinstance(picture, Tensor):
            return self.then(picture.expand(3, *picture.shape[-2:]) if picture.shape[-3] == 1 else picture)
        return self.then(picture if picture.mode == "RGB" else picture.convert("RGB"))


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, the transform of its inputs (None for some registered models), and what its weights are."""

    module: nn.Module
    transform: Transform
    weights: Weights


def load_model(
    name: str, weights: str | None = None, seed: int = 0, folders: Folders | None = None
) -> tuple[nn.Module, Transform]:
    """Load the model `name` in eval mode, and the transform that turns a picture into its input.

    `weights`: a name of torchvision's weights enum (downloaded by torchvision where it isn't there yet); a file below
    the checkpoint folder, or FILE:KEY where it holds several state dicts; or "none": initialised as torchvision does
    after `torch.manual_seed(seed)`, with the preprocessing of the default weights. A file that torchvision publishes is
    known by its hash and gets the preprocessing of its weights. Without `weights`, `digits_alexnet` is the trained one,
    and a registered model is what its factory makes after the same seeding (its transform may be None); a model of
    torchvision is refused. The caller's random state is restored. Without `folders`, those below ~/.ablation are used.

    Raises:
        SpecError: there is no such model or weights; the message names the nearest ones, or the choices.
        CheckpointError: the weights can't be downloaded, read, or loaded into this model.
        ModelError: the demo model can't be trained, or a registered one can't be made.
    """
    opened = open_model(name, weights, seed, folders)
    return opened.module, opened.transform


def open_model(name: str, weights: str | None = None, seed: int = 0, folders: Folders | None = None) -> Opened:
    """Load a model as `load_model` does, and tell what its weights are.

    Raises:
        SpecError, CheckpointError, ModelError: for the reasons of `load_model`.
    """
    folders = folders or _own_folders()
    if name in registered_names(MODELS) and name not in model_names():
        module, transform = _registered(name, seed)
        found = find_weights(weights, _facts_of(name, module, transform), folders, seed)
    else:
        found = find_weights(weights, model_facts(name, _named()), folders, seed)
        module, transform = _built_in(name, found, seed, folders)
    if found.member is not None and found.path is None:
        found = replace(found, notes=_say_other_file(name, found.member))
    if found.path is not None:
        loaded = _load_checkpoint(module, found.path, found.key, weights, is_published=found.member is not None)
        classes = replace(loaded.classes, n=found.classes.n) if found.member is None else found.classes
        found = replace(found, notes=loaded.notes, classes=classes)
    return Opened(module.eval(), transform, found)


def _built_in(name: str, found: Weights, seed: int, folders: Folders) -> tuple[nn.Module, Transform]:
    """A built-in model with its weights, unless those are a file's, which are still to be loaded."""
    if name == DEMO_MODEL:
        module: nn.Module = build_demo_model(seed)
        if found.is_own:
            _load_checkpoint(module, ensure_demo_model(folders))
        return module, prepare_digit
    member = _torchvision().get_model_weights(name)[found.like]
    if found.member is not None and found.path is None:
        module = _pretrained(name, member)
    else:
        module = build_model(name, seed, member if found.member is not None else None)
    return module, AsRGB(member.transforms())


def _facts_of(name: str, module: nn.Module, transform: Any) -> ModelFacts:
    """What is needed of a registered model's facts to find its weights: its parameters and classes, without costs."""
    shapes = _shapes(module)
    layers = [
        LayerFacts(parameter=parameter, kind="", shape=shape, path="", flops_after=0)
        for parameter, shape in shapes.items()
    ]
    n_classes = _count_rows(shapes)
    names = listed_classes(module) or listed_classes(transform) or ()
    return ModelFacts(
        name=name, n_classes=n_classes, input_shape=(), flops=0, widest=0, layers=tuple(layers), classes=names
    )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in module.named_parameters(remove_duplicate=False)}


def _count_rows(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the last weight, which makes the logits."""
    rows = [shape[0] for name, shape in shapes.items() if name.endswith("weight") and len(shape) > 1]
    return rows[-1] if rows else 0


def _named() -> Registered:
    """Registered names, for an error message."""
    return Registered(models=dict.fromkeys(registered_names(MODELS)))  # type: ignore[arg-type]


def _registered(name: str, seed: int) -> tuple[nn.Module, Transform]:
    """Make a registered model by its factory, and check it."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            made = load_factory(MODELS, name)()
    except Exception as error:
        raise ModelError(
            f"the registered model {name!r} can't be made: {type(error).__name__}: {str(error).rstrip('.')}. Its "
            "factory takes no arguments and must work in every worker."
        ) from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ModelError(
            f"the factory of the registered model {name!r} gave {type(made).__name__}; allowed: a pair "
            "(torch.nn.Module, transform), where the transform makes an input of an example, or is None."
        )
    module, transform = made
    return module, transform


def build_model(name: str, seed: int, member: Any = None) -> nn.Module:
    """Build a torchvision model after `torch.manual_seed(seed)`, without auxiliary classifiers.

    `member` of its weights enum: with the options with which torchvision builds the model for these weights.
    """
    options: dict[str, Any] = {}
    if name in TRANSFORMS_INPUT:
        options["init_weights"] = True  # explicit, since the default warns
        options["transform_input"] = member is not None
    if name.startswith("vit_"):  # built for the size that the transform makes
        options["image_size"] = (member or _default(name)).meta["min_size"][0]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reseed the GPUs
        return _without_auxiliary(_torchvision().get_model(name, weights=None, **options))


def build_demo_model(seed: int) -> DigitsAlexNet:
    """The demo model, untrained."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return DigitsAlexNet()


def default_transform(name: str) -> Transform:
    """Preprocessing of a torchvision model's default weights."""
    return AsRGB(_default(name).transforms())


def classifier_weights(name: str) -> tuple[str, ...]:
    """Names of torchvision's weights for a model, except those without a classifier (VGG's `IMAGENET1K_FEATURES`)."""
    return tuple(member.name for member in _torchvision().get_model_weights(name) if member.meta["categories"])


def _torchvision() -> Any:
    """Import torchvision's models, which takes four seconds, so only where one of them is needed."""
    import torchvision.models

    return torchvision.models


def _own_folders() -> Folders:
    home = Path.home() / ".ablation"
    return Folders(data=home / "data", checkpoints=home / "checkpoints", cache=home / "cache")


def _default(name: str) -> Any:
    return _torchvision().get_model_weights(name).DEFAULT


def _without_auxiliary(module: nn.Module) -> nn.Module:
    for name in _AUXILIARY:
        if hasattr(module, name):
            setattr(module, name, None)
            module.aux_logits = False  # type: ignore[assignment]
    return module


def _pretrained(name: str, member: Any) -> nn.Module:
    """Load the model with torchvision's own weights by torchvision, which checks the file's hash."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            module = _torchvision().get_model(name, weights=member)
    except Exception as error:  # errors of the network, the file system, and torch.load for damaged files
        raise CheckpointError(_what_to_place(name, member, error)) from error
    return _without_auxiliary(module).eval()


def _say_other_file(name: str, member: str) -> tuple[str, ...]:
    """A note where the file in torch hub's folder isn't the published one; torchvision looks at downloads only."""
    file = Path(urlparse(_torchvision().get_model_weights(name)[member].url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file() or recognise(name, path) == member:
        return ()
    return (f"{file} in torch hub's folder is not the published file: its SHA-256 begins with {hash_file(path)[:8]}",)


def _what_to_place(name: str, member: Any, error: Exception) -> str:
    file, folder = Path(urlparse(member.url).path).name, Path(torch.hub.get_dir()) / "checkpoints"
    verb = "read" if (folder / file).exists() else "downloaded"
    return (
        f"{name} with {member.name} can't be {verb}: {type(error).__name__}: {error}. Place the file {file} (from "
        f"{member.url}) into torch hub's folder {_shown(folder)}; or below the checkpoint folder, and give {file!r} "
        "as the weights."
    )


def _shown(folder: Path) -> str:
    """The folder with `~` for the home folder, whose path must not be shown."""
    return str(Path("~") / folder.relative_to(Path.home())) if folder.is_relative_to(Path.home()) else str(folder)


class _Loaded(NamedTuple):
    """What a file that was loaded says: the names of its classes, and notes on what was left out of it."""

    classes: ModelClasses
    notes: tuple[str, ...]


def _load_checkpoint(
    module: nn.Module, path: Path, key: str | None = None, weights: str | None = None, *, is_published: bool = False
) -> _Loaded:
    """Load the state dict of a file, all of it but what is known to be harmless; the head takes its number of classes.

    `weights` is what was given for them. Of a file that torchvision publishes nothing is told.
    """
    tree, shapes = _read_checkpoint(path), _shapes(module)
    chosen = choose_state_dict(tree, shapes, key, weights or path.name)
    if chosen is None or not all(isinstance(tensor, Tensor) for tensor in chosen.tensors.values()):
        raise CheckpointError(f"{path.name} holds a {type(tree).__name__}; allowed: a state dict, names to tensors.")
    n_before = _count_rows(shapes)
    n_classes = count_classes(chosen.tensors, shapes, n_before)
    if n_classes != n_before:
        _resize_head(module, str(find_head(shapes, n_before)), n_before, n_classes)
    wanted = module.state_dict()
    given, notes = _without_harmless(chosen.tensors, wanted)
    wrong = _misfits(given, wanted)
    if wrong:
        raise CheckpointError(
            f"{path.name} doesn't fit the model: {'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''} "
            f"({len(wrong)} of {len(wanted)} tensors). Save the state dict of this very model."
        )
    if broken := [name for name, tensor in wanted.items() if _breaks(given[name], tensor)]:
        raise CheckpointError(
            f"{path.name} holds numbers that are not finite in {', '.join(broken[:3])}"
            f"{', ...' if len(broken) > 3 else ''} ({len(broken)} of {len(wanted)} tensors); allowed: finite ones. "
            "Training has diverged, or the file was converted badly; take another one."
        )
    loaded: Any = OrderedDict(given)
    loaded._metadata = getattr(wanted, "_metadata", None)  # modules have the version they are of now
    module.load_state_dict(loaded)
    said = (
        () if is_published else (*say_changes(path, chosen, n_before, n_classes), *(f"{path.name}: {n}" for n in notes))
    )
    return _Loaded(name_classes(tree, n_classes), said)


def _resize_head(module: nn.Module, head: str, n_before: int, n_classes: int) -> None:
    """Give the module that makes the logits another number of rows, to be loaded."""
    owner = module.get_submodule(head)
    for size in ("out_features", "out_channels"):
        if getattr(owner, size, None) == n_before:
            setattr(owner, size, n_classes)
    for name, parameter in list(owner.named_parameters(recurse=False)):
        if parameter.shape[:1] == (n_before,):
            setattr(owner, name, nn.Parameter(parameter.new_zeros(n_classes, *parameter.shape[1:])))


def _without_harmless(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without what a model in eval mode does without, and notes of it; missing counters are the model's."""
    given, left_out = dict(tensors), []
    for name in tensors:
        is_idle = name.split(".")[0] in _AUXILIARY or name.rpartition(".")[2] in _HARMLESS
        if name not in wanted and is_idle:
            left_out.append(name)
            del given[name]
    missing = [name for name in wanted if name not in given and name.rpartition(".")[2] == "num_batches_tracked"]
    given |= {name: wanted[name] for name in missing}
    notes = [f"left out: {say_some(left_out)}"] if left_out else []
    return given, notes + ([f"without {say_some(missing)}, which change nothing"] if missing else [])


def _misfits(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Reasons why these tensors can't replace those, one for each that can't."""
    shared = [(name, given[name], tensor) for name, tensor in wanted.items() if name in given]
    return [
        *(f"{name} is missing" for name in wanted if name not in given),
        *(f"{name} is unknown" for name in given if name not in wanted),
        *(f"{name} {reason}" for name, ours, theirs in shared if (reason := _misfit(ours, theirs))),
    ]


def _misfit(given: Tensor, wanted: Tensor) -> str:
    """Reason why one tensor can't replace another; empty if it can. (torch itself would take 0.3 as an integer's 0.)"""
    if given.shape != wanted.shape:
        return f"has shape {tuple(given.shape)}, wanted {tuple(wanted.shape)}"
    if _kind(given) != _kind(wanted):
        return f"is {_dtype(given)}, wanted {_dtype(wanted)}"
    dense = given.layout is torch.strided and not given.is_meta and not given.is_quantized
    return "" if dense else "is not stored number by number"


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """Kind of numbers: real, complex or whole. Within a kind, numbers are converted whatever their width."""
    return tensor.is_floating_point(), tensor.is_complex()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _breaks(given: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor has NaN or infinity where the model has none (a mask may contain infinities)."""
    return not given.to(wanted.dtype).isfinite().all() and bool(wanted.isfinite().all())


def _read_checkpoint(path: Path) -> Any:
    """Read what is in a file: safetensors, or torch.load with `weights_only`, which runs no code."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                told = read_metadata(file.metadata())
            return told | load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path.name} can't be read ({type(error).__name__}); allowed: a .safetensors file, or a state dict of "
            "tensors saved by torch.save (files with other Python objects are not opened)."
        ) from error
    return loaded


def name_weights_file(name: str, weights: str | None) -> str | None:
    """Name of the file that `load_model` takes these weights from; None where they are no file's."""
    if weights is None or weights == "none":
        return f"{DEMO_MODEL}-{RECIPE}.safetensors" if name == DEMO_MODEL and weights is None else None
    if name in model_names() and weights in model_facts(name).weights:
        return Path(urlparse(_torchvision().get_model_weights(name)[weights].url).path).name
    return Path(weights).name

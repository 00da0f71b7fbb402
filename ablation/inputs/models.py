"""Models by name: the module in eval mode, and the preprocessing that its inputs want.

In: a name, and weights: torchvision's by their enum name, a checkpoint file, or none (initialised from a seed).
Out: (module, transform). The list of models and their facts are in `catalog.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ablation.errors import CheckpointError, ModelError
from ablation.inputs.catalog import DEMO_MODEL, Registered, find_checkpoint, model_facts, model_names
from ablation.inputs.demo import RECIPE, DigitsAlexNet, ensure_demo_model, prepare_digit
from ablation.inputs.folders import Folders
from ablation.inputs.registered import MODELS, load_factory, registered_names

Transform = Callable[[Any], Tensor]

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


def load_model(
    name: str, weights: str | None = None, seed: int = 0, folders: Folders | None = None
) -> tuple[nn.Module, Transform]:
    """Load the model `name` in eval mode, and the transform that turns a picture into its input.

    `weights`: a name of torchvision's weights enum (downloaded by torchvision where it isn't there yet), or a file
    below the checkpoint folder. Without it `digits_alexnet` has its trained weights; the others are initialised as
    torchvision does after `torch.manual_seed(seed)`, with the preprocessing of their default weights. A registered
    model is made by its factory, after the same seeding; its transform may be None. The caller's random state is
    restored. Without `folders`, those below ~/.ablation are used.

    Raises:
        SpecError: there is no such model or weights; the message names the nearest ones.
        CheckpointError: the weights can't be downloaded, read, or loaded into this model.
        ModelError: the demo model can't be trained, or a registered one can't be made.
    """
    folders = folders or _own_folders()
    if name in registered_names(MODELS) and name not in model_names():
        return _registered(name, find_checkpoint(weights, (), folders), seed)
    checkpoint = find_checkpoint(weights, model_facts(name, _named()).weights, folders)
    if name == DEMO_MODEL:
        module: nn.Module = build_demo_model(seed)
        _load_checkpoint(module, checkpoint or ensure_demo_model(folders))
        return module.eval(), prepare_digit
    if weights is not None and checkpoint is None:
        member = _torchvision().get_model_weights(name)[weights]
        return _pretrained(name, member), AsRGB(member.transforms())
    module = build_model(name, seed)
    if checkpoint is not None:
        _load_checkpoint(module, checkpoint)
    return module.eval(), default_transform(name)


def _named() -> Registered:
    """Registered names, for an error message."""
    return Registered(models=dict.fromkeys(registered_names(MODELS)))  # type: ignore[arg-type]


def _registered(name: str, checkpoint: Path | None, seed: int) -> tuple[nn.Module, Transform]:
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
    if checkpoint is not None:
        _load_checkpoint(module, checkpoint)
    return module.eval(), transform


def build_model(name: str, seed: int) -> nn.Module:
    """Build a torchvision model after `torch.manual_seed(seed)`, without auxiliary classifiers."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # explicit, since the default warns
    if name.startswith("vit_"):
        options["image_size"] = _default(name).meta["min_size"][0]  # built for the size that the transform makes
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


def _load_checkpoint(module: nn.Module, path: Path) -> None:
    tensors = _read_checkpoint(path)
    wanted = module.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] not in _AUXILIARY or name in wanted}
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
    module.load_state_dict(given)


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


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors in a file, by name: safetensors, or torch.load with `weights_only`, which runs no code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path.name} can't be read ({type(error).__name__}); allowed: a .safetensors file, or a state dict of "
            "tensors saved by torch.save (files with other Python objects are not opened)."
        ) from error
    for key in ("state_dict", "model"):  # keys under which training scripts usually save it
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    items = loaded.items() if isinstance(loaded, dict) else [(None, loaded)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise CheckpointError(f"{path.name} holds a {type(loaded).__name__}; allowed: a state dict, names to tensors.")
    return loaded


def name_weights_file(name: str, weights: str | None) -> str | None:
    """Name of the file that `load_model` takes these weights from; None where they are no file's."""
    if weights is None or weights == "none":
        return f"{DEMO_MODEL}-{RECIPE}.safetensors" if name == DEMO_MODEL and weights is None else None
    if name in model_names() and weights in model_facts(name).weights:
        return Path(urlparse(_torchvision().get_model_weights(name)[weights].url).path).name
    return Path(weights).name

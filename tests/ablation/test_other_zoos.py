"""Models of timm and of Hugging Face transformers, as they are built there, against brute force. Nothing is downloaded.

They use attention, relative positions, gates, squeeze-and-excitation, weight standardisation, channels-last linear
layers and outputs with `.logits`: code that nobody wrote with this package in mind.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import ablation
from ablation.layers import describe_model
from tests.compare import BOUND, brute_force, utility_error

N_CLASSES = 7
N_EXAMPLES = 5

# name: the size of its pictures, and what else timm.create_model is told
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "test_resnet": (32, {}),
    "test_vit": (32, {"img_size": 32}),
    "test_vit_relpos": (32, {"img_size": 32}),
    "test_convnext": (32, {}),
    "test_efficientnet": (32, {}),
    "test_byobnet": (32, {}),
    "test_nfnet": (32, {}),
    "test_mambaout": (32, {}),
    "test_maxvit": (64, {"img_size": 64}),
    "swin_tiny_patch4_window7_224": (
        32,
        {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)},
    ),
}

# name: the parts of timm's MlpMixer class, which its registered models of that kind are too large for
MIXERS: dict[str, dict[str, Any]] = {
    "MLP-Mixer": {},
    "ResMLP": {"block_layer": "ResBlock", "norm_layer": "Affine", "mlp_ratio": 3},
    "gMLP": {"block_layer": "SpatialGatingBlock", "mlp_layer": "GatedMlp", "mlp_ratio": 4},
}

# name: the size of its pictures, and its config: the smallest of its kind
TRANSFORMERS: dict[str, tuple[int, dict[str, Any]]] = {
    "ViT": (16, {"patch_size": 8}),
    "DeiT": (16, {"patch_size": 8}),
    "Beit": (16, {"patch_size": 8, "use_relative_position_bias": True}),
    "Dinov2": (16, {"patch_size": 8}),
    "ResNet": (32, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
    "ConvNext": (32, {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "Swin": (32, {"patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}),
}
WHERE = pytest.mark.parametrize(
    ("where", "precision"),
    [
        ("middle", "mixed"),
        *(
            pytest.param(*rest, marks=pytest.mark.slow)
            for rest in (("first", "mixed"), ("last", "mixed"), ("middle", "float64"))
        ),
    ],
)
HIDDEN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small shapes: many times as quick as with several threads where other processes run beside."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@cache
def from_timm(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", reason="the extra is not installed: pip install weight-ablation[timm]")
    if name in MIXERS:
        mixers = importlib.import_module("timm.models.mlp_mixer")
        small = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24}
        parts = {part: getattr(mixers, str(kind), kind) for part, kind in MIXERS[name].items()}
        return _settled(lambda: mixers.MlpMixer(num_classes=N_CLASSES, **small, **parts), 32)
    size, options = TIMM[name]
    return _settled(lambda: timm.create_model(name, pretrained=False, num_classes=N_CLASSES, **options), size)


@cache
def from_transformers(name: str) -> nn.Module:
    pytest.importorskip("transformers", reason="the extra is not installed: pip install weight-ablation[transformers]")
    transformers = importlib.import_module("transformers")
    size, options = TRANSFORMERS[name]
    known = {} if "hidden_sizes" in options or "embed_dim" in options else HIDDEN
    config = getattr(transformers, f"{name}Config")(image_size=size, num_labels=N_CLASSES, **known, **options)
    return _settled(lambda: getattr(transformers, f"{name}ForImageClassification")(config), size)


def _settled(build: Callable[[], nn.Module], size: int) -> nn.Module:
    """Built from a seed; with scales, biases and running statistics that are not 0 and 1, as after training."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.std() < 0.1 or parameter.numel() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
            model.train()(torch.randn(8, 3, size, size))
    return model.eval()


def _layers(model: nn.Module) -> dict[str, str]:
    """A first, a middle and a last one that have a matrix or kernels as their weight."""
    weights = [name for name, parameter in model.named_parameters() if name.endswith("weight") and parameter.dim() > 1]
    return {"first": weights[0], "middle": weights[len(weights) // 2], "last": weights[-1]}


def _check(model: nn.Module, size: int, where: str, precision: str) -> None:
    parameter = _layers(model)[where]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((N_EXAMPLES, 3, size, size), generator=generator)
    y = torch.randint(N_CLASSES, (N_EXAMPLES,), generator=generator)
    table = ablation.ablate(
        model, parameter, {"test": (x, y)}, sites=6, precision=precision, engine="finite", verify=2, progress=False
    )
    truth = brute_force(model, parameter, table.columns["index"], x, y)
    assert abs(truth).max() > 1e-9, f"{parameter}: nothing moves, so nothing is tested"
    error = utility_error(table.columns["utility_test"], truth, precision, table.about["baseline"]["test"]["loss"])
    assert error <= BOUND[precision], f"{parameter}: error {error:.3g}"


@WHERE
@pytest.mark.parametrize("name", [*TIMM, *MIXERS])
def test_timm(name: str, where: str, precision: str) -> None:
    _check(from_timm(name), TIMM[name][0] if name in TIMM else 32, where, precision)


@WHERE
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, where: str, precision: str) -> None:
    _check(from_transformers(name), TRANSFORMERS[name][0], where, precision)


def test_a_factory_of_timm_can_be_registered() -> None:
    """The example of docs/06-models-and-data.md: timm's own preprocessing of a picture goes with the model."""
    timm = pytest.importorskip("timm", reason="the extra is not installed: pip install weight-ablation[timm]")
    model = from_timm("test_resnet")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    picture = transform(Image.new("RGB", (224, 224)))
    facts = describe_model("tiny", model, torch.stack([picture, picture]))
    assert facts.n_classes == N_CLASSES
    assert facts.input_shape == tuple(picture.shape)
    assert {layer.path for layer in facts.layers} == {"direct", "finite"}

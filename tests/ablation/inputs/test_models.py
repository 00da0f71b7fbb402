import io
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save, save_file
from torch import nn

from ablation.errors import CheckpointError, SpecError
from ablation.inputs.data import load_batches, load_data
from ablation.inputs.folders import Folders
from ablation.inputs.models import _load_checkpoint, build_demo_model, build_model, load_model, open_model


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    folders = Folders(data=tmp_path / "data", checkpoints=tmp_path / "checkpoints", cache=tmp_path / "cache")
    folders.checkpoints.mkdir()
    return folders


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub folder, and no way to the internet."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of the first download
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_weights_a_model_is_what_torchvision_makes_of_the_seed(folders: Folders) -> None:
    torch.manual_seed(7)
    expected = torchvision.models.squeezenet1_1()
    state = torch.get_rng_state()
    model, _ = load_model("squeezenet1_1", "none", seed=7, folders=folders)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, expected)
    assert not any(module.training for module in model.modules())
    assert not same(model, load_model("squeezenet1_1", "none", seed=8, folders=folders)[0])


@pytest.mark.parametrize("name", ["googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_auxiliary_classifiers_are_gone_and_the_rest_is_torchvisions(name: str, folders: Folders) -> None:
    model, transform = load_model(name, "none", seed=3, folders=folders)
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(name, weights=None, init_weights=True).eval()
    assert not [key for key in model.state_dict() if key.startswith(("aux", "Aux"))]
    inputs = torch.stack([transform(Image.effect_noise((400, 300), 90)) for _ in range(2)])
    with torch.no_grad():
        logits = model(inputs)
        assert torch.equal(logits, theirs(inputs))
    assert logits.shape == (2, 1000)

    save_file(theirs.state_dict(), folders.checkpoints / "full.safetensors")  # with the auxiliary ones in it
    assert same(load_model(name, "full.safetensors", folders=folders)[0], model)


@pytest.mark.slow
def test_vit_h_14_is_built_for_the_size_its_transform_makes(folders: Folders) -> None:
    model, transform = load_model("vit_h_14", "none", folders=folders)
    with torch.no_grad():
        assert model(transform(Image.new("L", (600, 700)))[None]).shape == (1, 1000)


def test_grey_pictures_and_tensors_become_rgb(folders: Folders) -> None:
    _, transform = load_model("squeezenet1_1", "none", folders=folders)
    noise = Image.effect_noise((300, 260), 90)
    expected = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()(noise.convert("RGB"))
    assert expected.shape == (3, 224, 224)
    assert torch.equal(transform(noise), expected)
    assert torch.equal(transform(noise.convert("RGB")), expected)
    tensor = torchvision.transforms.functional.pil_to_tensor(noise)
    torch.testing.assert_close(transform(tensor), expected, atol=0.05, rtol=0)  # tensors are resized in another way


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(SpecError, match="Did you mean 'resnet18'") as caught:
        load_model("resnet_18")
    assert caught.value.field == "model.name"


# --- torchvision's weights -------------------------------------------------------------------------------------------


def test_a_download_that_fails_says_what_to_place_where_and_that_works(hub: Path, folders: Folders) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model("squeezenet1_1", "IMAGENET1K_V1", folders=folders)
    message = str(caught.value)
    assert "can't be downloaded" in message
    assert "squeezenet1_1-b8a52dc0.pth" in message
    assert str(hub) in message
    assert not list(hub.iterdir())

    source = build_model("squeezenet1_1", 5)
    torch.save(source.state_dict(), hub / "squeezenet1_1-b8a52dc0.pth")
    state = torch.get_rng_state()
    model, transform = load_model("squeezenet1_1", "IMAGENET1K_V1", folders=folders)
    assert same(model, source)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert transform(Image.new("L", (30, 30))).shape == (3, 224, 224)
    notes = open_model("squeezenet1_1", "IMAGENET1K_V1", folders=folders).weights.notes
    assert notes[0].startswith(
        "squeezenet1_1-b8a52dc0.pth in torch hub's folder is not the published file: its SHA-256"
    )

    for damaged in (b"half a file", b"R"):
        (hub / "squeezenet1_1-b8a52dc0.pth").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="can't be read"):
            load_model("squeezenet1_1", "IMAGENET1K_V1", folders=folders)


def test_the_home_folder_is_not_shown(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="torch hub's folder ~/hub/checkpoints") as caught:
        load_model("squeezenet1_1", "IMAGENET1K_V1")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("weights", ["IMAGENET1K_V2", "DEFAULT", "IMAGENET1K_FEATURES"])
def test_weights_there_are_not_are_refused(weights: str, folders: Folders) -> None:
    with pytest.raises(SpecError, match="IMAGENET1K_V1, or a file"):
        load_model("vgg16", weights, folders=folders)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "state dict", "state_dict", "model"])
def test_a_checkpoint_is_loaded(form: str, folders: Folders) -> None:
    source = build_demo_model(11)
    file = folders.checkpoints / ("x.safetensors" if form == "safetensors" else "x.pth")
    if form == "safetensors":
        save_file(source.state_dict(), file)
    else:
        torch.save(source.state_dict() if form == "state dict" else {form: source.state_dict(), "epoch": 3}, file)
    model, _ = load_model("digits_alexnet", file.name, folders=folders)
    assert same(model, source)
    assert not model.training
    assert not folders.cache.exists()  # nothing was trained


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_run(folders: Folders, tmp_path: Path) -> None:
    torch.save({"conv1.weight": Trap(tmp_path / "sprung")}, folders.checkpoints / "trap.pth")
    with pytest.raises(CheckpointError, match="other Python objects are not opened"):
        load_model("digits_alexnet", "trap.pth", folders=folders)
    assert not (tmp_path / "sprung").exists()
    torch.load(folders.checkpoints / "trap.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the control: the trap is a real one


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("kept", [0, 10, 3000])
def test_a_damaged_file_is_refused(name: str, kept: int, folders: Folders) -> None:
    state = build_demo_model(0).state_dict()
    file = folders.checkpoints / name
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"x\.\w+ can't be read") as caught:
        load_model("digits_alexnet", name, folders=folders)
    assert str(folders.checkpoints) not in str(caught.value)


def odd_contents(suffix: str) -> Iterator[bytes]:
    """Bytes that are no checkpoint, or a damaged one: every single letter, noise, what is cut short or changed."""
    random = np.random.default_rng(0)
    stream = io.BytesIO()
    torch.save({"bias": torch.zeros(3)}, stream, _use_new_zipfile_serialization=False)  # a bare pickle: goes deepest
    whole = save({"bias": torch.zeros(3)}) if suffix == ".safetensors" else stream.getvalue()
    for k in range(256):
        yield bytes([k])
        yield b"\x80\x02" + random.bytes(k // 8)
        yield whole[: random.integers(len(whole))]
        changed = bytearray(whole)
        changed[random.integers(len(whole))] = k
        yield bytes(changed)
    yield Path("/etc/passwd").read_bytes()


@pytest.mark.parametrize(("suffix", "often"), [(".pt", "IndexError"), (".safetensors", "SafetensorError")])
def test_whatever_bytes_are_in_a_file_the_refusal_names_it(suffix: str, often: str, folders: Folders) -> None:
    file = folders.checkpoints / f"x{suffix}"
    kinds = set()
    for content in odd_contents(suffix):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"^x\.\w+ (can't be read|holds a|doesn't fit the model)") as caught:
            _load_checkpoint(nn.Linear(3, 2), file)
        kinds.add(type(caught.value.__cause__).__name__)
    assert {often, "NoneType"} <= kinds  # the control: they fail in more than one way


MISFITS = {
    "whole numbers": ({"fc3.bias": torch.ones(10, dtype=torch.int64)}, (), "fc3.bias is int64, wanted float32"),
    "complex": ({"fc3.bias": torch.ones(10, dtype=torch.complex64)}, (), "fc3.bias is complex64, wanted float32"),
    "without numbers": ({"fc3.bias": torch.ones(10, device="meta")}, (), "fc3.bias is not stored number by number"),
    "shape": ({"fc3.bias": torch.zeros(11)}, (), r"fc3.bias has shape \(11,\), wanted \(10,\)"),
    "scalar for ten": ({"fc3.bias": torch.zeros(())}, (), r"fc3.bias has shape \(\)"),
    "missing": ({}, ("fc2.weight",), "fc2.weight is missing"),
    "unknown": ({"fc4.weight": torch.zeros(1)}, (), "fc4.weight is unknown"),
}


@pytest.mark.parametrize(("changed", "dropped", "message"), MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_of_another_model_is_refused(
    changed: dict[str, torch.Tensor], dropped: tuple[str, ...], message: str, folders: Folders
) -> None:
    state = {name: tensor for name, tensor in build_demo_model(0).state_dict().items() if name not in dropped}
    torch.save({**state, **changed}, folders.checkpoints / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_model("digits_alexnet", "x.pth", folders=folders)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fractions_of_another_width_are_taken(dtype: torch.dtype, folders: Folders) -> None:
    state = {name: tensor.to(dtype) for name, tensor in build_demo_model(3).state_dict().items()}
    torch.save(state, folders.checkpoints / "x.pth")
    model, _ = load_model("digits_alexnet", "x.pth", folders=folders)
    assert torch.equal(model.fc3.bias, state["fc3.bias"].float())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused(wrong: float, folders: Folders) -> None:
    """1e300 is finite in the file, but not in the model."""
    state = {name: tensor.double() for name, tensor in build_demo_model(0).state_dict().items()}
    state["fc2.weight"][5, 7] = wrong
    torch.save(state, folders.checkpoints / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"^x\.pth holds numbers that are not finite in fc2\.weight \(1 of 10 tens"
    ):
        load_model("digits_alexnet", "x.pth", folders=folders)


def test_infinity_where_the_model_has_it_itself_is_taken(folders: Folders) -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    torch.save(model.state_dict(), folders.checkpoints / "x.pth")
    _load_checkpoint(model, folders.checkpoints / "x.pth")


@pytest.mark.parametrize("content", [[1, 2], {"lr": 0.1}, {1: torch.zeros(3)}, torch.zeros(3)])
def test_a_file_without_a_state_dict_is_refused(content: Any, folders: Folders) -> None:
    torch.save(content, folders.checkpoints / "x.pth")
    with pytest.raises(CheckpointError, match="allowed: a state dict"):
        load_model("digits_alexnet", "x.pth", folders=folders)


@pytest.mark.parametrize("weights", ["../secret.pth", "link.pth", "absent.pth", "/etc/passwd", "a\0b", "."])
def test_nothing_outside_the_folder_is_opened(weights: str, folders: Folders, tmp_path: Path) -> None:
    torch.save(build_demo_model(0).state_dict(), tmp_path / "secret.pth")
    (folders.checkpoints / "link.pth").symlink_to(tmp_path / "secret.pth")
    with pytest.raises(SpecError, match="a file below the checkpoint folder") as caught:
        load_model("digits_alexnet", weights, folders=folders)
    assert caught.value.field == "model.weights"


# --- the demo model --------------------------------------------------------------------------------------------------


def test_the_demo_model_comes_trained(home: Path) -> None:
    folders = Folders(data=home / "data", checkpoints=home / "checkpoints", cache=home / "cache")
    state = torch.get_rng_state()
    model, transform = load_model("digits_alexnet", folders=folders)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert same(model, load_model("digits_alexnet", seed=5, folders=folders)[0])

    right = 0
    with torch.no_grad():
        for inputs, labels in load_batches(load_data("digits", transform=transform), np.arange(500), 100):
            right += int((model(inputs).argmax(1) == labels).sum())
    assert right / 500 >= 0.95


def test_the_demo_loads_without_what_is_slow_to_import(folders: Folders) -> None:
    torch.save(build_demo_model(0).state_dict(), folders.checkpoints / "x.pth")
    code = f"""
import sys
from pathlib import Path
from ablation.inputs.data import load_data
from ablation.inputs.folders import Folders
from ablation.inputs.models import load_model

folder = Path({str(folders.checkpoints)!r})
model, transform = load_model("digits_alexnet", "x.pth", folders=Folders(folder, folder, folder))
assert load_data("digits", transform=transform)[0][0].shape == (1, 8, 8)
print(sorted({{"torchvision", "sklearn", "scipy", "pandas"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr

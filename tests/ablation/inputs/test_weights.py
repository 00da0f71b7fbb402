"""Which weights are meant, in every way of naming them, and the preprocessing that goes with them."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from ablation.errors import CheckpointError, SpecError
from ablation.inputs import published, weights
from ablation.inputs.catalog import model_facts
from ablation.inputs.folders import Folders
from ablation.inputs.models import build_demo_model, build_model, load_model, open_model
from ablation.inputs.weights import find_weights, with_head

NET = "squeezenet1_1"
PICTURE = Image.effect_noise((400, 300), 90)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    folders = Folders(data=tmp_path / "data", checkpoints=tmp_path / "checkpoints", cache=tmp_path / "cache")
    folders.checkpoints.mkdir()
    return folders


Publish = Callable[[str, str, Path], None]


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Publish:
    """A function that makes a file the published one of a model's weights, since the real ones can't be had here."""

    def take(model: str, member: str, path: Path) -> None:
        digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        before = published.published_files(model)
        monkeypatch.setattr(
            published,
            "published_files",
            lambda name: {**before, digits: member} if name == model else {},
        )

    return take


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "vit_b_16", "googlenet"])
def test_a_model_of_torchvision_without_weights_is_refused_with_the_choices(name: str, folders: Folders) -> None:
    for refuse in (
        lambda: load_model(name, folders=folders),
        lambda: find_weights(None, model_facts(name), folders),
    ):
        with pytest.raises(SpecError) as caught:
            refuse()
        assert (caught.value.field, caught.value.given) == ("model.weights", None)
        for choice in ("'none' (initialised from the seed)", "IMAGENET1K_V1", "a file below the checkpoint folder"):
            assert choice in caught.value.allowed


def test_none_is_a_word(folders: Folders) -> None:
    model, _ = load_model("digits_alexnet", "none", seed=5, folders=folders)
    assert torch.equal(model.fc2.weight, build_demo_model(5).fc2.weight)
    assert not folders.cache.exists()  # nothing was trained
    assert find_weights("none", model_facts("resnet18"), folders, 7).text == "none: initialised from seed 7"
    for word in ("None", "NONE", ""):
        with pytest.raises(SpecError):
            load_model(NET, word, folders=folders)


def test_every_kind_of_weights_is_said_with_its_preprocessing(folders: Folders) -> None:
    torch.save({}, folders.checkpoints / "mine.pth")
    resnet, demo, googlenet = (model_facts(name) for name in ("resnet50", "digits_alexnet", "googlenet"))
    said = {
        given: (found.text, found.preprocessing)
        for given in ("IMAGENET1K_V1", "IMAGENET1K_V2", "none", "mine.pth")
        for found in [find_weights(given, resnet, folders)]
    }
    assert said == {
        "IMAGENET1K_V1": ("IMAGENET1K_V1 of torchvision", "resize 256 (bilinear), crop 224, of IMAGENET1K_V1"),
        "IMAGENET1K_V2": ("IMAGENET1K_V2 of torchvision", "resize 232 (bilinear), crop 224, of IMAGENET1K_V2"),
        "none": (
            "none: initialised from seed 0",
            "resize 232 (bilinear), crop 224, of IMAGENET1K_V2, the model's default",
        ),
        "mine.pth": ("file mine.pth", "resize 232 (bilinear), crop 224, of IMAGENET1K_V2, the model's default"),
    }
    assert find_weights(None, demo, folders).text == "its own, trained on the digits"
    assert "then transform_input" in str(find_weights("IMAGENET1K_V1", googlenet, folders).preprocessing)
    assert "without transform_input" in str(find_weights("mine.pth", googlenet, folders).preprocessing)


# --- files that torchvision publishes --------------------------------------------------------------------------------


def test_the_table_of_published_files_is_torchvisions() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        enum = torchvision.models.get_model_weights(name)
        facts = model_facts(name)
        files = published.published_files(name)
        assert published.default_weights(name) == enum.DEFAULT.name
        assert sorted(files.values()) == sorted(facts.weights)
        for digits, member in files.items():
            assert f"-{digits}.pth" in enum[member].url
            sizes = enum[member].transforms()
            said = published.say_preprocessing(name, member, is_member=True)
            assert f"resize {sizes.resize_size[0]} " in said
            assert f"crop {sizes.crop_size[0]}, of {member}" in said


def test_a_published_file_by_its_name_is_the_weights_by_theirs(folders: Folders, publish: Publish) -> None:
    """A renamed file of MobileNetV2's older weights: resized as they want it, and not as the default ones do."""
    path = folders.checkpoints / "renamed.pth"
    source = build_model("mobilenet_v2", 3)
    torch.save(source.state_dict(), path)
    before = open_model("mobilenet_v2", "renamed.pth", folders=folders)
    assert before.weights.member is None
    publish("mobilenet_v2", "IMAGENET1K_V1", path)
    opened = open_model("mobilenet_v2", "renamed.pth", folders=folders)
    assert opened.weights.text == "file renamed.pth, which is torchvision's IMAGENET1K_V1"
    assert opened.weights.classes.source == "ImageNet's"
    expected = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()(PICTURE.convert("RGB"))
    assert torch.equal(opened.transform(PICTURE), expected)
    assert not torch.equal(before.transform(PICTURE), expected)  # the control: others get the default's
    assert torch.equal(opened.module.classifier[1].weight, source.classifier[1].weight)


def test_googlenet_of_a_published_file_transforms_its_input(folders: Folders, publish: Publish) -> None:
    path = folders.checkpoints / "googlenet.pth"
    torch.save(torchvision.models.googlenet(init_weights=False).state_dict(), path)
    publish("googlenet", "IMAGENET1K_V1", path)
    assert open_model("googlenet", path.name, folders=folders).module.transform_input


def test_mnasnet_is_loaded_from_a_file_without_versions(folders: Folders) -> None:
    """Its modules want to know the version of a state dict, which safetensors don't keep."""
    source = build_model("mnasnet0_5", 3)
    save_file(source.state_dict(), folders.checkpoints / "x.safetensors")
    model, _ = load_model("mnasnet0_5", "x.safetensors", folders=folders)
    assert torch.equal(model.classifier[1].weight, source.classifier[1].weight)


# --- fine-tuned heads ------------------------------------------------------------------------------------------------


def test_a_fine_tuned_head_is_taken_with_its_classes(folders: Folders) -> None:
    source = torchvision.models.squeezenet1_1(num_classes=3)
    torch.save({"state_dict": source.state_dict(), "classes": ["dog", "cat", "eel"]}, folders.checkpoints / "x.pth")
    facts = model_facts(NET)
    found = find_weights("x.pth", facts, folders)
    assert (found.classes.n, found.classes.names) == (3, (("dog",), ("cat",), ("eel",)))
    assert found.notes == ("x.pth: taken from its key 'state_dict'", "x.pth: its head has 3 classes instead of 1,000")
    tuned = with_head(facts, 3)
    assert {layer.name: layer.shape for layer in tuned.layers if layer.name.startswith("classifier")} == {
        "classifier.1": (3, 512, 1, 1), "classifier.1.bias": (3,)
    }  # fmt: skip
    assert tuned.n_classes == 3
    opened = open_model(NET, "x.pth", folders=folders)
    assert opened.weights == replace(found)
    with torch.no_grad():
        inputs = torch.stack([opened.transform(PICTURE)])
        assert torch.equal(opened.module(inputs), source.eval()(inputs))
    assert {name: tuple(each.shape) for name, each in opened.module.named_parameters()} == {
        layer.parameter: layer.shape for layer in tuned.layers
    }


def test_another_network_is_not_taken_for_a_fine_tuned_one(folders: Folders) -> None:
    state = build_demo_model(0).state_dict() | {"fc3.weight": torch.zeros(3, 99), "fc3.bias": torch.zeros(3)}
    torch.save(state, folders.checkpoints / "x.pth")
    with pytest.raises(CheckpointError, match=r"fc3.weight has shape \(3, 99\), wanted \(10, 256\)"):
        load_model("digits_alexnet", "x.pth", folders=folders)


# --- what is harmless ------------------------------------------------------------------------------------------------


def test_harmless_extras_are_said_and_not_fatal(folders: Folders) -> None:
    source = torchvision.models.resnet18().state_dict()
    counters = [name for name in source if name.endswith("num_batches_tracked")]
    extra: dict[str, Any] = {"total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)}
    torch.save({n: t for n, t in source.items() if n not in counters} | extra, folders.checkpoints / "x.pth")
    opened = open_model("resnet18", "x.pth", folders=folders)
    assert torch.equal(opened.module.fc.weight, source["fc.weight"])
    said = "; ".join(opened.weights.notes)
    assert "x.pth: left out: total_ops, layer1.0.total_params" in said
    assert f"({len(counters)} in all), which change nothing" in said
    torch.save(source | {"fc.num_batches_tracked": torch.tensor(3)}, folders.checkpoints / "y.pth")
    assert "fc.num_batches_tracked" in open_model("resnet18", "y.pth", folders=folders).weights.notes[0]


def test_a_plain_file_has_no_notes(folders: Folders) -> None:
    torch.save(build_demo_model(0).state_dict(), folders.checkpoints / "x.pth")
    assert open_model("digits_alexnet", "x.pth", folders=folders).weights.notes == ()


# --- FILE:KEY --------------------------------------------------------------------------------------------------------


def test_a_key_picks_one_of_several(folders: Folders) -> None:
    first, second = build_demo_model(1), build_demo_model(2)
    (folders.checkpoints / "runs").mkdir()
    path = folders.checkpoints / "runs" / "both.pth"
    torch.save({"model": first.state_dict(), "model_ema": {"module": second.state_dict()}}, path)
    facts = model_facts("digits_alexnet")
    for refuse in (
        lambda: find_weights("runs/both.pth", facts, folders),
        lambda: load_model("digits_alexnet", "runs/both.pth", folders=folders),
    ):
        with pytest.raises(
            SpecError, match=r"one of runs/both\.pth:model, runs/both\.pth:model_ema\.module\. The file"
        ):
            refuse()
    for key, source in (("model", first), ("model_ema", second), ("model_ema.module", second)):
        model, _ = load_model("digits_alexnet", f"runs/both.pth:{key}", folders=folders)
        assert torch.equal(model.fc1.weight, source.fc1.weight)
        assert find_weights(f"runs/both.pth:{key}", facts, folders).text == f"file runs/both.pth:{key}"
    with pytest.raises(SpecError, match=r"It has no 'model_em'\. Did you mean 'model' or 'model_ema.module'"):
        load_model("digits_alexnet", "runs/both.pth:model_em", folders=folders)


def test_a_file_whose_name_has_a_colon_is_that_file(folders: Folders) -> None:
    source = build_demo_model(1)
    torch.save(source.state_dict(), folders.checkpoints / "epoch:3.pth")
    model, _ = load_model("digits_alexnet", "epoch:3.pth", folders=folders)
    assert torch.equal(model.fc1.weight, source.fc1.weight)
    assert weights.split_key("a:b:c") == [("a:b", "c"), ("a", "b:c")]


@pytest.mark.parametrize("given", ["../x.pth:model", "absent.pth:model", ":model", "x.pth:"])
def test_a_key_opens_nothing_else(given: str, folders: Folders, tmp_path: Path) -> None:
    torch.save({"model": build_demo_model(1).state_dict()}, tmp_path / "x.pth")
    with pytest.raises(SpecError, match="a file below the checkpoint folder"):
        load_model("digits_alexnet", given, folders=folders)

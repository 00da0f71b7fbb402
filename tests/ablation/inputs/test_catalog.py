import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from ablation.errors import SpecError
from ablation.inputs import catalog
from ablation.inputs.data import load_data
from ablation.inputs.folders import Folders
from ablation.inputs.images import find_images
from ablation.inputs.models import classifier_weights, default_transform
from ablation.inputs.weights import find_file, find_weights
from ablation.spec import DataSpec
from tools.make_facts import make_facts

TORCHVISION = tuple(torchvision.models.list_models(module=torchvision.models))
ALEXNET = catalog.model_facts("alexnet")


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (200, 30, 60)).save(folder / name)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    folders = Folders(data=tmp_path / "data", checkpoints=tmp_path / "checkpoints", cache=tmp_path / "cache")
    for folder in (folders.data, folders.checkpoints, folders.cache):
        folder.mkdir()
    return folders


# --- models ----------------------------------------------------------------------------------------------------------


def test_everything_here_works_without_torch(folders: Folders) -> None:
    write_images(folders.data / "pets", "train/cat/1.png", "train/dog/1.png", "train/dog/2.png")
    code = f"""
import sys
from pathlib import Path
from ablation.inputs import catalog
from ablation.inputs.folders import Folders
from ablation.inputs.weights import find_weights
from ablation.spec import DataSpec

folders = Folders(Path({str(folders.data)!r}), Path({str(folders.checkpoints)!r}), Path({str(folders.cache)!r}))
assert catalog.find_layer(catalog.model_facts("alexnet"), "classifier.4").shape == (4096, 4096)
assert find_weights("IMAGENET1K_V1", catalog.model_facts("alexnet"), folders).member == "IMAGENET1K_V1"
assert catalog.dataset_facts("digits").n_examples == {{"train": 1297, "test": 500}}
counts = catalog.split_counts(DataSpec(name="imagefolder", root="pets", train="all"), folders)
assert counts["train"].n_per_class == (1, 2), counts
print(sorted({{"torch", "torchvision", "sklearn", "PIL", "redis"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_names_are_the_demo_model_and_all_of_torchvision() -> None:
    assert catalog.model_names() == ("digits_alexnet", *TORCHVISION)
    assert len(TORCHVISION) >= 80


@pytest.mark.parametrize("name", TORCHVISION)
def test_weights_and_input_shape_match_torchvision(name: str) -> None:
    facts = catalog.model_facts(name)
    assert facts.weights == classifier_weights(name)
    assert facts.input_shape == tuple(default_transform(name)(Image.new("L", (70, 60))).shape)


QUICK = (
    "digits_alexnet", "alexnet", "resnet18", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small",
    "googlenet", "regnet_y_400mf",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ("digits_alexnet", *TORCHVISION)],
)
def test_facts_are_those_of_the_real_module(name: str) -> None:
    assert catalog.model_facts(name) == make_facts(name)


def test_facts_survive_the_table() -> None:
    facts = catalog.model_facts("vit_b_16")  # has parameters of its own, beside those of its modules
    assert {"class_token", "encoder.pos_embedding"} <= {layer.name for layer in facts.layers}
    assert catalog.facts_from_line(catalog.line_from_facts(facts)) == facts


def test_the_demo_layer_is_a_classifier_head() -> None:
    layer = catalog.find_layer(catalog.model_facts("digits_alexnet"), "fc2")
    assert (layer.shape, layer.path) == ((256, 256), "direct")
    assert layer.n_weights >= 4096


NO_LAYERS = {
    "without weights": ("alexnet", "features.1", "A ReLU has none"),
    "container": ("alexnet", "features", r"one of the layers inside it \(features.0, features.0.bias"),
    "container of containers": ("resnet18", "layer1", r"inside it \(layer1.0.conv1, "),
    "misspelt": ("resnet18", "layer1.0.conv3", "Did you mean 'layer1.0.conv[12]'"),
}


@pytest.mark.parametrize(("model", "layer", "message"), NO_LAYERS.values(), ids=NO_LAYERS)
def test_what_is_no_layer_is_refused_with_what_it_is(model: str, layer: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        catalog.find_layer(catalog.model_facts(model), layer)
    assert (caught.value.field, caught.value.given) == ("layer", layer)


@pytest.mark.parametrize(("given", "expected"), [("alexnett", "alexnet"), ("ResNet18", "resnet18"), ("zzz", "models")])
def test_an_unknown_model_names_the_nearest(given: str, expected: str) -> None:
    with pytest.raises(SpecError, match=expected) as caught:
        catalog.model_facts(given)
    assert (caught.value.field, caught.value.given) == ("model.name", given)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_weights_are_a_name_of_torchvision_or_a_file(folders: Folders) -> None:
    (folders.checkpoints / "runs").mkdir()
    (folders.checkpoints / "runs" / "mine.safetensors").touch()
    assert find_weights("IMAGENET1K_V1", ALEXNET, folders).path is None
    found = find_file("runs/mine.safetensors", ALEXNET, folders)
    assert found == (folders.checkpoints.resolve() / "runs" / "mine.safetensors", None)
    assert find_file("runs/mine.safetensors:ema.net", ALEXNET, folders) == (found[0], "ema.net")


@pytest.mark.parametrize("weights", ["IMAGENET1K_V2", "absent.pth", ".", "runs", "IMAGENET1K_FEATURES"])
def test_weights_that_are_neither_are_refused_with_the_names(folders: Folders, weights: str) -> None:
    (folders.checkpoints / "runs").mkdir()
    with pytest.raises(SpecError, match=r"IMAGENET1K_V1, or a file below the checkpoint folder") as caught:
        find_file(weights, catalog.model_facts("vgg16"), folders)
    assert caught.value.field == "model.weights"


# --- what leads out of a folder --------------------------------------------------------------------------------------

OUTSIDE = {
    "parent": "..",
    "sibling": "../secret",
    "round about": "pets/../../secret",
    "back inside": "../data/pets",
    "absolute": "/etc",
    "nul": "pets\0",
    "link": "link",
    "below a link": "link/train",
    "circle": "circle",
    "too long": "x" * 300,
}


@pytest.mark.parametrize("given", OUTSIDE.values(), ids=OUTSIDE)
def test_a_path_that_leads_out_is_refused(folders: Folders, given: str) -> None:
    secret = folders.data.parent / "secret"
    for folder in (folders.data, folders.checkpoints):
        (folder / "pets").mkdir()
        (folder / "link").symlink_to(secret)
        (folder / "circle").symlink_to(folder / "circle")
    write_images(secret, "train/cat/1.png")
    with pytest.raises(SpecError, match="must not lead out") as caught:
        catalog.split_counts(DataSpec(name="imagefolder", root=given, train="all"), folders)
    assert caught.value.field == "data.root"
    with pytest.raises(SpecError, match="must not lead out"):
        find_file(given, ALEXNET, folders)
    with pytest.raises(SpecError, match=r"must not lead out|no such file"):
        find_file(f"{given}:model", ALEXNET, folders)


def test_a_link_that_stays_inside_is_followed(folders: Folders) -> None:
    write_images(folders.data / "pets-2", "test/cat/1.png")
    (folders.data / "pets").symlink_to("pets-2")
    counts = catalog.split_counts(DataSpec(name="imagefolder", root="pets", test="all"), folders)
    assert counts["test"].n_examples == 1


# --- data sets -------------------------------------------------------------------------------------------------------


def test_dataset_names() -> None:
    names = ("digits", "imagefolder", "mnist", "fashionmnist", "cifar10", "cifar100", "imagenet")
    assert catalog.dataset_names() == names
    with pytest.raises(SpecError, match="Did you mean 'mnist'") as caught:
        catalog.dataset_facts("MNIST")
    assert caught.value.field == "data.name"


@pytest.mark.parametrize("name", ["mnist", "fashionmnist", "cifar10", "cifar100"])
def test_published_counts_add_up(name: str) -> None:
    facts = catalog.dataset_facts(name)
    n_train = 60000 if "mnist" in name else 50000
    assert facts.n_examples == {"train": n_train, "test": 10000}
    assert {split: sum(counts) for split, counts in facts.n_per_class.items()} == facts.n_examples
    assert {len(counts) for counts in facts.n_per_class.values()} == {facts.n_classes}


def test_only_the_splits_asked_for_are_counted(folders: Folders) -> None:
    counts = catalog.split_counts(DataSpec(name="digits", test="all"), folders)
    assert list(counts) == ["test"]
    assert counts["test"].n_per_class == (50,) * 10


def test_images_are_counted_by_the_loaders_rule(folders: Folders) -> None:
    root = folders.data / "pets"
    names = ("a.jpg", "B.JPEG", "c.PNG", "deep/er/d.webp", "deep/e.bmp", "f.tif", "g.tiff", "h.ppm")
    write_images(root, *(f"train/{label}/{name}" for label in ("Zebra", "ant", "10", "9") for name in names))
    write_images(root, "train/10/only.jpg", *(f"val/{label}/1.jpg" for label in ("Zebra", "ant", "10", "9")))
    (root / "train" / "ant" / "notes.txt").write_text("not a picture")
    (root / "train" / "ant" / "movie.gif").write_bytes(b"not a picture type")
    (root / "train" / "README.md").write_text("not a class")
    (root / "train" / "ant" / "linked").symlink_to(root / "train" / "9" / "deep")

    counts = catalog.split_counts(DataSpec(name="imagefolder", root="pets", train="all", test="all"), folders)
    theirs = torchvision.datasets.ImageFolder(root / "train")
    ours = load_data("imagefolder", root, "train")
    assert tuple(ours.classes) == tuple(theirs.classes) == ("10", "9", "Zebra", "ant")
    assert ours.samples == theirs.samples
    assert counts["train"].n_examples == len(theirs)
    assert counts["train"].n_per_class == tuple(theirs.targets.count(label) for label in range(4)) == (9, 8, 8, 10)
    assert counts["test"].n_per_class == (1, 1, 1, 1)


def test_a_test_folder_goes_before_a_val_folder(folders: Folders) -> None:
    write_images(folders.data, "test/cat/1.png", "val/cat/1.png", "val/cat/2.png")
    assert len(find_images("imagefolder", folders.data, "test")["cat"]) == 1
    with pytest.raises(SpecError, match="1000 class folders"):
        find_images("imagenet", folders.data, "test", n_classes=1000)


BAD_ROOTS = {
    "not given": (None, ("train/cat/1.png",), "Say where imagefolder is"),
    "absent": ("cats", ("train/cat/1.png",), "no such folder"),
    "a file": ("pets/train/cat/1.png", ("train/cat/1.png",), "no such folder"),
    "no split": ("pets", ("test/cat/1.png",), "train split is missing"),
    "no classes": ("pets", ("train/1.png",), "class folders"),
    "other classes": ("pets", ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png"), "Only one has 'dog'"),
}


@pytest.mark.parametrize(("root", "names", "message"), BAD_ROOTS.values(), ids=BAD_ROOTS)
def test_a_root_that_is_no_image_folder_is_refused(
    folders: Folders, root: str | None, names: tuple[str, ...], message: str
) -> None:
    write_images(folders.data / "pets", *names)
    with pytest.raises(SpecError, match=message) as caught:
        catalog.split_counts(DataSpec(name="imagefolder", root=root, train="all"), folders)
    assert caught.value.field == "data.root"
    assert str(folders.data) not in str(caught.value)


def test_a_class_without_pictures_is_refused(folders: Folders) -> None:
    write_images(folders.data / "pets", "train/cat/1.png")
    (folders.data / "pets" / "train" / "dog").mkdir()
    with pytest.raises(SpecError, match=r"got 'pets'.*Add pictures to .*train/dog"):
        catalog.split_counts(DataSpec(name="imagefolder", root="pets", train="all"), folders)


def test_a_bundled_data_set_has_no_root(folders: Folders) -> None:
    with pytest.raises(SpecError, match="digits is bundled"):
        catalog.split_counts(DataSpec(name="digits", root="pets", train="all"), folders)

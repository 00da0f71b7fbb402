"""Classes of the data are matched with the model's by name, else by number; whatever is not clear is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torchvision

from ablation.errors import SpecError
from ablation.inputs.catalog import split_counts
from ablation.inputs.classes import PUBLISHED_CLASSES, ModelClasses, imagenet, listed_classes, number_classes
from ablation.inputs.folders import Folders
from ablation.inputs.published import imagenet_classes
from ablation.spec import DataSpec

IMAGENET = imagenet(1000)
UNNAMED = ModelClasses(1000)
PETS = ModelClasses(3, (("dog",), ("cat",), ("guinea_pig",)), "the checkpoint's")


def numbers(names: list[str] | None, model: ModelClasses, **options: Any) -> list[int]:
    """The model's class for each label, by the label where it is not told."""
    found = number_classes(names, model, **{"are_folders": True, **options})
    assert found.text
    n = len(names or found.numbers or ())
    return [label if found.numbers is None else found.numbers[label] for label in range(n)]


def refusal(names: list[str] | None, model: ModelClasses, **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        number_classes(names, model, **{"are_folders": True, **options})
    assert caught.value.field.startswith("data.classes")
    return str(caught.value)


def test_imagenets_classes_are_torchvisions() -> None:
    wnids, names = zip(*imagenet_classes(), strict=True)
    assert list(names) == torchvision.models.AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    assert list(wnids) == sorted(set(wnids))
    assert (wnids[281], names[281], wnids[0]) == ("n02123045", "tabby", "n01440764")
    assert len(wnids) == 1000


def test_class_folders_are_matched_by_wordnet_id_or_name() -> None:
    assert numbers(["n01440764", "n02123045", "n15075141"], IMAGENET) == [0, 281, 999]
    assert numbers(["Great_White-Shark", "goldfish", "tabby"], IMAGENET) == [2, 1, 281]
    assert numbers(["cat", "dog", "guinea pig"], PETS) == [1, 0, 2]
    assert numbers(["cat", "guinea_pig"], PETS) == [1, 2]  # some of them


def test_classes_that_the_model_has_not_are_refused() -> None:
    said = refusal(["tabbi", "tench", "zebra"], IMAGENET)
    assert "got '3 classes (tabbi, tench, zebra)'" in said
    assert "The model has no 'tabbi'. Did you mean 'tabby'" in said
    assert "--classes FILE" in said
    assert '"classes": {"cat": 281}' in said
    assert "the checkpoint's 3 classes" in refusal(["cat", "dog", "eel"], PETS)  # as many, and yet not these


def test_two_folders_are_not_one_class() -> None:
    assert "Guinea Pig" in refusal(["Guinea Pig", "dog", "guinea_pig"], PETS)


def test_without_names_there_must_be_as_many() -> None:
    assert "got '3 classes (cat, dog, eel)'; allowed: the 1,000 classes" in refusal(["cat", "dog", "eel"], UNNAMED)
    assert numbers(["cat", "dog", "eel"], ModelClasses(3)) == [0, 1, 2]


def test_folders_that_are_numbers_mean_them() -> None:
    """Sorted as text, 10 comes before 2."""
    in_text_order = sorted(str(number) for number in range(1000))
    assert in_text_order[2] == "10"
    for model in (IMAGENET, UNNAMED):
        assert numbers(in_text_order, model) == [int(name) for name in in_text_order]
        assert numbers(["0", "2", "999"], model) == [0, 2, 999]
    assert numbers([f"{number:03d}" for number in range(1000)], UNNAMED) == list(range(1000))
    assert "Folder '1000' is beyond them" in refusal(["1", "1000"], UNNAMED)
    assert "0 to 2" in refusal(["1", "2", "3"], ModelClasses(3))
    assert "Two folders have one number" in refusal(["01", "1"], UNNAMED)


def test_some_of_imagenets_folders_have_its_numbers_in_any_model_of_a_thousand_classes() -> None:
    assert numbers(["n01440764", "n02123045"], UNNAMED) == [0, 281]
    assert "1,000 classes" in refusal(["n01440764", "n00000000"], UNNAMED)


def test_published_data_goes_by_its_numbers_where_the_names_are_others() -> None:
    ten = ModelClasses(10, tuple((name,) for name in PUBLISHED_CLASSES["digits"]), "the model's")
    files = {"are_folders": False, "are_published": True}
    assert numbers(list(PUBLISHED_CLASSES["fashionmnist"]), ten, **files) == list(range(10))
    turned = ModelClasses(10, tuple((name,) for name in PUBLISHED_CLASSES["cifar10"][::-1]), "the checkpoint's")
    assert numbers(list(PUBLISHED_CLASSES["cifar10"]), turned, **files) == list(range(10))[::-1]
    assert "10 classes" in refusal(list(PUBLISHED_CLASSES["digits"]), IMAGENET, **files)
    assert "10 classes" in refusal(list(PUBLISHED_CLASSES["digits"]), UNNAMED, **files)


def test_names_of_published_classes_are_torchvisions() -> None:
    fashion = torchvision.datasets.FashionMNIST.classes
    assert list(PUBLISHED_CLASSES["fashionmnist"]) == fashion
    assert [name.split(" - ")[0] for name in torchvision.datasets.MNIST.classes] == list(PUBLISHED_CLASSES["mnist"])


def test_a_mapping_says_which_class_each_one_is() -> None:
    given = {"cat": "tabby", "dog": 207, "more": "tench"}
    assert numbers(["cat", "dog"], IMAGENET, given=given) == [281, 207]
    assert numbers(["cat", "dog", "kitten"], PETS, given={"cat": 1, "dog": 0, "kitten": 1}) == [1, 0, 1]
    assert number_classes(None, UNNAMED, given={"0": 7, "5": 9}).numbers == {0: 7, 5: 9}


@pytest.mark.parametrize(
    ("given", "model", "says"),
    [
        ({"cat": 1}, PETS, "There is none for 'dog'"),
        ({"cat": 1, "dog": 3}, PETS, "data.classes.dog: got 3; allowed: a class number of the model, 0 to 2"),
        ({"cat": 1, "dog": -1}, PETS, "data.classes.dog: got -1"),
        ({"cat": 1, "dog": "dgo"}, PETS, "Did you mean 'dog'"),
        ({"cat": 1, "dog": "dog"}, UNNAMED, "The names of this model's classes are not known"),
        ({"cat": 1, "dog": "x"}, ModelClasses(2, (("x",), ("x",)), "its"), "one of the numbers 0, 1"),
    ],
)
def test_a_mapping_that_is_not_clear_is_refused(given: dict[str, Any], model: ModelClasses, says: str) -> None:
    assert says in refusal(["cat", "dog"], model, given=given)


def test_without_names_a_mapping_has_label_numbers() -> None:
    assert "label numbers" in refusal(None, UNNAMED, given={"cat": 1})


def test_objects_list_their_classes_as_torchvisions_data_sets_do() -> None:
    assert listed_classes(SimpleNamespace(classes=["b", "a"])) == ("b", "a")
    assert listed_classes(SimpleNamespace(class_to_idx={"b": 1, "a": 0})) == ("a", "b")
    assert listed_classes(SimpleNamespace(wnids=["n1", "n2"], classes=[("x", "y"), ("z",)])) == ("n1", "n2")
    assert listed_classes(SimpleNamespace(classes=["a", "a"])) is None  # names that don't tell classes apart
    assert listed_classes(SimpleNamespace(classes=10)) is None
    assert listed_classes(None) is None


def test_the_catalog_knows_the_classes_of_folders(tmp_path: Path) -> None:
    folders = Folders(tmp_path, tmp_path, tmp_path)
    for name in ("test/dog/1.png", "test/cat/1.png", "test/__MACOSX/._1.png", "test/.git/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    counts = split_counts(DataSpec(name="imagefolder", root=".", test="all"), folders)
    assert counts is not None
    assert counts["test"].classes == ("cat", "dog")

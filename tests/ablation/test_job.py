"""A job measures what was meant: its weights, its classes, its pictures; where that is doubtful, it says so."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ablation
from ablation.errors import DataError, SpecError
from ablation.inputs.data import labels_of, load_data
from ablation.inputs.demo import ensure_demo_model
from ablation.inputs.folders import Folders
from ablation.inputs.models import load_model
from ablation.job import load_job, plan_here
from ablation.plan import PlanOptions
from ablation.run import run_spec
from ablation.spec import make_spec
from ablation.statistics import make_summary, summary_lines

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
N = 6  # pictures of each digit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Folders:
    """Test digits as PNG files, in folders by their words; checkpoints of the trained net, one with the words."""
    here = tmp_path_factory.mktemp("here")
    folders = Folders(data=here / "data", checkpoints=here / "checkpoints", cache=home / "cache")
    folders.checkpoints.mkdir()
    digits = load_data("digits", split="test")
    labels = labels_of(digits)
    for digit, word in enumerate(WORDS):
        for name in (word, str(digit)):
            folder = folders.data / ("words" if name == word else "numbers") / "test" / name
            folder.mkdir(parents=True)
            for k in np.flatnonzero(labels == digit)[:N]:
                digits[int(k)][0].save(folder / f"{k}.png")
    state = load_file(ensure_demo_model(folders))
    torch.save({"state_dict": state, "classes": list(WORDS)}, folders.checkpoints / "words.pth")
    torch.save(state, folders.checkpoints / "plain.pth")
    kept = {"fc3.weight": state["fc3.weight"][[9, 5, 7]], "fc3.bias": state["fc3.bias"][[9, 5, 7]]}
    torch.save({"model": {**state, **kept}, "class_to_idx": {"nine": 0, "five": 1, "seven": 2}},
               folders.checkpoints / "tuned.pth")  # fmt: skip
    return folders


def run(folders: Folders, weights: str | None, root: str = "words", **changes: Any) -> dict[str, Any]:
    """The summary of a job on picture files; fields of the data may be given."""
    data = {"name": "imagefolder", "root": root, "test": "all", **changes}
    spec = make_spec(
        {"model": {"name": "digits_alexnet", "weights": weights}, "layer": "fc3", "data": data, "sites": {"count": 4}}
    )
    table = run_spec(spec, folders, PlanOptions(threads=1), device="cpu")
    summary = make_summary(table)
    assert json.loads(json.dumps(table.about))["inputs"]["weights"] == summary["weights"]
    return {**summary, "inputs": table.about["inputs"]}


# --- classes ---------------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_the_names_that_a_checkpoint_lists(folders: Folders) -> None:
    """Sorted, the folders are eight, five, four, ...; matched by number, one in ten would be right."""
    summary = run(folders, "words.pth")
    assert summary["splits"]["test"]["accuracy"] > 0.9
    assert summary["inputs"]["classes"] == {"test": "10 by name, of the checkpoint's 10"}
    assert summary["warnings"] == []
    by_number = run(folders, "plain.pth")  # a net whose classes are not known, and as many folders
    assert by_number["splits"]["test"]["accuracy"] < 0.3
    assert "the network does not know this data" in by_number["warnings"][0]


def test_folders_named_by_numbers_are_these_classes(folders: Folders) -> None:
    assert run(folders, "plain.pth", "numbers")["splits"]["test"]["accuracy"] > 0.9


def test_three_folders_of_ten_are_refused_unless_they_are_mapped(folders: Folders) -> None:
    some = folders.data / "some" / "test"
    for word in ("nine", "seven"):
        (some / word).mkdir(parents=True)
        for file in (folders.data / "words" / "test" / word).iterdir():
            (some / word / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SpecError, match=r"data\.classes: got '2 classes \(nine, seven\)'; allowed: the 10 classes"):
        run(folders, "plain.pth", "some")
    mapped = run(folders, "plain.pth", "some", classes={"nine": 9, "seven": 7})
    assert mapped["splits"]["test"]["accuracy"] > 0.9
    assert mapped["inputs"]["classes"] == {"test": "2 by the given mapping, of 10"}
    assert run(folders, "words.pth", "some")["splits"]["test"]["accuracy"] > 0.9


def test_a_draw_per_class_is_of_the_data_sets_own_classes(folders: Folders) -> None:
    data = {"name": "imagefolder", "root": "words", "test": {"per_class": 2}}
    spec = make_spec(
        {"model": {"name": "digits_alexnet", "weights": "words.pth"}, "layer": "fc3", "data": data, "sites": "all"}
    )
    job = load_job(spec, plan_here(spec, folders, PlanOptions(threads=1)), folders, device="cpu")
    split = job.splits["test"]
    labels = [split.dataset[int(index)][1] for index in split.indices]
    assert labels == [digit for word in sorted(WORDS) for digit in [WORDS.index(word)] * 2]


def test_a_fine_tuned_head_is_measured_with_its_own_classes(folders: Folders) -> None:
    classes = {word: 0 for word in WORDS} | {"nine": "nine", "five": 1, "seven": 2}
    summary = run(folders, "tuned.pth", classes=classes)
    assert summary["weights_in_layer"] == 3 * 256
    assert summary["notes"][:2] == [
        "tuned.pth: taken from its key 'model'", "tuned.pth: its head has 3 classes instead of 10",
    ]  # fmt: skip
    with pytest.raises(SpecError, match="The model has no 'eight'"):
        run(folders, "tuned.pth")


def test_a_label_that_the_mapping_leaves_out_is_named() -> None:
    from ablation.inputs.data import Relabelled

    with pytest.raises(DataError, match=r"example 1 has label 4, which the mapping of classes doesn't have; al"):
        Relabelled([(None, 0), (None, 4)], {0: 7})[1]


# --- what is said ----------------------------------------------------------------------------------------------------


def test_an_untrained_network_is_a_warning(folders: Folders) -> None:
    summary = run(folders, "none")
    assert summary["weights"] == "none: initialised from seed 0"
    assert len(summary["warnings"]) == 1
    assert summary["warnings"][0].startswith("test: the network does not know this data: its ")
    lines = summary_lines(summary)
    assert ("weights", "none: initialised from seed 0") in lines
    assert ("WARNING", summary["warnings"][0]) in lines


def test_what_was_skipped_or_converted_is_said_once(folders: Folders) -> None:
    root = folders.data / "odd" / "test"
    for digit in range(10):
        (root / str(digit)).mkdir(parents=True)
        Image.fromarray(np.full((9, 9), 65535 - digit, np.uint16)).save(root / str(digit) / "x.png")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "._x.png").touch()
    summary = run(folders, None, "odd")
    assert summary["weights"] == "its own, trained on the digits"
    assert summary["notes"] == [
        "test: 10 of 10 pictures have 16 bits of grey, which are scaled to 8",
        "test: 1 file skipped, which are no pictures of the data set: __MACOSX/._x.png",
    ]
    assert [text for label, text in summary_lines(summary) if label == "note"] == summary["notes"]


def test_orientations_are_applied_where_that_is_asked_for(folders: Folders) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (folders.data / "turned" / "test").mkdir(parents=True)
    for source in sorted((folders.data / "numbers" / "test").iterdir()):
        (folders.data / "turned" / "test" / source.name).mkdir()
        for file in source.iterdir():  # on its side, and a word that says so
            on_its_side = Image.open(file).transpose(Image.Transpose.ROTATE_90)
            on_its_side.save(folders.data / "turned" / "test" / source.name / file.name, exif=exif)
    ignored, applied = (run(folders, None, "turned", exif=how)["splits"]["test"]["accuracy"] for how in
                        ("ignore", "apply"))  # fmt: skip
    assert applied == run(folders, None, "numbers")["splits"]["test"]["accuracy"] > ignored + 0.3


# --- the caller's own data sets --------------------------------------------------------------------------------------


class Listed(torch.utils.data.TensorDataset):
    """A data set that lists its classes, as torchvision's do."""

    def __init__(self, classes: list[str]) -> None:
        random = torch.Generator().manual_seed(0)
        super().__init__(torch.rand(6, 1, 8, 8, generator=random), torch.arange(6) % 3)
        self.classes = classes


def ablate(data: Any, model: torch.nn.Module | None = None) -> Mapping[str, Any]:
    model = model or load_model("digits_alexnet", "none")[0]
    return ablation.ablate(
        model, "fc3", {"test": data}, sites=2, verify=0, engine="reference", progress=False
    ).summary()


def test_a_data_set_that_lists_other_classes_than_the_model_has_is_a_warning() -> None:
    said = ablate(Listed(["cat", "dog", "eel"]))["warnings"][0]
    assert said.startswith("test: the data set lists 3 classes (cat, dog, eel), the model has 10")
    part = torch.utils.data.Subset(Listed(["cat", "dog", "eel"]), [0, 1])
    assert "lists 3 classes" in ablate(part)["warnings"][0]
    assert not [said for said in ablate(Listed([*"abcdefghij"]))["warnings"] if "lists" in said]
    model = load_model("digits_alexnet", "none")[0]
    model.classes = [*"jihgfedcba"]
    assert "in another order" in ablate(Listed([*"abcdefghij"]), model)["warnings"][0]
    assert ablate(Listed([]))["weights"] is None

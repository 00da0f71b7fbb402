"""Which state dict of a file is meant: real files of torch.save and safetensors, read with torch and without."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ablation.errors import SpecError
from ablation.inputs.checkpoints import (
    choose_state_dict,
    count_classes,
    find_classes,
    find_head,
    order_names,
    read_outline,
)
from ablation.inputs.models import build_demo_model

MODEL = build_demo_model(1)
SHAPES = {name: tuple(parameter.shape) for name, parameter in MODEL.named_parameters()}


def prefixed(prefix: str, seed: int = 1) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in build_demo_model(seed).state_dict().items()}


def save(tree: Any, path: Path, **options: Any) -> Path:
    torch.save(tree, path, **options)
    return path


def choose(path: Path, key: str | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The choice by the outline, after seeing that it is that among the tensors."""
    given = path.name if key is None else f"{path.name}:{key}"
    told = choose_state_dict(read_outline(path), SHAPES, key, given)
    loaded = choose_state_dict(torch.load(path, weights_only=True), SHAPES, key, given)
    assert told is not None
    assert loaded is not None
    assert told.notes == loaded.notes
    assert {name: each.shape for name, each in told.tensors.items()} == {
        name: tuple(each.shape) for name, each in loaded.tensors.items()
    }
    return loaded.tensors, loaded.notes


PLAIN = prefixed("")
TREES: dict[str, tuple[Any, list[str]]] = {
    "plain": (PLAIN, []),
    "an ordered dict with metadata": (MODEL.state_dict(), []),
    "parameters": ({name: nn.Parameter(tensor) for name, tensor in PLAIN.items()}, []),
    "state_dict": ({"state_dict": PLAIN, "epoch": 3}, ["key 'state_dict'"]),
    "model": ({"model": PLAIN, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{}]}},
              ["key 'model'"]),
    "any other key": ({"net_g": PLAIN, "args": {"lr": 0.1, "name": "x"}}, ["key 'net_g'"]),
    "model in state": ({"state": {"model": PLAIN}}, ["key 'state.model'"]),
    "data parallel": (prefixed("module."), ["prefix 'module.'"]),
    "compiled": (prefixed("_orig_mod."), ["torch's wrappers"]),
    "compiled and parallel": (prefixed("module._orig_mod."), ["torch's wrappers", "prefix 'module.'"]),
    "one compiled part": ({name.replace("fc1.", "fc1._orig_mod."): each for name, each in PLAIN.items()},
                          ["torch's wrappers"]),
    "lightning": ({"state_dict": prefixed("model.") | {"criterion.weight": torch.ones(10)}, "epoch": 1},
                  ["key 'state_dict'", "prefix 'model.'", "left out, beside that prefix: criterion.weight"]),
    "state_dict as a prefix": (prefixed("state_dict."), ["prefix 'state_dict.'"]),
    "averaged weights": (prefixed("module.") | {"n_averaged": torch.tensor(4)}, ["prefix 'module.'", "n_averaged"]),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "says"), TREES.values(), ids=TREES)
def test_what_is_unambiguous_is_found_and_said(tree: Any, says: list[str], tmp_path: Path) -> None:
    tensors, notes = choose(save(tree, tmp_path / "x.pth"))
    assert set(tensors) == set(PLAIN)
    assert all(torch.equal(tensors[name], PLAIN[name]) for name in PLAIN)
    said = "; ".join(notes)
    assert all(part in said for part in says), said
    assert bool(says) == bool(notes)


def test_the_file_format_before_torch_1_6_is_read_too(tmp_path: Path) -> None:
    old = save({"state_dict": PLAIN}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert set(choose(old)[0]) == set(PLAIN)


SEVERAL: dict[str, tuple[Any, list[str]]] = {
    "model and its average": ({"model": prefixed(""), "model_ema": prefixed("", 2)}, ["model", "model_ema"]),
    "teacher and student": ({"student": prefixed("module."), "teacher": prefixed("module.", 2)},
                            ["student.module", "teacher.module"]),
    "a list": ([prefixed(""), prefixed("", 2)], ["0", "1"]),
    "a list of dicts": ({"nets": [{"state_dict": prefixed("")}, {"state_dict": prefixed("", 2)}]},
                        ["nets.0.state_dict", "nets.1.state_dict"]),
    "two prefixes": (prefixed("student.") | prefixed("teacher.", 2), ["student", "teacher"]),
    "momentum": (prefixed("module.encoder_q.") | prefixed("module.encoder_k.", 2),
                 ["module.encoder_q", "module.encoder_k"]),
    "one in the other": (prefixed("") | {"ema": prefixed("", 2)}, [".", "ema"]),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "keys"), SEVERAL.values(), ids=SEVERAL)
def test_of_several_state_dicts_the_keys_are_named_and_each_picks_its_own(
    tree: Any, keys: list[str], tmp_path: Path
) -> None:
    path = save(tree, tmp_path / "x.pth")
    for read in (read_outline(path), torch.load(path, weights_only=True)):
        with pytest.raises(SpecError, match="The file holds several state dicts") as caught:
            choose_state_dict(read, SHAPES, None, "x.pth")
        assert caught.value.field == "model.weights"
        assert caught.value.allowed == f"one of {', '.join(f'x.pth:{key}' for key in keys)}"
    for seed, key in enumerate(keys, 1):
        tensors, _ = choose(path, key)
        assert all(torch.equal(tensors[name], each) for name, each in prefixed("", seed).items()), key


def test_a_key_may_be_shorter_where_that_is_clear(tmp_path: Path) -> None:
    path = save({"student": prefixed("module."), "teacher": prefixed("module.", 2)}, tmp_path / "x.pth")
    tensors, notes = choose(path, "teacher")
    assert torch.equal(tensors["fc1.weight"], prefixed("", 2)["fc1.weight"])
    assert notes == ("the prefix 'module.' of its names was left out",)


def test_a_key_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = save({"model": PLAIN, "model_ema": prefixed("", 2)}, tmp_path / "x.pth")
    with pytest.raises(SpecError, match="Did you mean 'model_ema'") as caught:
        choose_state_dict(read_outline(path), SHAPES, "model_eam", "x.pth:model_eam")
    assert caught.value.allowed == "one of x.pth:model, x.pth:model_ema"


def test_the_old_names_of_densenets_file_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    names = [f"features.denseblock1.denselayer2.{part}{k}.weight" for part in ("norm", "conv") for k in (1, 2)]
    old = {name.replace("norm", "norm.").replace("conv", "conv."): torch.zeros(2) for name in names}
    read = read_outline(save(old, tmp_path / "x.pth"))
    chosen = choose_state_dict(read, dict.fromkeys(names, (2,)), None, "x.pth")
    assert chosen is not None
    assert sorted(chosen.tensors) == sorted(names) != sorted(old)
    assert "old versions" in chosen.notes[0]


def test_a_teacher_of_another_architecture_is_no_choice(tmp_path: Path) -> None:
    """Its names are the model's, as those of ResNet-50 are ResNet-18's, but not its shapes."""
    teacher = {name: torch.zeros(*(n + 1 for n in each.shape)) for name, each in PLAIN.items()}
    tensors, notes = choose(save({"student": PLAIN, "teacher": teacher}, tmp_path / "x.pth"))
    assert torch.equal(tensors["fc1.weight"], PLAIN["fc1.weight"])
    assert notes == ("taken from its key 'student'",)


@pytest.mark.parametrize("tree", [[1, 2], {"lr": 0.1}, {1: torch.zeros(3)}, torch.zeros(3), {}, []])
def test_without_a_state_dict_there_is_none(tree: Any, tmp_path: Path) -> None:
    assert choose_state_dict(read_outline(save(tree, tmp_path / "x.pth")), SHAPES, None, "x.pth") is None


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_an_outline_runs_no_code_of_the_file(tmp_path: Path) -> None:
    path = save({"state_dict": PLAIN, "args": Touch(tmp_path / "sprung")}, tmp_path / "x.pth")
    assert set(read_outline(path)["state_dict"]) == set(PLAIN)
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists()  # the control: the trap is a real one


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02.", b"\xff" * 40])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_of_damaged_files_there_is_no_outline(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_outline(tmp_path / name) is None


def test_a_head_is_the_last_weight_with_a_row_for_each_class() -> None:
    assert find_head(SHAPES, 10) == "fc3"
    tuned = {**PLAIN, "fc3.weight": torch.zeros(3, 256), "fc3.bias": torch.zeros(3)}
    assert count_classes(tuned, SHAPES, 10) == 3
    assert count_classes({**PLAIN, "fc3.weight": torch.zeros(3, 255)}, SHAPES, 10) == 10  # that is another model


LISTS: dict[str, tuple[Any, tuple[str, ...] | None]] = {
    "a list": ({"classes": ["cat", "dog", "eel"]}, ("cat", "dog", "eel")),
    "torchvision's name": ({"categories": ("cat", "dog", "eel")}, ("cat", "dog", "eel")),
    "names to numbers": ({"class_to_idx": {"eel": 2, "cat": 0, "dog": 1}}, ("cat", "dog", "eel")),
    "numbers to names": ({"idx_to_class": {1: "dog", 0: "cat", 2: "eel"}}, ("cat", "dog", "eel")),
    "numbers as text": ({"idx_to_class": {"1": "dog", "0": "cat", "2": "eel"}}, ("cat", "dog", "eel")),
    "in capitals, below another key": ({"meta": {"CLASSES": ("cat", "dog", "eel")}}, ("cat", "dog", "eel")),
    "not as many": ({"classes": ["cat", "dog"]}, None),
    "not names": ({"classes": [1, 2, 3]}, None),
    "a gap": ({"class_to_idx": {"eel": 3, "cat": 0, "dog": 1}}, None),
}


@pytest.mark.parametrize(("extra", "expected"), LISTS.values(), ids=LISTS)
def test_a_checkpoint_tells_the_names_of_its_classes(
    extra: dict[str, Any], expected: tuple[str, ...] | None, tmp_path: Path
) -> None:
    path = save({"state_dict": PLAIN, **extra}, tmp_path / "x.pth")
    assert find_classes(read_outline(path), 3) == find_classes(torch.load(path, weights_only=True), 3) == expected


def test_the_metadata_of_safetensors_may_have_them(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "x.safetensors", {"classes": json.dumps(["cat", "dog"]), "format": "pt"})
    outline = read_outline(tmp_path / "x.safetensors")
    assert find_classes(outline, 2) == ("cat", "dog")
    assert set(choose_state_dict(outline, SHAPES, None, "x").tensors) == set(PLAIN)  # type: ignore[union-attr]


def test_of_several_names_of_a_class_the_first_counts() -> None:
    assert order_names([("tench", "Tinca tinca"), ("goldfish",)]) == ("tench", "goldfish")
    assert order_names(OrderedDict()) is None

import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ablation.inputs.demo import DigitsAlexNet, ensure_demo_model, measure_accuracy, prepare_digit, train_demo_model
from ablation.inputs.folders import Folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, list[str]]:
    """A cache that two processes asked for the demo model at once, and what they printed."""
    cache = tmp_path_factory.mktemp("home") / "new" / "cache"
    command = [sys.executable, "-m", "ablation.inputs.demo", "--cache", str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return Folders(data=cache, checkpoints=cache, cache=cache), outputs


def test_two_processes_at_once_train_one_model(trained: tuple[Folders, list[str]]) -> None:
    folders, outputs = trained
    assert sum("training digits_alexnet" in output for output in outputs) == 1
    assert all("digits_alexnet is trained" in output for output in outputs)
    assert sorted(file.suffix for file in folders.cache.iterdir()) == [".lock", ".safetensors"]


def test_the_demo_model_is_good_and_kept(trained: tuple[Folders, list[str]]) -> None:
    folders, _ = trained
    seen: list[float] = []
    model = DigitsAlexNet()
    model.load_state_dict(load_file(ensure_demo_model(folders, seen.append)))
    assert measure_accuracy(model.eval()) >= 0.95
    assert seen == []  # it was there already


def test_an_untrained_net_is_not_good() -> None:
    assert measure_accuracy(DigitsAlexNet().eval()) < 0.5


def test_training_gives_the_same_bits_and_leaves_the_caller_as_it_was() -> None:
    torch.manual_seed(12)
    state, n_threads = torch.get_rng_state(), torch.get_num_threads()
    seen: list[float] = []
    with torch.no_grad():  # as a worker may have it
        first = train_demo_model(n_epochs=2, on_progress=seen.append).state_dict()
    assert seen == [0.5, 1.0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == n_threads

    torch.manual_seed(99)
    second = train_demo_model(n_epochs=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc2.weight"], train_demo_model(n_epochs=3).state_dict()["fc2.weight"])


def test_its_layers_are_those_of_a_small_alexnet() -> None:
    names = [name for name, _ in DigitsAlexNet().named_children()]
    assert names == ["conv1", "conv2", "fc1", "fc2", "fc3"]


@pytest.mark.parametrize(("mode", "size"), [("L", (8, 8)), ("RGB", (32, 32)), ("L", (28, 28)), ("RGBA", (9, 5))])
def test_any_picture_becomes_a_grey_one_of_8x8(mode: str, size: tuple[int, int]) -> None:
    white = prepare_digit(Image.new(mode, size, "white"))
    assert white.shape == (1, 8, 8)
    assert (white.min().item(), white.max().item()) == (1.0, 1.0)


def test_a_picture_keeps_its_rows_and_columns() -> None:
    picture = Image.new("L", (8, 8))
    picture.putpixel((6, 1), 51)  # x, y
    assert prepare_digit(picture)[0, 1, 6].item() == pytest.approx(0.2)

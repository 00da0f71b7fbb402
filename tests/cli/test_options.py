"""What is typed becomes the spec that is meant, or an error that says what may be typed."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ablation.cli.commands import commands
from ablation.cli.options import (
    PATHS,
    TYPED,
    command_again,
    command_told,
    locate,
    read_criteria,
    read_loss,
    read_sites,
    read_split,
    read_value,
    spec_options,
)
from ablation.cli.run import run
from ablation.errors import SpecError
from ablation.inputs.folders import Folders
from ablation.spec import JobSpec, Scale, make_spec

MINIMAL = ["--model", "alexnet", "--layer", "classifier.4", "--data", "imagenet", "--sites", "9"]


def read(*arguments: str) -> JobSpec:
    seen: list[JobSpec] = []

    @click.command()
    @spec_options
    def command(spec: JobSpec) -> None:
        seen.append(spec)

    command.main(args=[*MINIMAL, *arguments], standalone_mode=False)
    return seen[0]


def test_every_option_reaches_the_spec() -> None:
    spec = read(
        "--weights", "IMAGENET1K_V1", "--model-seed", "3", "--root", "somewhere", "--train", "50/class",
        "--test", "all", "--data-seed", "4",
        "--bad-images", "skip", "--check-images", "full", "--sites", "4096", "--seed", "5", "--value", "-0.25",
        "--precision", "float64", "--verify", "2", "--top1", "--label-smoothing", "0.1", "--class-weights", "1,0,2.5",
    )  # fmt: skip
    assert spec == make_spec(
        {
            "model": {"name": "alexnet", "weights": "IMAGENET1K_V1", "seed": 3},
            "layer": "classifier.4",
            "data": {
                "name": "imagenet",
                "root": "somewhere",
                "train": {"per_class": 50, "seed": 4},
                "test": "all",
                "bad_images": "skip",
                "check_images": "full",
            },
            "sites": {"count": 4096, "seed": 5},
            "value": {"constant": -0.25},
            "precision": "float64",
            "verify": 2,
            "top1": True,
            "loss": {"name": "cross_entropy", "label_smoothing": 0.1, "class_weights": [1, 0, 2.5]},
        }
    )


def test_defaults_are_the_specs_own() -> None:
    assert read("--test", "all") == make_spec(
        {
            "model": {"name": "alexnet"},
            "layer": "classifier.4",
            "data": {"name": "imagenet", "test": "all"},
            "sites": {"count": 9},
        }
    )


@pytest.mark.parametrize(
    ("text", "split"),
    [(None, None), ("all", "all"), ("500", {"count": 500, "seed": 7}), ("50/class", {"per_class": 50, "seed": 7})],
)
def test_split(text: str | None, split: object) -> None:
    assert read_split("train", text, 7) == split


@pytest.mark.parametrize("text", ["", "some", "50/classes", "/class", "--5", "1.5", "²"])
def test_split_of_no_form(text: str) -> None:
    with pytest.raises(SpecError, match=r"data\.train.*50/class"):
        read_split("train", text, 0)


@pytest.mark.parametrize(
    ("text", "sites"),
    [("all", "all"), ("12", {"count": 12, "seed": 7}), ("5,17,3", {"indices": [5, 17, 3]}), ("5,", {"indices": [5]})],
)
def test_sites(text: str, sites: object) -> None:
    assert read_sites(text, 7) == sites


@pytest.mark.parametrize("text", ["", ",", "some", "5,,3", "5;3", "1.5"])
def test_sites_of_no_form(text: str) -> None:
    with pytest.raises(SpecError, match=r"sites.*5,17,3"):
        read_sites(text, 0)


def test_value() -> None:
    assert read_value("zero") == "zero"
    assert read_value("1e-3") == {"constant": 0.001}
    assert read_value("flip_sign") == "flip_sign"
    assert read_value("scale=-0.5") == {"scale": -0.5}
    assert read("--test", "all", "--value", "scale=2").value == Scale(scale=2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "value: got 'nothing'; allowed: zero, flip_sign, a number or scale=NUMBER."),
        ("scale", "allowed: zero, flip_sign, a number or scale=NUMBER."),
        ("scale=half", "value: got 'scale=half'; allowed: zero, flip_sign, a number or scale=NUMBER."),
        ("flipsign", "Did you mean 'flip_sign'?"),
        ("scael=2", "Did you mean 'scale'?"),
        ("scale=inf", "value.scale: got Infinity; allowed: a finite number."),
        ("1e400", "value.constant: got Infinity; allowed: a finite number."),
    ],
)
def test_value_of_no_form(text: str, says: str) -> None:
    with pytest.raises(SpecError) as error:
        read("--test", "all", "--value", text)
    assert says in str(error.value)


def test_criteria_reach_the_spec_which_knows_their_names() -> None:
    assert read_criteria(["saliency, magnitude", "taylor1"]) == ["saliency", "magnitude", "taylor1"]
    assert read("--test", "all", "--criteria", "").criteria == ()
    assert read("--test", "all", "--criteria", "taylor1").criteria == ("taylor1",)
    with pytest.raises(
        SpecError, match=r"criteria\.1: got 'tailor1'; allowed: one of taylor1\. Did you mean 'taylor1'"
    ):
        read("--test", "all", "--criteria", "taylor1", "--criteria", "tailor1")
    with pytest.raises(SpecError, match="'taylor1' is given twice"):
        read("--test", "all", "--criteria", "taylor1,taylor1")


def test_help_has_the_names_of_the_criteria() -> None:
    said = " ".join(CliRunner().invoke(commands, ["plan", "--help"]).output.split())
    assert "taylor1: predicted utility g (r - w), to first order" in said


def test_losses() -> None:
    assert read_loss(None, None) == "cross_entropy"
    assert read_loss("1e-1", None) == {"name": "cross_entropy", "label_smoothing": 0.1}
    assert read_loss(None, "2, 0,") == {"name": "cross_entropy", "class_weights": [2.0, 0.0]}
    with pytest.raises(SpecError, match=r"loss.label_smoothing: got 'much'; allowed: a number\."):
        read_loss("much", None)
    with pytest.raises(SpecError, match=r"loss.class_weights: got 'two'; allowed: a number for each class"):
        read_loss(None, "1,two")
    with pytest.raises(SpecError, match=r"loss.label_smoothing: got 1.0; allowed: less than 1"):
        read("--test", "all", "--label-smoothing", "1")


def test_no_split_is_refused() -> None:
    with pytest.raises(SpecError, match="'train', 'test' or both"):
        read()


def test_paths_that_exist_here_become_names_below_their_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "net.pt").touch()
    folders = Folders(data=Path("/data"), checkpoints=Path("/checkpoints"), cache=Path("/cache"))
    here = read("--test", "all", "--root", str(tmp_path / "pictures"), "--weights", str(tmp_path / "net.pt"))
    spec, found = locate(here, folders)
    assert (spec.data.root, spec.model.weights) == ("pictures", "net.pt")
    assert (found.data, found.checkpoints, found.cache) == (tmp_path.resolve(), tmp_path.resolve(), Path("/cache"))


def test_a_key_behind_a_path_stays_with_the_name(tmp_path: Path) -> None:
    (tmp_path / "a:b.pt").touch()
    folders = Folders(data=Path("/data"), checkpoints=Path("/checkpoints"), cache=Path("/cache"))
    spec, found = locate(read("--test", "all", "--weights", f"{tmp_path}/a:b.pt:model.ema"), folders)
    assert (spec.model.weights, found.checkpoints) == ("a:b.pt:model.ema", tmp_path.resolve())
    there = read("--test", "all", "--weights", "runs/x.pt:model")  # for the checkpoint folder
    assert locate(there, folders) == (there, folders)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("cat,281\ndog,Golden retriever\n", {"cat": 281, "dog": "Golden retriever"}),
        ('\ufeff"cat, tabby", 281\r\n\r\n007,7', {"cat, tabby": 281, "007": 7}),
        ('{"cat": 281, "dog": "207"}', {"cat": 281, "dog": "207"}),
    ],
)
def test_a_mapping_of_classes_is_csv_or_json(text: str, classes: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "classes").write_text(text, "utf-8")
    spec = read("--test", "all", "--classes", str(tmp_path / "classes"), "--exif", "apply")
    assert (spec.data.classes, spec.data.exif) == (classes, "apply")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "It can't be read: No such file or directory."),
        ("cat\n", "It has the line 'cat'."),
        ("cat,281,tabby\n", "It has the line 'cat,281,tabby'."),
        ("cat,\n", "It has the line 'cat,'."),
        ("cat,1\ncat,2\n", "'cat' is given twice."),
        ('{"cat": 1, "cat": 2}', "'cat' is given twice."),
        ('{"cat": ', "It can't be read: Expecting value"),
        ('{"cat": 1.5}', "data.classes: got "),
        ("", "data.classes: got {}; allowed: 1 or more of them"),
    ],
)
def test_a_mapping_of_another_form_is_one_line(text: str | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "classes").write_text(text)
    with pytest.raises(SpecError) as caught:
        read("--test", "all", "--classes", str(tmp_path / "classes"))
    assert says in str(caught.value)


def test_other_names_are_left_to_the_operators_folders() -> None:
    folders = Folders(data=Path("/data"), checkpoints=Path("/checkpoints"), cache=Path("/cache"))
    spec = read("--test", "all", "--root", "nothing-here", "--weights", "IMAGENET1K_V1")
    assert locate(spec, folders) == (spec, folders)


@pytest.mark.parametrize("typed", ["deep/er", "deep/er/", "."])
def test_an_error_about_a_path_shows_what_was_typed(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = ["--model", "alexnet", "--layer", "classifier.4", "--sites", "9", "--test", "all"]
    of_data = ["--weights", "none", "--data", "mnist", "--root", typed]
    result = CliRunner().invoke(commands, ["plan", *options, *of_data])
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert result.output.startswith(f"Error: data.root: got '{typed}'; allowed: a folder with MNIST/raw/ and in it ")
    assert str(tmp_path) not in result.output
    result = CliRunner().invoke(commands, ["plan", *options, "--data", "digits", "--weights", typed])
    assert result.output.startswith(f"Error: model.weights: got '{typed}'; allowed: ")


@pytest.mark.parametrize(
    ("option", "given", "says"),
    [
        ("--precision", "half", "precision: got 'half'; allowed: 'mixed', 'float32' or 'float64'."),
        ("--verify", "some", "verify: got 'some'; allowed: a whole number."),
        ("--seed", "1.5", "sites.seed: got '1.5'; allowed: a whole number."),
        ("--seed", "-1", "sites.seed: got -1; allowed: 0 or more."),
        ("--sites", "-1", "sites.count: got -1; allowed: 1 or more."),
        ("--test", "-5/class", "data.test.per_class: got -5; allowed: 1 or more."),
        ("--batch-size", "abc", "--batch-size: got 'abc'; allowed: a whole number, 1 or more."),
        ("--batch-size", "0", "--batch-size: got 0; allowed: a whole number, 1 or more."),
    ],
)
def test_what_the_spec_refuses_it_refuses_in_its_own_words(option: str, given: str, says: str) -> None:
    options = [*MINIMAL, "--test", "all", option, given]
    result = CliRunner().invoke(commands, ["plan", *options])
    assert (result.exit_code, result.output) == (2, f"Error: {says}\n")


def test_what_is_no_option_is_one_line() -> None:
    result = CliRunner().invoke(commands, ["plan", "--modle", "alexnet"])
    assert result.exit_code == 2
    assert result.output.startswith("Error: No such option '--modle'.")
    assert result.output.endswith("See `commands plan --help`.\n")
    assert len(result.output.splitlines()) == 1


def told(*words: str) -> str:
    with click.Context(commands) as context:
        context.meta[TYPED] = words
        return command_told()


def test_a_command_is_told_without_folders_and_without_what_does_not_change_it() -> None:
    assert told("run", "--root", "/data/secret/pets", "--weights=~/a b/net.pt", "--train", "50/class", "--resume") == (
        "ablation run --root pets --weights=net.pt --train 50/class"
    )
    assert told("run", "--root", "../pets/", "--force", "--out", ".", "--layer", "fc/2", "/etc/x") == (
        "ablation run --root pets --out . --layer fc/2 x"
    )


def test_the_command_that_goes_on_is_as_it_was_typed() -> None:
    with click.Context(commands) as context:
        context.meta[TYPED] = ("run", "--root", "/data/my pets", "--force")
        assert command_again() == "ablation run --root '/data/my pets' --resume"


def test_every_option_of_a_path_is_known() -> None:
    """A new option whose value is a path must be told without its folder, too."""
    for option in run.params:
        if isinstance(option.type, click.Path) or "older of" in (getattr(option, "help", "") or ""):
            assert option.opts[0] in PATHS

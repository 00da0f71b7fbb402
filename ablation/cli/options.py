"""The options of a job spec: a decorator gives them to a command and turns them into a `JobSpec`.

In: text from the command line. Out: a checked spec, and folders. Whether the layer and the data exist is checked later.
"""

import contextlib
import csv
import dataclasses
import functools
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from ablation.criteria import CRITERIA
from ablation.errors import SpecError, as_given, nearest
from ablation.inputs.folders import Folders
from ablation.inputs.weights import split_key
from ablation.plan import ENGINES
from ablation.spec import DataSpec, JobSpec, ValueWord, make_spec
from worker.settings import load_settings

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Integer(click.ParamType):
    """A number; other text goes to the spec unchanged, whose error is then the same as over HTTP."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Convert `value` to a number, or return it unchanged."""
        return int(value) if _is_number(str(value)) else value


INTEGER = Integer()


@dataclasses.dataclass
class WholeNumber(click.ParamType):
    """A whole number of an option that is not part of the spec."""

    least: int
    most: int | None = None
    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert `value` to a number.

        Raises:
            SpecError: `value` is not a number, or is too small or too large.
        """
        number = INTEGER.convert(value, param, ctx)
        if isinstance(number, int) and number >= self.least and (self.most is None or number <= self.most):
            return number
        limits = f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"
        raise SpecError(param.opts[-1] if param else self.name, number, f"a whole number, {limits}")


_SPEC_OPTIONS = [
    click.option("--model", required=True, help="Name of the model; `ablation models` lists them."),
    click.option(
        "--weights", metavar="NAME|FILE[:KEY]|none",
        help="torchvision weights (IMAGENET1K_V1), a checkpoint file (FILE:KEY where it holds several), or none: "
        "initialised from --model-seed.  [default: the model's own; torchvision's models have none]",
    ),
    click.option("--model-seed", type=INTEGER, default=0, show_default=True, help="Seed of random weights."),
    click.option("--layer", required=True, help="A module's name (its weight) or a parameter; see `ablation layers`."),
    click.option("--data", required=True, help="Name of the data set: digits, imagefolder, cifar10, imagenet, ..."),
    click.option("--root", help="Folder of the data set, for those that need one."),
    click.option("--train", help="Training examples: all, N or N/class.  [default: none]"),
    click.option("--test", help="Test examples: all, N or N/class.  [default: none]"),
    click.option(
        "--classes", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
        help="Which class of the model each class of the data is: a CSV file with two columns, class and number or "
        "name (cat,281), or a JSON object.  [default: by name, or by number where there are as many]",
    ),
    click.option(
        "--exif", metavar="[ignore|apply]",
        help="apply: turn picture files as their EXIF orientation says.  [default: ignore]",
    ),
    click.option("--data-seed", type=INTEGER, default=0, show_default=True, help="Seed of the examples drawn."),
    click.option(
        "--bad-images", type=click.Choice(get_args(DataSpec.model_fields["bad_images"].annotation)), default="refuse",
        show_default=True, help="Pictures that can't be read: refuse the job, or leave them out and list them.",
    ),
    click.option(
        "--check-images", type=click.Choice(get_args(DataSpec.model_fields["check_images"].annotation)),
        default="headers", show_default=True, help="How pictures are checked before the work.",
    ),
    click.option("--sites", required=True, help="Weights to ablate: N (drawn at random), all, or flat indices: 5,17,3"),
    click.option("--seed", type=INTEGER, default=0, show_default=True, help="Seed of the weights drawn by --sites N."),
    click.option(
        "--value", metavar="[zero|flip_sign|NUMBER|scale=S]", default="zero", show_default=True,
        help="What replaces each weight: zero, flip_sign, a number (the same for all) or scale=S (S times the weight).",
    ),
    click.option(
        "--precision", metavar="[mixed|float32|float64]", default="mixed", show_default=True,
        help="mixed: float64 from the layer on, as exact as float64 for a model that runs in float32.",
    ),
    click.option("--verify", type=INTEGER, default=8, show_default=True, help="Weights checked by brute force."),
    click.option("--top1", is_flag=True, help="Also count the answers that become wrong and right."),
    click.option(
        "--criteria", multiple=True, metavar="NAME",
        help="Cheap criteria to compute beside; may be repeated, or names with commas between. "
        + "; ".join(f"{criterion.name}: {criterion.description}" for criterion in CRITERIA.values())
        + ".",
    ),
    click.option("--label-smoothing", help="Label smoothing of the cross-entropy, as torch's.  [default: 0]"),
    click.option("--class-weights", help="One weight for each class, with commas between: 1,2.5,0  [default: all 1]"),
]  # fmt: skip

_RUN_OPTIONS = [
    click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="Which path to take."),
    click.option("--batch-size", type=WholeNumber(1), help="Examples at once.  [default: by the model's size]"),
]


def spec_options(command: Command) -> Command:
    """Add the options of a job spec to a command, which is called with `spec`."""

    @functools.wraps(command)
    def with_spec(**options: Any) -> Any:
        asked = {name: options.pop(name) for name in inspect.signature(read_spec).parameters}
        return command(spec=read_spec(**asked), **options)

    return _decorate(with_spec, _SPEC_OPTIONS)


def run_options(command: Command) -> Command:
    """Add the options that change how a job is computed here, not what it computes."""
    return _decorate(command, _RUN_OPTIONS)


def home_option(contents: str) -> Callable[[Command], Command]:
    """Add `--home` to a command, which is called with `settings`; `contents` are the folders in it that it uses."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_settings(home: Path | None, **options: Any) -> Any:
            return command(settings=load_settings(home), **options)

        option = click.option(
            "--home", type=click.Path(path_type=Path, file_okay=False),
            help=f"Folder of {contents}.  [default: ABLATION_HOME or ~/.ablation]",
        )  # fmt: skip
        return _decorate(with_settings, [option])

    return decorate


def force_option(command: Command) -> Command:
    """Add `--force` to a command that writes results."""
    return _decorate(command, [click.option("--force", is_flag=True, help="Replace results that are in --out.")])


TYPED = "ablation.typed"  # where the words of the command line are noted
PATHS = ("--root", "--weights", "--classes", "--home", "--out")  # options whose value may be a path


def typed() -> list[str]:
    """The words after `ablation` of the command line that this process runs."""
    context = click.get_current_context(silent=True)
    return list(context.meta.get(TYPED, ())) if context else []


def command_again() -> str:
    """The command line that goes on with a job: as it was typed, with --resume and without --force."""
    words = [word for word in typed() if word not in ("--force", "--resume")]
    return shlex.join(["ablation", *words, "--resume"])


def command_told() -> str:
    """The command line as a result tells it: of every file and folder the name alone, as in the spec (`locate`)."""
    told: list[str] = []
    for word in typed():
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        takes_path = option in PATHS if equals else bool(told) and told[-1] in PATHS
        if value and (takes_path or value.startswith(("/", "~/"))):
            word = f"{option}{equals}{Path(value).name or value}"
        if word not in ("--force", "--resume"):
            told.append(word)
    return shlex.join(["ablation", *told])


def out_option(default: str) -> Callable[[Command], Command]:
    """Add `--out`, a folder, to a command."""
    return click.option(
        "--out", type=click.Path(path_type=Path), default=default, show_default=True,
        help="Folder for utility.csv, utility.parquet and summary.json.",
    )  # fmt: skip


def read_spec(
    *, model: str, weights: str | None, model_seed: int, layer: str, data: str, root: str | None, train: str | None,
    test: str | None, classes: Path | None, exif: str | None, data_seed: int, bad_images: str, check_images: str,
    sites: str, seed: int, value: str, precision: str, verify: int, top1: bool, criteria: Sequence[str],
    label_smoothing: str | None, class_weights: str | None,
) -> JobSpec:  # fmt: skip
    """Make the job spec from the options.

    Raises:
        SpecError: an option has a wrong format, or the spec is not possible.
    """
    splits = {"train": read_split("train", train, data_seed), "test": read_split("test", test, data_seed)}
    of_data = {
        "name": data, "root": root, "classes": read_classes(classes), **splits, "exif": exif,
        "bad_images": None if bad_images == "refuse" else bad_images,  # an error shows what was asked for, no defaults
        "check_images": None if check_images == "headers" else check_images,
    }  # fmt: skip
    return make_spec(
        {
            "model": {"name": model, "weights": weights, "seed": model_seed},
            "layer": layer,
            "data": {field: given for field, given in of_data.items() if given is not None},
            "sites": read_sites(sites, seed),
            "value": read_value(value),
            "precision": precision,
            "verify": verify,
            "top1": top1,
            "criteria": read_criteria(criteria),
            "loss": read_loss(label_smoothing, class_weights),
        }
    )


def read_split(name: str, text: str | None, seed: int) -> str | dict[str, int] | None:
    """Parse the part of a split: all, N, or N/class."""
    if text is None or text == "all":
        return text
    number, per_class = text.removesuffix("/class"), text.endswith("/class")
    if not _is_number(number):
        raise SpecError(f"data.{name}", text, "all, a number of examples (500) or a number per class (50/class)")
    return {"per_class" if per_class else "count": int(number), "seed": seed}


def read_classes(path: Path | None) -> dict[str, int | str] | None:
    """Read which class of the model each class of the data is, from two columns of CSV, or from a JSON object.

    In CSV a whole number is a class number; in JSON text is a name and a number a number.

    Raises:
        SpecError: the file can't be read, or has another form.
    """
    if path is None:
        return None
    allowed = "a CSV file with two columns (cat,281), class of the data and of the model, or a JSON object of them"
    try:
        text = path.expanduser().read_text("utf-8-sig")
        if text.lstrip().startswith("{"):
            read: dict[str, int | str] = json.loads(text, object_pairs_hook=_each_once)
            return read
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if any(row)]
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecError("--classes", str(path), allowed, f"It can't be read: {reason}.") from None
    if wrong := next((row for row in rows if len(row) != 2 or not all(row)), None):
        raise SpecError("--classes", str(path), allowed, f"It has the line {','.join(wrong)!r}.")
    try:
        return _each_once([(name, int(number) if _is_number(number) else number) for name, number in rows])
    except ValueError as error:
        raise SpecError("--classes", str(path), allowed, f"{error}.") from None


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs whose first parts are distinct."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} is given twice")
    return dict(pairs)


def read_sites(text: str, seed: int) -> str | dict[str, Any]:
    """Parse the sites: all, N, or flat indices with commas between them (`5,` is index 5 alone)."""
    if text == "all":
        return text
    numbers = [part.strip() for part in text.removesuffix(",").split(",")]
    if not all(_is_number(number) for number in numbers):
        raise SpecError("sites", text, "all, a number of weights (4096) or flat indices (5,17,3)")
    if "," in text:
        return {"indices": [int(number) for number in numbers]}
    return {"count": int(text), "seed": seed}


def read_value(text: str) -> str | dict[str, float]:
    """The replacement that `text` says: a name (zero, flip_sign), a number, or a name with a number (scale=0.5).

    Which names there are is known to the spec.
    """
    name, equals, number = text.rpartition("=")
    try:
        return {name if equals else "constant": float(number)}
    except ValueError:
        words = get_args(ValueWord)
        if equals or text not in words:
            raise SpecError("value", text, "zero, flip_sign, a number or scale=NUMBER", nearest(text, words)) from None
    return text


def read_criteria(given: Sequence[str]) -> list[str]:
    """Parse names, each text one or several with commas between them."""
    return [name for text in given for part in text.split(",") if (name := part.strip())]


def read_loss(smoothing: str | None, weights: str | None) -> str | dict[str, Any]:
    """Cross-entropy, with the label smoothing and the class weights that the two texts say."""
    if smoothing is None and weights is None:
        return "cross_entropy"
    given = {
        "label_smoothing": None if smoothing is None else _read_number("loss.label_smoothing", smoothing),
        "class_weights": None
        if weights is None
        else [_read_number("loss.class_weights", part) for part in weights.removesuffix(",").split(",")],
    }
    return {"name": "cross_entropy"} | {name: value for name, value in given.items() if value is not None}


def _read_number(field: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        several = " for each class, with commas between (1,2.5,0)" if field.endswith("weights") else ""
        raise SpecError(field, text, f"a number{several}") from None


@contextlib.contextmanager
def located(spec: JobSpec, folders: Folders) -> Iterator[tuple[JobSpec, Folders]]:
    """Context with the spec and folders of `locate`; errors raised inside show the text from the command line."""
    with as_given({"data.root": spec.data.root, "model.weights": spec.model.weights}):
        yield locate(spec, folders)


def locate(spec: JobSpec, folders: Folders) -> tuple[JobSpec, Folders]:
    """Take `--root` and `--weights` as paths of this machine, since the user who runs a job here is its operator.

    The spec keeps only the last part of the path, as a server's would, so a result doesn't show where its data was.
    """
    root, data = _below(spec.data.root, folders.data)
    weights, checkpoints = _file_below(spec.model.weights, folders.checkpoints)
    here = spec.model_copy(
        update={
            "data": spec.data.model_copy(update={"root": root}),
            "model": spec.model.model_copy(update={"weights": weights}),
        }
    )
    return here, dataclasses.replace(folders, data=data, checkpoints=checkpoints)


def _below(given: str | None, folder: Path) -> tuple[str | None, Path]:
    """Split `given` into a name and a folder: its own parent where it is an existing path, else `folder`."""
    if given is None or not (path := Path(given).expanduser().resolve()).exists():
        return given, folder
    return path.name, path.parent


def _file_below(given: str | None, folder: Path) -> tuple[str | None, Path]:
    """Split the weights that were given likewise, where they are a path, or a path and a key in the file."""
    whole = _below(given, folder)
    if given is None or whole != (given, folder):
        return whole
    for file, key in split_key(given):
        if Path(file).expanduser().is_file():
            name, parent = _below(file, folder)
            return f"{name}:{key}", parent
    return whole


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", text) is not None


def _decorate(command: Any, options: list[Any]) -> Any:
    for option in reversed(options):
        command = option(command)
    return command

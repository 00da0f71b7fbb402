"""The commands that compute nothing say what there is and what it would cost; all end with the right code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ablation.cli.commands import commands
from tests.api.conftest import serving
from worker.settings import Settings
from worker.store import JobStore

TEN_CLASSES = str(Path(__file__).with_name("ten_classes.csv"))
OF_DIGITS = ["--layer", "fc", "--data", "digits", "--test", "all", "--sites", "5"]
JOB = [
    "--model", "alexnet", "--weights", "none", "--layer", "classifier.4",
    "--data", "digits", "--classes", TEN_CLASSES, "--train", "10/class", "--test", "40",
]  # fmt: skip


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(commands, [*arguments])


def test_models() -> None:
    models = {model["name"]: model for model in json.loads(invoke("models", "--json").stdout)}
    assert {"digits_alexnet", "alexnet", "resnet18", "vit_b_16"} <= set(models)
    assert "IMAGENET1K_V1" in models["alexnet"]["weights"]
    assert "digits_alexnet" in invoke("models").stdout


def test_layers() -> None:
    layers = {layer["name"]: layer for layer in json.loads(invoke("layers", "alexnet", "--json").stdout)}
    assert layers["classifier.4"] == {
        "name": "classifier.4", "parameter": "classifier.4.weight", "kind": "Linear", "shape": [4096, 4096],
        "n_weights": 4096**2, "path": "direct", "whole_layer_path": "response",
    }  # fmt: skip
    line = next(line for line in invoke("layers", "alexnet").stdout.splitlines() if "classifier.4 " in line)
    assert line.split() == ["classifier.4", "Linear", "4096x4096", "16,777,216", "direct", "response"]


@pytest.mark.parametrize(("layer", "paths"), [("fc1", ["finite", "response"]), ("fc2.bias", ["direct", "direct"])])
def test_the_listed_paths_are_those_of_the_plans(layer: str, paths: list[str]) -> None:
    listed = next(line for line in invoke("layers", "digits_alexnet").stdout.splitlines() if line.startswith(layer))
    assert listed.split()[-2:] == paths
    job = ["--model", "digits_alexnet", "--layer", layer, "--data", "digits", "--test", "40", "--json"]
    planned = [json.loads(invoke("plan", *job, "--sites", sites).stdout)["path"] for sites in ("5", "all")]
    assert planned == paths


def test_datasets() -> None:
    datasets = {data["name"]: data for data in json.loads(invoke("datasets", "--json").stdout)}
    assert datasets["digits"]["n_examples"] == {"train": 1297, "test": 500}
    assert datasets["imagefolder"] == {
        "name": "imagefolder", "needs_root": True, "n_classes": None, "n_examples": {}, "n_per_class": {}
    }  # fmt: skip
    line = next(line for line in invoke("datasets").stdout.splitlines() if line.startswith("cifar10 "))
    assert line.split() == ["cifar10", "yes", "10", "50,000", "10,000"]


def test_plan() -> None:
    plan = json.loads(invoke("plan", *JOB, "--sites", "64", "--json").stdout)
    assert (plan["path"], plan["n_sites"], plan["estimate"]["n_examples"]) == ("direct", 64, 140)
    text = invoke("plan", *JOB, "--sites", "64", "--engine", "rerun").stdout
    assert "rerun" in text
    assert "140 (100 train, 40 test)" in text
    assert "64 of classifier.4.weight" in text
    assert "network  none: initialised from seed 0" in text
    assert "pictures resize 256 (bilinear), crop 224, of IMAGENET1K_V1, the model's default" in text
    assert "classes  10 by the given mapping, of 1,000 (train, test)" in text
    assert plan["inputs"]["weights"] == "none: initialised from seed 0"


def test_what_is_printed_as_json_is_what_the_api_answers(settings: Settings, store: JobStore) -> None:
    asked = {
        "model": {"name": "digits_alexnet"}, "layer": "fc2", "sites": {"count": 9, "seed": 2},
        "data": {"name": "digits", "train": {"per_class": 10}, "test": {"count": 40}},
    }  # fmt: skip
    options = ["--model", "digits_alexnet", "--layer", "fc2", "--data", "digits", "--train", "10/class", "--test", "40"]
    environment = {"ABLATION_THREADS": str(settings.threads)}
    with serving(settings) as api:
        models = api.get("/v1/models").json()["data"]
        urls = [model.pop("layers_url") for model in models]  # all that the command line has not: addresses
        layers = api.get(urls[0]).json()["data"]
        data = api.get("/v1/datasets").json()["data"]
        plan = api.post("/v1/plans", json=asked).json()
    planned = CliRunner().invoke(commands, ["plan", *options, "--sites", "9", "--seed", "2", "--json"], env=environment)
    assert json.loads(invoke("models", "--json").stdout) == models
    assert json.loads(invoke("layers", models[0]["name"], "--json").stdout) == layers
    assert json.loads(invoke("datasets", "--json").stdout) == data
    ours = json.loads(planned.stdout)
    assert ours["estimate"].pop("seconds") > 0 < plan["estimate"].pop("seconds")  # each at the pace that it knows of
    assert ours == plan


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["layers", "alexnett"], "'alexnet'"),
        (["layers", "qqqq"], "`ablation models` lists them."),
        (["plan", *JOB, "--sites", "8", "--layer", "qqqq"], "`ablation layers MODEL` lists those of a model."),
        (["plan", *JOB, "--sites", "8", "--data", "qqqq"], "`ablation datasets` lists them."),
        (["serve", "--port", "65536"], "--port: got 65536; allowed: a whole number, 0 to 65535."),
        (["serve", "--workers", "none"], "--workers: got 'none'; allowed: a whole number, 1 or more."),
        (["plan", *JOB, "--sites", "0"], "sites.count: got 0"),
        (["plan", *JOB, "--sites", "99999999"], "1 to 16777216"),
        (["plan", *JOB, "--sites", "8", "--weights", "V9"], "IMAGENET1K_V1"),
        (["plan", "--model", "alexnet", *OF_DIGITS], "'none' (initialised from the seed), IMAGENET1K_V1, or a file"),
        (["plan", "--model", "resnet18", *OF_DIGITS], "model.weights: got null"),
        (["plan", "--model", "resnet18", "--weights", "none", *OF_DIGITS], "Say which class of the model each one is"),
        (["run", *JOB, "--sites", "some"], "5,17,3"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], says: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_other_errors_are_code_1() -> None:
    result = invoke("submit", *JOB, "--sites", "8", "--server", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "ablation serve" in result.stderr


@pytest.mark.parametrize(
    "command", ["", "run", "plan", "models", "layers", "datasets", "serve", "submit", "demo", "api", "worker"]
)
def test_every_command_has_help(command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert len(result.stdout.split()) > 10


def test_the_command_line_starts_without_torch_and_without_the_api() -> None:
    script = (
        "import sys, ablation.cli; print(*[n for n in ('torch', 'api', 'fastapi', 'worker.tasks') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("command", ["api", "worker"])
def test_a_service_without_redis_says_what_to_set(command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "ABLATION_REDIS_URL")}
    started = [sys.executable, "-m", "ablation.cli", command]
    ended = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: REDIS_URL")

"""`ablation run`: a job in this process, from options to files."""

import csv
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from ablation import open_results
from ablation.cli.commands import commands
from ablation.export import csv_header

JOB = ["--model", "digits_alexnet", "--layer", "fc2", "--data", "digits"]


def test_run_writes_the_table_twice_and_a_summary(tmp_path: Path, home: Path) -> None:
    options = ["--train", "5/class", "--test", "30", "--sites", "13", "--seed", "3", "--value", "0.5"]
    result = CliRunner().invoke(commands, ["run", *JOB, *options, "--home", str(home), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"utility.csv", "utility.parquet", "summary.json"}
    header, *rows = csv.reader((tmp_path / "out" / "utility.csv").read_text().splitlines())
    assert len(rows) == 13
    read = pq.read_table(tmp_path / "out" / "utility.parquet")
    assert csv_header(read.column_names).decode().strip() == ",".join(header)
    assert [int(row[0]) for row in rows] == read["index"].to_pylist()
    assert [float(row[header.index("utility_test")]) for row in rows] == read["utility_test"].to_pylist()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "utility.csv" in result.stdout
    assert "100%" in result.stderr


def test_json_is_the_summary_and_nothing_else(tmp_path: Path, home: Path) -> None:
    options = ["--test", "30", "--sites", "3", "--home", str(home), "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(commands, ["run", *JOB, *options])
    assert result.exit_code == 0, result.output
    assert result.stdout == (tmp_path / "summary.json").read_text()
    assert json.loads(result.stdout)["sites"] == 3
    assert "100%" in result.stderr


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("file", "--out: got '{out}'; allowed: a folder that you may write to."),
        ("file/below", "--out: got '{out}'; allowed: a folder that you may write to."),
        ("folder", "--out: got '{out}'; allowed: a folder that our files can be written to."),
    ],
)
def test_where_nothing_can_be_written_nothing_is_computed(tmp_path: Path, home: Path, out: str, says: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "utility.parquet").mkdir(parents=True)
    options = ["--test", "30", "--sites", "3", "--home", str(home), "--out", str(tmp_path / out)]
    result = CliRunner().invoke(commands, ["run", *JOB, *options])
    assert result.exit_code == 1
    assert says.format(out=tmp_path / out) in result.stderr
    assert "%" not in result.stderr  # no progress: it did not begin


def test_a_device_that_is_not_here_is_bad_input(tmp_path: Path, home: Path) -> None:
    options = ["--test", "30", "--sites", "3", "--home", str(home), "--out", str(tmp_path / "out"), "--device", "gpu"]
    result = CliRunner().invoke(commands, ["run", *JOB, *options])
    assert result.exit_code == 2
    assert "device: got 'gpu'; allowed: a device that torch finds here" in result.stderr


def test_a_network_without_weights_is_run_only_where_that_is_asked_for(tmp_path: Path, home: Path) -> None:
    options = ["--layer", "fc", "--data", "digits", "--test", "9", "--sites", "3", "--home", str(home)]
    refused = CliRunner().invoke(commands, ["run", "--model", "resnet18", *options, "--out", str(tmp_path / "out")])
    assert refused.exit_code == 2
    assert "model.weights: got null; allowed: 'none' (initialised from the seed), IMAGENET1K_V1" in refused.stderr
    assert not (tmp_path / "out").exists()
    asked = ["--weights", "none", "--test", "40", "--sites", "3", "--home", str(home), "--out", str(tmp_path)]
    result = CliRunner().invoke(commands, ["run", *JOB, *asked])
    assert result.exit_code == 0, result.output
    assert "none: initialised from seed 0" in result.stdout
    assert "WARNING" in result.stdout
    assert "the network does not know this data" in json.loads((tmp_path / "summary.json").read_text())["warnings"][0]


def test_a_run_that_is_refused_writes_nothing(tmp_path: Path, home: Path) -> None:
    options = ["--train", "5/class", "--sites", "99999999", "--home", str(home), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(commands, ["run", *JOB, *options])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_result_says_what_it_is_of_in_every_file(tmp_path: Path, home: Path) -> None:
    out = tmp_path / "deep" / "out"
    options = ["--test", "30", "--sites", "3", "--home", str(home), f"--out={out}", "--verify", "0"]
    result = CliRunner().invoke(commands, ["run", *JOB, *options])
    assert result.exit_code == 0, result.output
    about = json.loads((out / "summary.json").read_text())["about"]
    assert about == json.loads(pq.read_schema(out / "utility.parquet").metadata[b"about"])
    assert about["model"]["file"] == "digits_alexnet-1.safetensors"
    assert about["spec"]["layer"] == "fc2"
    assert about["data"]["splits"]["test"] | {"fingerprint": ""} == {
        "kind": "Pictures", "n_examples": 30, "n_available": 500, "fingerprint": "", "n_skipped": 0, "skipped": {},
    }  # fmt: skip
    typed = " ".join(["ablation run", *JOB, "--test 30 --sites 3 --home", home.name, "--out=out --verify 0"])
    assert about["command"] == typed
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", about["date"])
    for text in ((out / "summary.json").read_text(), (out / "utility.parquet").read_bytes().decode("latin-1")):
        assert str(tmp_path) not in text
        assert str(home) not in text
    assert open_results(out).summary() == json.loads((out / "summary.json").read_text())


def test_the_operators_limit_of_memory_holds_here_too(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ABLATION_MEMORY_BYTES", "1000")
    options = ["--test", "30", "--sites", "3", "--home", str(home), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(commands, ["run", *JOB, *options])
    assert result.exit_code == 2
    assert "what takes at most 1000 bytes of memory" in result.stderr

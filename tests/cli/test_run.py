"""`ablation run`: a job in this process, from options to files."""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
from click.testing import CliRunner

from ablation.cli import main
from ablation.export import csv_header

JOB = ["--model", "digits_alexnet", "--layer", "fc2", "--data", "digits"]


def test_run_writes_the_table_twice_and_a_summary(tmp_path: Path, home: Path) -> None:
    options = ["--train", "5/class", "--test", "30", "--sites", "13", "--seed", "3", "--value", "0.5"]
    result = CliRunner().invoke(main, ["run", *JOB, *options, "--home", str(home), "--out", str(tmp_path / "out")])
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


def test_a_run_that_is_refused_writes_nothing(tmp_path: Path, home: Path) -> None:
    options = ["--train", "5/class", "--sites", "99999999", "--home", str(home), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["run", *JOB, *options])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()

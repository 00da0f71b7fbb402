"""A job leaves three files, all of them whole or none of them there."""

import json
from pathlib import Path
from typing import BinaryIO

import pytest
from click.testing import CliRunner

from ablation.cli.commands import commands
from ablation.cli.files import RESULT_FILES, results_folder, write_results
from ablation.errors import ServiceError, SpecError, WriteError


def write_ab(stream: BinaryIO) -> None:
    stream.write(b"a,b\n")


def break_off(stream: BinaryIO) -> None:
    stream.write(b"half")
    raise KeyboardInterrupt


def test_three_files_in_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    write_results(folder, csv=write_ab, parquet=write_ab, summary={"sites": 3, "r": 0.1})
    assert sorted(path.name for path in folder.iterdir()) == sorted(RESULT_FILES)
    assert (folder / "utility.csv").read_bytes() == b"a,b\n"
    assert json.loads((folder / "summary.json").read_text()) == {"sites": 3, "r": 0.1}


def test_what_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "utility.csv").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path, csv=break_off, parquet=write_ab, summary={})
    assert [path.name for path in tmp_path.iterdir()] == ["utility.csv"]
    assert (tmp_path / "utility.csv").read_bytes() == b"before"


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "utility.csv").mkdir(parents=True)
    for folder in ("file/out", "file", "taken"):
        with (
            pytest.raises(ServiceError, match=f"^--out: got .*/{folder}'; allowed: a folder"),
            results_folder(tmp_path / folder),
        ):
            raise AssertionError("it worked all the same")


def test_a_new_folder_goes_again_if_nothing_comes_of_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), results_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("broken", ["csv", "parquet"])
def test_of_three_files_all_appear_or_none(tmp_path: Path, broken: str) -> None:
    for name in RESULT_FILES:
        (tmp_path / name).write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path, **{"csv": write_ab, "parquet": write_ab, broken: break_off}, summary={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(RESULT_FILES, b"before")


def write_nothing(stream: BinaryIO) -> None:
    """/dev/full takes nothing: what is written to it ends as on a full disk."""
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"a")


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    says = r"utility.parquet can't be written: No space left on device\. Make room for it, or choose another place\."
    with pytest.raises(WriteError, match=says):
        write_results(tmp_path, csv=write_ab, parquet=write_nothing, summary={})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", RESULT_FILES)
def test_results_are_not_replaced_unless_that_is_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with results_folder(tmp_path) as held:
        held.check_empty(force=True)
        with pytest.raises(SpecError, match=f"^--out: got .*allowed: a folder without results. {name} is in it."):
            held.check_empty(force=False)
    (tmp_path / name).rename(tmp_path / "mine.txt")
    with results_folder(tmp_path) as held:
        held.check_free(force=False)
        (tmp_path / ".shards").mkdir()
        held.check_free(force=True)
        with pytest.raises(SpecError, match="a folder without an unfinished job"):
            held.check_free(force=False)


def test_submit_asks_before_it_sends_anything(tmp_path: Path) -> None:
    (tmp_path / "summary.json").touch()
    job = ["--model", "digits_alexnet", "--layer", "fc2", "--data", "digits", "--test", "all", "--sites", "3"]
    server = ["--server", "http://127.0.0.1:9", "--out", str(tmp_path)]
    refused = CliRunner().invoke(commands, ["submit", *job, *server])
    assert refused.exit_code == 2
    assert "summary.json is in it. Choose another with --out, or replace what is there with --force." in refused.stderr
    assert CliRunner().invoke(commands, ["submit", *job, *server, "--force"]).exit_code == 1

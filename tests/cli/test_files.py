"""A job leaves three files, each whole or not there."""

import json
from pathlib import Path
from typing import BinaryIO

import pytest

from ablation.cli.files import RESULT_FILES, results_folder, write_results
from ablation.errors import ServiceError


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

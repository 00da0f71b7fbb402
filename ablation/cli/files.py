"""Files of a job's results: the table as CSV and Parquet, and its summary. All are written as a whole, or none is.

In: functions that write them, and a folder. Not here: the formats (`ablation.export`), the files' names
(`ablation.results`).
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ablation.errors import ServiceError, SpecError
from ablation.results import CSV, PARQUET, RESULT_FILES, SUMMARY, UNFINISHED
from worker.settings import make_writable

Writer = Callable[[BinaryIO], None]


@dataclass(frozen=True)
class Held:
    """A folder for results that can be written to."""

    folder: Path

    def check_free(self, *, force: bool) -> None:
        """Check that neither results nor an unfinished job are in it, unless `force` is given.

        Raises:
            SpecError: there are.
        """
        self.check_empty(force=force)
        if (self.folder / UNFINISHED).is_dir() and not force:
            next_step = "Finish it with `ablation run --resume`, choose another with --out, or use --force."
            raise SpecError("--out", str(self.folder), "a folder without an unfinished job", next_step)

    def check_empty(self, *, force: bool) -> None:
        """Check that no results are in it, unless `force` is given, with which they will be replaced.

        Raises:
            SpecError: there are.
        """
        there = [name for name in RESULT_FILES if (self.folder / name).exists()]
        if there and not force:
            next_step = f"{there[0]} is in it. Choose another with --out, or replace what is there with --force."
            raise SpecError("--out", str(self.folder), "a folder without results", next_step)


@contextlib.contextmanager
def results_folder(folder: Path) -> Iterator[Held]:
    """Context that makes the folder before anything is computed, and removes it again if it stays empty.

    Raises:
        ServiceError: the folder can't be created or written to.
    """
    was_there = folder.exists()
    try:
        make_writable(folder, "--out")
        for name in RESULT_FILES:
            if (folder / name).is_dir():
                raise ServiceError(
                    f"--out: got {str(folder)!r}; allowed: a folder that our files can be written to. ({name} in it is "
                    "a folder.) Choose another with --out."
                )
        yield Held(folder)
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):  # it isn't empty
                folder.rmdir()
        raise


def write_results(folder: Path, *, csv: Writer, parquet: Writer, summary: Mapping[str, Any]) -> None:
    """Write the three files into `folder`, which is created if necessary.

    Raises:
        WriteError: one of them can't be written; the message names it.
    """
    from ablation.export import write_all  # loads Arrow, which most commands do without

    def write_summary(stream: BinaryIO) -> None:
        stream.write(json.dumps(summary, indent=2, allow_nan=False).encode() + b"\n")

    folder.mkdir(parents=True, exist_ok=True)
    write_all({folder / CSV: csv, folder / PARQUET: parquet, folder / SUMMARY: write_summary})

"""Files of a job's results: the table as CSV and Parquet, and its summary. Each is written as a whole or not at all.

In: functions that write them, and a folder. Not here: the formats (`ablation.export`).
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ablation.errors import ServiceError
from worker.settings import make_writable

CSV, PARQUET, SUMMARY = RESULT_FILES = ("utility.csv", "utility.parquet", "summary.json")

Writer = Callable[[BinaryIO], None]


@contextlib.contextmanager
def results_folder(folder: Path) -> Iterator[None]:
    """Context that makes the folder before anything is computed, and removes it again if it stays empty.

    Raises:
        ServiceError: the folder can't be created or written to.
    """
    was_there = folder.exists()
    make_writable(folder, "--out")
    for name in RESULT_FILES:
        if (folder / name).is_dir():
            raise ServiceError(
                f"--out: got {str(folder)!r}; allowed: a folder that our files can be written to. ({name} in it is a "
                "folder.) Choose another with --out."
            )
    try:
        yield
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):  # it isn't empty
                folder.rmdir()
        raise


def write_results(folder: Path, *, csv: Writer, parquet: Writer, summary: Mapping[str, Any]) -> None:
    """Write the three files into `folder`, which is created if necessary."""
    from ablation.export import write_whole  # loads Arrow, which most commands do without

    def write_summary(stream: BinaryIO) -> None:
        stream.write(json.dumps(summary, indent=2, allow_nan=False).encode() + b"\n")

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CSV, csv)
    write_whole(folder / PARQUET, parquet)
    write_whole(folder / SUMMARY, write_summary)

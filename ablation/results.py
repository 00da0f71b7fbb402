"""The files that a finished job leaves: their names, and the table back from them.

In: a folder that `ablation run --out` wrote, or one of its files. Out: columns, and what they are about, as the table
had them. Not here: how the files are written (`export.py`). Torch-free: the API names its downloads here.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablation.errors import SpecError
from ablation.spec import JobSpec
from ablation.table import ABOUT, Columns, ImportanceTable, Rows, as_plain, coordinate_names, make_rows

if TYPE_CHECKING:  # Arrow is loaded where it is needed, since most commands do without
    import pyarrow as pa

CSV, PARQUET, SUMMARY = RESULT_FILES = ("utility.csv", "utility.parquet", "summary.json")
BESIDE = "-metadata.json"  # ends the name of the file beside a CSV that stands alone, as CSV on the Web has it
UNFINISHED = ".shards"  # the folder, in that of the results, of what is done of a job that is not

MOST_LETTERS = 60  # of a model's or a layer's name in the name of a file
ALLOWED = (
    f"a folder that `ablation run --out` wrote, {PARQUET} or {CSV} in it (the CSV with {SUMMARY} beside it), or a file "
    "that a table has written"
)


def name_file(spec: JobSpec, job_id: str, suffix: str) -> str:
    """Name of a downloaded table: `utility-MODEL-LAYER-ID.csv`, of letters that every file system and header takes."""
    parts = (re.sub(r"[^A-Za-z0-9._]+", "-", part)[:MOST_LETTERS].strip("-.") for part in (spec.model.name, spec.layer))
    return "-".join(["utility", *filter(None, parts), job_id]) + f".{suffix}"


def read_results(path: Path) -> tuple[Rows, dict[str, Any]]:
    """The columns of a job's table, and what they are about.

    Raises:
        SpecError: there are no results at this path, or they don't belong together; the message says what is missing.
    """
    file = find_table(path)
    try:
        columns, about = _read_parquet(file) if file.suffix == ".parquet" else _read_csv(file)
    except SpecError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's errors are among these
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _wrong(path, f"{file.name} can't be read: {reason.rstrip('.')}.") from error
    try:
        rows = make_rows(columns, tuple(about["plan"]["shape"]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _wrong(path, f"{file.name} does not have the columns of the job that it says it is of.") from error
    splits = {name.removeprefix("utility_") for name in rows if name.startswith("utility_")}
    if set(about["baseline"]) != splits or about["plan"].get("n_sites", rows.n_rows) != rows.n_rows:
        raise _wrong(path, f"{file.name} and what is said of it belong to different jobs.")
    return rows, about


def find_table(path: Path) -> Path:
    """The file that has the table: the one given, or of a folder the Parquet file, else the CSV.

    Raises:
        SpecError: there is no such file.
    """
    if path.is_dir():
        for name in (PARQUET, CSV):
            if (path / name).is_file():
                return path / name
        if (path / UNFINISHED).is_dir():
            raise _wrong(path, "The job there is not finished: go on with `ablation run --resume`.")
        raise _wrong(path, f"There is neither {PARQUET} nor {CSV} in it.")
    if not path.is_file():
        raise _wrong(path, "There is no such file or folder.")
    if path.suffix not in (".parquet", ".csv"):
        raise _wrong(path, "Give the table itself.")
    return path


def _read_parquet(file: Path) -> tuple[Columns, dict[str, Any]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    metadata = table.schema.metadata or {}
    if ABOUT.encode() not in metadata:
        raise _wrong(file, "The Parquet file does not say what it is of, so it is not one of these.")
    return _arrays(table), json.loads(metadata[ABOUT.encode()])


def _read_csv(file: Path) -> tuple[Columns, dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.csv

    about = _read_beside(file)
    with file.open(encoding="utf-8") as lines:
        names = lines.readline().rstrip("\n").split(",")
    whole = {"index", *coordinate_names(tuple(about["plan"]["shape"]))}
    types = {name: pa.int64() if name in whole or _is_count(name) else pa.float64() for name in names}
    options = pyarrow.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False)
    return _arrays(pyarrow.csv.read_csv(file, convert_options=options)), about


def _is_count(name: str) -> bool:
    return name.startswith(("touched_", "broken_", "fixed_"))


def _read_beside(file: Path) -> dict[str, Any]:
    """What a CSV is about: from the file of its own name beside it, else from the summary in the same folder."""
    own, summary = file.with_name(file.name + BESIDE), file.with_name(SUMMARY)
    if own.is_file():
        return _take(own, lambda told: told["notes"][0])
    if not summary.is_file():
        raise _wrong(file, f"A CSV has numbers alone: {SUMMARY} or {own.name} must be beside it, which say of what.")
    return _take(summary, lambda told: told[ABOUT])


def _take(file: Path, find: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    try:
        return find(json.loads(file.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, IndexError):
        raise _wrong(file, f"{file.name} does not say what the table is of (earlier versions left that out).") from None


def _arrays(table: "pa.Table") -> dict[str, np.ndarray]:
    """The columns as arrays, with NaN for what is missing."""
    return {name: table[name].to_numpy() for name in table.column_names}


def _wrong(path: Path, reason: str) -> SpecError:
    return SpecError("path", str(path), ALLOWED, reason)


def describe_csv(name: str, table: ImportanceTable) -> bytes:
    """The file beside a CSV that stands alone: what it is of, as the note of a file of CSV on the Web."""
    told = {
        "@context": "http://www.w3.org/ns/csvw",
        "url": name,
        "tableSchema": {"columns": [{"name": column} for column in table.columns]},
        "notes": [as_plain(table.about)],
    }
    return json.dumps(told, indent=2, allow_nan=False).encode() + b"\n"

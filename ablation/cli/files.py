"""Which files a job leaves: the table as CSV and Parquet, and its summary. Each is whole or not there.

In: what writes them, and a folder. Not here: the formats (`ablation.export`).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

CSV, PARQUET, SUMMARY = RESULT_FILES = ("utility.csv", "utility.parquet", "summary.json")

Writer = Callable[[BinaryIO], None]


def write_results(folder: Path, *, csv: Writer, parquet: Writer, summary: Mapping[str, Any]) -> None:
    """Write the three files into `folder`, which is made if need be."""
    from ablation.export import write_whole  # loads Arrow, which most commands do without

    def write_summary(stream: BinaryIO) -> None:
        stream.write(json.dumps(summary, indent=2, allow_nan=False).encode() + b"\n")

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CSV, csv)
    write_whole(folder / PARQUET, parquet)
    write_whole(folder / SUMMARY, write_summary)

"""Files: numbers keep their bits, where blocks begin changes nothing, memory doesn't grow, no file is half-written."""

import csv
import io
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ablation.export import (
    ROWS_AT_A_TIME,
    csv_chunks,
    csv_header,
    csv_rows,
    parquet_chunks,
    write_csv,
    write_parquet,
    write_whole,
)
from tests.ablation.tables import heavy_deltas, table_of

# Both sides of every edge between the ways of writing a number, and the ends of the range.
POWERS = [sign * 10.0**k for k in range(-12, 23) for sign in (1, -1)]
EDGES = [
    value for power in POWERS for value in (power, np.nextafter(power, 0), np.nextafter(power, np.inf), 1.25 * power)
]
SPECIAL = [0.0, -0.0, 5e-324, 1.7976931348623157e308, 2.0**53, 2.0**53 + 2, 1 / 3, 123456789.0, 0.1]


def bits(values: object) -> list[bytes]:
    return [struct.pack("<d", value) for value in values]  # type: ignore[attr-defined]


def read_column(text: bytes) -> list[str]:
    return [row[1] for row in csv.reader(io.StringIO(text.decode()))]


@settings(max_examples=300)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@example(EDGES + SPECIAL)
def test_every_finite_float_reads_back_to_the_same_bits(values: list[float]) -> None:
    text = csv_rows({"index": np.arange(len(values)), "value": np.array(values)})
    cells = read_column(text)
    assert bits(map(float, cells)) == bits(values)
    assert cells == [repr(float(value)) for value in values]
    frame = pd.read_csv(io.BytesIO(b"index,value\n" + text))
    assert frame["value"].dtype == np.float64  # whole numbers too
    assert bits(frame["value"]) == bits(values)


def test_random_bit_patterns_read_back() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64).view(np.float64)
    values = values[np.isfinite(values)]
    cells = read_column(csv_rows({"index": np.arange(len(values)), "value": values}))
    assert cells == list(map(repr, values.tolist()))


def test_whole_numbers_are_exact() -> None:
    values = np.array([0, 2**53 + 1, 2**63 - 1, -(2**63)])
    assert csv_rows({"index": values}).decode().split() == [str(value) for value in values]


def test_the_exact_text_of_a_table() -> None:
    deltas = {"train": np.array([[0.5, 0.25], [0.0, 0.0]]), "test": np.array([[1e-7], [-2.5e-5]])}
    table = table_of(deltas, weights=[-0.125, 1.0])
    stream = io.BytesIO()
    write_csv(table, stream)
    assert stream.getvalue().decode() == (
        "index,out,in,weight,magnitude,utility_train,stderr_train,touched_train,utility_test,stderr_test,touched_test\n"
        "1,0,1,-0.125,0.125,0.375,0.125,2,1e-07,,1\n"
        "3,0,3,1.0,1.0,0.0,0.0,0,-2.5e-05,,1\n"
    )


def test_nan_is_an_empty_field_in_csv_and_nan_in_parquet() -> None:
    columns = {"index": np.arange(3), "value": np.array([np.nan, 1.5, np.nan]), "count": np.arange(3)}
    assert csv_rows(columns) == b"0,,0\n1,1.5,1\n2,,2\n"
    assert csv_header(list(columns)) == b"index,value,count\n"
    back = pyarrow.parquet.read_table(io.BytesIO(b"".join(parquet_chunks([columns]))))
    np.testing.assert_array_equal(back["value"].to_numpy(), columns["value"])


def blocks_of(table, starts: list[int]) -> list[dict[str, np.ndarray]]:
    ends = [*starts[1:], len(table)]
    return [{name: values[a:b] for name, values in table.columns.items()} for a, b in zip(starts, ends, strict=True)]


def test_where_blocks_begin_changes_no_row() -> None:
    n = ROWS_AT_A_TIME + 4_321
    table = table_of({"train": heavy_deltas(n, 4), "test": heavy_deltas(n, 1)}, shape=(n, 3))
    csv_file, parquet_file = io.BytesIO(), io.BytesIO()
    write_csv(table, csv_file)
    write_parquet(table, parquet_file)
    assert csv_file.getvalue().count(b"\n") == n + 1
    whole = pyarrow.parquet.read_table(parquet_file)
    assert whole["index"].to_pylist() == table.columns["index"].tolist()
    for starts in ([0], [0, 1, 40_000, ROWS_AT_A_TIME + 1]):
        assert b"".join(csv_chunks(blocks_of(table, starts))) == csv_file.getvalue()
        cut = pyarrow.parquet.read_table(io.BytesIO(b"".join(parquet_chunks(blocks_of(table, starts)))))
        assert cut.to_pandas().equals(whole.to_pandas())


def test_parquet_has_the_columns_of_the_csv_and_the_same_bytes_again() -> None:
    table = table_of({"train": heavy_deltas(41, 30), "test": heavy_deltas(41, 1)}, top1=True)
    first, again = io.BytesIO(), io.BytesIO()
    write_parquet(table, first)
    write_parquet(table, again)
    assert first.getvalue() == again.getvalue()
    file = pyarrow.parquet.ParquetFile(first)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.schema_arrow.names == list(table.columns)
    for name, values in table.columns.items():
        back = file.read()[name].to_numpy()
        assert back.dtype == values.dtype, name
        assert back.tobytes() == values.tobytes(), name


def test_a_file_without_rows_is_a_file() -> None:
    empty = {"index": np.arange(0), "value": np.zeros(0)}
    assert b"".join(csv_chunks([empty])) == b"index,value\n"
    assert pyarrow.parquet.read_table(io.BytesIO(b"".join(parquet_chunks([empty])))).num_rows == 0


STREAM = """
import resource, sys
import numpy as np
from ablation.export import csv_chunks, parquet_chunks
def blocks(n):
    for start in range(n):
        index = np.arange(100_000) + start * 100_000
        yield {"index": index} | {f"value{k}": np.sin(index + k) * 1e-7 for k in range(6)}
def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
chunks = {"csv": csv_chunks, "parquet": parquet_chunks}[sys.argv[1]]
sum(map(len, chunks(blocks(3)))); before = peak_mb()
n_bytes = sum(map(len, chunks(blocks(15)))); print(n_bytes / 1e6, peak_mb() - before)
"""


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_memory_does_not_grow_with_the_rows(kind: str) -> None:
    """1.5 million rows, more than 70 MB in either form, in the memory that 0.3 million took."""
    done = subprocess.run([sys.executable, "-c", STREAM, kind], capture_output=True, text=True, check=True)
    n_mb, grown_mb = map(float, done.stdout.split())
    assert n_mb > 70
    assert grown_mb < 25


FORMS = """
import sys
import numpy as np
from ablation.export import csv_chunks, parquet_chunks
columns = {"index": np.arange(6)[::2], "value": np.array([1e-7, np.nan, 2.5e-5])}
for chunks in (csv_chunks, parquet_chunks):
    assert b"".join(chunks([columns]))
print("pandas" in sys.modules)
"""


def test_no_request_for_a_file_has_to_wait_for_an_import_of_pandas() -> None:
    done = subprocess.run([sys.executable, "-c", FORMS], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_whole_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "utility.csv"
    path.write_bytes(b"old")
    write_whole(path, lambda stream: stream.writelines([b"n", b"ew"]))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_when_writing_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "utility.csv"
    path.write_bytes(b"old")

    def fail(stream) -> None:
        stream.write(b"half a fi")
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2  # in the same folder, so that the rename is one step
        raise error

    with pytest.raises(type(error)):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

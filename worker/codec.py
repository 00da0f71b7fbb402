"""How do partials and tables travel through Redis?

In: `PartialSums`, `ImportanceTable`. Out: bytes (Arrow IPC streams: the numbers as they are in memory,
so nothing is rounded), and back. Tables come in blocks of rows, so that the API never holds a whole one, and of their
columns only what is kept (`table.Rows`); the others are made again when they are read.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ablation.export import ROWS_AT_A_TIME
from ablation.partial import TOTALS, PartialSums, held
from ablation.table import Columns, ImportanceTable, Rows, cut_rows

MAX_CHUNK_BYTES = (16 << 20) - 4096  # nothing larger goes over the wire at once; with Redis' own header, 16 MiB
_HEADER_BYTES = 64 << 10  # room for Arrow's own header and padding in a block


def _encode(columns: Columns, about: Mapping[str, Any]) -> bytes:
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    batch = batch.replace_schema_metadata({"about": json.dumps(about)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _decode(payload: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    batch = pa.ipc.open_stream(payload).read_next_batch()
    columns = {name: batch.column(name).to_numpy() for name in batch.schema.names}
    return columns, json.loads(batch.schema.metadata[b"about"])


def encode_partial(partial: PartialSums) -> bytes:
    """One partial as bytes."""
    return _encode(held(partial), {name: getattr(partial, name) for name in TOTALS})


def decode_partial(payload: bytes) -> PartialSums:
    """The partial that `encode_partial` was given, to the bit."""
    columns, totals = _decode(payload)
    fields: dict[str, Any] = {**totals, **columns}
    return PartialSums(**fields)


def encode_json(value: Any) -> str:
    """Plain JSON, which knows neither NaN nor infinity: null stands for them."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def split_chunks(payload: bytes) -> Iterator[bytes]:
    """`payload` in pieces of at most `MAX_CHUNK_BYTES`."""
    for start in range(0, len(payload), MAX_CHUNK_BYTES):
        yield payload[start : start + MAX_CHUNK_BYTES]


def rows_per_block(columns: Columns) -> int:
    """How many rows fit into one block: whole pieces of a file, which so has the same bytes as one made at once."""
    row_bytes = sum(values.dtype.itemsize for values in columns.values())
    n_rows = max(1, (MAX_CHUNK_BYTES - _HEADER_BYTES) // row_bytes)
    return n_rows - n_rows % ROWS_AT_A_TIME or n_rows


def encode_blocks(table: ImportanceTable) -> Iterator[bytes]:
    """The table's rows as blocks of at most `MAX_CHUNK_BYTES`, in order."""
    columns = table.columns
    step = rows_per_block(columns.kept if isinstance(columns, Rows) else columns)
    for start in range(0, max(1, len(table)), step):
        rows = slice(start, start + step)
        if isinstance(columns, Rows):
            block = columns.cut(rows)
            yield _encode(block.kept, {"shape": block.shape, "first": block.first})
        else:
            yield _encode(cut_rows(columns, rows), {})


def decode_block(block: bytes) -> Columns:
    """The columns of one block."""
    kept, about = _decode(block)
    return Rows(kept, tuple(about["shape"]), about["first"]) if about else kept

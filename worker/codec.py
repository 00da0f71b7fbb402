"""How are partials and tables encoded for Redis?

In: `PartialSums`, `ImportanceTable`. Out: bytes (Arrow IPC streams: the numbers as they are in memory,
so nothing is rounded), and back. Tables are split into blocks of rows, so that the API never holds a whole one. Only
the stored columns are encoded (`table.Rows`); the others are computed when they are read.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ablation.export import ROWS_AT_A_TIME
from ablation.partial import TOTALS, PartialSums, held, make_partial
from ablation.table import Columns, ImportanceTable, Rows, cut_rows
from ablation.table import encode_json as encode_json  # how everything else is encoded

MAX_CHUNK_BYTES = (16 << 20) - 4096  # largest value sent to Redis; 16 MiB with its header
_HEADER_BYTES = 64 << 10  # room for Arrow's own header and padding in a block


def write_columns(sink: Any, columns: Columns, about: Mapping[str, Any]) -> None:
    """Write columns and what they are about to an open file; nothing is copied."""
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    batch = batch.replace_schema_metadata({"about": json.dumps(about)})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _encode(columns: Columns, about: Mapping[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    write_columns(sink, columns, about)
    return bytes(sink.getvalue())


def decode_columns(payload: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Decode what `write_columns` has written."""
    batch = pa.ipc.open_stream(payload).read_next_batch()
    columns = {name: batch.column(name).to_numpy() for name in batch.schema.names}
    return columns, json.loads(batch.schema.metadata[b"about"])


def encode_partial(partial: PartialSums) -> bytes:
    """Encode one partial as bytes."""
    return _encode(held(partial), {name: getattr(partial, name) for name in TOTALS})


def decode_partial(payload: bytes) -> PartialSums:
    """Decode a partial; it equals the encoded one to the bit."""
    columns, totals = decode_columns(payload)
    return make_partial(totals, columns)


def split_chunks(payload: bytes) -> Iterator[bytes]:
    """Split `payload` into chunks of at most `MAX_CHUNK_BYTES`."""
    for start in range(0, len(payload), MAX_CHUNK_BYTES):
        yield payload[start : start + MAX_CHUNK_BYTES]


def rows_per_block(columns: Columns) -> int:
    """Rows per block: a multiple of the rows that files are written in, so that bytes don't depend on the blocks."""
    row_bytes = sum(values.dtype.itemsize for values in columns.values())
    n_rows = max(1, (MAX_CHUNK_BYTES - _HEADER_BYTES) // row_bytes)
    return n_rows - n_rows % ROWS_AT_A_TIME or n_rows


def encode_blocks(table: ImportanceTable) -> Iterator[bytes]:
    """Encode the table's rows as blocks of at most `MAX_CHUNK_BYTES`, in order."""
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
    """Decode the columns of one block."""
    kept, about = decode_columns(block)
    return Rows(kept, tuple(about["shape"]), about["first"]) if about else kept

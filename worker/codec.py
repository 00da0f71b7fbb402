"""How do partials and tables travel through Redis?

In: `PartialSums`, `ImportanceTable`. Out: bytes (Arrow IPC streams: the numbers as they are in memory,
so nothing is rounded), and back. Tables come in blocks of rows, so that the API never holds a whole one.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ablation.partial import PER_SITE, TOTALS, PartialSums
from ablation.table import ImportanceTable

MAX_CHUNK_BYTES = 16 << 20  # nothing larger goes over the wire at once
_HEADER_BYTES = 64 << 10  # room for Arrow's own header and padding in a block


def _encode(columns: Mapping[str, np.ndarray], totals: Mapping[str, Any]) -> bytes:
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    batch = batch.replace_schema_metadata({"totals": json.dumps(totals)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _decode(payload: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    batch = pa.ipc.open_stream(payload).read_next_batch()
    columns = {name: batch.column(name).to_numpy() for name in batch.schema.names}
    return columns, json.loads(batch.schema.metadata[b"totals"])


def encode_partial(partial: PartialSums) -> bytes:
    """One partial as bytes."""
    columns = {name: getattr(partial, name) for name in PER_SITE}
    return _encode(columns, {name: getattr(partial, name) for name in TOTALS})


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


def rows_per_block(columns: Mapping[str, np.ndarray]) -> int:
    """How many rows fit into one block."""
    row_bytes = sum(values.dtype.itemsize for values in columns.values())
    return max(1, (MAX_CHUNK_BYTES - _HEADER_BYTES) // row_bytes)


def encode_blocks(table: ImportanceTable) -> Iterator[bytes]:
    """The table's rows as blocks of at most `MAX_CHUNK_BYTES`, in order."""
    step = rows_per_block(table.columns)
    for start in range(0, max(1, len(table)), step):
        yield _encode({name: values[start : start + step] for name, values in table.columns.items()}, {})


def decode_block(block: bytes) -> dict[str, np.ndarray]:
    """The columns of one block."""
    return _decode(block)[0]

import json
from dataclasses import fields

import numpy as np
import pytest

from ablation.partial import PartialSums
from ablation.table import ImportanceTable
from tests.worker.conftest import make_partial
from worker import codec


def make_table(n_rows: int) -> ImportanceTable:
    random = np.random.default_rng(5)
    columns = {
        "index": np.arange(n_rows, dtype=np.int64),
        "weight": random.normal(size=n_rows),
        "utility_test": random.normal(size=n_rows),
        "touched_test": random.integers(0, 9, n_rows),
    }
    columns["utility_test"][::3] = np.nan
    return ImportanceTable(columns, {"seconds": 1.5})


@pytest.mark.parametrize("n_sites", [1, 7, 1000])
def test_a_partial_comes_back_to_the_bit(n_sites: int) -> None:
    partial = make_partial(3, n_sites)
    partial.delta[0] = 5e-324
    back = codec.decode_partial(codec.encode_partial(partial))
    for field in fields(PartialSums):
        sent, got = np.asarray(getattr(partial, field.name)), np.asarray(getattr(back, field.name))
        assert (sent.dtype, sent.tobytes()) == (got.dtype, got.tobytes()), field.name


def test_the_same_partial_has_the_same_bytes() -> None:
    assert codec.encode_partial(make_partial(1)) == codec.encode_partial(make_partial(1))
    assert codec.encode_partial(make_partial(1)) != codec.encode_partial(make_partial(2))


def test_a_table_comes_back_block_by_block() -> None:
    table = make_table(1_200_000)
    blocks = [*codec.encode_blocks(table)]
    assert len(blocks) == 3
    assert max(map(len, blocks)) <= codec.MAX_CHUNK_BYTES
    parts = [codec.decode_block(block) for block in blocks]
    for name, values in table.columns.items():
        assert np.concatenate([part[name] for part in parts]).tobytes() == values.tobytes(), name


def test_json_has_null_for_what_it_does_not_know() -> None:
    told = {
        "errors": [1.5, float("inf"), -0.0],
        "proof": {"worst": float("nan"), "sites": (1, 2)},
        "name": "x",
        "none": None,
    }
    plain = {"errors": [1.5, None, -0.0], "proof": {"worst": None, "sites": [1, 2]}, "name": "x", "none": None}
    assert json.loads(codec.encode_json(told)) == plain


def test_chunks_are_small_and_join_to_the_payload() -> None:
    payload = np.random.default_rng(0).bytes(2 * codec.MAX_CHUNK_BYTES + 1)
    chunks = [*codec.split_chunks(payload)]
    assert [len(chunk) for chunk in chunks] == [codec.MAX_CHUNK_BYTES, codec.MAX_CHUNK_BYTES, 1]
    assert b"".join(chunks) == payload

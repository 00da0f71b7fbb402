import json
from dataclasses import fields, replace

import numpy as np
import pytest

from ablation.export import ROWS_AT_A_TIME, parquet_chunks
from ablation.partial import PER_SITE, TOTALS, PartialSums, held
from ablation.table import ImportanceTable, Rows
from tests.ablation.tables import heavy_deltas, table_of
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
@pytest.mark.parametrize("absent", [(), ("within",), ("proof", "within", "broken", "fixed")])
def test_a_partial_comes_back_to_the_bit(n_sites: int, absent: tuple[str, ...]) -> None:
    partial = replace(make_partial(3, n_sites), **dict.fromkeys(absent))
    partial.delta[0] = 5e-324
    back = codec.decode_partial(codec.encode_partial(partial))
    assert all(getattr(back, name) is None for name in absent)
    assert {field.name for field in fields(PartialSums)} == {*TOTALS, *PER_SITE, "statistics"}
    totals = [{name: getattr(one, name) for name in TOTALS} for one in (partial, back)]
    assert totals[0] == totals[1]
    assert list(held(back)) == list(held(partial))
    assert list(back.statistics) == ["gradient"]
    for name, sent in held(partial).items():
        got = held(back)[name]
        assert (sent.dtype, sent.tobytes()) == (got.dtype, got.tobytes()), name


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


@pytest.mark.parametrize("every_weight", [True, False])
def test_rows_travel_without_what_can_be_computed(every_weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_CHUNK_BYTES", 80_000)
    table = table_of({"test": heavy_deltas(1000, 5)}, shape=(40, 50), every_weight=every_weight)
    assert isinstance(table.columns, Rows)
    blocks = [*codec.encode_blocks(table)]
    assert len(blocks) == (2 if every_weight else 3)
    assert max(map(len, blocks)) <= 80_000
    parts = [codec.decode_block(block) for block in blocks]
    for name, values in table.columns.items():
        back = np.concatenate([part[name] for part in parts])
        assert (back.dtype, back.tobytes()) == (values.dtype, values.tobytes()), name
    assert sum(map(len, blocks)) < 1000 * (20 + 8 + 8 * (not every_weight)) + 2000 * len(blocks)


def test_a_block_is_whole_pieces_of_a_file() -> None:
    """So a Parquet file of blocks has the bytes of one that is written at once."""
    table = make_table(1_200_000)
    n_rows = [len(codec.decode_block(block)["index"]) for block in codec.encode_blocks(table)]
    assert [n % ROWS_AT_A_TIME for n in n_rows[:-1]] == [0, 0]
    at_once = b"".join(parquet_chunks([table.columns]))
    assert b"".join(parquet_chunks(map(codec.decode_block, codec.encode_blocks(table)))) == at_once


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

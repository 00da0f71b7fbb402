"""Activations kept between jobs: the same bytes with and without, whole files or none, never beyond the limit."""

import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ablation.cache import Activations, hash_of
from ablation.inputs.folders import Folders
from ablation.job import load_job
from ablation.plan import PlanOptions, plan_spec
from ablation.run import run_job
from ablation.spec import make_spec
from ablation.table import ImportanceTable


def activations(folder: Path, limit_bytes: int = 1 << 20, n_examples: int = 1, about: str = "a") -> Activations:
    return Activations(folder, limit_bytes, about, n_examples)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("**/*") if path.is_file())


def test_what_is_kept_comes_back_with_its_form(tmp_path: Path) -> None:
    kept = activations(tmp_path)
    turned = torch.randn(3, 5, 7).transpose(0, 2)
    address = kept.address(torch.ones(2))
    assert kept.get(address) is None
    kept.put(address, [None, (turned, True), {"a": [torch.arange(3)]}], 1)
    nothing, (tensor, in_place), inner = kept.get(address)
    assert nothing is None
    assert in_place is True
    assert torch.equal(tensor, turned)
    assert tensor.stride() == turned.stride()
    assert inner["a"][0].tolist() == [0, 1, 2]
    assert len(files(tmp_path)) == 1


def test_the_address_is_all_that_the_numbers_depend_on(tmp_path: Path) -> None:
    batch = torch.arange(6.0)
    every = [
        activations(tmp_path).address(batch),
        activations(tmp_path).address(batch + 1),
        activations(tmp_path).address(batch.double()),
        activations(tmp_path).address(batch.view(2, 3)),
        activations(tmp_path, about="b").address(batch),
    ]
    assert len(set(every)) == len(every)
    assert activations(tmp_path, limit_bytes=5, n_examples=9).address(batch.clone()) == every[0]
    assert hash_of(["ab", "c"]) != hash_of(["a", "bc"])


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 40])
def test_a_damaged_file_is_no_record_and_goes(damage: bytes, tmp_path: Path) -> None:
    kept = activations(tmp_path)
    address = kept.address(torch.ones(2))
    kept.put(address, torch.ones(4), 1)
    [path] = files(tmp_path)
    path.write_bytes(damage or path.read_bytes()[:-1])
    assert kept.get(address) is None
    assert files(tmp_path) == []


class Pair(NamedTuple):
    """What a module may give."""

    a: torch.Tensor
    b: torch.Tensor


def test_what_only_code_could_read_back_is_no_record(tmp_path: Path) -> None:
    kept = activations(tmp_path)
    kept.put("0" * 64, [Pair(torch.ones(2), torch.zeros(2))], 1)
    assert kept.get("0" * 64) is None
    kept.put("0" * 64, [torch.ones(2)], 1)
    assert torch.equal(kept.get("0" * 64)[0], torch.ones(2))


def test_the_limit_holds_and_what_was_used_last_stays(tmp_path: Path) -> None:
    record = torch.zeros(1000)
    size = 6000  # with the file's own form
    kept = activations(tmp_path, limit_bytes=3 * size)
    addresses = [kept.address(torch.full((2,), float(k))) for k in range(5)]

    for k, address in enumerate(addresses[:2]):
        kept.put(address, record, 1)
        os.utime(tmp_path / address[:2] / address, (k, k))
    kept.get(addresses[0])  # used again: the other one is older now
    for address in addresses[2:4]:
        kept.put(address, record, 1)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3 * size
    assert kept.get(addresses[1]) is None
    assert kept.get(addresses[0]) is not None
    kept.put(addresses[4], torch.zeros(100_000), 1)  # larger than all
    assert kept.get(addresses[4]) is None
    assert kept.get(addresses[0]) is not None


def test_of_a_job_that_does_not_fit_nothing_is_kept(tmp_path: Path) -> None:
    kept = activations(tmp_path, limit_bytes=50_000, n_examples=100)
    kept.put("ab", torch.zeros(1000), 2)
    assert files(tmp_path) == []


def test_a_folder_that_can_not_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = activations(tmp_path / "file")
    kept.put("ab", torch.zeros(10), 1)
    assert kept.get("ab") is None


def test_many_that_want_the_same_at_once(tmp_path: Path) -> None:
    """Every reader gets the whole record or none, while it is written and evicted again and again."""
    record = torch.arange(20_000.0)
    wrong: list[object] = []

    def work(seed: int) -> None:
        kept = activations(tmp_path, limit_bytes=200_000)
        random = np.random.default_rng(seed)
        for _ in range(30):
            address = f"{random.integers(4):064x}"
            got = kept.get(address)
            if got is None:
                kept.put(address, record, 1)
            elif not torch.equal(got, record):
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not [path for path in files(tmp_path) if path.name.endswith(".part")]
    assert files(tmp_path)


@pytest.mark.parametrize("layer", ["conv2", "fc2"])
def test_a_second_job_on_the_same_prefix_computes_none_of_it(
    layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(seed: int, cache_bytes: int, loss: str | dict[str, object] = "cross_entropy") -> ImportanceTable:
        folders = Folders(tmp_path, tmp_path, run_folder, cache_bytes)
        spec = make_spec(
            {"model": {"name": "digits_alexnet"}, "layer": layer, "data": {"name": "digits", "test": {"count": 90}},
             "sites": {"count": 20, "seed": seed}, "loss": loss}
        )  # fmt: skip
        plan = plan_spec(spec, folders, PlanOptions(threads=1, batch_size=32))
        assert plan is not None
        return run_job(load_job(spec, plan, folders))

    run_folder = tmp_path / "cache"
    run_folder.mkdir()
    without = job(1, 0)
    assert not (run_folder / "activations").exists()
    job(0, 1 << 30)
    kept = files(run_folder / "activations")
    assert len(kept) == 3
    counted: list[str] = []
    own = Activations.get

    def counting(self: Activations, address: str) -> object:
        record = own(self, address)
        counted.append("none" if record is None else "kept")
        return record

    monkeypatch.setattr(Activations, "get", counting)
    second = job(1, 1 << 30)
    assert counted == ["kept"] * 3
    assert files(run_folder / "activations") == kept
    for name, column in without.columns.items():
        assert column.tobytes() == second.columns[name].tobytes(), name
    job(1, 1 << 30, {"name": "cross_entropy", "label_smoothing": 0.1})  # what is kept does not depend on the loss
    assert counted == ["kept"] * 6
    assert files(run_folder / "activations") == kept

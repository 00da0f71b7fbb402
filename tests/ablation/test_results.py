"""What a finished job leaves says what it is of, and gives the table back, to the bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ablation
from ablation.cache import hash_of
from ablation.cli.files import write_results
from ablation.errors import SpecError, WriteError
from ablation.export import write_csv, write_parquet
from ablation.notebook import Table
from ablation.results import name_file
from ablation.spec import make_spec
from ablation.statistics import make_summary


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.rand(30, 2, 5, 5, generator=random), torch.arange(30) % 3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))


@pytest.fixture(scope="module")
def tables(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Table]:
    splits = {"train": data, "test": (data[0][:7], data[1][:7])}
    return {
        "sampled": ablation.ablate(model, "3", splits, sites=11, top1=True, criteria=["taylor1"], progress=False),
        "whole layer": ablation.ablate(model, "3", {"test": data}, progress=False),
        "convolution": ablation.ablate(model, "0", splits, sites=[7, 3, 53], progress=False),
        "bias": ablation.ablate(model, "0.bias", {"test": data}, progress=False),
        "not finite": ablation.ablate(
            model.double(), "3", {"test": (data[0].double(), data[1])}, sites=5, value={"scale": 1e308 * 1.7}, verify=0,
            progress=False,
        ),
    }  # fmt: skip


def write(table: Table, folder: Path) -> None:
    write_results(
        folder,
        csv=lambda stream: write_csv(table, stream),
        parquet=lambda stream: write_parquet(table, stream),
        summary=make_summary(table),
    )


@pytest.mark.parametrize("name", ["sampled", "whole layer", "convolution", "bias", "not finite"])
@pytest.mark.parametrize("of", ["", "utility.csv", "utility.parquet"])
def test_the_table_comes_back(tables: dict[str, Table], name: str, of: str, tmp_path: Path) -> None:
    table = tables[name]
    write(table, tmp_path)
    again = ablation.open_results(tmp_path / of)
    assert [*again.columns] == [*table.columns]
    for column, values in table.columns.items():
        assert again.columns[column].dtype == values.dtype
        known = ~np.isnan(values)  # a CSV has no sign of a NaN
        assert again.columns[column][known].tobytes() == values[known].tobytes(), column
        np.testing.assert_array_equal(again.columns[column], values)
    assert again.about == json.loads((tmp_path / "summary.json").read_text())["about"]
    assert json.dumps(again.summary()) == json.dumps(make_summary(table))
    again.to_csv(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "utility.csv").read_bytes()
    pd.testing.assert_frame_equal(again.to_pandas(), table.to_pandas())
    assert type(again) is Table


def test_a_figure_of_what_comes_back(tables: dict[str, Table], tmp_path: Path) -> None:
    tables["sampled"].to_parquet(tmp_path / "any name.parquet")
    assert ablation.open_results(str(tmp_path / "any name.parquet")).plot().axes


def test_a_csv_alone_has_its_note_beside_it(tables: dict[str, Table], tmp_path: Path) -> None:
    tables["sampled"].to_csv(tmp_path / "a.csv", about=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.csv-metadata.json"]
    noted = json.loads((tmp_path / "a.csv-metadata.json").read_text())
    assert (noted["@context"], noted["url"]) == ("http://www.w3.org/ns/csvw", "a.csv")
    assert [column["name"] for column in noted["tableSchema"]["columns"]] == [*tables["sampled"].columns]
    assert ablation.open_results(tmp_path / "a.csv").summary() == tables["sampled"].summary()


def break_parquet(folder: Path) -> None:
    (folder / "utility.parquet").write_bytes((folder / "utility.parquet").read_bytes()[:-40])


def take_other_csv(folder: Path) -> None:
    lines = (folder / "utility.csv").read_text().splitlines(keepends=True)
    (folder / "utility.csv").write_text("".join(lines[:-1]))


def take_another_splits_csv(folder: Path) -> None:
    text = (folder / "utility.csv").read_text()
    (folder / "utility.csv").write_text(text.replace("_train", "_more"))


def take_letters(folder: Path) -> None:
    (folder / "utility.csv").write_text((folder / "utility.csv").read_text().replace("0.", "x.", 1))


def take_plain_parquet(folder: Path) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(folder / "utility.parquet")


@pytest.mark.parametrize(
    ("break_it", "of", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "", "There is no such file or folder."),
        (lambda folder: None, "nothing.parquet", "There is no such file or folder."),
        (lambda folder: None, "summary.json", "Give the table itself."),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "", "neither utility.parquet nor utility.csv"),
        (lambda folder: (folder / "summary.json").unlink(), "utility.csv", "summary.json or utility.csv-metadata.json"),
        (lambda folder: (folder / "summary.json").write_text("{}"), "utility.csv", "does not say what the table"),
        (break_parquet, "", "utility.parquet can't be read: "),
        (take_plain_parquet, "", "does not say what it is of"),
        (take_other_csv, "utility.csv", "belong to different jobs"),
        (take_another_splits_csv, "utility.csv", "belong to different jobs"),
        (take_letters, "utility.csv", "utility.csv can't be read: "),
    ],
    ids=["gone", "no file", "summary", "empty", "csv alone", "another summary", "cut", "foreign", "cut csv", "splits",
         "letters"],
)  # fmt: skip
def test_what_is_no_result_is_refused(tables: dict[str, Table], tmp_path: Path, break_it, of: str, says: str) -> None:
    write(tables["sampled"], tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(
        SpecError, match=r"^path: got '.*'; allowed: a folder that `ablation run --out` wrote"
    ) as caught:
        ablation.open_results(tmp_path / "out" / of)
    assert says in str(caught.value)


def test_an_unfinished_job_is_no_result_yet(tmp_path: Path) -> None:
    (tmp_path / ".shards").mkdir()
    with pytest.raises(SpecError, match="is not finished: go on with `ablation run --resume`"):
        ablation.open_results(tmp_path)


def test_a_file_that_cannot_be_written_is_named(tables: dict[str, Table], tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "a.csv"
    with pytest.raises(WriteError, match=r"missing/a.csv can't be written: No such file or directory\. Make room"):
        tables["bias"].to_csv(missing)
    with pytest.raises(OSError, match="can't be written"):
        tables["bias"].to_parquet(missing)


# --- what it is of ---------------------------------------------------------------------------------------------------


def test_a_table_of_the_callers_own_says_what_it_is_of(tables: dict[str, Table], tmp_path: Path) -> None:
    about = tables["sampled"].about
    assert about["spec"]["layer"] == "3"
    assert about["spec"]["sites"] == {"count": 11, "seed": 0}
    assert about["model"]["kind"] == "Sequential"
    assert len(about["model"]["hash"]) == len(about["data"]["splits"]["test"]["fingerprint"]) == 64
    assert about["data"]["splits"]["train"]["n_examples"] == about["data"]["splits"]["train"]["n_available"] == 30
    assert about["data"]["splits"]["test"]["n_examples"] == 7
    assert about["versions"].keys() >= {"python", "torch", "torchvision", "numpy", "numba", "weight-ablation"}
    assert about["date"].endswith("Z")
    assert about["command"] is None
    assert about["device"]["name"] == "cpu"
    assert about["device"]["hardware"]
    tables["sampled"].to_parquet(tmp_path / "a.parquet")
    assert (
        json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"about"])
        == make_summary(tables["sampled"])["about"]
    )


def measure(model: nn.Module, data: object, **options: object) -> dict:
    return ablation.ablate(model, "3", {"test": data}, sites=3, verify=0, progress=False, **options).about


def test_the_hash_is_of_the_weights_and_the_fingerprint_of_the_data(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))

    about = measure(fresh(), data)
    assert about["model"]["hash"] == hash_of(fresh().state_dict().values())
    same = measure(fresh(), data, precision="float64")
    assert (same["model"], same["data"]) == (about["model"], about["data"])
    other = fresh()
    other[0].bias.data[1] += 1e-3  # not the layer itself
    assert measure(other, data)["model"]["hash"] != about["model"]["hash"]
    inputs, labels = data[0].clone(), data[1].clone()
    inputs[29, 0, 0, 0] += 1
    labels[17] = 0
    for changed in ((inputs, data[1]), (data[0], labels), (data[0][:29], data[1][:29])):
        assert measure(fresh(), changed)["data"] != about["data"]
    loader = DataLoader(
        TensorDataset(*data), batch_size=4, collate_fn=lambda rows: torch.utils.data.default_collate(rows)
    )
    assert len(measure(fresh(), loader)["data"]["splits"]["test"]["fingerprint"]) == 64


def test_names_of_downloads_are_safe() -> None:
    asked = {
        "model": {"name": 'my net/ä"\r\n'},
        "layer": "blocks.0.attn.in_proj_weight",
        "data": {"name": "d", "test": "all"},
    }
    name = name_file(make_spec({**asked, "sites": "all"}), "5f0c", "csv")
    assert name == "utility-my-net-blocks.0.attn.in_proj_weight-5f0c.csv"
    long = {**asked, "layer": "x" * 300, "sites": "all"}
    assert name_file(make_spec(long), "5f0c", "parquet") == f"utility-my-net-{'x' * 60}-5f0c.parquet"

"""`ablation.ablate` on models and data from outside: exact, polite, and clear about what it refuses."""

import copy
import json
import re
import typing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import ablation
from ablation.cli.display import print_summary
from ablation.errors import AblationError, DataError, ModelError, NoColumn, OutOfMemory, SpecError
from ablation.statistics import summary_lines
from tests.cases import Case, make_cases
from tests.compare import BOUND, brute_force, utility_error


def case_of(name: str, parameter: str) -> Case:
    return next(case for case in make_cases() if (case.name, case.parameter) == (name, parameter))


@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("case", make_cases(), ids=str)
def test_exact_on_two_splits(case: Case, precision: str) -> None:
    n = max(1, len(case.labels) // 2)
    splits = {"train": (case.inputs[:n], case.labels[:n]), "test": (case.inputs[-n:], case.labels[-n:])}
    layer = case.parameter.removesuffix(".weight")
    sites = min(12, case.model.get_parameter(case.parameter).numel())
    table = ablation.ablate(case.model, layer, splits, sites=sites, precision=precision, progress=False)
    for name, (inputs, labels) in splits.items():
        truth = brute_force(case.model, case.parameter, table.columns["index"], inputs, labels)
        error = utility_error(table.columns[f"utility_{name}"], truth, precision, table.about["baseline"][name]["loss"])
        assert error <= BOUND[precision]
        if n > 1:
            stderr = truth.std(axis=1, ddof=1) / np.sqrt(n)
            np.testing.assert_allclose(table.columns[f"stderr_{name}"], stderr, rtol=2e-3, atol=1e-12)
    weights = case.model.get_parameter(case.parameter).detach().double().flatten().numpy()
    np.testing.assert_array_equal(table.columns["weight"], weights[table.columns["index"]])
    np.testing.assert_array_equal(table.columns["magnitude"], np.abs(table.columns["weight"]))
    proof = table.about["proof"]
    assert proof["arithmetic_error"] <= proof["arithmetic_bound"]


def test_coordinates_point_at_the_weight() -> None:
    case = case_of("convnet", "conv2.weight")
    table = ablation.ablate(case.model, "conv2", {"test": (case.inputs, case.labels)}, sites=30, progress=False)
    weight = case.model.get_parameter("conv2.weight").detach().double()
    rows = table.to_pandas()
    assert list(rows.columns[:8]) == ["index", "out", "in", "kh", "kw", "weight", "magnitude", "utility_test"]
    for row in rows.itertuples():
        assert weight[row.out, row[3], row.kh, row.kw].item() == row.weight


class Hungry(torch.nn.Module):
    """Wants more memory than any machine has, if it is given more than a few examples."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 20:
            torch.empty(len(x) << 44, dtype=torch.uint8)
        return x


def test_where_memory_runs_out_the_batches_get_smaller() -> None:
    case = case_of("relu-mlp", "3.weight")
    model = torch.nn.Sequential(Hungry(), *case.model)
    data = {"test": (torch.randn(70, 11), torch.randint(5, (70,)))}
    table = ablation.ablate(model, "4", data, progress=False)
    plan = table.about["plan"]
    assert (plan["batch_size"], plan["n_halved"] > 0) == (16, True)
    with pytest.raises(OutOfMemory, match="Choose a smaller batch size"):
        ablation.ablate(model, "4", data, batch_size=64, progress=False)


class Numbers(Dataset):
    """A map-style data set that consumes randomness nowhere, and knows its labels only by reading."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(n, 11, generator=generator)
        self.labels = torch.randint(5, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.labels[index])


@pytest.mark.parametrize("kind", ["dataset", "subset", "loader", "shuffled", "tensors", "tensor_dataset"])
def test_every_form_of_data_gives_the_same(kind: str) -> None:
    model = case_of("relu-mlp", "3.weight").model
    data = Numbers(31)
    forms = {
        "dataset": data,
        "subset": Subset(data, list(range(31))),
        "loader": DataLoader(data, batch_size=4),
        "shuffled": DataLoader(data, batch_size=4, shuffle=True),
        "tensors": (data.inputs, data.labels),
        "tensor_dataset": TensorDataset(data.inputs, data.labels),
    }
    table = ablation.ablate(model, "3", {"test": forms[kind]}, sites=20, progress=False)
    expected = ablation.ablate(model, "3", {"test": (data.inputs, data.labels)}, sites=20, progress=False)
    for name in expected.columns:
        np.testing.assert_array_equal(table.columns[name], expected.columns[name])


def test_everything_is_left_as_it_was_found() -> None:
    case = case_of("convnet", "fc1.weight")
    model = copy.deepcopy(case.model)
    model.train()
    model.dropout.eval()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    calls = []
    model.fc2.register_forward_hook(lambda *_: calls.append(1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    np.random.seed(3)
    randomness = torch.get_rng_state(), np.random.get_state()[1].tolist()
    threads = torch.get_num_threads()
    for engine in ("auto", "finite", "rerun", "reference"):
        ablation.ablate(model, "fc1", {"test": (case.inputs, case.labels)}, sites=3, engine=engine, progress=False)
    assert torch.equal(randomness[0], torch.get_rng_state())
    assert randomness[1] == np.random.get_state()[1].tolist()
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["conv1.weight"]
    assert all(p.requires_grad for p in model.parameters())
    assert len(model.fc2._forward_hooks) == 1
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_same_call_same_bytes_and_seeds_matter() -> None:
    case = case_of("relu-mlp", "3.weight")
    splits = {"test": (case.inputs, case.labels)}
    first, again = (ablation.ablate(case.model, "3", splits, sites=40, seed=7, progress=False) for _ in range(2))
    for name in first.columns:
        assert first.columns[name].tobytes() == again.columns[name].tobytes()
    other = ablation.ablate(case.model, "3", splits, sites=40, seed=8, progress=False)
    assert other.columns["index"].tolist() != first.columns["index"].tolist()
    assert len(set(first.columns["index"].tolist())) == 40


def test_all_sites_and_listed_ones() -> None:
    case = case_of("relu-mlp", "5.weight")
    splits = {"test": (case.inputs, case.labels)}
    table = ablation.ablate(case.model, "5", splits, sites="all", progress=False)
    assert table.columns["index"].tolist() == list(range(5 * 13))
    some = ablation.ablate(case.model, "5.weight", splits, sites=[9, 2, 60], progress=False)
    assert some.columns["index"].tolist() == [9, 2, 60]
    same = table.columns["utility_test"][[9, 2, 60]]  # by another path: whole rows have their own
    np.testing.assert_allclose(some.columns["utility_test"], same, rtol=1e-5)


def test_files(tmp_path) -> None:
    case = case_of("relu-mlp", "5.weight")
    table = ablation.ablate(case.model, "5", {"test": (case.inputs, case.labels)}, sites=9, progress=False)
    table.to_csv(tmp_path / "utility.csv")
    table.to_parquet(tmp_path / "utility.parquet")
    frame = table.to_pandas()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "utility.csv"), frame)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "utility.parquet"), frame)
    assert table.summary()["sites"] == 9
    table.plot().savefig(tmp_path / "figure.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "utility.csv", "utility.parquet"]


@cache
def small_table() -> ablation.Table:
    data = torch.cat([X] * 3), torch.cat([Y] * 3)
    return ablation.ablate(relu_mlp(), "5", {"train": data, "test": data}, sites=20, progress=False)


def test_a_table_prints_its_summary_and_first_rows() -> None:
    table = small_table()
    text, page = repr(table), table._repr_html_()
    for label, value in summary_lines(table.summary()):
        assert re.search(rf"^{re.escape(label)} +{re.escape(value)}$", text, re.MULTILINE)
    assert str(table) == text
    assert text.splitlines()[-1] == "[5 of 20 rows x 11 columns]"
    assert text.splitlines()[-7].split() == list(table.columns)
    assert page.count("<tr") == 6
    assert "|utility| with |w|" in page
    assert "5 of 20 rows" in page


def test_a_summary_prints_as_the_command_line_and_is_a_mapping(capsys) -> None:
    summary = small_table().summary()
    print_summary(summary)
    assert capsys.readouterr().out == f"\n{summary}\n"
    assert isinstance(summary, dict)
    assert json.loads(json.dumps(summary, allow_nan=False))["sites"] == 20
    summary["sites"] = 0
    assert small_table().summary()["sites"] == 20


def test_columns_and_rows_of_a_table() -> None:
    table = small_table()
    np.testing.assert_array_equal(table["utility_test"], table.columns["utility_test"])
    rows = [*table]
    assert len(rows) == len(table) == 20
    assert table[3] == rows[3]
    assert table[-1] == rows[19]
    assert table[np.int64(3)]["utility_test"] == float(table["utility_test"][3])
    assert ("utility_test" in table, "utility" in table) == (True, False)
    assert pd.DataFrame([*table]).equals(table.to_pandas())
    for wrong in ("utility_tset", 20, -21, 1.5, True, slice(3)):
        with pytest.raises(NoColumn, match="table: got") as caught:
            table[wrong]
        assert isinstance(caught.value, KeyError)
    with pytest.raises(NoColumn, match="Did you mean 'utility_test'"):
        table["utility_tset"]


@pytest.mark.parametrize("largest", [True, False])
def test_a_mask_is_true_at_the_weights_chosen(largest: bool) -> None:
    table = small_table()
    order = np.argsort(table["utility_test"], kind="stable")
    chosen = sorted(table["utility_test"][order[-7:] if largest else order[:7]])
    row_of = {index: row for row, index in enumerate(table["index"].tolist())}
    for mask in (table.mask(k=7, largest=largest), table.mask(share=7 / 20, by="utility_test", largest=largest)):
        assert mask.shape == (5, 13)
        assert mask.dtype == torch.bool
        indices = mask.flatten().nonzero().flatten().tolist()
        assert sorted(table["utility_test"][row_of[index]] for index in indices) == chosen
    again = ablation.ablate(relu_mlp(), "5", {"test": (X, Y)}, sites=table.mask(k=7, largest=largest), progress=False)
    assert again["index"].tolist() == indices


def test_a_mask_by_other_columns_and_in_torch() -> None:
    model, data = copy.deepcopy(relu_mlp()), {"train": (X, Y)}
    table = ablation.ablate(model, "5", data, progress=False)
    by_size = table.mask(share=0.5, by="magnitude")
    assert torch.equal(by_size, model[5].weight.abs() >= model[5].weight.abs().flatten().sort().values[-32])
    assert torch.equal(table.mask(k=3), table.mask(k=3, by="utility_train"))
    prune.custom_from_mask(model[5], "weight", table.mask(k=10))
    assert int((model[5].weight != 0).sum()) == 10


@pytest.mark.parametrize(
    "options",
    [
        {}, {"k": 3, "share": 0.1}, {"k": 21}, {"k": -1}, {"k": 1.5}, {"k": True}, {"share": 1.1}, {"share": "a"},
        {"share": float("nan")}, {"k": 3, "by": "utility"},
    ],
)  # fmt: skip
def test_masks_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"(mask|table).*: got .*; allowed: "):
        small_table().mask(**options)


PLACES = [(0, 2), (12, 16), (3, 0)]  # in a parameter of 13 x 17


@pytest.mark.parametrize(
    "sites",
    [
        PLACES, [list(place) for place in PLACES], np.array(PLACES), torch.tensor(PLACES), np.array(PLACES, np.uint8),
        tuple(np.array(PLACES).T), tuple(torch.tensor(PLACES).T),
    ],
)  # fmt: skip
def test_sites_by_their_coordinates(sites: Any) -> None:
    table = ablation.ablate(relu_mlp(), "3", {"test": (X, Y)}, sites=sites, progress=False)
    assert list(zip(table["out"].tolist(), table["in"].tolist(), strict=True)) == PLACES


def test_sites_by_a_mask() -> None:
    mask = torch.zeros(13, 17, dtype=torch.bool)
    for place in PLACES:
        mask[place] = True
    for given in (mask, mask.numpy(), mask.tolist(), mask.nonzero()):
        table = ablation.ablate(relu_mlp(), "3", {"test": (X, Y)}, sites=given, progress=False)
        assert list(zip(table["out"].tolist(), table["in"].tolist(), strict=True)) == sorted(PLACES)
    bias = ablation.ablate(relu_mlp(), "3.bias", {"test": (X, Y)}, sites=np.arange(13) % 2 == 0, progress=False)
    assert bias["out"].tolist() == list(range(0, 13, 2))


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        (torch.ones(17, 13, dtype=torch.bool), r"a boolean mask of shape \(17, 13\)'; allowed: one of .* \(13, 17\)"),
        (np.zeros((13, 17), bool), "without a true entry"),
        (np.ones(221, bool), r"of shape \(221,\)"),
        ([(0, 1, 2)], r"coordinates of shape \(1, 3\)'; allowed: coordinates in a parameter of shape \(13, 17\)"),
        ([(0, 17)], r"\[0, 17\]; allowed: coordinates"),
        ([(0, -1)], r"\[0, -1\]; allowed: coordinates"),
        ([(0, 1), (2, 3), (0, 1)], "given twice"),
        ([(0, 1), (2,)], "allowed: a count"),
        ([(0.5, 1.0)], "allowed: a count"),
        ([], "sites"),
        (np.zeros((0, 2), int), "coordinates of shape"),
        (torch.ones(13, 17), "allowed: a count"),
        (np.ones((2, 2, 2), int), "allowed: a count"),
    ],
)
def test_masks_and_coordinates_that_fit_no_weight(sites: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        ablation.ablate(relu_mlp(), "3", {"test": (X, Y)}, sites=sites, progress=False)


def test_the_names_of_the_package() -> None:
    assert {"ablate", "load_data", "load_model", "Table", "errors", "__version__"} <= set(dir(ablation))
    assert all(getattr(ablation, name) is not None for name in ablation.__all__)
    with pytest.raises(AttributeError, match=r"'ablatte'; it has .*ablate"):
        ablation.ablatte  # noqa: B018


def test_what_an_argument_may_be_is_in_its_type() -> None:
    types = typing.get_type_hints(ablation.ablate)
    assert typing.get_args(types["precision"]) == ("mixed", "float32", "float64")
    assert typing.get_args(types["engine"]) == ("auto", "direct", "response", "finite", "rerun", "reference")


@pytest.mark.parametrize("criteria", ["taylor1", ["taylor1"], None])
def test_one_criterion_or_none(criteria: Any) -> None:
    table = ablation.ablate(relu_mlp(), "5", {"test": (X, Y)}, sites=5, criteria=criteria, progress=False)
    assert ("taylor1_test" in table) == (criteria is not None)


class Stream(IterableDataset):
    """Has no fixed order."""

    def __iter__(self):
        yield torch.zeros(11), 0


def relu_mlp() -> nn.Module:
    return case_of("relu-mlp", "3.weight").model


X, Y = torch.randn(6, 11), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((relu_mlp(), "4", {"test": (X, Y)}), {}, SpecError, "layer: got '4'"),
        ((relu_mlp(), "3", {"valid": (X, Y)}), {}, SpecError, "'train', 'test' or both"),
        ((relu_mlp(), "3", {}), {}, SpecError, "'train', 'test' or both"),
        ((relu_mlp(), "3", {"test": (X, Y)}), {"sites": 222}, SpecError, "1 to 221"),
        ((relu_mlp(), "3", {"test": (X, Y)}), {"sites": -1}, SpecError, "sites"),
        ((relu_mlp(), "3", {"test": (X, Y)}), {"sites": True}, SpecError, "sites"),
        ((relu_mlp(), "3", {"test": (X, Y)}), {"sites": [1, 1]}, SpecError, "distinct"),
        ((relu_mlp(), "3", {"test": (X, Y)}), {"value": float("nan")}, SpecError, "finite"),
        ((relu_mlp(), "3", {"test": (X, Y)}), {"precision": "half"}, SpecError, "precision"),
        ((relu_mlp(), "3", {"test": (X, Y)}), {"engine": "quick"}, SpecError, "engine"),
        ((relu_mlp(), "0", {"test": (X, Y)}), {"engine": "direct"}, SpecError, "classifier head"),
        ((relu_mlp(), "3", {"test": (X, Y)}), {"batch_size": 0}, SpecError, "batch_size"),
        ((relu_mlp(), "3", {"test": (X, Y)}), {"criteria": ["taylor9"]}, SpecError, "criteria.0: got 'taylor9'"),
        ((relu_mlp(), "3", {"test": Stream()}), {}, DataError, "no examples by index"),
        ((relu_mlp(), "3", {"test": (X, Y[:5])}), {}, DataError, "5"),
        ((relu_mlp(), "3", {"test": (X, torch.rand(6, 5))}), {}, DataError, "soft labels"),
        ((relu_mlp(), "3", {"test": (X, Y + 1)}), {}, DataError, "label 5; allowed: 0 to 4"),
        ((relu_mlp(), "3", {"test": (X * float("nan"), Y)}), {}, DataError, "NaN or infinite"),
        ((nn.Sequential(nn.Unflatten(1, (11, 1)), nn.Linear(1, 5)), "1", {"test": (X, Y)}), {},
         ModelError, r"\(2, 11, 5\)"),
        ((nn.Sequential(nn.BatchNorm1d(11, track_running_stats=False), nn.Linear(11, 5)), "1", {"test": (X, Y)}), {},
         ModelError, "running statistics"),
        ((nn.ReLU(), "0", {"test": (X, Y)}), {}, ModelError, "no parameters"),
    ],
)  # fmt: skip
def test_refusals(arguments, options, error, words) -> None:
    with pytest.raises(error, match=words):
        ablation.ablate(*arguments, progress=False, **options)
    assert issubclass(error, AblationError)


def test_one_bad_example_is_named() -> None:
    inputs = torch.randn(40, 11)
    inputs[33, 2] = float("inf")
    splits = {"test": (inputs, torch.zeros(40, dtype=torch.int64))}
    with pytest.raises(DataError, match="example 33"):
        ablation.ablate(relu_mlp(), "3", splits, sites=2, batch_size=16, progress=False)


class Recurrent(nn.Module):
    """Its LSTM hands its weights over as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def test_recurrent_weights() -> None:
    model, inputs, labels = Recurrent(), torch.randn(8, 6, 4), torch.randint(3, (8,))
    table = ablation.ablate(model, "rnn.weight_hh_l0", {"test": (inputs, labels)}, sites=10, progress=False)
    truth = brute_force(model, "rnn.weight_hh_l0", table.columns["index"], inputs, labels)
    assert np.abs(truth).max() > 0
    assert utility_error(table.columns["utility_test"], truth, "mixed") <= BOUND["mixed"]


class Hoarder(nn.Module):
    """Keeps its weight under another name, and reads it there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.kept = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept[0].T


def test_a_weight_that_is_read_past_its_name_is_found() -> None:
    model, data = Hoarder(), (torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
    table = ablation.ablate(model, "weight", {"test": data}, sites=2, progress=False)
    model.kept[0] = model.weight.data.clone()
    plain = nn.Linear(4, 3, bias=False)
    plain.weight = model.weight
    truth = brute_force(plain, "weight", table.columns["index"], *data)
    assert utility_error(table.columns["utility_test"], truth, "mixed") <= BOUND["mixed"]


class Hider(Hoarder):
    """Reads its weight where nothing can find it."""

    def __init__(self) -> None:
        super().__init__()
        weight, self.kept = self.weight, []
        self.read = lambda: weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.read().T


def test_a_weight_that_is_read_past_its_name_is_refused() -> None:
    with pytest.raises(ModelError, match="can't be replaced from outside"):
        ablation.ablate(Hider(), "weight", {"test": (torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))}, sites=2)


def test_progress_goes_to_the_end(capsys) -> None:
    case = case_of("relu-mlp", "5.weight")
    ablation.ablate(case.model, "5", {"test": (case.inputs, case.labels)}, sites=9)
    assert "Traceback" not in capsys.readouterr().out


LEFT_ALONE = """
import random, torch
from ablation import ablate
random.seed(3)
before = random.getstate()
data = torch.randn(9, 4), torch.zeros(9, dtype=torch.long)
ablate(torch.nn.Linear(4, 3), "weight", {"test": data}, progress=False)
assert random.getstate() == before
"""


def test_pythons_own_randomness_is_left_alone() -> None:
    """In an interpreter of its own: the checks of axes that the suite turns on draw from `random` too."""
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", LEFT_ALONE], check=True)


class Counter(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(11, 5)
        self.register_buffer("n_calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        return self.out(x)


def test_buffers_are_left_alone() -> None:
    model = Counter()
    ablation.ablate(model, "out", {"test": (X, Y)}, sites=5, progress=False)
    assert model.n_calls == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_inputs_of_another_precision(dtype: torch.dtype) -> None:
    table = ablation.ablate(relu_mlp(), "3", {"test": (X.to(dtype), Y)}, sites=9, progress=False)
    truth = brute_force(relu_mlp(), "3.weight", table.columns["index"], X.to(dtype).float(), Y)
    assert utility_error(table.columns["utility_test"], truth, "mixed") <= BOUND["mixed"]


@pytest.mark.parametrize("sites", [np.int64(5), np.array([4, 2]), torch.tensor([4, 2]), range(3)])
def test_sites_of_any_library(sites) -> None:
    table = ablation.ablate(relu_mlp(), "3", {"test": (X, Y)}, sites=sites, value=np.float32(0.5), progress=False)
    assert len(table) == (5 if isinstance(sites, np.int64) else len(sites))


@pytest.mark.parametrize("sites", [[1.5], np.array([3.7, 1.2]), ["1"], [True, False], None, 5.0, np.ones((2, 2), int)])
def test_sites_that_are_no_indices(sites) -> None:
    with pytest.raises(SpecError, match="sites"):
        ablation.ablate(relu_mlp(), "3", {"test": (X, Y)}, sites=sites, progress=False)


def test_batch_mates_are_noticed_in_batches_of_two() -> None:
    class Mates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(11, 5)

        def forward(self, x: Tensor) -> Tensor:
            z = self.out(x)
            return z - 0.5 * z.mean(dim=0)

    with pytest.raises(ModelError, match="batch composition"):
        ablation.ablate(Mates(), "out", {"test": (X, Y)}, sites=2, batch_size=2, progress=False)


@pytest.mark.parametrize(
    "output", [lambda z: (z, z), lambda z: {"out": z}, lambda z: None], ids=["tuple", "dict", "None"]
)
def test_outputs_that_are_no_logits(output) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(11, 5)

        def forward(self, x: Tensor):
            return output(self.out(x))

    with pytest.raises(ModelError, match="allowed: logits"):
        ablation.ablate(Odd(), "out", {"test": (X, Y)}, sites=2, progress=False)


def test_other_things_than_models_and_devices() -> None:
    with pytest.raises(ModelError, match=r"a torch\.nn\.Module"):
        ablation.ablate(lambda x: x, "out", {"test": (X, Y)})
    with pytest.raises(SpecError, match="device: got 'foo'"):
        ablation.ablate(relu_mlp(), "3", {"test": (X, Y)}, device="foo")


def test_huge_replacements() -> None:
    table = ablation.ablate(relu_mlp(), "3", {"test": (X, Y)}, sites=30, value=1e39, progress=False)
    truth = brute_force(relu_mlp(), "3.weight", table.columns["index"], X, Y, 1e39)
    assert utility_error(table.columns["utility_test"], truth, "mixed") <= BOUND["mixed"]


def test_thousands_of_classes_and_an_unsure_network() -> None:
    """Where the label is not the top class: centring on the top one would lose a factor of 1 / p_m."""
    torch.manual_seed(0)
    model = nn.Linear(6, 20_000)
    with torch.no_grad():
        model.bias[7] += 1
    inputs, labels = torch.rand(40, 6), torch.arange(40)
    table = ablation.ablate(model, "weight", {"test": (inputs, labels)}, sites=200, progress=False)
    assert table.about["proof"]["arithmetic_error"] < 2e-6


def test_the_example_in_the_docstring() -> None:
    import doctest

    import ablation.notebook

    assert doctest.testmod(ablation.notebook).failed == 0
    assert doctest.testmod(ablation.notebook).attempted > 3


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = "import ablation, sys; assert 'torch' not in sys.modules; assert callable(ablation.ablate)"
    subprocess.run([sys.executable, "-c", code], check=True)


class Augmented(Numbers):
    """Its examples differ each time they are read."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, label = super().__getitem__(index)
        return inputs + 1e-4 * torch.rand(()), label


def test_random_augmentation_is_refused() -> None:
    with pytest.raises(DataError, match=r"example \d+ differs between two readings"):
        ablation.ablate(relu_mlp(), "3", {"test": Augmented(20)}, sites=2, progress=False)


STREAMED = """
import resource, sys, torch, ablation
class Endless(torch.utils.data.Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, index):
        return torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index)), index % 5
layers = torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 50), torch.nn.ReLU(), torch.nn.Linear(50, 5)
model = torch.nn.Sequential(*layers)
ablation.ablate(model, "1", {"test": Endless(300)}, sites=200, progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ablation.ablate(model, "1", {"test": Endless(6000)}, sites=200, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_examples() -> None:
    """6,000 examples are 295 MB of inputs; what is kept is one batch."""
    import subprocess
    import sys

    grown_kb = int(subprocess.run([sys.executable, "-c", STREAMED], check=True, capture_output=True, text=True).stdout)
    assert grown_kb < 60_000


@pytest.mark.parametrize(
    ("value", "replace"),
    [("flip_sign", lambda w: -w), ({"scale": np.float32(0.5)}, lambda w: w / 2), (np.float64(0.25), lambda w: 0.25)],
)
def test_replacement_values(value: Any, replace: Any) -> None:
    table = ablation.ablate(relu_mlp(), "3", {"test": (X, Y)}, sites=30, value=value, progress=False)
    truth = brute_force(relu_mlp(), "3.weight", table.columns["index"], X, Y, replace)
    assert utility_error(table.columns["utility_test"], truth, "mixed") <= BOUND["mixed"]
    assert table.summary()["not_finite"] == 0


def net_of_extremes() -> nn.Sequential:
    """Weights of 1e-290, and two of 1e30 in a unit that no logit hears of: times 1e290, the two are infinite."""
    model = copy.deepcopy(relu_mlp()).double()
    with torch.no_grad():
        model[3].weight.mul_(1e-290)
        model[3].weight[2, 1] = model[3].weight[2, 4] = 1e30
        model[5].weight[:, 2] = 0.0
    return model


@pytest.mark.parametrize("engine", ["direct", "finite", "rerun", "reference"])
@pytest.mark.parametrize("sites", ["all", [200, *range(30, 90)]], ids=["all", "some"])
def test_sites_without_a_finite_replacement_are_not_run(sites: Any, engine: str, tmp_path: Path) -> None:
    model, data = net_of_extremes(), {"train": (X.double(), Y), "test": (X[:20].double(), Y[:20])}
    options = {"sites": sites, "engine": engine, "top1": True, "progress": False, "verify": 400}
    table = ablation.ablate(model, "3", data, value={"scale": 1e290}, **options)
    index = table.columns["index"]
    not_run = np.isin(index, [2 * 17 + 1, 2 * 17 + 4])
    for split, (inputs, labels) in data.items():
        utility, stderr, touched = (table.columns[f"{name}_{split}"] for name in ("utility", "stderr", "touched"))
        np.testing.assert_array_equal(np.isnan(utility), not_run)
        np.testing.assert_array_equal(np.isnan(stderr), not_run)
        assert touched[not_run].tolist() == [len(labels)] * 2
        assert not table.columns[f"broken_{split}"][not_run].any()
        assert not table.columns[f"fixed_{split}"][not_run].any()
        truth = brute_force(model, "3.weight", index[~not_run], inputs, labels, lambda w: w * 1e290)
        assert np.abs(truth).max() > 1e-3
        assert utility_error(utility[~not_run], truth, "mixed") <= BOUND["mixed"]
    summary = table.summary()
    assert (summary["sites"], summary["not_finite"]) == (len(index), 2)
    assert summary["proof"]["n_sites"] == len(index) - 2  # as many as `verify` asks for, of those that were run
    json.dumps(summary, allow_nan=False)
    assert ("not run", f"2 of {len(index)} ({2 / len(index):.1%}): the replacement is not a finite number") in (
        summary_lines(summary)
    )
    table.plot()
    table.to_csv(tmp_path / "utility.csv")
    rows = [line.split(",") for line in (tmp_path / "utility.csv").read_text().splitlines()]
    empty = [row[rows[0].index("utility_test")] == "" for row in rows[1:]]
    assert empty == not_run.tolist()


def test_where_no_site_is_run_nothing_is_proved() -> None:
    options = {"value": {"scale": 1e290}, "progress": False, "sites": [2 * 17 + 4, 2 * 17 + 1]}
    table = ablation.ablate(net_of_extremes(), "3", {"train": (X.double(), Y), "test": (X.double(), Y)}, **options)
    assert np.isnan(table.columns["utility_test"]).all()
    assert table.about["proof"] is None
    assert ("largest error", "not checked (no site was run)") in summary_lines(table.summary())
    table.plot()


def test_a_proof_may_have_more_sites_than_the_loops_score_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
    data = torch.randn(40, 12, generator=generator), torch.randint(5, (40,), generator=generator)
    table = ablation.ablate(model, "0", {"test": data}, engine="response", verify=100, progress=False)
    assert table.about["proof"]["n_sites"] == 100
    assert table.about["proof"]["arithmetic_error"] < 1e-4

"""All weights of a layer by response functions: the same numbers as one by one, for heads and for convolutions."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablation
from ablation.engine.batches import run_batches
from ablation.engine.calls import record_calls
from ablation.engine.deltas import Deltas, make_runs
from ablation.engine.interface import Setup
from ablation.engine.loss import make_intact
from ablation.engine.paths import open_path
from ablation.engine.responses.loops import series
from ablation.engine.responses.way import find_averaged
from ablation.errors import ExampleError, SpecError
from ablation.sites import EveryWeight, make_sites
from tests.compare import brute_force, count_moved, utility_error

BOUND = 1e-4  # docs/02-exactness.md


def make_head(
    scale: float = 1.0, n_classes: int = 7, seed: int = 0, function: type[nn.Module] | Any = nn.ReLU
) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(13, 19), function(), nn.Linear(19, n_classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
        model[2].weight[:, 3] = 0  # a unit that no logit hears of
        model[0].weight[5, :4] = 0  # weights that are 0 already
    return model


def make_deep(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(13, 17), nn.ReLU(), nn.Dropout(), nn.Linear(17, 11), nn.ReLU(inplace=True), nn.Linear(11, 7)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def make_data(n: int = 83, n_classes: int = 7, density: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 13, generator=generator) * (torch.rand(n, 13, generator=generator) < density)
    return x, torch.randint(n_classes, (n,), generator=generator)


def run(model: nn.Module, layer: str, data: Any, engine: str, **options: Any) -> Any:
    given = {"sites": "all", "progress": False, "batch_size": 32, **options}
    return ablation.ablate(model, layer, {"test": data}, engine=engine, **given)


class Convs(nn.Module):
    """A convolution that is averaged before the last Linear, in one of many forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.form = form
        options: dict[str, Any] = {"padding": 1}
        if form == "strided":
            options = {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.target = nn.Conv2d(6, 5 if form == "logits" else 8, (3, 2) if form == "strided" else 3, **options)
        self.shortcut = nn.Conv2d(6, 8, 1)
        self.norm = nn.BatchNorm2d(10 if form == "beside" else 8)
        for norm in [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.last = nn.Linear(10 if form in ("beside", "after") else 8, 5)
        self.function = form.removesuffix("-large")
        if form.endswith("-large"):
            self.norm.weight.data.mul_(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = self.target(x)
        if self.form == "logits":
            return F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1)
        if self.form == "beside":
            y = torch.cat([x[:, :2], y], 1)
        y = self.norm(y)
        if self.form == "residual":
            y += self.shortcut(x)
        if self.function in KNOWN:
            y = KNOWN[self.function]()(y)
        elif self.form != "linear":
            y = F.relu(y, inplace=True)
        if self.form == "after":
            y = torch.cat([x[:, :2], y], dim=1)
        if self.form == "mean":
            return self.last(F.dropout(y.mean([2, 3]), 0.5, self.training))
        return self.last(torch.flatten(F.adaptive_avg_pool2d(y, (1, 1)), 1))


KNOWN: dict[str, Any] = {  # behind which whole rows go as they do behind ReLU
    "leaky": partial(nn.LeakyReLU, 0.2, inplace=True),
    "hardtanh": partial(nn.Hardtanh, -0.4, 0.6),
    "relu6": nn.ReLU6,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": partial(nn.Softplus, beta=2.0, threshold=3.0),
    "silu": partial(nn.SiLU, inplace=True),
    "gelu": nn.GELU,
}
FORMS = ("plain", "residual", "strided", "beside", "after", "linear", "mean", "logits")
HEADS = {
    "usual": (make_head(), "0", 7, {}),
    "large": (make_head(6.0), "0", 7, {}),  # steps beyond the series: the direct formula
    "huge": (make_head(60.0), "0", 7, {}),  # changes beyond it: differences of losses
    "small": (make_head(0.01), "0", 7, {}),
    "two-classes": (make_head(n_classes=2), "0", 2, {}),
    "last": (make_head(), "2", 7, {}),
    "last-large": (make_head(6.0), "2", 7, {}),
    "deep": (make_deep(), "0", 7, {}),
    "deep-large": (make_deep(4.0), "0", 7, {"value": 0.3}),
    "constant": (make_head(), "0", 7, {"value": 0.7}),
    "float32": (make_head(), "0", 7, {"precision": "float32"}),
}
for name, function in KNOWN.items():  # within the series' reach; beyond it and over kinks
    HEADS[name] = make_head(0.3, function=function), "0", 7, {}
    HEADS[f"{name}-large"] = make_head(4.0, function=function), "0", 7, {}
HEADS["gelu-two-classes"] = make_head(n_classes=2, function=nn.GELU), "0", 2, {"value": 0.3}
HEADS["hardswish-float32"] = make_head(function=nn.Hardswish), "0", 7, {"precision": "float32"}
HEADS["silu-logits"] = nn.Sequential(nn.Linear(13, 7), nn.SiLU()), "0", 7, {}


@pytest.mark.parametrize("name", HEADS)
def test_whole_rows_of_a_head_equal_brute_force(name: str) -> None:
    model, layer, n_classes, options = HEADS[name]
    x, labels = make_data(n_classes=n_classes)
    columns = run(model, layer, (x, labels), "response", **options).columns
    value = options.get("value", 0.0)
    every = np.arange(len(columns["index"]))
    truth = brute_force(model.double(), f"{layer}.weight", every, x.double(), labels, value)
    moved = count_moved(model, f"{layer}.weight", every, x.double(), value)
    model.float()
    assert utility_error(columns["utility_test"], truth, "mixed") < BOUND
    stderr = truth.std(axis=1, ddof=1) / np.sqrt(truth.shape[1])
    np.testing.assert_allclose(columns["stderr_test"], stderr, rtol=1e-4, atol=1e-6 * stderr.max())
    np.testing.assert_array_equal(columns["touched_test"], moved)


@pytest.mark.parametrize("form", [*FORMS, *KNOWN, *(f"{name}-large" for name in KNOWN)])
def test_whole_channels_equal_brute_force(form: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, labels = torch.randn(41, 3, 6, 7, generator=generator), torch.randint(5, (41,), generator=generator)
    model = Convs(form).eval()
    columns = run(model, "target", (x, labels), "response").columns
    table = run(model, "target", (x, labels), "direct", sites=60, seed=1)
    assert table.about["plan"]["path"] == "direct"
    every = np.arange(len(columns["index"]))
    some = np.sort(np.random.default_rng(0).choice(every, 50, replace=False))
    truth = brute_force(model.double(), "target.weight", some, x.double(), labels)
    assert utility_error(columns["utility_test"][some], truth, "mixed") < BOUND
    stderr = truth.std(axis=1, ddof=1) / np.sqrt(truth.shape[1])
    np.testing.assert_allclose(columns["stderr_test"][some], stderr, rtol=1e-4, atol=1e-6 * stderr.max())
    moved = count_moved(model, "target.weight", some, x.double())
    np.testing.assert_array_equal(columns["touched_test"][some], moved)
    sampled = table.columns
    np.testing.assert_allclose(sampled["utility_test"], columns["utility_test"][sampled["index"]], rtol=1e-3, atol=1e-9)
    np.testing.assert_array_equal(sampled["touched_test"], columns["touched_test"][sampled["index"]])


def test_ways_that_are_no_tail_are_not_taken_for_one() -> None:
    class Other(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.form = form
            self.target = nn.Conv2d(4, 4, 3, padding=1, groups=2 if form == "grouped" else 1)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.target(x))
            if self.form == "again":
                y = torch.relu(self.target(y))
            elif self.form == "own shortcut":
                y = y + self.target(x)
            elif self.form == "smooth":
                y = F.gelu(y)
            pooled = F.adaptive_avg_pool2d(y, 1).flatten(1)
            return self.last(F.relu(pooled) if self.form == "behind" else pooled)

    x = torch.randn(2, 4, 5, 5)
    found = {
        form: find_averaged(record_calls(Other(form).eval(), x), "target.weight") is not None
        for form in ("plain", "grouped", "again", "own shortcut", "smooth", "behind")
    }
    assert [form for form, is_tail in found.items() if is_tail] == ["plain"]


@pytest.mark.parametrize(
    "make", [make_head, make_deep, partial(make_head, 4.0, function=nn.SiLU), partial(make_head, function=nn.ReLU6)]
)
def test_classes_in_blocks_give_the_stratified_sums_of_one_by_one(make: Any) -> None:
    model, (x, labels) = make(), make_data(84)
    sites = EveryWeight(model[0].weight.detach().reshape(-1), 0, model[0].weight.numel(), "zero")
    partials = []
    for name in ("rerun" if make is make_deep else "direct", "response"):
        given = sites if name == "response" else sites.listed()
        path = open_path(name, Setup(model, "0.weight", given), x[:2])
        partials.append(
            run_batches(
                path,
                model,
                zip(x.split(25), labels.split(25), strict=True),  # classes of 7 begin and end within batches
                n_sites=len(sites),
                first_example=0,
                per_class=7,
                proof_examples=frozenset({3, 30, 31}),
                device=x.device,
                on_step=lambda examples, sites: None,
            )
        )
    single, rows = partials
    for field in ("delta", "delta_squared", "within", "proof"):
        ours, expected = getattr(rows, field), getattr(single, field)
        assert expected.any()
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(), err_msg=field)
    np.testing.assert_array_equal(rows.touched, single.touched)
    assert 0 <= rows.left_out < 1e-4 * np.abs(rows.delta).max()


@pytest.mark.parametrize("function", [nn.ReLU, nn.GELU, nn.Hardswish])
def test_the_number_of_threads_changes_no_byte(function: type[nn.Module]) -> None:
    model, data = make_head(function=function), make_data()
    threads = torch.get_num_threads()
    tables = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            tables.append(run(model, "0", data, "response").columns)
    finally:
        torch.set_num_threads(threads)
    for name, values in tables[0].items():
        assert values.tobytes() == tables[1][name].tobytes(), name


def test_sampled_sites_by_whole_rows_are_the_same_as_one_by_one() -> None:
    model, data = make_head(), make_data()
    for sites in (100, list(range(200, 100, -1))):
        rows = run(model, "0", data, "response", sites=sites).columns
        single = run(model, "0", data, "direct", sites=sites).columns
        np.testing.assert_array_equal(rows["index"], single["index"])
        np.testing.assert_array_equal(rows["touched_test"], single["touched_test"])
        size = np.abs(single["utility_test"]).max()
        np.testing.assert_allclose(rows["utility_test"], single["utility_test"], rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_what_the_series_leave_out_is_within_their_bound(spread: float) -> None:
    generator = np.random.default_rng(0)
    worst = 0.0
    for confidence in (0.0, 3.0, 9.0):
        logits = torch.from_numpy(generator.normal(size=(1, 11)) + confidence * (np.arange(11) == 4)).double()
        intact = make_intact(logits, torch.tensor([2]))
        v = generator.uniform(0, 1, 11)
        v *= spread / (v.max() - v.min())
        m, kappa = np.empty(series.ORDERS), np.empty(series.ORDERS)
        series.moments_of_column(intact.rest[0].numpy(), v, 2, m)
        series.series_of_log(m, kappa)
        order = series.SHORT_ORDER if spread <= series.REACH_SHORT else series.LONG_ORDER
        truth = np.log1p((intact.rest[0].numpy() * np.expm1(v - v[2])).sum())
        left_out = abs(truth - sum(kappa[:order]))
        bound = series.rest_of_series(spread, spread, 2 * kappa[1])
        floor = 1e-13 * abs(truth)
        assert left_out <= bound + floor
        cut_short = abs(truth - sum(kappa[: order - 3]))  # the control: three orders less are too few
        worst = max(worst, cut_short / (bound + floor))
    assert worst > 1


def test_a_polynomial_of_expm1_is_right_to_float32() -> None:
    z = np.linspace(-0.25, 0.25, 2001, dtype=np.float32)
    ours = np.array([series.expm1_small(value) for value in z])
    np.testing.assert_allclose(ours, np.expm1(z.astype(np.float64)), rtol=4e-7)


@pytest.mark.parametrize("step", [1e-12, 1e-3, 0.2, 1.5, 40.0, 900.0])
@pytest.mark.parametrize("confidence", [0.0, 5.0, 30.0])
def test_the_loss_along_a_column_is_as_in_float64(step: float, confidence: float) -> None:
    generator = np.random.default_rng(5)
    z = generator.normal(size=17) + confidence * (np.arange(17) == 3)
    v = generator.normal(size=17).astype(np.float32)
    label = 3
    q = torch.softmax(torch.from_numpy(z), 0).numpy()
    q[label] = 0
    for sign in (1, -1):
        t = sign * step
        ours = series.loss_of_column(t, np.float32(v.max() - v.min()), q.astype(np.float32), z, v, label)
        dz = t * v.astype(np.float64)
        truth = np.log1p((q * np.expm1(np.minimum(dz - dz[label], 700.0))).sum())
        if np.abs(dz).max() > 100:
            before, after = (float(torch.logsumexp(torch.from_numpy(each), 0)) for each in (z, z + dz))
            truth = after - before - dz[label]
        assert ours == pytest.approx(truth, rel=3e-6, abs=1e-15)


@pytest.mark.parametrize("t", [1e-9, 0.3, 3.0, 20.0, 600.0])
@pytest.mark.parametrize("confidence", [0.0, 5.0, 30.0])
def test_the_loss_along_one_logit_is_as_in_float64(t: float, confidence: float) -> None:
    z = np.random.default_rng(6).normal(size=9) + confidence * (np.arange(9) == 3)
    for label in (3, 5):  # a confident network is right, or wrong
        q = torch.softmax(torch.from_numpy(z), 0).numpy()
        q[label] = 0
        for unit in (3, 5, 0):
            for step in (t, -t):
                ours = series.loss_of_logit(step, unit, q.astype(np.float32), z, label)
                dz = step * (np.arange(9) == unit)
                before, after = (float(torch.logsumexp(torch.from_numpy(each), 0)) for each in (z, z + dz))
                truth = after - before - dz[label]
                if abs(truth) < 1e-3:
                    truth = math.log1p(float((q * np.expm1(dz - dz[label])).sum()))
                assert ours == pytest.approx(truth, rel=1e-6, abs=1e-15)


def test_deltas_of_chosen_rows_sum_up_to_the_rows_sums() -> None:
    model, (x, labels) = make_head(), make_data()
    sites = EveryWeight(model[0].weight.detach().reshape(-1), 13 * 2, 13 * 9, "zero")
    path = open_path("response", Setup(model, "0.weight", sites), x[:2])
    intact, (responses,) = path.run(x, labels)
    assert not isinstance(responses, Deltas)
    sums = {"delta": np.zeros(len(sites)), "touched": np.zeros(len(sites), np.int32)}
    responses.add(sums, make_runs(len(labels), 0, None), np.zeros(responses.n_units))
    rows = np.array([0, 17, 90])
    deltas = responses.deltas_of(rows, intact)
    np.testing.assert_allclose(deltas.delta.sum(dim=1).numpy(), sums["delta"][rows], rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(deltas.touched.sum(dim=1).numpy(), sums["touched"][rows])
    brute = brute_force(model.double(), "0.weight", sites.pick(rows).indices.numpy(), x.double(), labels)
    np.testing.assert_allclose(deltas.delta.numpy(), brute, rtol=1e-4, atol=1e-7)


def test_a_loss_that_overflows_is_refused_with_its_example() -> None:
    model, (x, labels) = make_head(), make_data()
    with torch.no_grad():
        model[0].weight.mul_(1e30)
        model[2].weight.mul_(1e30)
    with pytest.raises((ExampleError, ablation.errors.AblationError)):
        run(model, "0", (x, labels), "response", precision="float32")


@pytest.mark.parametrize(
    ("options", "what"),
    [({"precision": "float64"}, "float64"), ({"top1": True}, "top1"), ({"layer": "0.bias"}, "engine")],
)
def test_response_functions_are_refused_where_they_do_not_reach(options: dict[str, Any], what: str) -> None:
    layer = options.pop("layer", "0")
    with pytest.raises(SpecError, match="engine"):
        run(make_head(), layer, make_data(), "response", **options)
    table = run(make_head(), layer, make_data(), "auto", **options)
    assert table.about["plan"]["path"] == "direct", what


@pytest.mark.parametrize("function", [nn.ReLU, nn.GELU, nn.Hardswish])
def test_loops_equal_matrix_operations(function: type[nn.Module]) -> None:
    """The compiled loops and torch's operations are two descriptions of one formula."""
    model, (x, labels) = make_head(2.0, function=function), make_data()
    sites = make_sites(model[0].weight, np.arange(13 * 19), "zero")
    deltas = []
    for loops in (True, False):
        path: Any = open_path("direct", Setup(model, "0.weight", sites, top1=not loops), x[:2])
        assert (path.loops is not None) is loops
        _, pieces = path.run(x, labels)
        deltas.append(torch.cat([piece.delta for piece in pieces]))
    size = deltas[1].abs().mean().item()
    torch.testing.assert_close(deltas[0], deltas[1], rtol=3e-6, atol=3e-6 * size)
    assert not torch.equal(deltas[0], deltas[1])

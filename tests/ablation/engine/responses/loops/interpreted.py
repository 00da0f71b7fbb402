"""The Triton kernels against the compiled loops of the CPU and against float64, number by number.

Run by `test_triton.py` in a process of its own: in Triton's interpreter, which must be chosen before Triton is
imported, or on a CUDA device where there is one. No size is a multiple of a block.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ablation.engine.batches import run_batches
from ablation.engine.deltas import Runs, make_runs
from ablation.engine.interface import Setup
from ablation.engine.loss import make_intact
from ablation.engine.paths import open_path
from ablation.engine.responses.arrays import NO_SUMS, look_up_inputs
from ablation.engine.responses.loops import rows as row_loops
from ablation.engine.responses.loops import series
from ablation.engine.responses.loops import triton_rows as tk
from ablation.engine.responses.loops.activations import IDENTITY, RELU, Function, relu_change
from ablation.engine.responses.loops.records import Batch, Follows, Sums, column_of
from ablation.sites import EveryWeight, make_sites

# Some tests let numbers overflow, of which NumPy, that the interpreter computes by, warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclass(frozen=True)
class Given:
    """Some units and a batch, on the host."""

    units: Tensor
    columns: Tensor  # of all units; where the units are logits (1, 1)
    is_logit: bool
    has_relu: bool
    steps: Tensor
    y: Tensor
    x: Tensor
    q: Tensor
    z: Tensor
    labels: Tensor


def make_given(
    size: float, *, units: int = 5, inputs: int = 37, examples: int = 41, classes: int = 11, form: str = "relu"
) -> Given:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(examples, inputs) * (torch.rand(examples, inputs, generator=generator) < 0.5)
    steps = normal(units, inputs) * 0.1 * size
    steps[1, :4] = 0
    columns = normal(2 * units, classes) * 0.2 * size
    columns[4:5] = 0  # no logit hears of units[2]
    y, z = (normal(units, examples) - 0.4).double(), 2 * normal(examples, classes).double()
    labels = torch.randint(classes, (examples,), generator=generator)
    q = make_intact(z, labels, torch.float32).rest
    is_logit = form == "logit"
    every = torch.arange(units) if is_logit else 2 * torch.arange(units)
    return Given(every, torch.zeros(1, 1) if is_logit else columns, is_logit, form == "relu", steps, y, x, q, z, labels)


def on_host(given: Given) -> tuple[Batch, Follows]:
    """Batch and what follows the target, as the compiled loops take them."""
    batch = Batch(*(each.numpy() for each in (given.x, given.y, given.q, given.z, given.labels)))
    return batch, Follows(given.columns.numpy(), given.is_logit, Function(RELU if given.has_relu else IDENTITY))


def on_device(given: Given) -> tuple[tk.Columns, Tensor, Batch]:
    """Columns, steps and batch, as the launchers take them."""
    values = None if given.is_logit else given.columns[given.units].to(DEVICE)
    columns = tk.Columns(given.units.to(DEVICE), values, given.has_relu)
    batch = Batch(*(each.to(DEVICE) for each in (given.x, given.y, given.q, given.z, given.labels)))
    return columns, given.steps.to(DEVICE), batch


def make_sums(given: Given, per_class: int) -> dict[str, Tensor]:
    """Sums that hold something already, but for the unit that no logit hears of."""
    names = ("delta", "delta_squared", *(("class_delta", "class_delta_squared", "within") if per_class else ()))
    generator = torch.Generator().manual_seed(1)
    sums = {name: torch.rand(given.steps.shape, generator=generator, dtype=torch.float64) * 1e-3 for name in names}
    for values in sums.values():
        values[2:3] = 0
    return sums | {"touched": torch.zeros(given.steps.shape, dtype=torch.int32)}


def by_loops(given: Given, runs: Runs) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Sums and bounds by `rows.py`."""
    sums, bounds = {name: values.numpy() for name, values in make_sums(given, runs.per_class).items()}, np.zeros(99)
    batch, follows = on_host(given)
    own = Sums(**(dict.fromkeys(("class_delta", "class_delta_squared", "within"), NO_SUMS) | sums), bounds=bounds)
    inputs = look_up_inputs(batch.x)
    row_loops.add_rows(given.units.numpy(), given.steps.numpy(), batch, inputs, follows, runs, own)
    return sums, bounds[: len(given.units)]


def by_triton(given: Given, runs: Runs) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Sums by `triton_rows.py`."""
    columns, steps, batch = on_device(given)
    sums = {name: values.to(DEVICE) for name, values in make_sums(given, runs.per_class).items()}
    bounds = torch.zeros(len(steps), dtype=torch.float64, device=DEVICE)
    tk.add_rows(columns, steps, batch, runs, sums, bounds)
    return {name: values.cpu().numpy() for name, values in sums.items()}, bounds.cpu().numpy()


def in_float64(given: Given) -> tuple[np.ndarray, np.ndarray]:
    """Every (unit, input, example) pair's change of loss, and whether a logit moves; from the float32 x and steps."""
    d = given.steps.double()[:, :, None] * given.x.double().T
    y = given.y[:, None]
    t = (y + d).relu() - y.relu() if given.has_relu else d
    if given.is_logit:
        dz = t[..., None] * torch.eye(given.q.shape[1]).double()[given.units][:, None, None]
    else:
        dz = t[..., None] * given.columns.double()[given.units][:, None, None]
    own = dz.gather(3, given.labels[None, None, :, None].expand(*t.shape, 1))
    q = make_intact(given.z, given.labels).rest
    small = torch.log1p((q * torch.expm1(dz - own)).sum(3))
    large = torch.logsumexp(given.z + dz, 3) - torch.logsumexp(given.z, 1) - own[..., 0]
    return torch.where(small.abs() < 1, small, large).numpy(), (dz != 0).any(3).numpy()


CASES: dict[str, tuple[Given, Runs]] = {
    "usual": (make_given(1), make_runs(41, 0, None)),
    "small": (make_given(0.01), make_runs(41, 0, None)),
    "wide": (make_given(10), make_runs(41, 0, None)),  # inputs beyond the series: the direct formula
    "huge": (make_given(60), make_runs(41, 0, None)),  # losses beyond that: differences
    "without-relu": (make_given(2, form="plain"), make_runs(41, 0, None)),
    "logits": (make_given(3, units=11, form="logit"), make_runs(41, 0, None)),
    "classes": (make_given(1), make_runs(41, 3, 7)),
    "wide-classes": (make_given(10), make_runs(41, 3, 7)),
    "single-classes": (make_given(1, examples=13), make_runs(13, 0, 1)),
    "many-classes": (make_given(0.3, units=3, inputs=5, examples=23, classes=530), make_runs(23, 0, None)),
    "many-inputs": (make_given(3, units=3, inputs=1033, examples=13), make_runs(13, 0, 6)),
    "many-examples": (make_given(1, units=2, inputs=3, examples=517, classes=3), make_runs(517, 0, None)),
    "one-of-each": (make_given(1, units=2, inputs=1, examples=1, classes=2), make_runs(1, 0, None)),
}


@cache
def of_case(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What the kernels make of a case."""
    return by_triton(*CASES[name])


def close(ours: np.ndarray, theirs: np.ndarray, rtol: float) -> bool:
    size = np.abs(theirs).max(initial=0.0)
    return bool(np.allclose(ours, theirs, rtol=rtol, atol=0.1 * rtol * size))


@pytest.mark.parametrize("name", CASES)
def test_rows_equal_those_of_the_compiled_loops(name: str) -> None:
    ours, bounds = of_case(name)
    theirs, expected_bounds = by_loops(*CASES[name])
    for field, expected in theirs.items():
        # Both are sums of float32 numbers, formed in another order: 1e-7 of each, seen.
        assert close(ours[field], expected, 3e-6), (field, np.abs(ours[field] - expected).max())
    np.testing.assert_array_equal(ours["touched"], theirs["touched"])
    np.testing.assert_allclose(bounds, expected_bounds, rtol=1e-5)


@pytest.mark.parametrize("name", ["usual", "wide", "huge", "without-relu", "logits"])
def test_rows_equal_float64(name: str) -> None:
    given, _ = CASES[name]
    before = make_sums(given, 0)
    ours, _ = of_case(name)
    truth, moved = in_float64(given)
    delta = truth.sum(2)
    scale = np.maximum(np.abs(delta), 0.01 * np.sqrt(np.mean(delta**2)))
    assert (np.abs(ours["delta"] - before["delta"].numpy() - delta) / scale).max() < 1e-4  # docs/02-exactness.md
    squared = (truth**2).sum(2)
    assert close(ours["delta_squared"] - before["delta_squared"].numpy(), squared, 1e-4)
    np.testing.assert_array_equal(ours["touched"], moved.sum(2))
    # The control: without one example it is something else.
    assert not close(ours["delta"] - before["delta"].numpy(), truth[:, :, 1:].sum(2), 1e-4)


def test_how_the_work_is_cut_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    given, runs = make_given(10, examples=17), make_runs(17, 3, 7)
    whole, _ = by_triton(given, runs)
    monkeypatch.setattr(tk, "PAIRS_PER_LAUNCH", 2 * 17)
    monkeypatch.setattr(tk, "FAR_AT_ONCE", 3 * 37)
    monkeypatch.setattr(tk, "FAR_LISTED", 20 * 37)
    monkeypatch.setattr(tk, "LISTED", 8)
    monkeypatch.setattr(tk, "COUNTED", 16)
    monkeypatch.setattr(tk, "MOMENT_PARTS", 3)
    cut, _ = by_triton(given, runs)
    for name, values in whole.items():
        assert values.tobytes() == cut[name].tobytes(), name


@pytest.mark.parametrize("name", ["usual", "wide-classes", "without-relu"])
def test_pairs_are_those_of_the_compiled_loops(name: str) -> None:
    given, runs = CASES[name]
    columns, steps, batch = on_device(given)
    on_cpu, follows = on_host(given)
    pairs = tk.list_pairs(columns, steps, batch, torch.tensor(runs.ends, dtype=torch.int32, device=DEVICE))
    n = len(given.x)
    for row in range(len(steps)):
        own = given.columns[given.units[row]].numpy()
        if not own.any():
            assert pairs.starts[row, -1, -1] == 0
            continue
        expected, largest = row_loops.make_pairs(n, follows.function), np.float64(given.steps[row].abs().max())
        column, _ = column_of(follows, int(given.units[row]))
        inputs = look_up_inputs(on_cpu.x)
        row_loops.list_pairs(row, largest, column, on_cpu, inputs, expected, np.zeros(len(steps)))
        n_pairs, n_candidates = expected.n
        examples, candidates, active = expected.examples, expected.candidates, expected.active
        reach, unused = np.empty(n), np.empty(9, np.float32)
        for p in range(n_pairs):
            far = largest * inputs.largest[examples[p]]
            reach[p] = row_loops.chart_pair(column, expected.y[p], far, unused, unused, unused)[2]
        low, high = expected.numbers[:, :2].T
        chosen, begin, order = np.empty(n, np.int64), 0, []
        for run, last in enumerate(runs.ends):
            end, starts = begin + int(np.searchsorted(examples[begin:n_pairs], last)), [begin]
            for kind in (row_loops.SHORT, row_loops.LONG, row_loops.BEYOND):
                count = row_loops.pick(expected.kinds, kind, begin, end, chosen)
                starts.append(starts[-1] + count)
                order += chosen[:count].tolist()
            np.testing.assert_array_equal(pairs.starts[row, run].cpu(), starts)
            begin = end
        assert len(order) == n_pairs == pairs.starts[row, -1, -1]
        for ours, theirs in zip(
            (pairs.example, pairs.low, pairs.high, pairs.reach),
            (examples, low, high, reach),
            strict=True,
        ):
            np.testing.assert_allclose(ours[row, :n_pairs].cpu(), theirs[order], rtol=1e-15)
        listed = pairs.candidates[row, : int(pairs.n_candidates[row])].cpu().numpy()
        np.testing.assert_array_equal(np.sort(np.asarray(order)[listed]), np.sort(candidates[:n_candidates]))
        bits = [bool(active[0] >> np.uint64(example) & np.uint64(1)) for example in range(n)]
        np.testing.assert_array_equal(pairs.active[row].cpu() == 1, bits)


@pytest.mark.parametrize("form", ["relu", "logit"])
def test_every_coefficient_is_that_of_the_compiled_loops(form: str) -> None:
    given = make_given(4, units=5, examples=17, classes=7, form=form)
    columns, steps, batch = on_device(given)
    pairs = tk.list_pairs(columns, steps, batch, torch.tensor([17], dtype=torch.int32, device=DEVICE))
    bounds = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    ours = tk.fit_series(columns, pairs, batch, bounds).cpu().numpy()
    m, kappa = np.empty(series.ORDERS), np.empty(series.ORDERS)
    compared = 0
    for row in range(5):
        left_out = 0.0
        for pair in range(int(pairs.starts[row, -1, -1])):
            n = int(pairs.example[row, pair])
            if form == "logit":
                series.moments_of_logit(given.q[n].numpy(), row, int(given.labels[n]), m)
                spread = np.float32(1)
            else:
                own = given.columns[given.units[row]].numpy()
                series.moments_of_column(given.q[n].numpy(), own, int(given.labels[n]), m)
                spread = own.max() - own.min()
            series.series_of_log(m, kappa)
            # Cumulants cancel: 1e-6 of what they are made of, which moments and their powers bound.
            size = np.array([max(np.abs(m[j]) ** ((k + 1) / (j + 1)) for j in range(k + 1)) for k in range(8)])
            assert (np.abs(ours[row, pair] - kappa) <= 1e-6 * size + 1e-6 * np.abs(kappa)).all()
            assert not np.allclose(ours[row, pair], kappa * (1 + 1e-4), rtol=1e-6)
            left_out += series.rest_of_series(float(pairs.reach[row, pair]), spread, 2 * kappa[1])
            compared += 1
        assert bounds[row].item() == pytest.approx(left_out, rel=1e-5)
    assert compared > 40


@pytest.mark.parametrize("confidence", [0.0, 5.0, 30.0])
@pytest.mark.parametrize("form", ["column", "logit"])
def test_the_direct_formula_is_that_of_the_compiled_loops(form: str, confidence: float) -> None:
    generator = np.random.default_rng(5)
    z = generator.normal(size=(3, 17)) + confidence * (np.arange(17) == 3)
    labels = np.array([3, 3, 8])
    intact = make_intact(torch.from_numpy(z), torch.from_numpy(labels), torch.float32)
    v = generator.normal(size=(2, 17)).astype(np.float32)
    sizes = [1e-12, 1e-3, 0.05, 0.2, 0.5, 1.5, 40.0, 900.0]
    rows, examples, ts = np.array([(r, n, s * t) for r in (0, 1) for n in range(3) for t in sizes for s in (1, -1)]).T
    rows, examples, ts = rows.astype(np.int64), examples.astype(np.int64), ts.astype(np.float32)
    units = np.array([8, 3])
    values = None if form == "logit" else torch.from_numpy(v).to(DEVICE)
    columns = tk.Columns(torch.from_numpy(units).to(DEVICE), values, True)
    empty = torch.zeros(3, 1)
    batch = Batch(
        *(each.to(DEVICE) for each in (empty, empty.T, intact.rest, torch.from_numpy(z), torch.from_numpy(labels)))
    )
    ours = tk.far_losses(columns, *(torch.from_numpy(each).to(DEVICE) for each in (rows, examples, ts)), batch).cpu()
    q = intact.rest.numpy()
    for row, n, t, loss in zip(rows, examples, ts.astype(np.float64), ours.tolist(), strict=True):
        if form == "logit" and abs(t) > 2:  # too large to subtract nothing from 1: as two losses
            moved = z[n] + t * (np.arange(17) == units[row])
            before, after = (float(torch.logsumexp(torch.from_numpy(each), 0)) for each in (z[n], moved))
            theirs = after - before - t * (units[row] == labels[n])
        elif form == "logit":
            theirs = series.loss_of_logit(t, units[row], q[n], z[n], labels[n])
        else:
            theirs = series.loss_of_column(t, v[row].max() - v[row].min(), q[n], z[n], v[row], labels[n])
        floor = 1e-13 if form == "logit" and abs(t) > 2 else 1e-18  # what subtracting two losses of 30 can't see
        assert loss == pytest.approx(theirs, rel=3e-6, abs=floor), (row, n, t)


@triton.jit
def _call(a, b, c, out, n, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    """One of the parts that kernels are made of, of up to eleven numbers."""
    k = tl.arange(0, BLOCK)
    inside = k < n
    x, y, z = tl.load(a + k, mask=inside), tl.load(b + k, mask=inside), tl.load(c + k, mask=inside)
    if WHICH == "sum_short":
        result = tk._sum_short(x, 0.3, -0.7, y, z, 1.1)
    elif WHICH == "sum_long":
        result = tk._sum_long(x, 0.3, -0.7, y, z, 1.1, 0.9, -0.6, 0.8)
    elif WHICH == "unit_delta":
        result = tk._unit_delta(x, y, z)
    elif WHICH == "expm1_small":
        result = tk._expm1_small(x)
    elif WHICH == "expm1":
        result = tk._expm1(x * 3)
    elif WHICH == "log1p":
        result = tk._log1p(x * 0.9)
    else:
        result = tk._rest_of_series(x * x * 0.5, y * y, z)
    tl.store(out + k, result, mask=inside)


PARTS: dict[str, tuple[Any, Any]] = {
    "sum_short": (np.float32, lambda x, y, z: series.short_sum(x, tuple(map(np.float32, (0.3, -0.7, y, z, 1.1))))),
    "sum_long": (
        np.float32,
        lambda x, y, z: series.long_sum(x, tuple(map(np.float32, (0.3, -0.7, y, z, 1.1, 0.9, -0.6, 0.8)))),
    ),
    "unit_delta": (np.float32, relu_change),
    "expm1_small": (np.float32, lambda x, y, z: series.expm1_small(x)),
    "expm1": (np.float64, lambda x, y, z: np.expm1(x * 3)),
    "log1p": (np.float64, lambda x, y, z: np.log1p(x * 0.9)),
    "rest_of_series": (np.float64, lambda x, y, z: series.rest_of_series(x * x * 0.5, y * y, z)),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_that_of_the_compiled_loops(part: str) -> None:
    dtype, theirs = PARTS[part]
    x, y, z = np.random.default_rng(0).uniform(-1, 1, (3, 61)).astype(dtype)
    x[:20] *= dtype(1e-6)
    out = torch.empty(61, dtype=torch.from_numpy(x).dtype, device=DEVICE)
    _call[(1,)](*(torch.from_numpy(each).to(DEVICE) for each in (x, y, z)), out, 61, part, 64)
    expected = np.array([theirs(*each) for each in zip(x, y, z, strict=True)])
    tolerance = 1e-6 if dtype == np.float32 else 1e-14
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=tolerance, atol=tolerance * np.abs(expected).min())
    assert not np.allclose(out.cpu().numpy(), expected * (1 + 100 * tolerance), rtol=tolerance, atol=0)


class Head(nn.Sequential):
    """A head in which one unit is never heard of."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(13, 9), nn.ReLU(), nn.Linear(9, 7))
        with torch.no_grad():
            self[2].weight[:, 3] = 0
            self[0].weight[5, :4] = 0


@pytest.mark.parametrize(("layer", "sites"), [("0", "all"), ("0", "sampled"), ("0", "few"), ("2", "all")])
def test_the_path_on_a_device_equals_one_weight_by_one(layer: str, sites: str) -> None:
    model = Head().to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(21, 13, generator=generator) * (torch.rand(21, 13, generator=generator) < 0.5)
    x, labels = x.to(DEVICE), torch.randint(7, (21,), generator=generator).to(DEVICE)
    parameter = f"{layer}.weight"
    weight = model.get_parameter(parameter).detach()
    n = weight.numel()
    every = EveryWeight(weight.reshape(-1), 0, n, "zero")
    count = {"sampled": n - 5, "few": 10}.get(sites, n)
    some = make_sites(weight, np.random.default_rng(0).permutation(n)[:count], "zero")
    partials = []
    for name in ("direct", "response"):
        given = some if sites != "all" else every if name == "response" else every.listed()
        path: Any = open_path(name, Setup(model, parameter, given), x[:2])
        path.on_device = True
        partials.append(
            run_batches(
                path,
                model,
                zip(x.split(12), labels.split(12), strict=True),  # classes of 7 begin and end within batches
                n_sites=len(given),
                first_example=0,
                per_class=7,
                proof_examples=frozenset({3, 17, 18}),
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


def test_deltas_of_chosen_rows_sum_up_to_the_rows_sums() -> None:
    model = Head().to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(11, 13, generator=generator).to(DEVICE), torch.arange(11, device=DEVICE) % 7
    sites = EveryWeight(model[0].weight.detach().reshape(-1), 13 * 2, 13 * 8, "zero")
    path: Any = open_path("response", Setup(model, "0.weight", sites), x[:2])
    path.on_device = True
    intact, (responses,) = path.run(x, labels)
    sums = {"delta": torch.zeros(len(sites), dtype=torch.float64, device=DEVICE)}
    sums["touched"] = torch.zeros(len(sites), dtype=torch.int32, device=DEVICE)
    responses.add(sums, make_runs(11, 0, None), torch.zeros(responses.n_units, dtype=torch.float64, device=DEVICE))
    rows = np.array([0, 17, 61])
    deltas = responses.deltas_of(rows, intact)
    torch.testing.assert_close(deltas.delta.sum(1), sums["delta"][rows], rtol=1e-6, atol=1e-9)
    assert torch.equal(deltas.touched.sum(1), sums["touched"][rows].long())
    assert not torch.equal(deltas.touched[0], deltas.touched[1])

"""Every path against an independent brute force, on every case, in every precision that promises something."""

import copy
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ablation.cost import Path
from ablation.engine.batches import run_batches
from ablation.engine.calls import record_calls
from ablation.engine.interface import Setup
from ablation.engine.paths import PATHS, find_paths, open_path
from ablation.errors import ExampleError, ModelError, SpecError
from ablation.layers import describe_model
from ablation.loss import CROSS_ENTROPY, CrossEntropy
from ablation.partial import PartialSums
from ablation.plan import ENGINES
from ablation.sites import make_sites
from tests.ablation.tables import merged
from tests.cases import Case, confident_net, make_cases
from tests.compare import BOUND, brute_force, count_moved, utility_error
from tests.losses import NAMES as LOSSES
from tests.losses import WEIGHTS, Focal, loss_of


def run(case: Case, path: str, precision: str, indices: np.ndarray, cut: int, value="zero", **options) -> PartialSums:
    model = copy.deepcopy(case.model).double() if precision == "float64" else case.model
    weights = model.get_parameter(case.parameter)
    inputs = case.inputs.to(weights.dtype)
    sites = make_sites(weights, indices, value)
    top1, lanes = options.pop("top1", False), options.pop("lanes", 24)
    loss = options.pop("loss", CROSS_ENTROPY)
    engine = open_path(path, Setup(model, case.parameter, sites, precision, top1, lanes, loss=loss), inputs[:2])
    defaults = {"first_example": 0, "per_class": None, "proof_examples": frozenset()}
    return run_batches(
        engine,
        model,
        zip(inputs.split(cut), case.labels.split(cut), strict=True),
        n_sites=len(sites),
        device=torch.device("cpu"),
        on_step=lambda examples, sites: None,
        **{**defaults, **options},
    )


def some(case: Case, n: int = 24) -> np.ndarray:
    n_weights = case.model.get_parameter(case.parameter).numel()
    return np.arange(n_weights)[:: max(1, n_weights // n)]


def is_convolution(case: Case) -> bool:
    return case.model.get_parameter(case.parameter).dim() > 2


@pytest.mark.parametrize("case", make_cases(), ids=str)
def test_the_path_is_found(case: Case) -> None:
    paths = find_paths(record_calls(case.model, case.inputs[:2]), case.parameter)
    assert ("direct" in paths) == (case.path == "direct")
    assert paths[-3:] == ("finite", "rerun", "reference")


def test_the_table_of_paths_has_every_name_that_a_plan_can_have() -> None:
    assert tuple(PATHS) == get_args(Path)
    assert ("auto", *PATHS) == ENGINES


@pytest.mark.parametrize("path", ["auto", "Reference", "brute", ""])
def test_a_path_that_is_not_in_the_table_is_refused(path: str) -> None:
    case = make_cases()[0]
    with pytest.raises(SpecError, match=f"path: got '{path}'; allowed: one of direct, response, finite, rerun, ref"):
        run(case, path, "mixed", some(case), cut=8)


@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("path", ["direct", "finite", "rerun", "reference"])
@pytest.mark.parametrize("case", make_cases(), ids=str)
def test_equals_brute_force(case: Case, path: str, precision: str) -> None:
    if path == "direct" and case.path != "direct":
        with pytest.raises(Exception, match="not part of a classifier head"):
            run(case, path, precision, some(case), cut=8)
        return
    if path == "direct" and precision == "float64" and is_convolution(case):
        with pytest.raises(ModelError, match="take a convolution's weights in 'mixed'"):
            run(case, path, precision, some(case), cut=8)
        return
    indices = some(case)
    partial = run(case, path, precision, indices, cut=8)
    truth = brute_force(case.model, case.parameter, indices, case.inputs, case.labels)
    n = len(case.labels)
    loss = partial.loss / n
    error = utility_error(partial.delta / n, truth, precision, loss)
    assert error <= BOUND[precision], f"{case} {path} {precision}: error {error:.3g}"
    # Where float64 brute force sees a change of loss, a logit has moved; and only where it sees a logit move.
    assert (partial.touched >= (np.abs(truth) > 1e-13).sum(axis=1)).all()
    moved = count_moved(case.model, case.parameter, indices, case.inputs)
    if precision == "float64" or case.name in ("dead-mlp", "side-output"):
        np.testing.assert_array_equal(partial.touched, moved)


ONE_OF_EACH_FORM = ("focal", "smoothing-0.1-weights")
LOSSES_BY_PRECISION = [(name, "mixed") for name in LOSSES] + [(name, "float64") for name in ONE_OF_EACH_FORM]


@pytest.mark.parametrize(("name", "precision"), LOSSES_BY_PRECISION)
@pytest.mark.parametrize("case", make_cases(), ids=str)
def test_other_losses_equal_brute_force(case: Case, name: str, precision: str) -> None:
    """Every path that takes the loss; the slow ones, which see only its form, with one loss of each."""
    indices = some(case, 6)
    logits = logits_of(case)
    one = loss_of(name, logits.shape[1])
    truth = brute_force(case.model, case.parameter, indices, case.inputs, case.labels, loss=one.values)
    is_head = case.path == "direct" and not is_convolution(case)
    slow = ("rerun", "reference") if name in ONE_OF_EACH_FORM else ()
    for path in ("finite", *slow, *(("direct",) if is_head else ())):
        partial = run(case, path, precision, indices, cut=8, loss=one.loss)
        n = len(case.labels)
        error = utility_error(partial.delta / n, truth, precision, partial.loss / n)
        assert error <= BOUND[precision], f"{case} {name} {path} {precision}: error {error:.3g}"
        mean = one.values(logits, case.labels).mean().item()
        assert partial.loss / n == pytest.approx(mean, rel=1e-4 if precision == "mixed" else 1e-12, abs=1e-14)


def logits_of(case: Case) -> torch.Tensor:
    """The float64 logits of plain PyTorch."""
    with torch.no_grad():
        output = copy.deepcopy(case.model).double().eval()(case.inputs.double())
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("path", ["direct", "response"])
@pytest.mark.parametrize("case", make_cases(), ids=str)
def test_compiled_loops_refuse_other_losses(case: Case, path: str) -> None:
    if path == "direct" and not (case.path == "direct" and is_convolution(case)):
        return
    with pytest.raises(ModelError, match=r"with plain cross-entropy only.*use engine='finite'"):
        run(case, path, "mixed", some(case), cut=8, loss=Focal())


def test_examples_of_a_class_that_counts_nothing_have_no_loss() -> None:
    case = next(case for case in make_cases() if case.parameter == "3.weight")
    loss = CrossEntropy(class_weights=WEIGHTS)
    silent = case.labels == WEIGHTS.index(0)
    only = Case(case.name, case.model, case.parameter, case.inputs[silent], case.labels[silent], case.path)
    for path in ("direct", "finite", "rerun", "reference"):
        partial = run(only, path, "mixed", some(case), cut=8, loss=loss)
        assert partial.loss == 0
        assert not partial.delta.any()
        assert partial.touched.any()  # the logits do move


def test_a_loss_that_looks_at_batch_mates_is_refused() -> None:
    case = next(case for case in make_cases() if case.parameter == "3.weight")

    class Centred:
        def values(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits - logits.mean(dim=0), labels, reduction="none")

    with pytest.raises(SpecError, match=r"Centred, whose values differ by .* in another batch composition"):
        run(case, "rerun", "mixed", some(case), cut=8, loss=Centred())


def test_a_loss_that_is_not_finite_is_refused_with_the_example() -> None:
    case = next(case for case in make_cases() if case.parameter == "3.weight")

    class Logarithm:
        def values(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return torch.where(labels == labels[3], float("nan"), logits[:, 0])

    with pytest.raises(ExampleError) as refused:
        run(case, "rerun", "mixed", some(case), cut=8, loss=Logarithm())
    assert refused.value.position == int((case.labels == case.labels[3]).nonzero()[0])


@pytest.mark.parametrize("case", make_cases(), ids=str)
def test_squares_and_touched_agree_between_paths(case: Case) -> None:
    if case.path != "direct" or is_convolution(case):
        return
    indices = some(case)
    direct = run(case, "direct", "float64", indices, cut=9)
    rerun = run(case, "rerun", "float64", indices, cut=9)
    np.testing.assert_allclose(direct.delta_squared, rerun.delta_squared, rtol=1e-8, atol=1e-26)
    np.testing.assert_array_equal(direct.touched, rerun.touched)
    assert direct.n_correct == rerun.n_correct


def test_confident_networks_stay_exact() -> None:
    model, inputs, labels = confident_net()
    with torch.no_grad():
        p = model.double()(inputs.double()).softmax(1)
        model.float()
    doubt = 1 - p.gather(1, labels[:, None])
    assert doubt.median() < 1e-5, "the case is not what it says"
    case = Case("confident", model, "2.weight", inputs, labels, "direct")
    indices = np.arange(40 * 24)
    partial = run(case, "direct", "mixed", indices, cut=64)
    # From the same float32 layer input on, in float64: the engine's own arithmetic.
    with torch.no_grad():
        x = torch.relu(model[0](inputs)).double()
        head = copy.deepcopy(model[2:]).double()
        weight = head[0].weight.data.view(-1)
        loss = F.cross_entropy(head(x), labels, reduction="none")
        truth = torch.zeros(len(indices), len(labels), dtype=torch.float64)
        for row in range(len(indices)):
            kept = weight[row].item()
            weight[row] = 0
            truth[row] = F.cross_entropy(head(x), labels, reduction="none") - loss
            weight[row] = kept
    true = truth.mean(1).numpy()
    scale = np.maximum(np.abs(true), 0.01 * np.sqrt((true**2).mean()))
    error = np.where(partial.delta == 0, 0, np.abs(partial.delta / len(labels) - true) / scale)
    assert error.max() <= 1e-4


@pytest.mark.parametrize("value", [0.5, -3.0, 40.0])
def test_constants(value: float) -> None:
    case = next(case for case in make_cases() if case.parameter == "3.weight")
    from ablation.spec import Constant

    for path in ("direct", "finite", "rerun"):
        partial = run(case, path, "float64", some(case), cut=7, value=Constant(constant=value))
        truth = brute_force(case.model, case.parameter, some(case), case.inputs, case.labels, value)
        assert utility_error(partial.delta / len(case.labels), truth, "float64") <= 1e-9


def test_touched_counts_exactly_the_examples_with_an_input() -> None:
    """Three examples have nothing in input 4: its weights can't move them, and move all the others."""
    case = next(case for case in make_cases() if case.name == "one-linear")
    inputs = case.inputs.clone()
    inputs[[2, 5, 11], 4] = 0
    silent = Case(case.name, case.model, case.parameter, inputs, case.labels, case.path)
    indices = np.array([4, 11 + 4, 5])
    for path in ("direct", "finite", "rerun", "reference"):
        assert run(silent, path, "mixed", indices, cut=8).touched.tolist() == [26, 26, 29]


def test_top1_counts() -> None:
    case = next(case for case in make_cases() if case.parameter == "5.weight")
    model = copy.deepcopy(case.model).double().eval()
    weights = model.get_parameter(case.parameter).data.view(-1)
    indices = np.arange(weights.numel())
    with torch.no_grad():
        before = model(case.inputs.double()).argmax(1) == case.labels
        broken, fixed = [], []
        for index in indices:
            kept = weights[index].item()
            weights[index] = 2.0
            after = model(case.inputs.double()).argmax(1) == case.labels
            weights[index] = kept
            broken.append(int((before & ~after).sum()))
            fixed.append(int((~before & after).sum()))
    assert sum(broken)
    assert sum(fixed)
    from ablation.spec import Constant

    for path in ("direct", "finite", "rerun", "reference"):
        partial = run(case, path, "mixed", indices, cut=10, value=Constant(constant=2.0), top1=True)
        np.testing.assert_array_equal(partial.broken, broken)
        np.testing.assert_array_equal(partial.fixed, fixed)


def test_any_cut_equals_the_uncut_run() -> None:
    case = next(case for case in make_cases() if case.parameter == "fc1.weight")
    whole = run(case, "direct", "float64", some(case), cut=23)
    for cut in (1, 5, 22):
        np.testing.assert_allclose(run(case, "direct", "float64", some(case), cut=cut).delta, whole.delta, rtol=1e-11)
    halves = []
    for part in (slice(0, 10), slice(10, 23)):
        half = Case(case.name, case.model, case.parameter, case.inputs[part], case.labels[part], case.path)
        halves.append(run(half, "direct", "float64", some(case), cut=4))
    np.testing.assert_allclose(merged(halves).delta, whole.delta, rtol=1e-11)
    assert merged(halves).n_examples == 23


def test_same_cut_same_bytes() -> None:
    case = next(case for case in make_cases() if case.parameter == "fc1.weight")
    first, second = (run(case, "direct", "mixed", some(case), cut=6) for _ in range(2))
    assert first.delta.tobytes() == second.delta.tobytes()


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 29])
def test_blocks_of_one_class(cut: int) -> None:
    """The variance within classes does not depend on where batches end."""
    base = next(case for case in make_cases() if case.parameter == "3.weight")
    n, k = 28, 4
    case = Case(base.name, base.model, base.parameter, base.inputs[:n], base.labels[:n], "direct")
    partial = run(case, "direct", "float64", some(case), cut=cut, per_class=k)
    deltas = brute_force(case.model, case.parameter, some(case), case.inputs, case.labels)
    blocks = deltas.reshape(len(deltas), n // k, k)
    within = (k * blocks.var(axis=2, ddof=1)).sum(axis=1)
    np.testing.assert_allclose(partial.within, within, rtol=1e-7, atol=1e-22)


def test_proof_sums_are_those_of_the_proof_examples() -> None:
    case = next(case for case in make_cases() if case.parameter == "3.weight")
    partial = run(case, "direct", "float64", some(case), cut=8, first_example=100, proof_examples=frozenset({103, 119}))
    deltas = brute_force(case.model, case.parameter, some(case), case.inputs, case.labels)
    np.testing.assert_allclose(partial.proof, deltas[:, [3, 19]].sum(axis=1), rtol=1e-8, atol=1e-16)


def test_describe_model_counts_flops() -> None:
    case = make_cases()[0]
    facts = describe_model("mlp", case.model, case.inputs[:3])
    assert facts.flops == 2 * (11 * 17 + 17 * 13 + 13 * 5)
    assert facts.n_classes == 5
    assert facts.input_shape == (11,)
    after = {layer.name: layer.flops_after for layer in facts.layers}
    assert after["5"] == 2 * 13 * 5
    assert after["3"] == 2 * (17 * 13 + 13 * 5)


@pytest.mark.parametrize(
    ("rest", "moving", "kept"),
    [
        ([nn.ReLU(), nn.Conv2d(6, 2, 1)], 2 * 16, 2 * 16),  # of six channels one is carried by itself
        ([nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1)], (6 + 2) * 16, 2 * 16),  # all channels of its group move
        ([nn.ReLU(), nn.ConvTranspose2d(6, 2, 1)], (6 + 2) * 16, 2 * 16),  # takes all channels together
        ([nn.ReLU(), nn.Flatten(2), nn.Conv1d(6, 2, 1)], (6 + 2) * 16, 2 * 16),  # so does this one
        ([nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5)], 5, 5),
    ],
    ids=["channel", "group", "transposed", "1-d", "flat"],
)
def test_numbers_that_are_carried(rest: list[nn.Module], moving: int, kept: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *rest, nn.Flatten())
    layer = describe_model("net", model, torch.randn(2, 3, 4, 4)).layers[0]
    flat = 2 * kept  # in and out of the last one
    assert (layer.widest_spread, layer.values_after) == (max(moving, flat), 6 * 16 + kept)

"""The loss as an object: what it is in PyTorch's words, what is taken for one, and a whole job with each."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablation
from ablation.errors import DataError, ProofError, SpecError
from ablation.loss import CROSS_ENTROPY, CrossEntropy, is_plain, loss_values, read_loss
from tests.cases import Case, confident_net, make_cases
from tests.compare import BOUND, brute_force, utility_error
from tests.losses import NAMES, WEIGHTS, Focal, loss_of, make_losses

LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
LABELS = torch.arange(12) % 5


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_torch(name: str) -> None:
    one = loss_of(name, 5)
    torch.testing.assert_close(loss_values(one.loss, LOGITS, LABELS), one.values(LOGITS, LABELS), rtol=0, atol=0)


@pytest.mark.parametrize("case", [case for case in make_losses(5) if isinstance(case.loss, CrossEntropy)], ids=str)
def test_soft_labels_say_the_same_as_the_values(case: Any) -> None:
    soft = case.loss.soft_labels(LABELS, 5)
    values = (soft * -LOGITS.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(values, case.values(LOGITS, LABELS), rtol=1e-14, atol=1e-15)


def test_a_weight_of_0_gives_no_loss() -> None:
    values = CrossEntropy(class_weights=WEIGHTS).values(LOGITS, LABELS)
    weights = torch.tensor(WEIGHTS)[LABELS]
    assert (values[weights == 0] == 0).all()
    assert (values[weights > 0] > 0).all()


def test_which_loss_is_plain() -> None:
    assert is_plain(CROSS_ENTROPY)
    assert is_plain(CrossEntropy(0.0, None))
    assert not any(is_plain(case.loss) for case in make_losses(5))
    assert not is_plain(CrossEntropy(class_weights=(1.0,) * 5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing": 1.0}, r"loss.label_smoothing: got 1.0; allowed: less than 1"),
        ({"label_smoothing": -0.5}, r"loss.label_smoothing: got -0.5; allowed: 0"),
        ({"class_weights": (1.0, -1.0)}, r"loss.class_weights: .*finite numbers of at least 0; -1.0 is not one"),
        ({"class_weights": (0.0, 0.0)}, r"loss.class_weights: .*at least one number above 0"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        CrossEntropy(**options)


def test_what_is_taken_for_a_loss() -> None:
    said = {"name": "cross_entropy", "label_smoothing": 0.25, "class_weights": (1.0, 2.0, 0.0)}
    torchs = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.0]), label_smoothing=0.25)
    assert read_loss("cross_entropy") == ("cross_entropy", None)
    assert read_loss(said) == (said, None)
    assert read_loss(CrossEntropy(0.25, (1.0, 2.0, 0.0))) == (said, None)
    assert read_loss(torchs) == (said, None)
    assert read_loss(nn.CrossEntropyLoss(reduction="none"))[0]["class_weights"] is None
    focal = Focal()
    assert read_loss(focal) == ({"object": "Focal"}, focal)


class OwnCrossEntropy(nn.CrossEntropyLoss):
    """May compute anything."""


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), r"loss.reduction: got 'sum'; allowed: 'mean' or 'none'"),
        (nn.CrossEntropyLoss(ignore_index=2), r"loss.ignore_index: got 2; .*Leave examples of that class out"),
        (OwnCrossEntropy(), r"loss: got .*an object with values\(logits, labels\)"),
        (nn.MSELoss(), r"loss: got .*an object with values\(logits, labels\)"),
        (F.cross_entropy, r"loss: got .*an object with values\(logits, labels\)"),
        (Focal, r"loss: got .*an object with values\(logits, labels\)"),  # the class instead of an object
        (None, r"loss: got null; allowed"),
        ("hinge", r"loss: got 'hinge'; allowed: \"cross_entropy\" or"),
        (CrossEntropy(class_weights=(1.0, 2.0)), r"loss.class_weights: got '2 numbers'; allowed: 5 numbers"),
    ],
)  # fmt: skip
def test_what_is_not(loss: Any, words: str) -> None:
    case = case_of("relu-mlp", "3.weight")
    with pytest.raises(SpecError, match=words):
        ablation.ablate(case.model, "3", {"test": (case.inputs, case.labels)}, loss=loss, progress=False)


class Reduced:
    """The mean, as a training loop has it."""

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


class Narrow:
    """Loses what is looked for."""

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")


@pytest.mark.parametrize(
    ("loss", "words"),
    [(Reduced(), r"Reduced.* gave torch.float64 of shape \(\)"), (Narrow(), r"Narrow.* gave torch.float32 of shape")],
)
def test_values_that_are_not_one_float64_number_per_example(loss: Any, words: str) -> None:
    case = case_of("relu-mlp", "3.weight")
    with pytest.raises(SpecError, match=words):
        ablation.ablate(case.model, "3", {"test": (case.inputs, case.labels)}, loss=loss, progress=False)


def test_soft_labels_stay_refused() -> None:
    case = case_of("relu-mlp", "3.weight")
    soft = torch.rand(len(case.inputs), 5).softmax(dim=1)
    with pytest.raises(DataError, match="no soft labels"):
        ablation.ablate(case.model, "3", {"test": (case.inputs, soft)}, loss=CrossEntropy(0.1), progress=False)


def case_of(name: str, parameter: str) -> Case:
    return next(case for case in make_cases() if (case.name, case.parameter) == (name, parameter))


@pytest.mark.parametrize("sites", [30, "all"])
@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("network", "parameter"), [("relu-mlp", "3.weight"), ("two-classes", "0.weight"), ("convnet", "norm1.weight")]
)
def test_a_whole_job(network: str, parameter: str, name: str, precision: str, sites: int | str) -> None:
    case = case_of(network, parameter)
    n_weights = case.model.get_parameter(parameter).numel()
    sites = min(sites, n_weights) if isinstance(sites, int) else sites
    n_classes = 2 if network == "two-classes" else 5
    one = loss_of(name, n_classes)
    splits = {"train": (case.inputs[:9], case.labels[:9]), "test": (case.inputs[9:], case.labels[9:])}
    table = ablation.ablate(
        case.model, parameter, splits, sites, loss=one.loss, precision=precision, batch_size=5, progress=False
    )
    assert table.about["plan"]["path"] == case.path
    for split, (inputs, labels) in splits.items():
        indices = table.columns["index"]
        truth = brute_force(case.model, parameter, indices, inputs, labels, loss=one.values)
        error = utility_error(table.columns[f"utility_{split}"], truth, precision)
        assert error <= BOUND[precision], f"{case} {name} {precision}: error {error:.3g}"
        stderr = truth.std(axis=1, ddof=1) / np.sqrt(len(labels))
        np.testing.assert_allclose(table.columns[f"stderr_{split}"], stderr, rtol=2e-3, atol=1e-12)
    proof = table.about["proof"]
    assert proof["arithmetic_error"] <= proof["arithmetic_bound"]


def test_options_that_change_nothing_change_nothing_but_rounding() -> None:
    case = case_of("relu-mlp", "3.weight")
    data = {"test": (case.inputs, case.labels)}
    plain, same = (
        ablation.ablate(case.model, "3", data, loss=loss, progress=False)
        for loss in ("cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.0))
    )
    assert (plain.about["plan"]["path"], same.about["plan"]["path"]) == ("response", "response")
    ones = ablation.ablate(case.model, "3", data, loss=CrossEntropy(class_weights=(1.0,) * 5), progress=False)
    assert ones.about["plan"]["path"] == "direct"
    utility = plain.columns["utility_test"]
    assert same.columns["utility_test"].tobytes() == utility.tobytes()
    np.testing.assert_allclose(ones.columns["utility_test"], utility, rtol=1e-4, atol=1e-4 * np.abs(utility).mean())


class Wrong:
    """Says that it is the plain cross-entropy, and has other values."""

    def __init__(self, power: float) -> None:
        self.power = power

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none") ** self.power

    def soft_labels(self, labels: Tensor, n_classes: int) -> Tensor:
        return F.one_hot(labels, n_classes).double()


@pytest.mark.parametrize("engine", ["direct", "finite", "rerun"])
def test_a_change_that_is_not_that_of_the_values_fails_the_proof(engine: str) -> None:
    case = case_of("relu-mlp", "3.weight")
    data = {"test": (case.inputs, case.labels)}
    right = ablation.ablate(case.model, "3", data, 20, loss=Wrong(1.0), engine=engine, progress=False)
    assert right.about["proof"]["arithmetic_error"] < 1e-5
    with pytest.raises(ProofError, match="the engine against the reference"):
        ablation.ablate(case.model, "3", data, 20, loss=Wrong(1.001), engine=engine, progress=False)


@pytest.mark.parametrize("loss", [CrossEntropy(class_weights=(1e4, 1e4, 0.0)), CrossEntropy(0.1, (1e4, 1e3, 1.0))])
@pytest.mark.parametrize("precision", ["mixed", "float64"])
def test_large_class_weights_on_confident_examples_are_proved(loss: CrossEntropy, precision: str) -> None:
    """The reference rounds as much more as the loss is larger; 1 - p_y is below 1e-5 for most of them."""
    model, inputs, labels = confident_net()
    data = {"test": (inputs, labels)}
    table = ablation.ablate(model, "2", data, 200, loss=loss, precision=precision, progress=False)
    assert table.about["proof"]["arithmetic_error"] <= table.about["proof"]["arithmetic_bound"]

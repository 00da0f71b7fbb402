"""Sums of gradients against autograd on the whole split and against central differences of the loss, on every case."""

import copy
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablation.criteria import STATISTICS
from ablation.engine import batches
from ablation.engine.batches import open_statistics, run_batches
from ablation.engine.gradients import Gradients, loss_gradient
from ablation.engine.interface import Setup
from ablation.engine.paths import open_path
from ablation.errors import ModelError
from ablation.loss import CrossEntropy, Loss
from ablation.sites import EveryWeight, list_sites, make_sites
from ablation.spec import SitesSpec
from tests.cases import Case, WritesInto, confident_net, make_cases

CASES = [case for case in make_cases() if case.name != "writes-out"]  # functions with out= have no derivative


def case_of(parameter: str, name: str = "relu-mlp") -> Case:
    return next(case for case in make_cases() if (case.name, case.parameter) == (name, parameter))


def sum_gradients(
    case: Case, precision: str, *, sites: SitesSpec | np.ndarray = "all", batch: int = 8, at_once: int = 3
) -> np.ndarray:
    """The statistic over all examples of a case, in batches of which the last one is short."""
    model = copy.deepcopy(case.model).double() if precision == "float64" else case.model
    weights = model.get_parameter(case.parameter)
    listed = make_sites(weights, sites, "zero") if isinstance(sites, np.ndarray) else list_sites(weights, sites, "zero")
    gradients = Gradients(Setup(model, case.parameter, listed, precision), at_once)
    sums = torch.zeros(len(listed), dtype=torch.float64)
    for inputs, labels in zip(case.inputs.to(weights.dtype).split(batch), case.labels.split(batch), strict=True):
        gradients.add(sums, inputs, labels)
    return sums.numpy()


def losses(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Each example's cross-entropy in a form whose derivative does not cancel either."""
    output = model(inputs.clone())
    logits = output if isinstance(output, Tensor) else output.logits
    others = logits - logits.gather(1, labels[:, None])
    others = others.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    return F.softplus(others.logsumexp(dim=1))


def by_autograd(case: Case) -> np.ndarray:
    """The gradient of the summed loss by torch alone, all examples at once, in float64."""
    model = copy.deepcopy(case.model).double().eval()
    total = losses(model, case.inputs.double(), case.labels).sum()
    (gradient,) = torch.autograd.grad(
        total, model.get_parameter(case.parameter), allow_unused=True, materialize_grads=True
    )
    return gradient.reshape(-1).numpy()


def by_differences(case: Case, indices: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """(L(w + h) - L(w - h)) / 2h of the summed loss L in float64, one weight at a time."""
    model = copy.deepcopy(case.model).double().eval()
    weights = model.get_parameter(case.parameter).data
    found = []
    with torch.no_grad():
        for index in indices:
            place = np.unravel_index(index, weights.shape)
            kept, both = weights[place].item(), []
            for moved in (kept + step, kept - step):
                weights[place] = moved
                both.append(losses(model, case.inputs.double(), case.labels))
            weights[place] = kept
            found.append(((both[0] - both[1]).sum() / (2 * step)).item())
    return np.array(found)


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference in units of the largest gradient; 0 against 0 is 0."""
    return float(np.abs(found - truth).max() / max(np.abs(truth).max(), 1e-300))


@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-12), ("mixed", 2e-6), ("float32", 2e-5)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_autograd_on_the_whole_split(case: Case, precision: str, bound: float) -> None:
    """In `mixed` what comes before the layer is float32, which is all that differs."""
    truth = by_autograd(case)
    assert relative_error(sum_gradients(case, precision), truth) <= bound
    assert truth.any() or case.parameter == "side.weight" or case.name == "dead-mlp", "the case says nothing"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_central_differences_of_the_loss(case: Case) -> None:
    n_weights = case.model.get_parameter(case.parameter).numel()
    indices = np.arange(n_weights)[:: max(1, n_weights // 6)]
    found = sum_gradients(case, "float64", sites=indices)
    scale = np.abs(sum_gradients(case, "float64")).max()
    assert np.abs(found - by_differences(case, indices)).max() <= 1e-6 * scale + 1e-9


def test_mixed_is_float64_from_the_layers_input_on() -> None:
    case = case_of("3.weight")
    with torch.no_grad():
        x = case.model.eval()[:3](case.inputs).double()  # in float32
    rest = Case(case.name, copy.deepcopy(case.model)[3:].double(), "3.weight", x, case.labels, case.path)
    found = sum_gradients(case, "mixed", batch=29, at_once=29)  # in other batches, float32 rounds otherwise
    assert relative_error(found, by_autograd(rest)) <= 1e-12
    assert relative_error(sum_gradients(case, "float32"), by_autograd(rest)) > 1e-9  # the control


def test_confident_examples_keep_their_gradient() -> None:
    """softmax - 1 at the label would leave some 1e-16 of examples whose whole gradient may be smaller."""
    model, inputs, labels = confident_net()
    case = Case("confident", copy.deepcopy(model).double(), "2.weight", inputs, labels, "direct")
    assert relative_error(sum_gradients(case, "float64"), by_autograd(case)) <= 1e-12
    logits = torch.tensor([[40.0, 0.0, -3.0], [0.0, 45.0, 1.0]], dtype=torch.float64)
    found = loss_gradient(logits, torch.tensor([0, 1]))
    assert found[0, 0].item() == pytest.approx(-(np.exp(-40) + np.exp(-43)), rel=1e-14)
    assert found.sum(dim=1).abs().max() < 1e-30


@pytest.mark.parametrize(("batch", "at_once"), [(1, 1), (7, 7), (29, 29), (29, 4), (10, 256)])
def test_any_cut_into_batches_gives_the_same(batch: int, at_once: int) -> None:
    case = case_of("fc1.weight", "convnet")
    whole, cut = sum_gradients(case, "float64"), sum_gradients(case, "float64", batch=batch, at_once=at_once)
    assert relative_error(cut, whole) <= 1e-14
    again = sum_gradients(case, "float64", batch=batch, at_once=at_once)
    assert again.tobytes() == cut.tobytes()


def test_sites_in_any_order_and_parts_of_a_layer_get_their_own() -> None:
    case = case_of("conv1.weight", "channels-last")  # whose memory is in another order than its flat indices
    whole = sum_gradients(case, "mixed")
    chosen = np.array([101, 0, 161, 7])
    np.testing.assert_array_equal(sum_gradients(case, "mixed", sites=chosen), whole[chosen])
    weights = case.model.get_parameter(case.parameter)
    part = list_sites(weights, "all", "zero")[27:54]
    assert isinstance(part, EveryWeight)
    sums = torch.zeros(27, dtype=torch.float64)
    for inputs, labels in zip(case.inputs.split(8), case.labels.split(8), strict=True):
        Gradients(Setup(case.model, case.parameter, part), 3).add(sums, inputs, labels)
    np.testing.assert_array_equal(sums.numpy(), whole[27:54])


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_caller_may_have_gradients_on_or_off(caller) -> None:
    case = case_of("fc1.weight", "convnet")
    expected = sum_gradients(case, "mixed")
    with caller():
        assert sum_gradients(case, "mixed").tobytes() == expected.tobytes()


def test_the_model_is_left_as_it_was_found() -> None:
    case = case_of("conv2.weight", "convnet")
    model = copy.deepcopy(case.model).train()
    model.fc1.weight.requires_grad_(False)
    model.fc2.bias.grad = torch.ones(5)
    called = []
    hook = model.relu.register_full_backward_hook(lambda *_: called.append("backward"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    sum_gradients(Case(case.name, model, case.parameter, case.inputs, case.labels, case.path), "mixed")  # compiles
    random = torch.random.get_rng_state()
    found = sum_gradients(Case(case.name, model, case.parameter, case.inputs, case.labels, case.path), "mixed")
    assert relative_error(found, by_autograd(case)) <= 2e-6
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.training
    assert model.dropout.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asked
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["fc2.bias"]
    assert model.fc2.bias.grad.tolist() == [1.0] * 5
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert called == []
    assert model.relu._backward_hooks == OrderedDict({hook.id: model.relu._backward_hooks[hook.id]})


def test_a_backward_hook_that_changes_gradients_changes_none_here() -> None:
    case = case_of("3.weight")
    expected = sum_gradients(case, "mixed")
    model = copy.deepcopy(case.model)
    model[4].register_full_backward_hook(lambda module, into, out: tuple(7 * gradient for gradient in into))
    hooked = Case(case.name, model, case.parameter, case.inputs, case.labels, case.path)
    assert sum_gradients(hooked, "mixed").tobytes() == expected.tobytes()


class Squared:
    """A loss of somebody's own: the squared distance of the softmax from the label."""

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])).square().sum(dim=1)


@pytest.mark.parametrize(
    ("loss", "torch_loss"),
    [
        (CrossEntropy(0.1), nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")),
        (
            CrossEntropy(0.2, (0.5, 2.0, 0.0, 1.0, 3.0)),
            nn.CrossEntropyLoss(
                torch.tensor([0.5, 2, 0, 1, 3], dtype=torch.float64), label_smoothing=0.2, reduction="none"
            ),
        ),
        (Squared(), Squared().values),
    ],
    ids=["smoothing", "class weights", "own"],
)
def test_the_gradient_is_that_of_the_jobs_loss(loss: Loss, torch_loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    case = case_of("3.weight")
    model = copy.deepcopy(case.model).double().eval()
    weights = model.get_parameter("3.weight")
    total = torch_loss(model(case.inputs.double()), case.labels).sum()
    expected = torch.autograd.grad(total, weights)[0].reshape(-1).numpy()
    sums = torch.zeros(weights.numel(), dtype=torch.float64)
    setup = Setup(model, "3.weight", list_sites(weights, "all", "zero"), "float64", loss=loss)
    with torch.no_grad():
        Gradients(setup, 3).add(sums, case.inputs.double(), case.labels)
    assert relative_error(sums.numpy(), expected) <= 1e-12
    assert relative_error(expected, by_autograd(case)) > 1e-2  # the control


def test_operations_without_a_derivative_are_refused() -> None:
    case = next(case for case in make_cases() if case.name == "writes-out")
    assert isinstance(case.model, WritesInto)
    with pytest.raises(ModelError, match=r"the gradient of the loss by target\.weight can't be computed .*out=.*Leave"):
        sum_gradients(case, "mixed")


class Detached(nn.Sequential):
    """Computes without gradients, whoever asks."""

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def run(model: nn.Module, parameter: str, inputs: Tensor, labels: Tensor) -> np.ndarray:
    setup = Setup(model, parameter, list_sites(model.get_parameter(parameter), "all", "zero"))
    partial = run_batches(
        open_path("rerun", setup, inputs[:2]),
        model,
        zip(inputs.split(8), labels.split(8), strict=True),
        n_sites=len(setup.sites),
        device=torch.device("cpu"),
        on_step=lambda examples, sites: None,
        first_example=0,
        per_class=None,
        proof_examples=frozenset(),
        statistics=open_statistics(["gradient"], setup, 3),
    )
    return partial.statistics["gradient"]


def test_a_forward_pass_without_gradients_is_refused_and_a_weight_without_effect_is_not() -> None:
    case = case_of("5.weight")
    np.testing.assert_array_equal(run(case.model, "5.weight", case.inputs, case.labels), sum_gradients(case, "mixed"))
    with pytest.raises(ModelError, match=r"autograd finds no way back to it.*torch\.no_grad"):
        run(Detached(*case.model), "5.weight", case.inputs, case.labels)
    unused = case_of("side.weight", "side-output")
    assert not run(unused.model, "side.weight", unused.inputs, unused.labels).any()


def test_every_statistic_of_the_registry_can_be_computed() -> None:
    assert list(batches.STATISTIC_TYPES) == list(STATISTICS)

"""Numbers that a model holds in several places: an ablation reaches all of them, on every path, as in plain PyTorch."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablation
from ablation.errors import ModelError
from ablation.reference import in_float64
from ablation.sharing import converted, tied
from tests.compare import utility_error

D, N_CLASSES = 6, 4


class Net(nn.Module):
    """Two square Linears and a head; how the second comes to the first one's numbers is said by the cases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.second = nn.Linear(D, D)
        self.out = nn.Linear(D, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.second(torch.relu(self.first(x)))))


class WithBuffer(Net):
    """Uses a buffer that is the first weight's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("copy", self.first.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(F.linear(torch.relu(self.first(x)), self.copy)))


class WithAttribute(Net):
    """Uses plain attributes that are the first weight's memory: a tensor, and one in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.first.weight.data
        self.listed = [torch.ones(1), self.first.weight.data]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.out(F.gelu(F.linear(x, self.kept) + F.linear(x, self.listed[1])))


class WithSlice(Net):
    """Has a Parameter that is some rows and columns of the first weight."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Parameter(self.first.weight.data[1:4, 2:5])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.out(F.gelu(self.second(x))) + F.pad(x[:, :3] @ self.part, (0, 1))


class BeforeIt(Net):
    """Uses a view of the first weight before the weight itself, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.stem.weight = nn.Parameter(self.first.weight.data.t())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.stem(x)))


class Recurrent(nn.Module):
    """Two recurrent modules that share their weights by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(D, D, batch_first=True)
        self.second = nn.GRU(D, D, batch_first=True)
        for name, parameter in self.second.named_parameters():
            parameter.data = self.first.get_parameter(name).data
        self.out = nn.Linear(D, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].expand(-1, 3, -1)
        return self.out(self.second(self.first(x)[0])[0][:, -1])


def by_data() -> nn.Module:
    net = Net()
    net.second.weight.data = net.first.weight.data
    return net


def by_state() -> nn.Module:
    net, state = Net(), Net().state_dict()
    state["second.weight"] = state["first.weight"]
    net.load_state_dict(state, assign=True)
    return net


def transposed() -> nn.Module:
    net = Net()
    net.second.weight = nn.Parameter(net.first.weight.data.t())
    return net


def head() -> nn.Module:
    """A head that would go by `direct`, whose weight the layer before it has, too."""
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, N_CLASSES))
    net[2].weight.data = net[0].weight.data
    return net


def with_bias() -> nn.Module:
    net = Net()
    net.second.bias.data = net.first.bias.data
    return net


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "by-data": (by_data, "first.weight"),
    "by-data-under-the-other-name": (by_data, "second.weight"),
    "by-state": (by_state, "first.weight"),
    "transposed": (transposed, "first.weight"),
    "head": (head, "2.weight"),
    "bias": (with_bias, "second.bias"),
    "buffer": (WithBuffer, "first.weight"),
    "attribute": (WithAttribute, "first.weight"),
    "slice": (WithSlice, "first.weight"),
    "before-it": (BeforeIt, "first.weight"),
    "recurrent": (Recurrent, "first.weight_ih_l0"),
}


def make(name: str) -> tuple[nn.Module, str]:
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        build, parameter = MODELS[name]
        return build().eval(), parameter


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(30, D, generator=generator), torch.randint(N_CLASSES, (30,), generator=generator)


def truth_in_place(model: nn.Module, parameter: str, indices: np.ndarray) -> np.ndarray:
    """Per-example deltas (sites, examples) of the plain model, each number overwritten where it lies in memory."""
    inputs, labels = data()
    flat = model.get_parameter(parameter).data.view(-1)
    rows = []
    with torch.no_grad():
        intact = F.cross_entropy(model(inputs).double(), labels, reduction="none")
        for index in indices:
            kept = flat[index].item()
            flat[index] = 0.0
            rows.append(F.cross_entropy(model(inputs).double(), labels, reduction="none") - intact)
            flat[index] = kept
    return torch.stack(rows).numpy()


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, engine) for name in MODELS for engine in ("auto", "reference")),
        ("by-data", "rerun"),
        ("slice", "rerun"),
        ("before-it", "rerun"),
    ],
)
def test_every_path_reaches_every_place(name: str, engine: str) -> None:
    model, parameter = make(name)
    objects = dict(model.named_parameters(remove_duplicate=False))
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    sites = min(7, model.get_parameter(parameter).numel())
    precision = "float64" if name == "recurrent" else "mixed"  # a GRU takes no weights that differ from its inputs
    splits = {"test": data()}
    table = ablation.ablate(model, parameter, splits, sites, engine=engine, precision=precision, progress=False)
    truth = truth_in_place(model, parameter, table.columns["index"])
    assert utility_error(table.columns["utility_test"], truth, "mixed") < 1e-4
    assert addresses == [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert all(model.get_parameter(key) is value for key, value in objects.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_float64_copy_shares_what_the_model_shares(name: str) -> None:
    model, parameter = make(name)
    wide = in_float64(model)
    assert wide.get_parameter(parameter).dtype == torch.float64
    own, other = model.get_parameter(parameter).data, wide.get_parameter(parameter).data
    with torch.no_grad():
        before = model(data()[0])
        other.view(-1)[3] += 0.5
        assert torch.equal(model(data()[0]), before)
        own.view(-1)[3] += 0.5
        expected = model(data()[0])
        assert not torch.equal(expected, before)
        torch.testing.assert_close(wide(data()[0].double()).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_other_precisions(precision: str) -> None:
    model, parameter = make("transposed")
    table = ablation.ablate(model, parameter, {"test": data()}, precision=precision, progress=False)
    truth = truth_in_place(model, parameter, table.columns["index"])
    assert utility_error(table.columns["utility_test"], truth, "mixed") < 1e-3


def test_gradients_count_every_place() -> None:
    model, parameter = make("by-data")
    table = ablation.ablate(
        model, parameter, {"test": data()}, criteria=["taylor1"], value={"scale": 0.999}, progress=False
    )
    np.testing.assert_allclose(table.columns["taylor1_test"], table.columns["utility_test"], rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize(
    ("make_model", "parameter", "message"),
    [
        (transposed, "second.weight", "Choose first.weight as the layer"),
        (WithSlice, "part", "Choose first.weight as the layer"),
    ],
)
def test_a_part_of_shared_numbers_is_refused(make_model, parameter: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ablation.ablate(make_model(), parameter, {"test": data()}, progress=False)


def test_entries_that_are_one_number_are_refused() -> None:
    model = Net()
    model.first.bias = nn.Parameter(torch.ones(1).expand(D))
    with pytest.raises(ModelError, match=r"first.bias has entries that are one number .* give it memory of its own"):
        ablation.ablate(model, "first.bias", {"test": data()}, progress=False)


class Hidden(Net):
    """Keeps the first weight's memory where nothing can find it, and uses it before the weight itself."""

    def __init__(self, as_numpy: bool) -> None:
        super().__init__()
        memory = self.first.weight.data.numpy() if as_numpy else self.first.weight.data
        self.use = lambda: torch.from_numpy(memory) if as_numpy else memory

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(F.linear(x, self.use())))


@pytest.mark.parametrize("layer", ["first", "out"])
@pytest.mark.parametrize("as_numpy", [False, True])
def test_a_place_that_can_not_be_found_is_refused_for_its_layer_alone(as_numpy: bool, layer: str) -> None:
    model = Hidden(as_numpy)
    if layer == "out":
        assert len(ablation.ablate(model, layer, {"test": data()}, progress=False)) == D * N_CLASSES
        return
    for engine in ("auto", "rerun", "reference"):
        with pytest.raises(ModelError, match=r"first.weight is used in a way that can't be replaced from outside"):
            ablation.ablate(
                model, layer, {"test": data()}, engine=engine, precision="float64", verify=0, progress=False
            )


def test_interleaved_parts_of_one_storage_are_apart() -> None:
    model, both = Net(), torch.randn(D, 2 * D)
    model.first.weight, model.second.weight = nn.Parameter(both[:, :D]), nn.Parameter(both[:, D:])
    table = ablation.ablate(model, "second", {"test": data()}, sites=5, progress=False)
    truth = []
    flat = model.second.weight.data
    with torch.no_grad():
        for index in table.columns["index"]:
            twin = copy.deepcopy(model).double()
            intact = F.cross_entropy(twin(data()[0].double()), data()[1], reduction="none")
            twin.second.weight.data[np.unravel_index(index, flat.shape)] = 0
            truth.append((F.cross_entropy(twin(data()[0].double()), data()[1], reduction="none") - intact).numpy())
    assert utility_error(table.columns["utility_test"], np.stack(truth), "mixed") < 1e-4


def test_tied_is_undone_and_nests() -> None:
    model, _ = make("buffer")
    held = model.copy
    with tied(model), tied(model):
        assert model.copy is model.first.weight
    assert model.copy is held


def test_conversion_in_place_keeps_what_is_shared() -> None:
    model, _ = make("transposed")
    assert converted(model, nn.Module.double) is model
    assert model.second.weight.data_ptr() == model.first.weight.data_ptr()
    assert torch.equal(model.second.weight, model.first.weight.t())

"""What callers have and torch objects to: each kind is measured exactly, or refused by one line of this package."""

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import ablation
from ablation.errors import AblationError, ModelError, SpecError
from tests.compare import BOUND, brute_force, utility_error

X, Y = torch.randn(12, 11, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 5
PICTURES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ROWS, IMAGES = (X, Y), (PICTURES, torch.arange(10) % 5)


def mlp() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(11, 9), nn.ReLU(), nn.Linear(9, 5))


def convnet() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )  # fmt: skip


def embedding() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5))


def quietly(make: Callable[..., Any], *arguments: Any) -> Any:
    """Torch warns that these are old, or only a beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments)


def changed(change: Callable[[nn.Sequential], object], model: nn.Sequential | None = None) -> nn.Sequential:
    model = mlp() if model is None else model
    change(model)
    return model


def twice() -> nn.Sequential:
    """One Linear under two names."""
    first, relu, last = mlp()
    middle = nn.Linear(9, 9, bias=False)
    with torch.no_grad():
        middle.weight.copy_(first.weight[:, :9])
    return nn.Sequential(first, relu, middle, relu, middle, last)


class Then(nn.Module):
    """The plain network, and something done with its logits."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.function = mlp(), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.body(x))


class Masked(nn.Module):
    """Wants a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.body(x) * mask


class ByName(Masked):
    """Wants its input by name."""

    def forward(self, *, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        return self.body(pixel_values)


class Scales(nn.Module):
    """Takes pictures of whole numbers, as its code says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x / 255)


class Rows(Dataset):
    """Examples that a function makes."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def in_inference_mode(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


def picture(index: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), index, np.uint8))


def sparse(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())


def pruned(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)


WHOLE = torch.arange(10 * 192).reshape(10, 3, 8, 8).to(torch.uint8)

# name -> (model, layer, data), and the plain model, parameter and inputs that brute force runs on
EXACT: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], nn.Module, str, Tensor]] = {
    "compiled": (lambda: (torch.compile(mlp()), "_orig_mod.0", ROWS), mlp(), "0.weight", X),
    "compiled, by its plain name": (lambda: (torch.compile(mlp()), "0", ROWS), mlp(), "0.weight", X),
    "compiled in place": (lambda: (changed(nn.Module.compile), "2", ROWS), mlp(), "2.weight", X),
    "a compiled part": (
        lambda: (changed(lambda m: m.__setitem__(0, torch.compile(m[0]))), "0", ROWS), mlp(), "0.weight", X
    ),
    "a compiled part, by its full name": (
        lambda: (changed(lambda m: m.__setitem__(0, torch.compile(m[0]))), "0._orig_mod.bias", ROWS), mlp(), "0.bias", X
    ),
    "DataParallel": (lambda: (nn.DataParallel(mlp()), "module.2", ROWS), mlp(), "2.weight", X),
    "compiled DataParallel": (lambda: (torch.compile(nn.DataParallel(mlp())), "2", ROWS), mlp(), "2.weight", X),
    "averaged": (lambda: (AveragedModel(mlp()), "2", ROWS), mlp(), "2.weight", X),
    "an fx graph": (lambda: (torch.fx.symbolic_trace(mlp()), "0", ROWS), mlp(), "0.weight", X),
    "inference tensors": (lambda: (in_inference_mode(mlp), "0", ROWS), mlp(), "0.weight", X),
    "inference tensors in a convnet": (lambda: (in_inference_mode(convnet), "0", IMAGES), convnet(), "0.weight",
                                       PICTURES),
    "inference tensors as data": (lambda: (mlp(), "0", in_inference_mode(lambda: (X.clone(), Y.clone()))), mlp(),
                                  "0.weight", X),
    "pruned": (lambda: (changed(pruned), "0.weight_orig", ROWS), changed(pruned), "0.weight_orig", X),
    "behind a pruned layer": (lambda: (changed(pruned), "2", ROWS), changed(pruned), "2.weight", X),
    "weight norm": (
        lambda: (changed(lambda m: quietly(nn.utils.weight_norm, m[0])), "0.weight_v", ROWS),
        changed(lambda m: quietly(nn.utils.weight_norm, m[0])), "0.weight_v", X,
    ),
    "weight norm by parametrization": (
        lambda: (changed(lambda m: parametrizations.weight_norm(m[0])), "0.parametrizations.weight.original1", ROWS),
        changed(lambda m: parametrizations.weight_norm(m[0])), "0.parametrizations.weight.original1", X,
    ),
    "behind weight norm": (
        lambda: (changed(lambda m: parametrizations.weight_norm(m[0])), "2", ROWS),
        changed(lambda m: parametrizations.weight_norm(m[0])), "2.weight", X,
    ),
    "shared": (lambda: (twice(), "4", ROWS), twice(), "2.weight", X),
    "whole pixels that the model scales": (lambda: (Scales(), "body.0", (WHOLE, IMAGES[1])), Scales(), "body.0.weight",
                                           WHOLE),
    "arrays": (lambda: (mlp(), "0", (X.numpy(), Y.numpy())), mlp(), "0.weight", X),
    "arrays that can't be written": (
        lambda: (mlp(), "0", (np.frombuffer(X.numpy().tobytes(), np.float32).reshape(12, 11), Y.numpy())),
        mlp(), "0.weight", X,
    ),
    "arrays of the other byte order": (
        lambda: (mlp(), "0", (X.numpy().astype(">f4"), Y.numpy().astype(">i8"))), mlp(), "0.weight", X
    ),
    "an array and a list": (lambda: (mlp(), "0", (X.numpy(), Y.tolist())), mlp(), "0.weight", X),
    "examples of arrays": (lambda: (mlp(), "0", Rows(lambda k: (X[k].numpy(), Y[k].numpy()))), mlp(), "0.weight", X),
    "a list of examples": (lambda: (mlp(), "0", list(zip(X, Y.tolist(), strict=True))), mlp(), "0.weight", X),
    "labels of int32": (lambda: (mlp(), "0", (X, Y.int())), mlp(), "0.weight", X),
    "labels of uint8": (lambda: (mlp(), "0", (X, Y.to(torch.uint8))), mlp(), "0.weight", X),
    "inputs with gradients": (lambda: (mlp(), "0", (X.clone().requires_grad_(), Y)), mlp(), "0.weight", X),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    make, plain, parameter, inputs = EXACT[name]
    model, layer, data = make()
    n = min(12, plain.get_parameter(parameter).numel())
    table = ablation.ablate(model, layer, {"test": data}, sites=n, progress=False)
    with torch.no_grad():
        plain.eval()(inputs[:2])  # pruned and normed layers keep a weight, which can be copied if it has no gradient
    truth = brute_force(plain, parameter, table.columns["index"], inputs.detach(), Y[: len(inputs)])
    assert np.abs(truth).max() > 0
    assert utility_error(table.columns["utility_test"], truth, "mixed") <= BOUND["mixed"]


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


# name -> (model, layer, data), and what the error says
REFUSED: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], str]] = {
    "other width": (lambda: (mlp(), "0", (X[:, :7], Y)), r"float32 of shape \(2, 7\) \(in 0 \(Linear\): RuntimeError"),
    "other channels": (lambda: (convnet(), "0", (PICTURES[:, :1], IMAGES[1])), r"\(2, 1, 8, 8\) \(in 0 \(Conv2d\)"),
    "too small": (lambda: (convnet(), "0", (PICTURES[..., :2, :2], IMAGES[1])), "Kernel size"),
    "no channels": (lambda: (convnet(), "0", (PICTURES[:, 0], IMAGES[1])), r"\(2, 8, 8\)"),
    "uint8": (lambda: (convnet(), "0", (WHOLE, IMAGES[1])), "uint8 of shape.*convert them as in training"),
    "int64": (lambda: (mlp(), "0", (X.long(), Y)), "int64 of shape.*Whole numbers reach the model"),
    "bool": (lambda: (mlp(), "0", (X > 0, Y)), "bool of shape"),
    "complex inputs": (lambda: (mlp(), "0", (X + 0j, Y)), "complex64 of shape"),
    "real indices": (lambda: (embedding(), "0", (X[:, :3], Y)), r"in 0 \(Embedding\)"),
    "a late index out of range": (
        lambda: (embedding(), "0", (torch.cat([torch.zeros(40, 3), torch.full((2, 3), 9)]).long(), torch.zeros(42))),
        "labels have shape",
    ),
    "meta": (lambda: (on_meta(mlp()), "0", ROWS), "0.weight has no numbers .device meta.*to_empty"),
    "partly meta": (lambda: (changed(lambda m: m[2].to("meta")), "0", ROWS), "2.weight has no numbers"),
    "meta inputs": (lambda: (mlp(), "0", (X.to("meta"), Y)), "inputs are a tensor without numbers"),
    "meta labels": (lambda: (mlp(), "0", (X, Y.to("meta"))), "labels are a tensor without numbers"),
    "scripted": (lambda: (quietly(torch.jit.script, mlp()), "0", ROWS), "the model is a torch.jit module"),
    "traced": (lambda: (quietly(torch.jit.trace, mlp(), X), "0", ROWS), "the model is a torch.jit module"),
    "a scripted part": (
        lambda: (changed(lambda m: m.__setitem__(2, quietly(torch.jit.script, m[2]))), "0", ROWS),
        "the part '2' of the model is a torch.jit module",
    ),
    "exported": (
        lambda: (torch.export.export(mlp().eval(), (X,)).module(), "0", ROWS), "a graph made by torch.export"
    ),
    "a program": (lambda: (torch.export.export(mlp().eval(), (X,)), "0", ROWS), "Give the module that was exported"),
    "a class": (lambda: (nn.Linear, "0", ROWS), "the class Linear"),
    "a state dict": (lambda: (mlp().state_dict(), "0", ROWS), "a state dict"),
    "pruned": (lambda: (changed(pruned), "0", ROWS), "computed from .0.weight_orig"),
    "pruned, in full": (lambda: (changed(pruned), "0.weight", ROWS), "computed from .0.weight_orig"),
    "weight norm": (
        lambda: (changed(lambda m: quietly(nn.utils.weight_norm, m[0])), "0", ROWS), "0.weight_g, 0.weight_v"
    ),
    "weight norm by parametrization": (
        lambda: (changed(lambda m: parametrizations.weight_norm(m[0])), "0", ROWS),
        "0.parametrizations.weight.original0, 0.parametrizations.weight.original1",
    ),
    "spectral norm": (
        lambda: (changed(lambda m: parametrizations.spectral_norm(m[0])), "0", ROWS),
        "0.parametrizations.weight.original",
    ),
    "spectral norm by hooks": (
        lambda: (changed(lambda m: nn.utils.spectral_norm(m[0])), "0", ROWS), "0.weight_orig"
    ),
    "lazy": (lambda: (nn.Sequential(nn.LazyLinear(9), nn.Linear(9, 5)), "1", ROWS), "LazyLinear that has no numbers"),
    "sparse weight": (lambda: (changed(sparse), "0", ROWS), "0.weight is sparse .sparse_coo.*to_dense"),
    "sparse weight elsewhere": (lambda: (changed(sparse), "2", ROWS), "0.weight is sparse"),
    "sparse inputs": (lambda: (mlp(), "0", (X.to_sparse(), Y)), "inputs are a tensor that is sparse"),
    "sparse examples": (lambda: (mlp(), "0", Rows(lambda k: (X[k].to_sparse(), int(Y[k])))), "sparse"),
    "quantized": (
        lambda: (quietly(torch.ao.quantization.quantize_dynamic, mlp(), {nn.Linear}, torch.qint8), "0", ROWS),
        "is quantized",
    ),
    "no parameters": (lambda: (nn.ReLU(), "0", ROWS), "no parameters"),
    "complex parameters": (lambda: (nn.Linear(11, 5, dtype=torch.complex64), "weight", ROWS), "complex64: weight"),
    "two precisions": (
        lambda: (changed(lambda m: m[2].double()), "0", ROWS), "float32: 0.weight, float64: 2.weight.*model.float"
    ),
    "complex logits": (lambda: (Then(lambda z: z + 0j), "body.0", ROWS), "a tensor, complex64"),
    "a dict": (lambda: (Then(lambda z: {"logits": z}), "body.0", ROWS), "a dict with 'logits'"),
    "a tuple": (lambda: (Then(lambda z: (z, z)), "body.0", ROWS), "a tuple of 2"),
    "answers": (lambda: (Then(lambda z: z.argmax(1)), "body.0", ROWS), "a tensor, int64"),
    "an array": (lambda: (Then(lambda z: z.numpy()), "body.0", ROWS), "a ndarray"),
    "sparse logits": (lambda: (Then(Tensor.to_sparse), "body.0", ROWS), "sparse_coo"),
    "one logit": (lambda: (Then(lambda z: z[:, :1]), "body.0", (X, Y * 0)), "one logit per example"),
    "no axis of classes": (lambda: (Then(lambda z: z[:, 0]), "body.0", ROWS), r"shape \(2,\) for 2 examples"),
    "two inputs": (lambda: (Masked(), "body.0", ROWS), "forward takes one tensor"),
    "inputs by name": (lambda: (ByName(), "body.0", ROWS), "forward takes one tensor"),
    "its own error": (lambda: (Then(lambda z: z / 0 if len(z) == 0 else [][0]), "body.0", ROWS), "in Then: IndexError"),
    "its own error on some batch": (
        lambda: (Then(lambda z: z if len(z) == 2 else [][0]), "body.0", ROWS), "fails on 12 examples"
    ),
    "labels out of range": (lambda: (mlp(), "0", (X, Y + 3)), "allowed: 0 to 4"),
    "negative labels": (lambda: (mlp(), "0", (X, Y - 3)), "label -3"),
    "real labels": (lambda: (mlp(), "0", (X, Y.float())), "float32"),
    "labels of a column": (lambda: (mlp(), "0", (X, Y[:, None])), r"\(2, 1\)"),
    "text labels": (lambda: (mlp(), "0", (X, np.array(["a"] * 12))), "labels are an array of <U1"),
    "rows of objects": (lambda: (mlp(), "0", (X.numpy().astype(object), Y)), "inputs are an array of object"),
    "no layer": (lambda: (mlp(), "", ROWS), r"0.weight, 0.bias, 2.weight, 2.bias"),
    "no layer of one": (lambda: (nn.Linear(11, 5), "", ROWS), r"\(weight, bias\)"),
    "a number": (lambda: (mlp(), 0, ROWS), "layer: got 0; allowed: text"),
    "a module": (lambda: (lambda m: (m, m[2], ROWS))(mlp()), "Its name is '2'"),
    "a parameter": (lambda: (lambda m: (m, m[2].bias, ROWS))(mlp()), "Its name is '2.bias'"),
    "rows by name": (lambda: (mlp(), "0", Rows(lambda k: {"x": X[k], "y": int(Y[k])})), "a dict with 'x', 'y'"),
    "batches by name": (
        lambda: (mlp(), "0", DataLoader(Rows(lambda k: {"x": X[k], "y": int(Y[k])}), 4)), "a dict with 'x', 'y'"
    ),
    "inputs of two tensors": (lambda: (mlp(), "0", Rows(lambda k: ((X[k], X[k]), int(Y[k])))), "a list of 2"),
    "inputs by their names": (lambda: (mlp(), "0", Rows(lambda k: ({"a": X[k]}, int(Y[k])))), "a dict with 'a'"),
    "three parts": (lambda: (mlp(), "0", Rows(lambda k: (X[k], X[k], int(Y[k])))), "a list of 3"),
    "pictures": (lambda: (convnet(), "0", Rows(lambda k: (picture(k), k % 5))), "transform"),
    "single numbers": (lambda: (mlp(), "0", (torch.tensor(1.0), torch.tensor(1))), "a single number"),
    "a stacking that fails": (
        lambda: (mlp(), "0", DataLoader(Rows(lambda k: (X[k], int(Y[k]))), collate_fn=lambda rows: rows["x"])),
        "can't be stacked",
    ),
    "a sampler that fails": (
        lambda: (mlp(), "0", DataLoader(Rows(lambda k: (X[k], int(Y[k]))), sampler=Words())), "sampler"
    ),
    "a stream": (lambda: (mlp(), "0", DataLoader(Stream())), "no examples by index"),
}  # fmt: skip


class Words(Sampler[int]):
    """Names examples by words."""

    def __init__(self) -> None:
        pass

    def __iter__(self):
        yield "first"


class Stream(IterableDataset):
    """Has no examples by index."""

    def __iter__(self):
        yield X[0], 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str) -> None:
    make, words = REFUSED[name]
    model, layer, data = make()
    with pytest.raises(AblationError, match=words) as caught:
        ablation.ablate(model, layer, {"test": data}, sites=3, progress=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def test_an_index_out_of_range_in_a_later_batch() -> None:
    inputs = torch.zeros(300, 3, dtype=torch.long)
    inputs[290, 1] = 9
    with pytest.raises(ModelError, match=r"on examples 0 to 299 of test \(in 0 \(Embedding\): IndexError"):
        ablation.ablate(embedding(), "2", {"test": (inputs, torch.arange(300) % 5)}, sites=3, progress=False)


@pytest.mark.gpu
def test_several_devices_are_named() -> None:
    with pytest.raises(ModelError, match=r"2 devices \(cpu: 0.weight, cuda:0: 2.weight\)"):
        ablation.ablate(changed(lambda m: m[2].to("cuda")), "0", {"test": ROWS}, sites=3, progress=False)


def test_hooks_of_a_wrapper_are_kept() -> None:
    """What a hook on the wrapper changes is part of the function, so the wrapper stays."""
    model = nn.DataParallel(mlp())
    model.register_forward_hook(lambda module, inputs, logits: logits * 2)
    table = ablation.ablate(model, "module.2", {"test": ROWS}, sites=9, progress=False)
    truth = brute_force(model, "module.2.weight", table.columns["index"], X, Y)
    assert utility_error(table.columns["utility_test"], truth, "mixed") <= BOUND["mixed"]


def test_models_of_inference_tensors_stay_as_they_are() -> None:
    model = in_inference_mode(mlp)
    before = copy.deepcopy(model.state_dict())
    ablation.ablate(model, "0", {"test": ROWS}, sites=3, progress=False)
    assert model[0].weight.is_inference()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_of_inference_tensors_that_share_memory_shares_it_while_it_is_measured() -> None:
    def sharing() -> nn.Sequential:
        with torch.random.fork_rng([]):
            torch.manual_seed(4)
            model = nn.Sequential(nn.Linear(11, 11), nn.ReLU(), nn.Linear(11, 11), nn.ReLU(), nn.Linear(11, 5))
        model[2].weight = nn.Parameter(model[0].weight.detach())
        return model

    expected = ablation.ablate(sharing(), "0", {"test": ROWS}, sites=20, progress=False)
    found = ablation.ablate(in_inference_mode(sharing), "0", {"test": ROWS}, sites=20, progress=False)
    np.testing.assert_array_equal(found.columns["utility_test"], expected.columns["utility_test"])


def test_a_pruned_layer_keeps_its_own_tensors() -> None:
    model = changed(pruned)
    held = {name: getattr(model[0], name) for name in ("weight", "weight_orig", "weight_mask", "bias")}
    ablation.ablate(model, "0.weight_orig", {"test": ROWS}, sites=9, progress=False)
    assert all(getattr(model[0], name) is tensor for name, tensor in held.items())


def test_outputs_that_are_probabilities_are_warned_of() -> None:
    def warnings_of(model: nn.Module, loss: Any = "cross_entropy") -> list[str]:
        table = ablation.ablate(model, "0", {"test": ROWS}, sites=3, loss=loss, progress=False)
        return [each for each in table.summary()["warnings"] if "probabilities" in each]

    class NegativeLogLikelihood:
        def values(self, logits: Tensor, labels: Tensor) -> Tensor:
            return -logits.log().gather(1, labels[:, None]).squeeze(1)

    assert len(warnings_of(nn.Sequential(*mlp(), nn.Softmax(dim=1)))) == 1
    assert warnings_of(nn.Sequential(*mlp(), nn.LogSoftmax(dim=1))) == []
    assert warnings_of(mlp()) == []
    assert warnings_of(nn.Sequential(*mlp(), nn.Softmax(dim=1)), NegativeLogLikelihood()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_cpu(dtype: torch.dtype) -> None:
    model = convnet().to(dtype)
    tables = [
        ablation.ablate(model, "0", {"test": IMAGES}, sites=9, engine=engine, progress=False)
        for engine in ("auto", "reference")
    ]
    utility, truth = (table.columns["utility_test"] for table in tables)
    np.testing.assert_allclose(utility, truth, rtol=1e-4, atol=1e-6 * np.abs(truth).max())


def test_a_fault_that_nobody_foresaw_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ablation.notebook.make_plan", lambda *arguments: [][0])
    with pytest.raises(ModelError, match=r"IndexError: list index out of range.*please report"):
        ablation.ablate(mlp(), "0", {"test": ROWS}, sites=3, progress=False)


@pytest.mark.parametrize("device", [True, ["cpu"], "meta", 1.0])
def test_devices_that_are_none(device: Any) -> None:
    with pytest.raises(SpecError, match="device: got"):
        ablation.ablate(mlp(), "0", {"test": ROWS}, sites=3, device=device, progress=False)


def test_what_a_thread_compiles_is_its_own_affair() -> None:
    """`torch.compile` compiles nothing in a job, and goes on compiling after it."""
    seen: list[int] = []
    model = torch.compile(mlp(), backend=lambda graph, inputs: seen.append(1) or graph.forward)
    ablation.ablate(model, "0", {"test": ROWS}, sites=3, progress=False)
    assert not seen
    thread = threading.Thread(target=lambda: model(X))
    thread.start()
    thread.join()
    assert seen

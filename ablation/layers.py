"""What a model's layers are: every parameter that can be a target, its shape, the path it takes, the flops behind it.

In: a model and one small batch, or the name of a registered model. Out: `ModelFacts`. One forward pass is run and
looked at.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from PIL import Image

from ablation import baseline
from ablation.engine.calls import Call, Calls, record_calls
from ablation.engine.paths import find_paths
from ablation.engine.responses.way import DROPOUT, ELEMENTWISE, SAME_SHAPE
from ablation.errors import ModelError, say_cause
from ablation.inputs.catalog import LayerFacts, ModelFacts, Registered, find_layer
from ablation.inputs.classes import listed_classes
from ablation.inputs.models import load_model
from ablation.inputs.registered import DATASETS, MODELS, registered_names
from ablation.intake import run_plainly
from ablation.sharing import partly_shared, tied
from ablation.sight import find_unseen

# What a registered model's transform is tried on: pictures as ImageNet, CIFAR, MNIST and digits have them.
_PICTURES = (("RGB", 224), ("RGB", 32), ("L", 28), ("L", 8))


def describe_model(
    name: str, model: torch.nn.Module, example: Any, weights: tuple[str, ...] = (), *, layer: str | None = None
) -> ModelFacts:
    """The facts of `model`, found by a few forward passes over `example`, a batch of at least two examples.

    A parameter that no call has used still is a layer: its path is `finite`, its utility 0. One whose effect gets out
    of torch's sight takes `rerun` (`sight.py`); where a `layer` is named, it alone is looked at.
    """
    with tied(model):
        facts = _describe(name, model, example, weights)
        asked = facts.layers if layer is None else (find_layer(facts, layer),)
        general = [each.parameter for each in asked if each.path == "finite"]
        if not general or find_unseen(model, general, example) is None:
            return facts
        unseen = {name for name in general if len(general) == 1 or find_unseen(model, [name], example) is not None}
    return facts.model_copy(
        update={"layers": tuple(_unseen(each) if each.parameter in unseen else each for each in facts.layers)}
    )


def _unseen(layer: LayerFacts) -> LayerFacts:
    return layer.model_copy(update={"path": "rerun", "response": False})


def _describe(name: str, model: torch.nn.Module, example: Any, weights: tuple[str, ...]) -> ModelFacts:
    calls = record_calls(model, example, count_flops=True)
    mixed = partly_shared(model)
    owners = {
        f"{prefix}.{local}" if prefix else local: type(module).__name__
        for prefix, module in model.named_modules(remove_duplicate=False)
        for local in module._parameters
    }
    layers = [
        LayerFacts(
            parameter=parameter,
            kind=owners[parameter],
            shape=tuple(tensor.shape),
            **_paths(calls, parameter, is_plain=id(tensor) not in mixed),
            **_costs(calls, parameter),
        )
        for parameter, tensor in model.named_parameters(remove_duplicate=False)
        if tensor.is_floating_point()
    ]
    without_weights: dict[str, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if module_name and not list(module.parameters()):
            without_weights.setdefault(type(module).__name__, []).append(module_name)
    return ModelFacts(
        name=name,
        weights=weights,
        n_classes=calls.n_classes,
        input_shape=tuple(example.shape[1:]),
        flops=calls.flops,
        widest=max((_width(call, calls.n_examples) for call in calls.calls), default=0),
        layers=tuple(layers),
        without_weights={kind: tuple(names) for kind, names in without_weights.items()},
    )


def _paths(calls: Calls, parameter: str, *, is_plain: bool) -> dict[str, Any]:
    """The fields that tell a parameter's paths; one whose memory has other views (not `is_plain`) takes the general."""
    paths = find_paths(calls, parameter) if is_plain else ()
    return {"path": "direct" if "direct" in paths else "finite", "response": "response" in paths}


_BY_UNIT = {"linear", "conv2d"}  # products that take one unit of their input by itself
_APART = ELEMENTWISE | DROPOUT | SAME_SHAPE | {"batch_norm", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"}


def _costs(calls: Calls, parameter: str) -> dict[str, Any]:
    """What depends on a parameter; and of it, where more than one unit moves: behind the next matrix product."""
    way = [call for call, _ in calls.dependents(parameter)]
    next_product = next((k for k, call in enumerate(way) if k and call.flops), len(way))
    spread = way[next_product:]
    widths = [_n_numbers(call.input_shapes[:1] + call.output_shapes, calls.n_examples) for call in spread]
    if spread and spread[0].name in _BY_UNIT and all(call.name in _APART for call in way[1:next_product]):
        widths[0] = _n_numbers(spread[0].output_shapes, calls.n_examples)  # of its input only one unit moves
    return {
        "flops_after": sum(call.flops for call in way) / calls.n_examples,
        "flops_spread": sum(call.flops for call in spread[1:]) / calls.n_examples,
        "flops_flat": sum(call.flops for call in spread[1:] if _is_flat(call)) / calls.n_examples,
        "values_after": sum(_n_numbers(call.output_shapes, calls.n_examples) for call in way if call.flops),
        "values_spread": sum(_n_numbers(call.output_shapes, calls.n_examples) for call in spread),
        "widest_spread": max(widths, default=calls.n_classes),
    }


def _is_flat(call: Call) -> bool:
    return call.name == "linear" and len(call.output_shapes[0]) == 2


def _n_numbers(shapes: tuple[tuple[int, ...], ...], n_examples: int) -> int:
    return sum(math.prod(shape) // (n_examples if shape[:1] == (n_examples,) else 1) for shape in shapes)


def _width(call: Call, n_examples: int) -> int:
    """How many numbers per example go into and out of one call."""
    shapes = [shape for shape in call.input_shapes + call.output_shapes if shape[:1] == (n_examples,)]
    return sum(math.prod(shape[1:]) for shape in shapes)


@cache
def describe_registered(name: str) -> ModelFacts:
    """The facts of a registered model, on its `example_input_array` (one example in a batch) or on a blank picture.

    Raises:
        ModelError: it can't be made, or takes none of the pictures; the message says what happened with each.
    """
    module, transform = load_model(name)
    wrong = []
    for what, example in _examples(module, transform):
        try:
            inputs = example() if callable(example) else example
            with run_plainly():
                facts = describe_model(name, module, torch.cat([inputs[:1], inputs[:1]]))
            names = listed_classes(module) or listed_classes(transform) or ()
            return facts.model_copy(update={"classes": names if len(names) == facts.n_classes else ()})
        except Exception as error:
            wrong.append(f"{what}: {say_cause(error)}")
    baseline.check_model(module)  # a reason of its own says more
    raise ModelError(
        f"the registered model {name!r} can't be described: {'; '.join(wrong)}. Let its transform take a PIL picture, "
        "or give the module an attribute `example_input_array`: a batch with one example."
    )


def _examples(module: torch.nn.Module, transform: Any) -> Iterator[tuple[str, Any]]:
    """What to try, by name: a batch, or what makes one."""
    given = getattr(module, "example_input_array", None)  # as Lightning calls it
    if given is not None:
        yield "example_input_array", given
        return
    for mode, size in _PICTURES:
        picture = Image.new(mode, (size, size))
        yield f"{mode} picture of {size}x{size}", lambda picture=picture: transform(picture)[None]


class _Described(Mapping[str, ModelFacts]):
    """The facts of registered models, each made when it is asked for."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __getitem__(self, name: str) -> ModelFacts:
        if name not in self.names:
            raise KeyError(name)
        return describe_registered(name)

    def __contains__(self, name: object) -> bool:  # without building it
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def registered_here() -> Registered:
    """What is registered in this Python environment; a model is built when its facts are asked for."""
    return Registered(models=_Described(registered_names(MODELS)), datasets=registered_names(DATASETS))

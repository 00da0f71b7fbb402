"""What a model's layers are: every parameter that can be a target, its shape, the path it takes, the flops behind it.

In: a model and one small batch. Out: `ModelFacts`. One forward pass is run and looked at.
"""

import math
from typing import Any

import torch

from ablation.catalog import LayerFacts, ModelFacts
from ablation.engine.calls import Call, Calls, record_calls
from ablation.engine.head import find_head


def describe_model(name: str, model: torch.nn.Module, example: Any, weights: tuple[str, ...] = ()) -> ModelFacts:
    """The facts of `model`, found by one forward pass over `example`, a batch of at least two examples.

    A parameter that no call has used still is a layer: its path is `rerun`, its utility 0.
    """
    calls = record_calls(model, example, count_flops=True)
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
            path=find_path(calls, parameter),
            flops_after=sum(call.flops for call, _ in calls.dependents(parameter)) / calls.n_examples,
        )
        for parameter, tensor in model.named_parameters(remove_duplicate=False)
        if tensor.is_floating_point()
    ]
    return ModelFacts(
        name=name,
        weights=weights,
        n_classes=calls.n_classes,
        input_shape=tuple(example.shape[1:]),
        flops=calls.flops,
        widest=max((_width(call, calls.n_examples) for call in calls.calls), default=0),
        layers=tuple(layers),
    )


def _width(call: Call, n_examples: int) -> int:
    """How many numbers per example go into and out of one call."""
    shapes = [shape for shape in call.input_shapes + call.output_shapes if shape[:1] == (n_examples,)]
    return sum(math.prod(shape[1:]) for shape in shapes)


def find_path(calls: Calls, parameter: str) -> str:
    """`direct` for classifier heads, `rerun` for everything else."""
    return "direct" if find_head(calls, parameter) is not None else "rerun"

"""Finite differences carried forward, against brute force: AlexNet's last convolution, ResNet-18's, and first halves.

Measured is the time from the target's input (the prefix is computed once) to per-example loss deltas of all sites.
It is compared with the whole float32 network for every weight ("full forward", prefix included) and with the float32
rest of the network for every weight ("prefix cached", prefix excluded). The error is against float64 brute force on the
same layer input, over some of the sites, in units of max(|u|, 0.01 rms u).

Excluded is the fixed cost at the beginning of a shard, which has more examples than these: the check of eight sites in
float64, and compiling or loading the loops. The first batch runs once before the clock starts.

The networks have seeded random weights; every ReLU's input is shifted so that the stated share of it is active.
The floor is the time of the flops behind the target in float32 matrix products here; no brute force is faster.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ablation.devices import freed_memory_kept
from ablation.engine.carried.finite import Finite
from ablation.engine.interface import Setup
from ablation.engine.prefix import Prefix
from ablation.engine.rerun import Rerun
from ablation.inputs.catalog import SplitCounts, find_layer
from ablation.inputs.models import build_model
from ablation.layers import describe_model
from ablation.plan import PlanOptions, make_plan
from ablation.precision import FromTargetOn, as_found, run_with
from ablation.sites import make_sites
from ablation.spec import make_spec
from benchmarks.environment import write_result

CHECKED = 8  # sites that also run in float64, one by one
CASES = [  # model, parameter, sites, examples, active share of ReLUs (None: as it is)
    ("alexnet", "features.10.weight", 1024, 32, 0.25),
    ("alexnet", "features.10.weight", 1024, 32, 0.5),
    ("resnet18", "layer4.1.conv2.weight", 1024, 256, None),
    ("resnet18", "layer1.0.conv1.weight", 32, 8, None),
    ("resnet18", "layer2.0.conv1.weight", 32, 8, None),
    ("mobilenet_v3_large", "features.4.block.0.0.weight", 32, 16, None),
    ("vit_b_16", "encoder.layers.encoder_layer_3.mlp.0.weight", 16, 2, None),
]


def build(name: str, active: float | None, inputs: Tensor) -> nn.Module:
    """Build a model with activations of size 1, and the given share of active units behind every ReLU."""
    model = build_model(name, 0).eval()
    generator = torch.Generator().manual_seed(0)

    def scale(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not module.weight.any():  # a head that is initialised with zeros
            module.weight.normal_(generator=generator)
            output = nn.functional.linear(args[0], module.weight, module.bias)
        axis = 1 if output.dim() == 4 else -1
        flat = output.movedim(axis, 0).flatten(1)
        size = flat.std()
        module.weight.div_(size)
        shift = flat.quantile(1 - active, dim=1) / size if active else flat.mean(dim=1) / size
        if module.bias is None:
            return output / size
        bias = module.bias / size
        module.bias.copy_(bias - shift)
        return output / size - shift.view(-1, *[1] * (output.dim() - 2) if axis == 1 else ())

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(scale) for layer in layers[: -1 if active else None]]
    with torch.no_grad():
        model(inputs[:8])
    for hook in hooks:
        hook.remove()
    return model


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Context that adds the seconds of its block to a list."""
    started = time.perf_counter()
    yield
    into[name] = into.get(name, 0.0) + time.perf_counter() - started


def measure(name: str, parameter: str, n_sites: int, n_examples: int, active: float | None) -> dict[str, object]:
    """Measure one row."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n_examples, 3, 224, 224, generator=generator)
    labels = torch.randint(1000, (n_examples,), generator=generator)
    model = build(name, active, inputs)
    facts = describe_model(name, model, inputs[:2])
    layer = find_layer(facts, parameter)
    spec = make_spec(
        {"model": {"name": name}, "layer": parameter, "data": {"name": "d", "test": "all"},
         "sites": {"count": n_sites}}
    )  # fmt: skip
    plan = make_plan(
        spec, facts, {"test": SplitCounts(n_examples=n_examples)}, PlanOptions(torch.get_num_threads(), engine="finite")
    )
    weights = model.get_parameter(parameter)
    chosen = np.random.default_rng(0).choice(weights.numel(), n_sites, replace=False)
    sites = make_sites(weights, chosen, "zero")
    finite = Finite(Setup(model, parameter, sites, lanes=plan.lanes))
    finite.is_probed = True
    seconds: dict[str, float] = {}
    deltas = []
    batches = list(zip(inputs.split(plan.batch_size), labels.split(plan.batch_size), strict=True))
    with freed_memory_kept():
        list(finite.run(*batches[0])[1])  # compile or load the loops
        for x, y in batches:
            _, pieces = finite.run(x, y)
            with timed(seconds, "ours"):
                deltas.append(torch.cat([piece.delta for piece in pieces]))
    utility = torch.cat(deltas, dim=1).mean(dim=1)
    rerun = Rerun(Setup(model, parameter, sites[:CHECKED]))
    _, pieces = rerun.run(inputs, labels)
    truth = torch.cat([piece.delta for piece in pieces]).mean(dim=1)
    scale = torch.maximum(truth.abs(), 0.01 * utility.square().mean().sqrt())
    brute = time_brute(model, parameter, inputs)
    row = {
        "model": name, "parameter": parameter, "sites": n_sites, "examples": n_examples, "active": active,
        "lanes": plan.lanes, "batch_size": plan.batch_size,
        "seconds": seconds["ours"],
        "seconds_per_pair": seconds["ours"] / n_sites / n_examples,
        "full_forward_s": brute["full"], "prefix_cached_s": brute["rest"],
        "times_full_forward": brute["full"] * n_sites / seconds["ours"],
        "times_prefix_cached": brute["rest"] * n_sites / seconds["ours"],
        "floor_s_per_pair": layer.flops_after / flops_per_s(),
        "error": float(((utility[:CHECKED] - truth) / scale).abs().max()),
    }  # fmt: skip
    print(
        f"{name} {parameter} {f'{active:.0%} active ' if active else ''}: {n_sites} sites x {n_examples} examples in "
        f"{seconds['ours']:.2f} s: {row['times_full_forward']:,.1f} times full forward, "
        f"{row['times_prefix_cached']:,.1f} times prefix cached, error {row['error']:.1e}",
        flush=True,
    )
    return row


def time_brute(model: nn.Module, parameter: str, inputs: Tensor) -> dict[str, float]:
    """Seconds of one float32 pass over the inputs, whole and from the target on, as the better of two."""
    best = {"full": float("inf"), "rest": float("inf")}
    weights = model.get_parameter(parameter).detach()
    prefix, mode = Prefix(model), FromTargetOn(weights)
    parts = inputs.split(32)
    for _ in range(2):
        seconds = {"full": 0.0, "rest": 0.0}
        for part in parts:
            with torch.no_grad(), timed(seconds, "full"):
                model(part)
            mode.seen = False
            with as_found(model):
                prefix.first_run(lambda part=part: run_with(model, parameter, weights, part, mode=mode), mode, part)
            with as_found(model), prefix.replay(), timed(seconds, "rest"):
                model(part)
        best = {name: min(best[name], seconds[name]) for name in best}
    return best


def flops_per_s() -> float:
    """Floating-point operations per second of a large float32 matrix product on this machine."""
    a = torch.randn(2048, 2048)
    seconds: dict[str, float] = {}
    torch.mm(a, a)
    with timed(seconds, "product"):
        for _ in range(8):
            torch.mm(a, a)
    return 8 * 2 * 2048**3 / seconds["product"]


def main() -> None:
    """Measure every row and write the file."""
    write_result("finite", {"rows": [measure(*case) for case in CASES]})


if __name__ == "__main__":
    main()

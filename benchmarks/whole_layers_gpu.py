"""All weights of AlexNet's second Linear on 50,000 examples, on one CUDA device, against float32 brute force there.

The head alone, 4096 -> 4096 -> ReLU -> 1000: seeded random numbers, 20 % of the inputs and 25 % of the units active.
The prefix is excluded on both sides. Brute force: set a weight to 0, run the head in float32, take the loss.

    memory     from the layer's input on the device to the sums of 16,777,216 weights, which stay there
    disk       likewise from the cache of activations (`ablation.cache`), which a second job on the same prefix reads:
               files that this process has just written, so the system may hold them in memory
    job        `ablation.ablate` from the layer's input to the table, proof included

The first run of each compiles, or fills the cache, and does not count. Error: against float64 brute force from the same
inputs, in units of max(|u|, 0.01 rms u).

    python -m benchmarks.whole_layers_gpu [examples]
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ablation
from ablation.cache import Activations, make_known
from ablation.engine.interface import Setup
from ablation.engine.paths import open_path
from ablation.engine.sums import Sums
from ablation.partial import PartialSums
from ablation.sites import EveryWeight
from benchmarks.alexnet_head import CLASSES, INPUTS, brute_s, float64_truth, make_head, now
from benchmarks.environment import write_result
from benchmarks.whole_layers import CHECKED, errors

N, BATCH, ROUNDS = 50_000, 2048, 5
CACHE_BYTES = 8 << 30

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def make_examples(n: int, device: str) -> tuple[Tensor, Tensor]:
    """Draw examples as `make_head` does, but on the device."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.rand(n, INPUTS, generator=generator, device=device)
    x *= torch.rand(n, INPUTS, generator=generator, device=device) < 0.2
    return x, torch.randint(CLASSES, (n,), generator=generator, device=device)


def run(model: nn.Sequential, batches: Batches, activations: Activations | None = None) -> tuple[float, PartialSums]:
    """Seconds from the layer's input to the sums on the device, and the sums on the host."""
    weight = model.get_parameter("0.weight").detach()
    sites = EveryWeight(weight.reshape(-1), 0, weight.numel(), "zero")
    example = torch.zeros(2, INPUTS, device=weight.device)
    path = open_path("response", Setup(model, "0.weight", sites, activations=activations), example)
    sums = Sums(len(sites), None, weight.device, proof=False, top1=False)
    started = now(weight.device)
    for inputs, labels in batches():
        intact, pieces = path.run(inputs, labels)
        for piece in pieces:
            sums.add(piece, intact, torch.zeros(len(labels), dtype=torch.bool, device=weight.device))
        sums.add_intact(intact)
    return now(weight.device) - started, sums.finish()


def measure(model: nn.Sequential, batches: Batches, activations: Activations | None = None) -> dict[str, Any]:
    """Median of some runs after a first one."""
    run(model, batches, activations)
    times = [run(model, batches, activations)[0] for _ in range(ROUNDS)]
    return {"seconds": statistics.median(times), "every_run_s": times}


def from_cache(x: Tensor, labels: Tensor, activations: Activations) -> Batches:
    """Make placeholders of batches whose records are in the cache, as shards of one job use them."""
    parts = list(zip(x.split(BATCH), labels.split(BATCH), strict=True))
    addresses = [activations.address(inputs) for inputs, _ in parts]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for address, (inputs, own_labels) in zip(addresses, parts, strict=True):
            if activations.hold(address):
                yield make_known(address, len(own_labels)), own_labels
            else:
                yield inputs, own_labels

    return batches


def main(n: int = N, device: str = "cuda") -> None:
    """Measure, print and store the results."""
    model, _, _ = make_head(device)
    x, labels = make_examples(n, device)
    with torch.no_grad():
        active = (model[0](x[:500]) > 0).float().mean().item()
    before = brute_s(model, x, labels)
    cases = {"memory": measure(model, lambda: zip(x.split(BATCH), labels.split(BATCH), strict=True))}
    with tempfile.TemporaryDirectory() as folder:
        activations = Activations(Path(folder), CACHE_BYTES, "head", n)
        cases["disk"] = measure(model, from_cache(x, labels, activations), activations)
    started = now(x.device)
    table = ablation.ablate(model, "0", {"test": (x, labels)}, sites="all", engine="response", progress=False)
    cases["job"] = {"seconds": now(x.device) - started}
    brute = statistics.mean([before, brute_s(model, x, labels)])
    utility = table.columns["utility_test"]
    for case in cases.values():
        case["times_brute"] = brute * len(utility) / case["seconds"]
    rows = np.random.default_rng(0).choice(len(utility), CHECKED, replace=False)
    truth = float64_truth(model, x, labels, rows)
    _, sums = run(model, lambda: zip(x.split(BATCH), labels.split(BATCH), strict=True))
    write_result(
        "whole_layers_gpu",
        {
            "claim": "AlexNet fc2 head, all weights, against float32 brute force on the same device, prefix out",
            "weights": len(utility), "examples": n, "batch": BATCH, "active_inputs": 0.2, "active_units": active,
            "brute_s_per_weight": brute, **cases, "error": errors(sums.delta / n, rows, truth),
            "error_of_job": errors(utility, rows, truth), "proof": table.about["proof"], "rounds": ROUNDS,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        },
    )  # fmt: skip


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device; run `make bench` for the CPU")
    main(*(int(argument) for argument in sys.argv[1:2]))

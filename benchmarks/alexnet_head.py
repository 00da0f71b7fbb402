"""AlexNet's fc2, 4,096 sampled weights, 2,000 examples: the direct path against float32 brute force.

Head 4096 -> 4096 -> ReLU -> 1000, 20 % of the inputs and 25 % of the units active, seeded random numbers.
Brute force is the usual loop: set the weight to 0, run the head in float32 on cached layer inputs, take the loss.
The prefix (AlexNet up to classifier.4) is excluded on both sides. Error: against float64 brute force.

    python -m benchmarks.alexnet_head
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablation import ablate
from ablation.engine.batches import run_batches
from ablation.engine.interface import Setup
from ablation.engine.paths import open_path
from ablation.sites import Sites, draw_indices, make_sites
from ablation.spec import CountOfSites
from benchmarks.environment import write_result

N, INPUTS, UNITS, CLASSES, SITES, BATCH = 2000, 4096, 4096, 1000, 4096, 256
ROUNDS = 3


def make_head(device: str = "cpu") -> tuple[nn.Sequential, Tensor, Tensor]:
    """Make the head and its inputs, with the shares of active inputs and units that AlexNet has on real images."""
    torch.manual_seed(0)
    x = torch.rand(N, INPUTS) * (torch.rand(N, INPUTS) < 0.2)
    model = nn.Sequential(nn.Linear(INPUTS, UNITS), nn.ReLU(), nn.Linear(UNITS, CLASSES))
    with torch.no_grad():
        model[0].weight.normal_(0, 0.03)
        model[2].weight.normal_(0, 0.05)
        model[0].bias.zero_()
        y = model[0](x[:500])
        model[0].bias -= torch.quantile(y, 0.75, dim=0)
    return model.to(device), x.to(device), torch.randint(CLASSES, (N,)).to(device)


def brute_s(model: nn.Sequential, x: Tensor, labels: Tensor, n_weights: int = 3) -> float:
    """Seconds per weight of float32 brute force, prefix cached."""
    weight = model[0].weight.data.view(-1)
    times = []
    with torch.no_grad():
        for index in range(n_weights + 1):
            started = time.perf_counter()
            kept = weight[index].item()
            weight[index] = 0
            F.cross_entropy(model(x), labels).item()
            weight[index] = kept
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def float64_truth(model: nn.Sequential, x: Tensor, labels: Tensor, indices: np.ndarray) -> np.ndarray:
    """Utilities by float64 brute force; values that do not change (other units, parts of the logits) are reused."""
    wide = nn.Sequential(nn.Linear(INPUTS, UNITS), nn.ReLU(), nn.Linear(UNITS, CLASSES))
    wide.load_state_dict(model.state_dict())
    wide.to(x.device).double()
    x = x.double()
    utilities = []
    with torch.no_grad():
        loss = F.cross_entropy(wide(x), labels, reduction="none")
        for index in indices:
            weight = wide[0].weight.data.view(-1)
            kept = weight[index].item()
            weight[index] = 0
            utilities.append((F.cross_entropy(wide(x), labels, reduction="none") - loss).mean().item())
            weight[index] = kept
    return np.array(utilities)


def median_s(run: Callable[[], object]) -> float:
    """Median seconds of ROUNDS runs after one warm-up run."""
    run()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def now(device: torch.device) -> float:
    """Time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def score(model: nn.Sequential, sites: Sites, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Seconds from layer input to sums, and the part of them after the intact head: the scoring alone."""
    scoring = 0.0
    path = open_path("direct", Setup(model, "0.weight", sites), x[:2])
    run_intact = path.run

    def timed(inputs: Tensor, targets: Tensor):  # type: ignore[no-untyped-def]
        intact, pieces = run_intact(inputs, targets)

        def counted():  # type: ignore[no-untyped-def]
            nonlocal scoring
            started = now(x.device)
            for piece in pieces:
                scoring += now(x.device) - started
                yield piece
                started = now(x.device)
            scoring += now(x.device) - started

        return intact, counted()

    path.run = timed  # type: ignore[method-assign]
    started = now(x.device)
    run_batches(
        path,
        model,
        zip(x.split(BATCH), labels.split(BATCH), strict=True),
        n_sites=len(sites),
        first_example=0,
        per_class=None,
        proof_examples=frozenset(),
        device=x.device,
        on_step=lambda examples, sites: None,
    )
    return now(x.device) - started, scoring


def main(device: str = "cpu", name: str = "alexnet_head") -> None:
    """Measure, print and store the results."""
    model, x, labels = make_head(device)
    with torch.no_grad():
        active = (model[0](x[:500]) > 0).float().mean().item()
    indices = draw_indices(CountOfSites(count=SITES, seed=0), INPUTS * UNITS)
    sites = make_sites(model[0].weight, indices, "zero")
    brute = brute_s(model, x, labels)
    runs = [score(model, sites, x, labels) for _ in range(ROUNDS + 1)][1:]
    sums_s = statistics.median(run[0] for run in runs)
    scoring_s = statistics.median(run[1] for run in runs)
    whole_s = median_s(lambda: ablate(model, "0", {"test": (x, labels)}, sites=SITES, progress=False))
    table = ablate(model, "0", {"test": (x, labels)}, sites=SITES, progress=False)
    utility = table.columns["utility_test"]
    rows = np.random.default_rng(0).choice(SITES, 24, replace=False)
    truth = float64_truth(model, x, labels, indices[rows])
    scale = np.maximum(np.abs(truth), 0.01 * np.sqrt(np.mean(utility**2)))
    brute_again = brute_s(model, x, labels)
    per_weight = statistics.mean([brute, brute_again])
    write_result(
        name,
        {
            "claim": "AlexNet fc2 head, 4,096 sampled weights, N = 2,000, against float32 brute force, prefix out",
            "active_inputs": 0.2,
            "active_units": active,
            "brute_s_per_weight": [brute, brute_again],
            "brute_s_all": per_weight * SITES,
            "scoring_s": scoring_s,
            "layer_input_to_sums_s": sums_s,
            "whole_call_with_proof_s": whole_s,
            "ratio_scoring": per_weight * SITES / scoring_s,
            "ratio_layer_input_to_sums": per_weight * SITES / sums_s,
            "ratio_whole_call": per_weight * SITES / whole_s,
            "error_against_float64": float((np.abs(utility[rows] - truth) / scale).max()),
            "proof": table.about["proof"],
            "rounds": ROUNDS,
        },
    )


if __name__ == "__main__":
    main()

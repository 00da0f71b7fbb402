"""All weights of a layer at once, and sampled ones, against float32 brute force and against one plain evaluation pass.

    fc2        AlexNet's second Linear, 4096 x 4096, as a head alone: 20 % of the inputs and 25 % of the units active,
               2,000 examples. From the layer's input to the table, proof included, by `ablation.ablate`: the prefix is
               excluded on both sides. Brute force: set a weight to 0, run the head in float32, take the loss.
    fc1        its first Linear, likewise, 9216 x 4096, with two Linears behind it; 512 examples, a quarter of the
               inputs and of all units active.
    pass       the whole of AlexNet on 4,000 pictures, all weights of fc2: everything from the pictures' tensors to the
               table, in units of one plain float32 evaluation of the same pictures. Only their decoding is excluded.
    conv       ResNet-18's last convolution: 1,024 sampled weights (from the layer's input to the deltas, against the
               whole network once for every weight) and all 2,359,296 (the whole job, in passes).

Errors are against float64 brute force from the same layer input, in units of max(|u|, 0.01 rms u). Every case runs in a
process of its own, which reports its peak memory.

    python -m benchmarks.whole_layers [case ...]
"""

import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import ablation
from ablation.engine.interface import Setup
from ablation.engine.paths import open_path
from ablation.engine.rerun import Rerun
from ablation.machine import measure_pace
from ablation.sites import make_sites
from benchmarks import alexnet_head
from benchmarks.environment import RESULTS, write_result
from benchmarks.finite import build

N = 2000
N_OF_PASS = 4000  # at 2,000 the fixed cost of a job (the proof, the table) is a sixth
CHECKED = 24


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures held as float32 tensors: some hundred different ones, each repeated with different brightness."""

    def __init__(self, n: int, size: int = 224) -> None:
        generator = torch.Generator().manual_seed(1)
        self.few = torch.randn(250, 3, size, size, generator=generator)
        self.labels = torch.randint(1000, (n,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.few[index % 250] * (0.6 + 0.02 * (index // 250)), self.labels[index]


def best_s(run: Any, rounds: int = 2) -> tuple[float, Any]:
    """Shortest time of some runs, and the last result."""
    seconds, result = [], None
    for _ in range(rounds):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def plain_pass_s(model: nn.Module, pictures: Pictures, batch_size: int = 64) -> float:
    """Seconds of one plain float32 evaluation: stack batches, run the network, sum the loss."""

    def run() -> float:
        total = 0.0
        with torch.inference_mode():
            for first in range(0, len(pictures), batch_size):
                rows = range(first, min(first + batch_size, len(pictures)))
                inputs, labels = zip(*(pictures[row] for row in rows), strict=True)
                logits = model(torch.stack(inputs))
                total += F.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
        return total

    return best_s(run)[0]


def errors(utility: np.ndarray, rows: np.ndarray, truth: np.ndarray) -> float:
    """Largest error, in units of max(|u|, 0.01 rms u)."""
    scale = np.maximum(np.abs(truth), 0.01 * np.sqrt(np.mean(utility**2)))
    return float((np.abs(utility[rows] - truth) / scale).max())


def measure_fc2() -> dict[str, Any]:
    """Measure the head alone, all weights."""
    model, x, labels = alexnet_head.make_head()
    before = alexnet_head.brute_s(model, x, labels)
    seconds, table = best_s(lambda: ablation.ablate(model, "0", {"test": (x, labels)}, sites="all", progress=False), 3)
    brute = statistics.mean([before, alexnet_head.brute_s(model, x, labels)])
    utility = table.columns["utility_test"]
    rows = np.random.default_rng(0).choice(len(utility), CHECKED, replace=False)
    return {
        "weights": len(utility), "examples": N, "seconds": seconds, "brute_s_per_weight": brute,
        "times_brute": brute * len(utility) / seconds,
        "error": errors(utility, rows, alexnet_head.float64_truth(model, x, labels, rows)),
        **about(table, seconds),
    }  # fmt: skip


def measure_fc1() -> dict[str, Any]:
    """Measure three Linears, all weights of the first."""
    n = 512
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 9216, generator=generator) * (torch.rand(n, 9216, generator=generator) < 0.25)
    labels = torch.randint(1000, (n,), generator=generator)
    layers = [nn.Linear(9216, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000)]
    y = x
    with torch.no_grad():
        for k, layer in enumerate(layers):
            layer.weight.normal_(generator=generator)
            layer.bias.zero_()
            layer.weight /= layer(y).std()
            if k < 2:
                layer.bias -= torch.quantile(layer(y), 0.75, dim=0)
            y = layer(y).relu()
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    before = alexnet_head.brute_s(model, x, labels)
    seconds, table = best_s(lambda: ablation.ablate(model, "0", {"test": (x, labels)}, sites="all", progress=False), 1)
    brute = statistics.mean([before, alexnet_head.brute_s(model, x, labels)])
    utility = table.columns["utility_test"]
    rows = np.random.default_rng(0).choice(len(utility), CHECKED, replace=False)
    truth = brute_force_utilities(model, x, labels, rows)
    return {
        "weights": len(utility), "examples": n, "seconds": seconds, "brute_s_per_weight": brute,
        "times_brute": brute * len(utility) / seconds, "error": errors(utility, rows, truth), **about(table, seconds),
    }  # fmt: skip


def brute_force_utilities(model: nn.Module, x: Tensor, labels: Tensor, rows: np.ndarray) -> np.ndarray:
    """Utilities in float64, weight by weight."""
    wide = copy.deepcopy(model).double()
    x, weight = x.double(), wide.get_parameter("0.weight").data.view(-1)
    utilities = []
    with torch.no_grad():
        loss = F.cross_entropy(wide(x), labels, reduction="none")
        for row in rows.tolist():
            kept = weight[row].item()
            weight[row] = 0
            utilities.append((F.cross_entropy(wide(x), labels, reduction="none") - loss).mean().item())
            weight[row] = kept
    return np.array(utilities)


def about(table: Any, seconds: float) -> dict[str, Any]:
    """The job's proof, its path, and its estimate compared with the measured time."""
    estimate = table.about["plan"]["estimate"]["seconds"] / measure_pace()
    return {
        "proof": table.about["proof"],
        "path": table.about["plan"]["path"],
        "series_bound": table.about["baseline"]["test"]["series_bound"],
        "estimated_s": estimate, "estimate_over_measured": estimate / seconds,
    }  # fmt: skip


def measure_pass() -> dict[str, Any]:
    """Measure the whole of AlexNet, all weights of fc2."""
    pictures = Pictures(N_OF_PASS)
    model = build("alexnet", 0.25, pictures.few[:64])
    before = plain_pass_s(model, pictures)
    seconds, table = best_s(
        lambda: ablation.ablate(model, "classifier.4", {"test": pictures}, sites="all", progress=False)
    )
    pass_s = statistics.mean([before, plain_pass_s(model, pictures)])
    return {
        "weights": len(table), "examples": N_OF_PASS, "seconds": seconds, "pass_s": pass_s, "passes": seconds / pass_s,
        **about(table, seconds),
    }  # fmt: skip


def measure_conv() -> dict[str, Any]:
    """Measure ResNet-18's last convolution."""
    n = 512
    pictures = Pictures(n)
    layer = "layer4.1.conv2"
    model = build("resnet18", None, pictures.few[:64])
    before = plain_pass_s(model, pictures)
    seconds, table = best_s(lambda: ablation.ablate(model, layer, {"test": pictures}, sites="all", progress=False))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pass_s = statistics.mean([before, plain_pass_s(model, pictures)])
    inputs, labels = (torch.stack([pictures[k][0] for k in range(256)]), torch.tensor(pictures.labels[:256]))
    weights = model.get_parameter(f"{layer}.weight")
    chosen = np.sort(np.random.default_rng(0).choice(weights.numel(), 1024, replace=False))
    sites = make_sites(weights, chosen, "zero")
    path = open_path("direct", Setup(model, f"{layer}.weight", sites), inputs[:2])

    def score() -> tuple[float, Tensor]:
        spent, deltas = 0.0, []
        for x, y in zip(inputs.split(64), labels.split(64), strict=True):
            _, pieces = path.run(x, y)
            started = time.perf_counter()
            deltas.append(torch.cat([piece.delta for piece in pieces]))
            spent += time.perf_counter() - started
        return spent, torch.cat(deltas, dim=1)

    score()
    scored_s, deltas = min((score() for _ in range(3)), key=lambda run: run[0])
    rerun = Rerun(Setup(model, f"{layer}.weight", sites[:CHECKED]))
    _, pieces = rerun.run(inputs, labels)
    truth = torch.cat([piece.delta for piece in pieces]).mean(dim=1).numpy()
    return {
        "weights": len(table), "examples": n, "seconds": seconds, "pass_s": pass_s, "passes": seconds / pass_s,
        "peak_memory_bytes": peak_bytes,
        **about(table, seconds),
        "sampled": {
            "weights": 1024, "examples": 256, "seconds": scored_s,
            "times_full_forward": pass_s / n * 256 * 1024 / scored_s,
            "error": errors(deltas.mean(dim=1).numpy(), np.arange(CHECKED), truth),
        },
    }  # fmt: skip


CASES = {"fc2": measure_fc2, "fc1": measure_fc1, "pass": measure_pass, "conv": measure_conv}


def main() -> None:
    """Run every case in a process of its own, then write the file."""
    if sys.argv[1:2] == ["--one"]:
        result = CASES[sys.argv[2]]()
        result.setdefault("peak_memory_bytes", 0)
        result["peak_memory_bytes"] = (
            result["peak_memory_bytes"] or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        print(json.dumps(result))
        return
    kept = RESULTS / "whole_layers.json"
    rows = json.loads(kept.read_text()) if sys.argv[1:] and kept.exists() else {}  # keep the other cases' rows
    rows.pop("environment", None)
    for name in sys.argv[1:] or CASES:
        command = [sys.executable, "-m", "benchmarks.whole_layers", "--one", name]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows[name] = json.loads(printed.splitlines()[-1])
        print(name, json.dumps(rows[name]), flush=True)
    write_result("whole_layers", rows)


if __name__ == "__main__":
    main()

"""Measure the engine's exactness on every torchvision classification model, store the results, write the page.

Run by `make check-torchvision`. It compares each model's first, middle and last weight layer, in `float64` and in
`mixed`, by the table of rules and by the general exact rule alone, with a brute force that uses nothing of the engine.
Results are written to `benchmarks/results/torchvision_exactness.json` as they come, so a run can be stopped and
resumed: results that passed with the same versions are not repeated (`--again` repeats them). The page is
`docs/exactness-torchvision.md`.

In untrained networks activations nearly vanish (heads of zeros, layer scales of 1e-6, the same logits for all inputs),
and errors with them. So the weights are scaled, layer by layer, until activations have a realistic size (`Enliven`).

    python tools/check_torchvision.py [--models resnet18,vit_b_32] [--again] [--only-table]
"""

import argparse
import gc
import hashlib
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ablation.engine.carried.finite import Finite
from ablation.engine.carried.products import RULES
from ablation.engine.interface import Setup
from ablation.inputs.models import build_model
from ablation.reference import reference_deltas
from ablation.sites import make_sites

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "torchvision_exactness.json"
PAGE = ROOT / "docs" / "exactness-torchvision.md"

PLACES = ("first", "middle", "last")
PRECISIONS = ("float64", "mixed")  # in this order: the model is converted to float64 once, and back
BOUND = {"mixed": 1e-4, "float64": 1e-9}
RULE_SETS: dict[str, Mapping[Any, Any]] = {"special": RULES, "general": {}}
N_SITES = {"special": 3, "general": 2}
N_INPUTS, N_CLASSES = 2, 1000
MOVES = 1e-8  # nats: a site whose mean |delta| is less is drawn again, up to N_DRAWN of them
N_DRAWN = 12
SEED = 0
ENGINE = hashlib.sha256(
    b"".join(file.read_bytes() for file in sorted(ROOT.glob("ablation/engine/**/*.py")))
).hexdigest()

Entry = dict[str, Any]


def names() -> list[str]:
    """Every torchvision classification model, those with few weights first."""
    every = torchvision.models.list_models(module=torchvision.models)
    return sorted(every, key=lambda name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


# --- models with activations of a realistic size ---------------------------------------------------------------------


def image_size(name: str) -> int:
    """Size of a small image that the architecture takes; MaxViT's windows fit 224 only."""
    sizes = {"inception": 96, "maxvit": 224, "vit_b_32": 96, "vit_l_32": 96, "vit_h_14": 56}
    return next((size for start, size in sizes.items() if name.startswith(start)), 64)


def n_enlivening(name: str) -> int:
    """Number of images that the weights are scaled on; with fewer, EfficientNets are chaotic (1000 nats a weight)."""
    return 64 if name == "efficientnet_v2_l" else 24


def make_live_model(name: str) -> tuple[nn.Module, Tensor]:
    """Make the model in eval mode with seeded, scaled weights (`enliven`), and its inputs, random normal images."""
    if name.startswith("vit_"):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            model = torchvision.models.get_model(name, weights=None, image_size=image_size(name))
    else:
        model = build_model(name, SEED)
    random = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(n_enlivening(name), 3, image_size(name), image_size(name), generator=random)
    enliven(model.eval(), inputs, random)
    return model, inputs[:N_INPUTS].clone()


def enliven(model: nn.Module, inputs: Tensor, random: torch.Generator) -> None:
    """Scale the weights in place as `Enliven` does; logits get a standard deviation of 1.5.

    Raises:
        ValueError: the logits hardly differ between inputs.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("bias") and parameter.abs().max() < 1e-4:  # zero heads and tokens, small layer scales
                parameter.normal_(generator=random)
        with Enliven():
            model(inputs)
        last = model.get_submodule(weight_names(model)[-1].removesuffix(".weight"))
        scale = 1.5 / model(inputs[:N_INPUTS]).std()
        for parameter in last.parameters():  # what follows the last layer, at most ReLU and a mean, scales along
            parameter.mul_(scale)
        logits = model(inputs[:N_INPUTS])
    size, difference = float(logits.std()), float((logits[0] - logits[1]).std())
    if not (1 <= size <= 3 and difference >= 0.5):
        raise ValueError(
            f"the logits' standard deviation is {size:.3g}, allowed is 1 to 3, and that of their difference between "
            f"two inputs {difference:.3g}, allowed is 0.5 or more. See what `Enliven` doesn't adapt in this model."
        )


class Enliven(TorchFunctionMode):
    """Mode that scales each layer's weights, at its first call, so that its outputs have standard deviation 1.

    Biases are set so that the mean of each output channel is 0, since otherwise all inputs soon look alike to a deep
    ReLU network. BatchNorm's running statistics are set to those of its inputs. The mode intercepts functions and not
    modules, since attention in torchvision uses parameters of modules that it never calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: set[int] = set()

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function; before it, adapt the parameters it uses."""
        kwargs = kwargs or {}
        if call.__name__ in ("linear", "conv2d"):
            self._adapt(args[1], args[2] if len(args) > 2 else kwargs.get("bias"), lambda: call(*args, **kwargs))
        elif call is F.batch_norm:
            self._norm(*args[:3])
        elif call is F.multi_head_attention_forward:
            query, weight, bias = args[0], args[5], args[6]
            self._adapt(weight, None, lambda: F.linear(query, weight, bias))
            self._adapt(args[11], args[12], lambda: call(*args, **kwargs)[0])
        return call(*args, **kwargs)

    def _adapt(self, weight: Tensor, bias: Tensor | None, run: Callable[[], Tensor]) -> None:
        if id(weight) in self.done:
            return
        self.done.add(id(weight))
        output = run()
        channel = 1 if weight.dim() == 4 else output.dim() - 1
        mean = output.mean([axis for axis in range(output.dim()) if axis != channel])
        centred = output - mean.view(-1, *[1] * (output.dim() - 1 - channel)) if bias is not None else output
        scale = 1 / centred.std()
        if bias is not None and isinstance(bias, nn.Parameter):
            bias.copy_((bias - mean) * scale)
        weight *= scale

    def _norm(self, values: Tensor, mean: Tensor, variance: Tensor) -> None:
        if id(mean) in self.done:
            return
        self.done.add(id(mean))
        mean.copy_(values.mean([0, 2, 3]))
        variance.copy_(values.var([0, 2, 3]))
        variance.clamp_(
            min=0.1 * float(variance.mean())
        )  # so that channels with little variance are not amplified too much


def weight_names(model: nn.Module) -> list[str]:
    """Names of the weight layers' parameters, in the model's order."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and name.endswith((".weight", "in_proj_weight"))
    ]


def find_layer(model: nn.Module, place: str) -> str:
    """Find the first, middle or last weight layer's parameter."""
    every = weight_names(model)
    return every[{"first": 0, "middle": len(every) // 2, "last": len(every) - 1}[place]]


def kind_of(model: nn.Module, parameter: str) -> str:
    """Describe the kind of a layer in a few words."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    if isinstance(module, nn.Conv2d):
        groups = f", {module.groups} groups" if module.groups > 1 else ""
        return f"Conv2d {module.kernel_size[0]}x{module.kernel_size[1]}{groups}"
    if parameter.endswith("in_proj_weight"):
        return "attention in_proj"
    return "Linear" if isinstance(module, nn.Linear) else type(module).__name__


# --- the truth -------------------------------------------------------------------------------------------------------


def brute_force(model: nn.Module, parameter: str, inputs: Tensor, labels: Tensor) -> Callable[[int], np.ndarray]:
    """Make a function from a flat index to each example's loss delta in nats, by plain PyTorch on a float64 model."""

    def losses() -> Tensor:
        return F.cross_entropy(model(inputs), labels, reduction="none")

    weight = model.get_parameter(parameter).data
    with torch.no_grad():
        intact = losses()

    @torch.no_grad()
    def delta(index: int) -> np.ndarray:
        place = np.unravel_index(index, weight.shape)
        kept = weight[place].item()
        weight[place] = 0
        ablated = losses()
        weight[place] = kept
        return (ablated - intact).numpy()

    return delta


def draw_sites(name: str, parameter: str, n_weights: int, delta_of: Callable[[int], np.ndarray]) -> dict[int, Any]:
    """Draw sites of a layer, with their true deltas: the first that move the loss; if too few do, others as well."""
    random = np.random.default_rng(zlib.crc32(f"{name} {parameter}".encode()))
    moving: dict[int, Any] = {}
    silent: dict[int, Any] = {}
    for index in random.choice(n_weights, size=min(N_DRAWN, n_weights), replace=False).tolist():
        delta = delta_of(index)
        (moving if np.abs(delta).mean() > MOVES else silent)[index] = delta
        if len(moving) == N_SITES["special"]:
            break
    return dict(list((moving | silent).items())[: N_SITES["special"]])


def errors_of(delta: np.ndarray, truth: np.ndarray, precision: str, loss: float) -> tuple[float, float]:
    """Largest arithmetic error over sites, as defined in docs/02-exactness.md, and its per-example part.

    The per-example part is in units of the mean |delta|; in `mixed` the utility's error in units of max(|u|, 0.01 rms
    u) counts, too. Differences up to 4e-15 (1 + mean loss) nats, the rounding of float64 losses, are not counted.
    """
    floor = 4e-15 * (1 + loss)
    difference = np.maximum(np.abs(delta - truth) - floor, 0).mean(axis=1)
    of_examples = float(_ratio(difference, np.abs(truth).mean(axis=1)).max())
    if precision == "float64":
        return of_examples, of_examples
    utility = truth.mean(axis=1)
    scale = np.maximum(np.abs(utility), 0.01 * np.sqrt((utility**2).mean()))
    of_utility = float(_ratio(np.maximum(np.abs(delta.mean(axis=1) - utility) - floor, 0), scale).max())
    return max(of_examples, of_utility), of_examples


def rounding_of(delta: np.ndarray, truth: np.ndarray) -> float:
    """Model rounding: the utility in units of max(mean |delta|, 0.1 of its rms over sites)."""
    size = np.abs(truth).mean(axis=1)
    scale = np.maximum(size, 0.1 * np.sqrt((size**2).mean()))
    return float(_ratio(np.abs((delta - truth).mean(axis=1)), scale).max())


def _ratio(difference: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / scale)


# --- the measurement -------------------------------------------------------------------------------------------------


def check_model(name: str, places: tuple[str, ...] = PLACES) -> Iterator[Entry]:
    """Check every layer, precision and set of rules of one model, of which one copy is in memory."""
    model, inputs = make_live_model(name)
    labels = torch.randint(N_CLASSES, (N_INPUTS,), generator=torch.Generator().manual_seed(SEED))
    layers = {place: find_layer(model, place) for place in places}
    model.double()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(inputs.double()), labels))
    truths = {}
    for place, layer in layers.items():
        n_weights = model.get_parameter(layer).numel()
        truths[place] = draw_sites(name, layer, n_weights, brute_force(model, layer, inputs.double(), labels))
    for precision in PRECISIONS:
        model.to(
            torch.float64 if precision == "float64" else torch.float32
        )  # lossless, since the weights are float32 numbers
        for place, layer in layers.items():
            yield from check_layer(
                {"model": name, "place": place, "layer": layer, "kind": kind_of(model, layer), "precision": precision},
                model,
                inputs.double() if precision == "float64" else inputs,
                labels,
                truths[place],
                loss,
            )


def check_layer(
    about: Entry, model: nn.Module, inputs: Tensor, labels: Tensor, drawn: dict[int, Any], loss: float
) -> Iterator[Entry]:
    """Check one layer in one precision, by each set of rules."""
    indices = np.array(list(drawn), dtype=np.int64)
    whole = np.stack(list(drawn.values()))
    truth = whole
    if about["precision"] == "mixed":
        sites = make_sites(model.get_parameter(about["layer"]), indices, "zero")
        truth = reference_deltas(model, about["layer"], sites, inputs, labels).numpy()
    for rules, table in RULE_SETS.items():
        n = N_SITES[rules]
        entry = about | {"rules": rules, "image_size": inputs.shape[-1], "engine": ENGINE, **versions()}
        entry["effects"] = np.abs(whole[:n]).mean(axis=1).tolist()  # mean |delta| of each site, in nats
        started = time.perf_counter()
        try:
            delta, how = run_engine(model, about["layer"], indices[:n], inputs, labels, about["precision"], table)
        except Exception as error:
            yield entry | failed(error)
            continue
        entry["seconds"] = round(time.perf_counter() - started, 3)
        entry |= how
        entry["error"], entry["error_of_examples"] = errors_of(delta, truth[:n], about["precision"], loss)
        if about["precision"] == "mixed":
            entry["model_rounding"] = rounding_of(delta, whole[:n])
        yield entry


def run_engine(
    model: nn.Module, parameter: str, indices: np.ndarray, inputs: Tensor, labels: Tensor, precision: str, rules: Any
) -> tuple[np.ndarray, dict[str, bool]]:
    """The engine's deltas, and whether it used a fallback.

    `one_by_one`: the model branches by a number that changed. `wide`: deltas in float64, also in `mixed`.
    """
    sites = make_sites(model.get_parameter(parameter), indices, "zero")
    path = Finite(Setup(model, parameter, sites, precision, lanes=len(sites)), rules=rules)
    pieces = list(path.run(inputs, labels)[1])
    delta = torch.cat([piece.delta for piece in pieces]).numpy()
    return delta, {"one_by_one": len(pieces) > 1, "wide": path.delta_dtype == torch.float64}


def versions() -> Entry:
    """Versions of libraries that a result depends on."""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__}


def failed(error: Exception) -> Entry:
    """Part of an entry for an exception."""
    return {"seconds": 0.0, "error": None, "failure": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def is_within(entry: Entry) -> bool:
    """Whether an entry passed."""
    return entry["error"] is not None and entry["error"] <= BOUND[entry["precision"]]


# --- stored results ---------------------------------------------------------------------------------------------------

Key = tuple[str, str, str, str]


def key_of(entry: Entry) -> Key:
    """Key of an entry."""
    return entry["model"], entry["place"], entry["precision"], entry["rules"]


def keys_of(model: str) -> list[Key]:
    """Keys of all entries of a model."""
    return [(model, place, precision, rules) for place in PLACES for precision in PRECISIONS for rules in RULE_SETS]


def load_entries() -> dict[Key, Entry]:
    """Load what has been measured so far."""
    return {key_of(entry): entry for entry in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}


def save_entries(entries: dict[Key, Entry]) -> None:
    """Save the entries in the order of their keys; a reader sees either the old file or the new one."""
    new = RESULTS.with_suffix(".new")
    new.write_text("[\n" + ",\n".join(json.dumps(entries[key]) for key in sorted(entries)) + "\n]\n")
    new.replace(RESULTS)


def is_done(model: str, entries: dict[Key, Entry]) -> bool:
    """Whether all of a model was measured with these versions, and passed."""
    kept = [entries.get(key) for key in keys_of(model)]
    return all(entry and is_within(entry) and versions().items() <= entry.items() for entry in kept)


def check_and_keep(model: str, entries: dict[Key, Entry]) -> None:
    """Measure a model and save every entry as it comes; an exception is saved as a failed entry."""
    left = dict.fromkeys(keys_of(model))
    for key in left:
        entries.pop(key, None)
    try:
        for entry in check_model(model):
            entries[key_of(entry)] = entry
            left.pop(key_of(entry))
            save_entries(entries)
    except Exception as error:
        for _, place, precision, rules in left:
            about = {"model": model, "place": place, "layer": "?", "kind": "?", "precision": precision, "rules": rules}
            entry = about | {"engine": ENGINE} | versions() | failed(error)
            entries[key_of(entry)] = entry
        save_entries(entries)


# --- the page --------------------------------------------------------------------------------------------------------

HEAD = """# Exactness on every torchvision classification model

Written by `make check-torchvision` (`tools/check_torchvision.py`) from `benchmarks/results/torchvision_exactness.json`.

**{n_within} of {n_all} results within bounds: {n_models} models, {n_layers} layers**, each in `mixed` and `float64`,
by the table of rules and by the general exact rule alone. torch {torch}, torchvision {torchvision}. The engine, by the
beginning of the SHA-256 of `ablation/engine/**/*.py`: {engine}.

{n_moving} of the {n_sites} ablated weights move the loss by more than 1e-8 nats, the median one by {median}.
{n_one_by_one} results (marked *) fell back to running the sites one by one. In {n_wide} results in `mixed` (marked ^)
the engine's own probe found float32 deltas not precise enough, so it carried all of them in float64.

- **Layers**: the first, the middle and the last weight with at least two dimensions, in the order of
  `named_parameters()`.
- **Errors**: the largest over 3 ablated weights (general rule alone: 2), as in [exactness](02-exactness.md). Bounds:
  1e-4 in `mixed`, 1e-9 in `float64`, beyond 4e-15 (1 + mean loss) nats. 0 means: not beyond that.
- **The truth in `float64`** uses nothing of the package: the whole model in float64, one weight set to zero, forward,
  cross-entropy per example, subtracted. **In `mixed`** it is the package's reference, which goes on in float64 from the
  same float32 layer input. *Model rounding* ties it to the first one: the `mixed` utilities against the whole model in
  float64, in units of max(mean |delta|, 0.1 of its rms over sites); float32's own, reported and not bounded.
- **Weights** are random (seed 0), scaled layer by layer so that signals live: convolutions, linear layers and attention
  give numbers of standard deviation 1, biases centre them, BatchNorm's statistics are those of its inputs, zero heads
  and small layer scales are random; logits have standard deviation 1.5 and differ between inputs (checked). This is
  done on 24 images (efficientnet_v2_l: 64). On 8, or 24 for that one, large EfficientNets were chaotic: one weight
  moved the loss by up to 1,000 nats, and errors were beyond the bounds (up to 2e-1 in `mixed`, before there was the
  probe that ^ marks; up to 3e-8 in `float64`, brute force's own rounding included).
- **Inputs**: 2 random normal images, small where the architecture takes it ({sizes} pixels).
- **Weights ablated**: drawn by a seeded generator; those that don't move the loss are replaced, up to 12 draws a layer.
- **Seconds**: the engine's, all four runs of a layer together, on one thread of a busy machine: no claim about speed.

| model | layer | kind | mixed | model rounding | float64 | general: mixed | general: float64 | seconds |
|---|---|---|---|---|---|---|---|---|
"""


def make_page(entries: dict[Key, Entry]) -> str:
    """Make the page from the stored results: a row for each layer of each model."""
    every = [entries[key] for key in sorted(entries)]
    rows: dict[tuple[str, str], list[Entry]] = {}
    for model in sorted({entry["model"] for entry in every}):
        for place in PLACES:
            rows[model, place] = [entry for entry in every if (entry["model"], entry["place"]) == (model, place)]
    special = [entry for entry in every if (entry["precision"], entry["rules"]) == ("float64", "special")]
    effects = [effect for entry in special for effect in entry.get("effects", [])]
    engines = Counter(entry["engine"] for entry in every)
    n_wide = sum(entry["precision"] == "mixed" and entry.get("wide", False) for entry in every)
    n_one_by_one = sum(entry.get("one_by_one", False) for entry in every)
    head = HEAD.format(
        n_within=sum(map(is_within, every)),
        n_all=len(every),
        n_models=len({entry["model"] for entry in every}),
        n_layers=len(rows),
        n_moving=sum(effect > MOVES for effect in effects),
        n_sites=len(effects),
        median=f"{np.median(effects):.0e}" if effects else "unknown",
        n_one_by_one=n_one_by_one,
        n_wide=n_wide,
        engine=", ".join(f"{digest[:8]} ({n} results)" for digest, n in sorted(engines.items())),
        torch=_listed(entry["torch"] for entry in every),
        torchvision=_listed(entry["torchvision"] for entry in every),
        sizes=_listed(entry["image_size"] for entry in every if "image_size" in entry),
    )
    lines = [_row(entries) for entries in rows.values() if entries]
    failures = [f"- {', '.join(key_of(entry))}: {_failure(entry)}" for entry in every if not is_within(entry)]
    return head + "\n".join(lines) + "\n" + ("\n## Failures\n\n" + "\n".join(failures) + "\n" if failures else "")


def _failure(entry: Entry) -> str:
    if "failure" in entry:
        return str(entry["failure"])
    return f"{entry['error']:.2g}; per example {entry['error_of_examples']:.2g} of the mean |delta|"


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))


def _row(entries: list[Entry]) -> str:
    by = {(entry["rules"], entry["precision"]): entry for entry in entries}
    first = entries[0]
    rounding = by.get(("special", "mixed"), {}).get("model_rounding")
    cells = [
        first["model"],
        f"`{first['layer']}`",
        first["kind"],
        _error(by.get(("special", "mixed"))),
        "" if rounding is None else f"{rounding:.0e}",
        _error(by.get(("special", "float64"))),
        _error(by.get(("general", "mixed"))),
        _error(by.get(("general", "float64"))),
        f"{sum(entry['seconds'] for entry in entries):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _error(entry: Entry | None) -> str:
    if entry is None:
        return "not run"
    if entry["error"] is None:
        return "**failed**"
    number = f"{entry['error']:.0e}" if entry["error"] else "0"
    number += "*" * entry["one_by_one"] + "^" * (entry["precision"] == "mixed" and entry.get("wide", False))
    return number if is_within(entry) else f"**failed: {number}**"


# --- the command -----------------------------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    """Parse the command line; unknown models are refused by name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", help="names, separated by commas; all of torchvision's where absent")
    parser.add_argument("--again", action="store_true", help="also run what has passed before")
    parser.add_argument("--only-table", action="store_true", help="run nothing, write the page from what is kept")
    options = parser.parse_args()
    options.models = options.models.split(",") if options.models else names()
    if unknown := sorted(set(options.models) - set(names())):
        parser.error(f"no such model: {', '.join(unknown)}. Allowed: {', '.join(sorted(names()))}")
    return options


def main() -> int:
    """Measure what is missing and write the page; returns 1 if something failed or is missing."""
    options = parse_options()
    entries = load_entries()
    for place, model in enumerate([] if options.only_table else options.models, 1):
        if options.again or not is_done(model, entries):
            started = time.perf_counter()
            check_and_keep(model, entries)
            gc.collect()
            print(_progress(model, entries, time.perf_counter() - started), file=sys.stderr, flush=True, end=" ")
            print(f"({place} of {len(options.models)})", file=sys.stderr, flush=True)
            PAGE.write_text(make_page(entries), "utf-8")
    PAGE.write_text(make_page(entries), "utf-8")
    wanted = [entries.get(key) for model in options.models for key in keys_of(model)]
    return 0 if all(entry and is_within(entry) for entry in wanted) else 1


def _progress(model: str, entries: dict[Key, Entry], seconds: float) -> str:
    mine = [entries[key] for key in keys_of(model)]
    within = [entry for entry in mine if is_within(entry)]
    worst = ", ".join(
        f"{precision} {max((entry['error'] for entry in within if entry['precision'] == precision), default=0):.0e}"
        for precision in PRECISIONS
    )
    return f"{model}: {len(within)} of {len(mine)} within bounds ({worst}), {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())

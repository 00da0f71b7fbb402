"""Write `ablation/inputs/facts.jsonl`: the facts of every built-in model, from real modules, one at a time.

Run by `make facts`, after a change of torchvision or of the facts. Meta devices and fake tensors fail on some families,
so each model is built (seeded; no pretrained weights, no download) and run on two examples.
"""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from PIL import Image

from ablation.inputs.catalog import COSTS, DEMO_MODEL, LayerFacts, ModelFacts, line_from_facts
from ablation.inputs.demo import prepare_digit
from ablation.inputs.models import build_demo_model, build_model, classifier_weights, default_transform
from ablation.layers import describe_model

TABLE = Path(__file__).parent.parent / "ablation" / "inputs" / "facts.jsonl"


def names() -> Iterator[str]:
    """Names of the demo model and of every torchvision classification model."""
    yield DEMO_MODEL
    yield from torchvision.models.list_models(module=torchvision.models)


def make_facts(name: str) -> ModelFacts:
    """Make the facts of one model, as `load_model` builds it without weights; numbers for estimates are rounded."""
    if name == DEMO_MODEL:
        return _rounded(describe_model(name, build_demo_model(0), torch.zeros(2, *prepare_digit(_BLANK).shape)))
    example = torch.zeros(2, *default_transform(name)(_BLANK).shape)
    return _rounded(describe_model(name, build_model(name, 0).eval(), example, classifier_weights(name)))


_BLANK = Image.new("L", (640, 480))


def _rounded(facts: ModelFacts) -> ModelFacts:
    layers = tuple(layer.model_copy(update=_rounded_costs(layer)) for layer in facts.layers)
    return facts.model_copy(update={"flops": _three_digits(facts.flops), "layers": layers})


def _rounded_costs(layer: LayerFacts) -> dict[str, int]:
    return {name: _three_digits(getattr(layer, name)) for name in COSTS}


def _three_digits(flops: float) -> int:
    return int(float(f"{flops:.3g}"))


def main() -> None:
    """Rewrite the file, one line per model."""
    lines = []
    for name in names():
        print(name, file=sys.stderr, flush=True)
        lines.append(line_from_facts(make_facts(name)) + "\n")
        gc.collect()  # recorded calls refer to the model in cycles
    TABLE.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()

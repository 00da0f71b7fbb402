"""Write `ablation/inputs/published.json`: ImageNet's classes, and what torchvision publishes of its weights.

Run by `make facts`, after a change of torchvision. Names of the classes and everything about weights are torchvision's
own; the WordNet ids come from timm, which has them in the same order.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torchvision

from ablation.inputs.models import classifier_weights

TABLE = Path(__file__).parent.parent / "ablation" / "inputs" / "published.json"


def make_classes() -> list[tuple[str, str]]:
    """WordNet id and torchvision's name of every ImageNet class, in the order of their numbers."""
    names = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    wnids = files("timm.data._info").joinpath("imagenet_synsets.txt").read_text("utf-8").split()
    if wnids != sorted(wnids):
        raise ValueError("timm's ids are not in ImageNet's order, which is sorted")
    return list(zip(wnids, names, strict=True))


def make_weights(name: str) -> dict[str, Any]:
    """The default member of a model's weights enum, and of each member its file and its preprocessing in words."""
    enum = torchvision.models.get_model_weights(name)
    names = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    members = {}
    for member in classifier_weights(name):
        if enum[member].meta["categories"] != names:
            raise ValueError(f"{name} with {member} has other classes than ImageNet's")
        members[member] = [Path(urlparse(enum[member].url).path).name, say_preprocessing(enum[member].transforms())]
    return {"default": enum.DEFAULT.name, "weights": members}


def say_preprocessing(transform: Any) -> str:
    """The steps of torchvision's preset for classification."""
    return f"resize {transform.resize_size[0]} ({transform.interpolation.value}), crop {transform.crop_size[0]}"


def main() -> None:
    """Rewrite the file: one line for the classes, one for each model."""
    models = {name: make_weights(name) for name in torchvision.models.list_models(module=torchvision.models)}
    lines = [f"{json.dumps(name)}: {json.dumps(about, separators=(',', ':'))}" for name, about in models.items()]
    classes = json.dumps(make_classes(), separators=(",", ":"))
    TABLE.write_text('{"classes": ' + classes + ',\n"models": {\n' + ",\n".join(lines) + "\n}}\n", "utf-8")


if __name__ == "__main__":
    main()

"""Which models, layers and data sets there are, and their facts: names, shapes, counts, the path each layer takes.

Torch-free: the API checks a spec against these facts at once, whether or not a worker is up.
The facts of the built-in models are a generated file, `facts.jsonl` (`make facts`), one model a line.
"""

from pydantic import Field

from ablation.errors import SpecError, nearest
from ablation.spec import Record


class LayerFacts(Record):
    """One parameter tensor that can be a target."""

    parameter: str = Field(description="full name, e.g. classifier.4.weight")
    kind: str = Field(description="class of the module that owns it, e.g. Linear")
    shape: tuple[int, ...] = Field(strict=False)
    path: str = Field(description="how the engine computes it: direct or rerun")
    flops_after: float = Field(description="flops per example of everything that depends on this parameter")

    @property
    def name(self) -> str:
        """What users type: the module's name where this is its weight, else the parameter's full name."""
        return self.parameter.removesuffix(".weight")

    @property
    def n_weights(self) -> int:
        """Number of entries of the parameter tensor."""
        n = 1
        for size in self.shape:
            n *= size
        return n


class ModelFacts(Record):
    """What can be known of a model without running it."""

    name: str
    weights: tuple[str, ...] = Field(default=(), strict=False, description="names of torchvision's weights enum")
    n_classes: int
    input_shape: tuple[int, ...] = Field(strict=False, description="shape of one example after preprocessing")
    flops: float = Field(description="flops per example of one forward pass")
    widest: int = Field(description="most numbers per example that go into and out of one call")
    layers: tuple[LayerFacts, ...] = Field(strict=False)


class DatasetFacts(Record):
    """What can be known of a data set without reading it."""

    name: str
    needs_root: bool
    n_classes: int | None = Field(default=None, description="None: as many as its folders")
    n_examples: dict[str, int] = Field(default={}, description="examples per split; empty: counted when asked for")
    n_per_class: dict[str, tuple[int, ...]] = Field(default={}, strict=False, description="examples per split and class")


def find_layer(facts: ModelFacts, layer: str) -> LayerFacts:
    """The layer called `layer`: a module's name (its weight) or a parameter's full name.

    Raises:
        SpecError: there is no such layer; the message names the nearest ones.
    """
    for candidate in facts.layers:
        if layer in (candidate.name, candidate.parameter):
            return candidate
    names = [candidate.name for candidate in facts.layers]
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise SpecError("layer", layer, f"a layer of {facts.name} ({some})", nearest(layer, names))

"""Models and data sets that an operator has registered by Python entry points. Torch-free.

    [project.entry-points."ablation.models"]        NAME = "package.module:function"   () -> (module, transform)
    [project.entry-points."ablation.datasets"]      NAME = "package.module:function"   (root, split) -> Dataset

In: names. Out: names and factories. Only `load_factory` loads code: in workers and on the operator's own command line,
never in the API, which knows what workers publish.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

MODELS, DATASETS = GROUPS = ("ablation.models", "ablation.datasets")


def registered_names(group: str) -> tuple[str, ...]:
    """Names in one of the `GROUPS`, sorted."""
    return tuple(sorted({point.name for point in entry_points(group=group)}))


def load_factory(group: str, name: str) -> Callable[..., Any]:
    """Load the function that is registered as `name`; this may raise whatever its module raises."""
    point = next(point for point in entry_points(group=group) if point.name == name)
    factory: Callable[..., Any] = point.load()
    return factory

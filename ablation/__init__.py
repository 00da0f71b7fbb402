"""The exact importance of single weights: how much does the loss change when this weight is set to zero?

`docs/08-words.md` has the meaning of every word. The map, in reading order (a file imports only files above it):

    errors      the error tree, drawn              intake      models as callers give them; torch's errors in one line
    criteria    predictions beside the truth       baseline    intact loss; determinism check
                                                   partial     raw sums over one shard, and all of them
    spec        JobSpec: what was asked            cache       activations kept between jobs
    inputs/     opens models and data              engine/     run one shard -> PartialSums
    sites       list weights, draw sampled ones    layers      what a model's layers are, the path each takes
    cost, machine   costs; pace and memory here    table       one frozen row per site
    plan        spec + shapes -> shards            statistics, export   read the table only
    views       what is told of models and plans   plots       a figure of the table
    precision   float64 from the target on         devices     what torch finds here to compute on
    loss        one number from each example       job         a job with its model and data loaded
    reference   zero, forward, restore: the truth  shard       run one shard of a job
                                                   proof, memory   check a job; begin it again where memory runs out
                                                   run         the whole walk on one screen
                                                   notebook    `ablation.ablate` and the table it returns
                                                   cli/        an edge: reads the environment, starts services
                                                   __main__    `python -m ablation`, which is the command line
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablation import errors
    from ablation.inputs.data import load_data
    from ablation.inputs.models import load_model
    from ablation.notebook import Table, ablate

    __version__: str

__all__ = ["Table", "__version__", "ablate", "errors", "load_data", "load_model"]

_HOMES = {
    "Table": "ablation.notebook",
    "ablate": "ablation.notebook",
    "load_data": "ablation.inputs.data",
    "load_model": "ablation.inputs.models",
}


def __getattr__(name: str) -> Any:  # torch is loaded when it is first needed, so that `import ablation` is quick
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "errors":
        return import_module("ablation.errors")
    if name == "__version__":
        from importlib.metadata import version

        return version("weight-ablation")
    raise AttributeError(f"module 'ablation' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

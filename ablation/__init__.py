"""The exact importance of single weights: how much does the loss change when this weight is set to zero?

`docs/08-words.md` has the meaning of every word. The map, in reading order (a file imports only files above it):

    errors      the error tree, drawn              intake      models as callers give them; torch's errors in one line
    criteria    predictions beside the truth       baseline    intact loss; determinism check
    spec        JobSpec: what was asked            sight       does all a model does stay in sight?
    inputs/     opens models and data              partial     raw sums over one shard, and all of them
    sites       list weights, draw sampled ones    cache       activations kept between jobs
    cost, machine   costs; pace and memory here    engine/     run one shard -> PartialSums
    plan        spec + shapes -> shards            layers      what a model's layers are, the path each takes
    views       what is told of models and plans   table       one frozen row per site
    sharing     numbers held in several places     statistics, export   read the table only
    precision   float64 from the target on         results     the files of a job that is done, and back from them
    found       a model is left as it was found    plots       a figure of the table
                                                   compiling, devices   told of loops; what torch finds here
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
    from ablation.notebook import Table, ablate, open_results

    __version__: str

__all__ = ["Table", "__version__", "ablate", "errors", "load_data", "load_model", "open_results"]

_HOMES = {
    "Table": "ablation.notebook",
    "ablate": "ablation.notebook",
    "load_data": "ablation.inputs.data",
    "load_model": "ablation.inputs.models",
    "open_results": "ablation.notebook",
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

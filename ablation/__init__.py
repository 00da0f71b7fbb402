"""The exact importance of single weights: how much does the loss change when this weight is set to zero?

`docs/08-words.md` has the meaning of every word. The map, in reading order (a file imports only files above it):

    errors      the error tree, drawn              baseline    intact loss; determinism check
    criteria    predictions beside the truth       sight       does all a model does stay in sight?
    spec        JobSpec: what was asked            partial     raw sums over one shard, and all of them
    inputs/     opens models and data              cache       activations kept between jobs
    sites       list weights, draw sampled ones    engine/     run one shard -> PartialSums
    cost, machine   costs; pace and memory here    layers      what a model's layers are, the path each takes
    plan        spec + shapes -> shards            table       one frozen row per site
    views       what is told of models and plans   statistics, export   read the table only
    sharing     numbers held in several places     results     the files of a job that is done, and back from them
    precision   float64 from the target on         plots       a figure of the table
    found       a model is left as it was found    compiling, devices   told of loops; what torch finds here
    loss        one number from each example       job         a job with its model and data loaded
    reference   zero, forward, restore: the truth  shard       run one shard of a job
                                                   proof, memory   check a job; begin it again where memory runs out
                                                   run         the whole walk on one screen
                                                   notebook    `ablation.ablate` and the table it returns
                                                   cli/        an edge: reads the environment, starts services
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablation.inputs.data import load_data
    from ablation.inputs.models import load_model
    from ablation.notebook import ablate, open_results

__all__ = ["ablate", "load_data", "load_model", "open_results"]


def __getattr__(name: str) -> Any:  # torch is loaded when it is first needed, so that `import ablation` is quick
    if name == "ablate":
        from ablation.notebook import ablate

        return ablate
    if name == "open_results":
        from ablation.notebook import open_results

        return open_results
    if name == "load_model":
        from ablation.inputs.models import load_model

        return load_model
    if name == "load_data":
        from ablation.inputs.data import load_data

        return load_data
    raise AttributeError(f"module 'ablation' has no attribute {name!r}")

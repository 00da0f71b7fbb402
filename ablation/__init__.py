"""The exact importance of single weights: how much does the loss change when this weight is set to zero?

The map, in reading order (a file imports only files above it):

    errors      the error tree, drawn              reference   zero, forward, restore: the truth
    spec        JobSpec: what was asked            baseline    intact loss; determinism check
    folders     where data and checkpoints are     partial     raw sums over one shard: zero, add, merge, join
    images      image folders: classes, files      cache       activations kept between jobs
    published   MNIST's and CIFAR's own files      engine/     run one shard -> PartialSums
    registered  what an operator has added         layers      what a model's layers are, the path each takes
    catalog     names and facts; torch-free        table       one frozen row per site
    data        name -> batches in fixed order     statistics, export   read the table only
    demo        the built-in model, its training   plots       a figure of the table
    models      name -> module in eval mode        proof       the job's own check against the reference
    sites       list weights, draw sampled ones    devices     what torch finds here to compute on
    cost, machine   costs; pace and memory here    run         the whole walk on one screen
    plan        spec + shapes -> shards            notebook    `ablation.ablate` and the table it returns
    views       what is told of models and plans   cli/        an edge: reads the environment, starts services
    precision   float64 from the target on
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablation.data import load_data
    from ablation.models import load_model
    from ablation.notebook import ablate

__all__ = ["ablate", "load_data", "load_model"]


def __getattr__(name: str) -> Any:  # torch is loaded when it is first needed, so that `import ablation` is quick
    if name == "ablate":
        from ablation.notebook import ablate

        return ablate
    if name == "load_model":
        from ablation.models import load_model

        return load_model
    if name == "load_data":
        from ablation.data import load_data

        return load_data
    raise AttributeError(f"module 'ablation' has no attribute {name!r}")

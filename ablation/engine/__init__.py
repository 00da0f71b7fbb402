"""Run one shard: batches in, `PartialSums` out.

The map, in reading order (a file imports only files above it; neither wing imports the other):

    calls        what a network does with its parameters, call by call
    compiled     the decorators of compiled loops
    threads      work cut into ranges that run on threads
    increments   the change of an elementwise function, without cancellation
    expm1        a sum over classes, compiled
    loss         the loss change from a change of logits
    deltas       what every path yields
    interface    what every path is made from, and what it can do
    sums         from deltas to partial sums
    gradients    the sums of gradients that criteria are made of
    prefix       what comes before the target, computed once per batch
    reference    the path `reference`: the whole network again for each site, in float64
    rerun        the path `rerun`: any target, one site at a time
    carried/     the path `finite`: finite differences through any operation
    responses/   the paths `direct` and `response`: where one number per example leads on
    paths        the table of paths, and which of them a parameter can take
    batches      the batches of a shard through a path, summed up

Not here: which shards there are (`plan.py`), where batches come from (`inputs/data.py`), what the sums become
(`table.py`).
"""

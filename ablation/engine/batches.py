"""Run the batches of one shard through a path, and sum up what it yields: batches in, `PartialSums` out.

In: an open path (`paths.py`), the statistics that criteria need, and the shard's batches. Out: a partial. Not here:
where batches come from (`inputs/data.py`), what the sums become (`table.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from jaxtyping import Float64
from torch import Tensor

from ablation import baseline
from ablation.engine.deltas import Deltas, Responses
from ablation.engine.gradients import Gradients
from ablation.engine.interface import EnginePath, Setup, Statistic
from ablation.engine.loss import Intact
from ablation.engine.sums import Sums
from ablation.errors import ExampleError
from ablation.partial import PartialSums
from ablation.reference import intact_logits

N_COMPARED = 32  # examples at the beginning of a shard that the model is run on as it is, for its logits

# How each statistic of `criteria.py` is made ready for one shard: its setup, and how many examples to take at once.
STATISTIC_TYPES: dict[str, Callable[[Setup, int], Statistic]] = {"gradient": Gradients}


def open_statistics(names: Iterable[str], setup: Setup, examples_at_once: int) -> dict[str, Statistic]:
    """Make these statistics ready for one shard."""
    return {name: STATISTIC_TYPES[name](setup, examples_at_once) for name in names}


def run_batches(
    path: EnginePath,
    model: torch.nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_sites: int,
    first_example: int,
    per_class: int | None,
    proof_examples: frozenset[int],
    device: torch.device,
    on_step: Callable[[int, int], None],
    proof: bool = True,
    top1: bool = True,
    statistics: Mapping[str, Statistic] = MappingProxyType({}),
) -> PartialSums:
    """Sum the deltas of all sites over the batches of one shard; `proof`, `top1`: whether their sums are wanted.

    The `statistics` are summed up beside them. They look at the inputs of every batch, so none may be a `cache.Known`.

    `on_step(n_examples, n_sites)` is called after each piece of work with how much of it is done: examples of whole
    batches, and sites of the batch under way. It may raise, to cancel.
    """
    sums = Sums(n_sites, per_class, device, proof=proof, top1=top1, statistics=statistics)
    position = first_example
    for inputs, labels in batches:
        with counting_from(position):
            intact, pieces = path.run(inputs, labels)
            baseline.check_logits(intact.logits, len(labels))
        if position == first_example:  # the path's intact network is the model's own, up to the model's rounding
            own = intact_logits(model, inputs[:N_COMPARED])
            tolerance = baseline.COMPOSITION_TOLERANCE[own.dtype]
            baseline.check_agreement(intact.logits[:N_COMPARED], own, "from what this path computes", tolerance)
            if not intact.is_plain:
                with counting_from(position):
                    baseline.check_loss(intact.function, intact.logits, labels)
        in_proof = torch.tensor([position + k in proof_examples for k in range(len(labels))], device=device)
        for deltas in pieces:
            sums.add(deltas, intact, in_proof)
            with counting_from(position):
                check_deltas(deltas, intact, sums.float["delta"])
            on_step(position - first_example, deltas.rows.stop)
        for name, statistic in statistics.items():
            statistic.add(sums.statistics[name], inputs, labels)
        sums.add_intact(intact)
        position += len(labels)
    for statistic in statistics.values():
        statistic.check(any_touched=bool(sums.count["touched"].any()))
    return sums.finish()


def check_deltas(deltas: Deltas | Responses, intact: Intact, sums: Float64[Tensor, " sites"]) -> None:
    """Refuse a loss change that is not finite: an activation that is not, or a replacement that makes one overflow.

    Looks at the sums, which is cheap, and at the deltas only where a sum is wrong.

    Raises:
        ExampleError: the loss of an example is NaN or infinite with one of the weights replaced.
    """
    is_finite = sums[deltas.rows].isfinite()
    if is_finite.all():
        return
    if not isinstance(deltas, Deltas):
        deltas = deltas.deltas_of((~is_finite).nonzero()[:1, 0].cpu().numpy(), intact)
    bad = (~deltas.delta.isfinite()).any(dim=0).nonzero().flatten().tolist()
    what = "gives a NaN or infinite loss once a weight is replaced"
    raise ExampleError(bad[0], f"{what}; check its activations and the replacement value.")


@contextmanager
def counting_from(first: int) -> Iterator[None]:
    """Let errors about an example count it from the beginning of the split, and not of the batch."""
    try:
        yield
    except ExampleError as error:
        raise ExampleError(first + error.position, error.what) from None

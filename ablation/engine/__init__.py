"""Run one shard: batches in, `PartialSums` out.

The map, in reading order (a file imports only files above it; neither wing imports the other):

    calls        what a network does with its parameters, call by call
    compiled     the decorators of compiled loops
    threads      work cut into ranges that run on threads
    increments   the change of an elementwise function, without cancellation
    expm1        a sum over classes, compiled
    loss         the loss change from a change of logits
    deltas       what every path yields
    sums         from deltas to partial sums
    prefix       what comes before the target, computed once per batch
    rerun        the path `rerun`: any target, one site at a time
    carried/     the path `finite`: finite differences through any operation
    responses/   the paths `direct` and `response`: where one number per example leads on

Not here: which shards there are (`plan.py`), where batches come from (`inputs/data.py`), what the sums become
(`table.py`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ablation import baseline
from ablation.cache import Activations
from ablation.engine.calls import record_calls
from ablation.engine.carried.finite import Finite
from ablation.engine.deltas import Deltas, Responses
from ablation.engine.loss import Intact, make_intact
from ablation.engine.rerun import Rerun
from ablation.engine.responses.averaged import Pooled
from ablation.engine.responses.averaged_way import find_tail
from ablation.engine.responses.direct import Direct
from ablation.engine.responses.head import find_head
from ablation.engine.responses.rows import Whole
from ablation.engine.responses.three_linears import Deep, find_deep
from ablation.engine.sums import Sums
from ablation.errors import ExampleError, ModelError
from ablation.partial import PartialSums
from ablation.precision import fit
from ablation.reference import in_float64, intact_logits, run_reference
from ablation.sites import Sites

N_COMPARED = 32  # examples at the beginning of a shard that the model is run on as it is, for its logits


@runtime_checkable
class EnginePath(Protocol):
    """One way to get the deltas; holds what does not change from batch to batch."""

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas | Responses]]:
        """One batch: the intact network, and the deltas of all sites; or functions that sum them up."""
        ...


class Reference:
    """`reference.py` as a path: the whole network in float64, one site at a time."""

    def __init__(self, model: torch.nn.Module, parameter: str, sites: Sites) -> None:
        self.model = in_float64(model)
        self.parameter = parameter
        self.sites = sites

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Deltas]]:
        """One batch."""
        inputs = fit(inputs, self.model)
        intact = make_intact(intact_logits(self.model, inputs), labels)
        return intact, self._deltas(intact, inputs)

    def _deltas(self, intact: Intact, inputs: Tensor) -> Iterator[Deltas]:
        for row in range(len(self.sites)):
            rows = slice(row, row + 1)
            truth = run_reference(self.model, self.parameter, self.sites[rows], inputs, intact.labels)
            yield Deltas(rows, truth.delta, truth.touched, truth.correct)


def open_path(
    path: str,
    model: torch.nn.Module,
    parameter: str,
    sites: Sites,
    example: Any,
    *,
    precision: str,
    top1: bool,
    lanes: int,
    activations: Activations | None = None,
) -> EnginePath:
    """Make the path ready for one shard. `example` is a small batch, looked at to find the classifier head."""
    if path in ("direct", "response"):
        calls = record_calls(model, example)
        if (tail := find_tail(calls, parameter)) is not None:
            return Pooled(model, tail, sites, precision=precision, top1=top1)
        if path == "response" and (deep := find_deep(calls, parameter)) is not None:
            return Deep(model, deep, sites, precision=precision, top1=top1, activations=activations)
        head = find_head(calls, parameter)
        if head is None:
            raise ModelError(f"{parameter} is not part of a classifier head on this data; use engine='finite'.")
        of_head = Direct if path == "direct" else Whole
        return of_head(model, head, sites, precision=precision, top1=top1, activations=activations)
    if path == "finite":
        return Finite(model, parameter, sites, precision=precision, top1=top1, lanes=lanes, activations=activations)
    if path == "rerun":
        return Rerun(model, parameter, sites, precision=precision, top1=top1, activations=activations)
    return Reference(model, parameter, sites)


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
) -> PartialSums:
    """Sum the deltas of all sites over the batches of one shard; `proof`, `top1`: whether their sums are wanted.

    `on_step(n_examples, n_sites)` is called after each piece of work with how much of it is done: examples of whole
    batches, and sites of the batch under way. It may raise, to cancel.
    """
    sums = Sums(n_sites, per_class, device, proof=proof, top1=top1)
    position = first_example
    for inputs, labels in batches:
        with counting_from(position):
            intact, pieces = path.run(inputs, labels)
            baseline.check_logits(intact.logits, len(labels))
        if position == first_example:  # the path's intact network is the model's own, up to the model's rounding
            own = intact_logits(model, inputs[:N_COMPARED])
            tolerance = baseline.COMPOSITION_TOLERANCE[own.dtype]
            baseline.check_agreement(intact.logits[:N_COMPARED], own, "from what this path computes", tolerance)
        in_proof = torch.tensor([position + k in proof_examples for k in range(len(labels))], device=device)
        for deltas in pieces:
            sums.add(deltas, intact, in_proof)
            with counting_from(position):
                check_deltas(deltas, intact, sums.float["delta"])
            on_step(position - first_example, deltas.rows.stop)
        sums.add_intact(intact)
        position += len(labels)
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

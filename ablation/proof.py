"""The job's own check against the reference: does what the table says agree with brute force?

In: a job and the sums over its examples. Out: a plain record of errors, or `ProofError`.
Chosen sites go through `reference.py` on examples drawn from every shard. Three numbers come out:

    arithmetic error   the engine's own: the reference continued in float64 from the same layer input
    model rounding     float32's own: against the whole model in float64 (reported, not bounded), on a few examples
    sum error          what the shards summed up over these examples, against the reference's sums:
                       it ties the rows of the table to the right weights and the right examples
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ablation.cost import PROVED_WHOLE
from ablation.engine.deltas import Deltas, Responses
from ablation.engine.interface import EnginePath
from ablation.engine.loss import Intact
from ablation.errors import ProofError
from ablation.job import Job
from ablation.loss import CROSS_ENTROPY, Loss, loss_values
from ablation.partial import PartialSums
from ablation.precision import fit
from ablation.reference import in_float64, reference_deltas
from ablation.shard import open_engine, read
from ablation.sites import Sites

# Bounds of docs/02-exactness.md. float32 has none; its errors are only reported.
ARITHMETIC_BOUND = {"mixed": 1e-4, "float64": 1e-9, "float32": None}
# The prefix runs here in another batch composition than in the shards, so float32 rounds differently (seen: 1e-5);
# wrong rows or examples give errors of order 1.
SUM_BOUND = {"mixed": 1e-2, "float64": 1e-9, "float32": 1e-1}
ROUNDING = 4e-15  # of 1 + mean loss, in nats: what subtracting two float64 losses can't see; of large logits a tenth
MAX_CANDIDATES = 1 << 20  # rows that the proof chooses from; of a larger table,
N_CANDIDATES = 1 << 12  # so many of the touched ones, drawn, beside the largest


@dataclass(frozen=True)
class Compared:
    """One split: the engine's and the reference's per-example deltas for the same sites and examples."""

    engine: Float64[np.ndarray, "sites examples"]
    continued: Float64[np.ndarray, "sites examples"]
    whole: Float64[np.ndarray, "sites first"]  # of the first few examples
    sums: Float64[np.ndarray, " sites"]
    utility_rms: float
    rounding: float  # what subtracting two losses can't see


def run_proof(
    job: Job, totals: dict[str, PartialSums], rows: Int64[np.ndarray, " rows"] | None = None
) -> dict[str, Any] | None:
    """The job's own check: chosen sites through the reference, on the plan's proof examples of every split.

    `rows` of the table are those whose sums `totals` are; None: all. Without a site to check there is no proof: None.
    """
    n_sites = min(job.plan.proof.n_sites, len(next(iter(totals.values())).delta))
    if not n_sites:
        return None
    chosen = choose_proved(totals, n_sites)
    sites = job.sites.pick(chosen if rows is None else rows[chosen])
    job = replace(job, activations=None)  # computed anew here
    compared = {}
    for name, total in totals.items():
        positions = np.asarray(job.plan.proof.examples[name])
        example = next(read(job, name, positions[:2]))[0]
        compared[name] = compare(
            open_engine(job, sites, example),
            job.model,
            job.plan.parameter,
            sites,
            read(job, name, positions),
            sums=take_proof(total, chosen),
            utility_rms=rms(total.delta / total.n_examples),
            mean_loss=total.loss / total.n_examples,
            loss=job.loss,
        )
    return make_proof(compared, job.plan.precision)


def choose_proved(totals: dict[str, PartialSums], n_sites: int) -> np.ndarray:
    """The rows to prove; in a large table, chosen among the largest utilities and a draw of the touched rows."""
    n_rows = len(next(iter(totals.values())).delta)
    rows = np.arange(n_rows) if n_rows <= MAX_CANDIDATES else choose_candidates(totals, n_sites)
    utility = np.stack([total.delta[rows] / total.n_examples for total in totals.values()])
    touched = np.stack([total.touched[rows].astype(np.int64) for total in totals.values()])
    return rows[choose_rows(utility, touched, n_sites)]


def choose_candidates(totals: dict[str, PartialSums], n_sites: int) -> np.ndarray:
    """Some rows of a large table, sorted: the `n_sites` largest of each split, and a draw of all and of the touched."""
    random = np.random.default_rng(0)
    n_rows = len(next(iter(totals.values())).delta)
    chosen = [random.integers(0, n_rows, n_sites)]
    for total in totals.values():
        chosen.append(np.argpartition(np.nan_to_num(np.abs(total.delta)), -n_sites)[-n_sites:])
        touched = np.flatnonzero(total.touched)
        if len(touched):
            chosen.append(touched[random.integers(0, len(touched), N_CANDIDATES)])
    return np.unique(np.concatenate(chosen))


def take_proof(total: PartialSums, rows: np.ndarray) -> np.ndarray:
    """The sums over the proof's examples alone."""
    assert total.proof is not None  # of a job that is proved
    return total.proof[rows]


def choose_rows(
    utility: Float64[np.ndarray, "splits sites"], touched: Int64[np.ndarray, "splits sites"], n: int
) -> Int64[np.ndarray, " rows"]:
    """The rows to prove: half of them the largest |utility|, the others drawn from those that were touched."""
    size = np.nan_to_num(np.abs(utility)).max(axis=0)
    largest = np.argsort(-size, kind="stable")[: (n + 1) // 2]
    others = np.setdiff1d(np.flatnonzero(touched.sum(axis=0) > 0), largest)
    rest = np.setdiff1d(np.arange(utility.shape[1]), np.union1d(largest, others))
    random = np.random.default_rng(0)
    drawn = np.concatenate([random.permutation(others), random.permutation(rest)])[: n - len(largest)]
    return np.sort(np.concatenate([largest, drawn])).astype(np.int64)


def compare(
    path: EnginePath,
    model: torch.nn.Module,
    parameter: str,
    sites: Sites,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    sums: Float64[np.ndarray, " sites"],
    utility_rms: float,
    mean_loss: float,
    loss: Loss = CROSS_ENTROPY,
) -> Compared:
    """Run engine and reference side by side over the proof's examples of one split."""
    columns: dict[str, list[Tensor]] = {"engine": [], "continued": [], "whole": []}
    largest_logit, unit = 0.0, 1.0
    batches = [*batches]  # of a proof's few examples
    for inputs, labels in batches:
        intact, pieces = path.run(inputs, labels)
        largest_logit = max(largest_logit, float(intact.logits.abs().max()))
        unit = max(unit, _unit(loss, intact.logits, labels))
        columns["engine"].append(torch.cat([_deltas_of(piece, intact).delta for piece in pieces]))
        columns["continued"].append(reference_deltas(model, parameter, sites, inputs, labels, loss))
    model = in_float64(model)  # only now: the reference keeps float64 numbers, too, while it runs
    for inputs, labels in cut_short(batches, PROVED_WHOLE):
        columns["whole"].append(reference_deltas(model, parameter, sites, fit(inputs, model), labels, loss))
    arrays = {name: torch.cat(parts, dim=1).cpu().numpy() for name, parts in columns.items()}
    rounding = ROUNDING * (unit + mean_loss) + ROUNDING / 10 * unit * largest_logit
    return Compared(**arrays, sums=sums, utility_rms=utility_rms, rounding=rounding)


def _deltas_of(piece: Deltas | Responses, intact: Intact) -> Deltas:
    """The deltas example by example; response functions, which a path yields for many sites, compute them."""
    return piece if isinstance(piece, Deltas) else piece.deltas_of(np.arange(piece.rows.stop), intact)


def _unit(loss: Loss, logits: Float[Tensor, "examples classes"], labels: Int64[Tensor, " examples"]) -> float:
    """The ratio of the loss to cross-entropy at logits of 0 (at least 1), by which its rounding error grows."""
    flat = torch.zeros_like(logits)
    ratio = loss_values(loss, flat, labels) / loss_values(CROSS_ENTROPY, flat, labels)
    return max([1.0, *ratio[ratio.isfinite()].abs().tolist()])


def cut_short(batches: Iterable[tuple[Tensor, Tensor]], n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `n` examples."""
    for inputs, labels in batches:
        if n > 0:
            yield inputs[:n], labels[:n]
        n -= len(labels)


def make_proof(compared: Mapping[str, Compared], precision: str) -> dict[str, Any]:
    """The errors over all splits, as the record that goes into the table.

    Raises:
        ProofError: an error is beyond its bound; both numbers are in the message.
    """
    rounding = np.concatenate([_model_rounding(split) for split in compared.values()])
    arithmetic = max(float(_arithmetic_errors(split, precision).max()) for split in compared.values())
    sum_error = max(float(_sum_errors(split).max()) for split in compared.values())
    proof = {
        "n_sites": next(iter(compared.values())).engine.shape[0],
        "n_examples": sum(split.engine.shape[1] for split in compared.values()),
        "arithmetic_error": arithmetic,
        "arithmetic_bound": ARITHMETIC_BOUND[precision],
        "model_rounding_median": float(np.median(rounding)),
        "model_rounding_p99": float(np.quantile(rounding, 0.99)),
        "sum_error": sum_error,
        "sum_bound": SUM_BOUND[precision],
    }
    _require(proof, "arithmetic", "the engine against the reference from the same layer input")
    _require(proof, "sum", "the table's sums against the reference's on the same examples, read once more,")
    return proof


def _require(proof: dict[str, Any], name: str, what: str) -> None:
    error, bound = proof[f"{name}_error"], proof[f"{name}_bound"]
    if bound is not None and not error <= bound:
        raise ProofError(
            f"the proof failed: {what} is off by {error:.3g}, allowed is {bound:.3g}. The results are withheld; "
            "precision='float64' or engine='reference' may do; please report this model."
        )


def _arithmetic_errors(split: Compared, precision: str) -> Float64[np.ndarray, " sites"]:
    """Per example against the mean |delta|, and of the utility against |u|; neither, but for float64, below 0.01 rms u.

    float32 sums over classes, which may all but cancel: a delta that is nothing beside others may be off by more of it.
    """
    floor = split.rounding
    difference = np.maximum(np.abs(split.engine - split.continued) - floor, 0).mean(axis=1)
    size = np.abs(split.continued).mean(axis=1)
    if precision == "float64":
        return _ratio(difference, size)
    utility, least = split.continued.mean(axis=1), 0.01 * split.utility_rms
    of_examples = _ratio(difference, np.maximum(size, least))
    difference = np.maximum(np.abs(split.engine.mean(axis=1) - utility) - floor, 0)
    return np.maximum(of_examples, _ratio(difference, np.maximum(np.abs(utility), least)))


def _model_rounding(split: Compared) -> Float64[np.ndarray, " sites"]:
    engine = split.engine[:, : split.whole.shape[1]]
    difference = np.abs(engine.mean(axis=1) - split.whole.mean(axis=1))
    return _ratio(difference, _scale(split.whole))


def _sum_errors(split: Compared) -> Float64[np.ndarray, " sites"]:
    n_examples = split.continued.shape[1]
    difference = np.maximum(np.abs(split.sums - split.continued.sum(axis=1)) / n_examples - split.rounding, 0)
    return _ratio(difference, _scale(split.continued))


def _scale(deltas: Float64[np.ndarray, "sites examples"]) -> Float64[np.ndarray, " sites"]:
    """max(mean_n |delta_n|, 0.1 of its rms over sites)."""
    mean = np.abs(deltas).mean(axis=1)
    return np.maximum(mean, 0.1 * rms(mean))


def rms(values: Float64[np.ndarray, " _"]) -> float:
    """Root mean square, also where the squares are too large for float64: an infinite scale would prove anything."""
    peak = float(np.abs(values).max(initial=0.0))
    return peak * float(np.sqrt(np.mean((values / peak) ** 2))) if 0 < peak < np.inf else peak


def _ratio(difference: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """difference / scale, where 0 against 0 is 0 and anything against 0 is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / scale)

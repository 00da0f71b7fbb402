"""Run one shard of a job: the sums over its examples for its sites.

In: a loaded `Job` and one of its plan's shards. Out: `PartialSums`. Shards with the same examples share what comes
before the layer: it is computed once, kept in the cache, and found again by notes of which batch lies where.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ablation import baseline
from ablation.cache import Notes, find_next, find_start, make_known
from ablation.criteria import find_statistics
from ablation.devices import freed_memory_kept
from ablation.engine.batches import open_statistics, run_batches
from ablation.engine.interface import EnginePath, HasPrefix, Setup
from ablation.engine.paths import open_path
from ablation.errors import DataError, ExampleError
from ablation.found import Unchanged, Writes
from ablation.inputs.data import is_stateless, load_batches, name_example
from ablation.intake import failures_told, run_plainly
from ablation.job import Job, Split, check_pictures
from ablation.loss import CrossEntropy
from ablation.partial import PartialSums
from ablation.plan import Plan, Shard
from ablation.precision import fit
from ablation.reference import intact_logits
from ablation.sight import check_in_sight
from ablation.sites import Sites

READY_SHARE = 0.05  # of a shard's progress, once it is ready for its first batch
FILL_SHARE = 0.5  # of the rest, where all of its activations are missing
N_READ_TWICE = 64  # examples of a split that are read twice before it is worked on
REREAD_EVERY = 32  # and one example in so many once more, while it is
SUM_TOLERANCE = 1e-2  # of the sum of outputs that count as probabilities, in half precision too
PROBABILITIES = (
    "the model's outputs look like probabilities (none is negative, and each example's add up to 1), and the "
    "cross-entropy takes them for logits: measure the model without its last softmax."
)
N_CHECKED = 32  # examples at the beginning of a split that the model is checked on


def run_shard(job: Job, shard: Shard, *, on_batch: Callable[[float], None] = lambda fraction: None) -> PartialSums:
    """The sums over one shard's examples for one shard's sites.

    `on_batch` is called with the fraction of the shard that is done; it may raise to cancel.
    """
    first, last = shard.examples
    rows = slice(*shard.sites)
    n_sites = rows.stop - rows.start
    positions = np.arange(first, last)
    told = failures_told(job.model, lambda: f"examples {first} to {last - 1} of {shard.split}")
    with (
        told,
        run_plainly(),
        threads_of(job.plan),
        freed_memory_kept(),
        example_of(job.splits[shard.split], np.arange(last)),
    ):
        if shard == job.plan.shards[0]:
            check_pictures(job, lambda part: on_batch(0.0))
        example = next(read(job, shard.split, positions[:2]))[0]
        unchanged, writes = Unchanged(job.model), Writes(job.model)
        if first == 0 and rows.start == 0:
            n_checked = min(N_CHECKED, max(2, job.plan.batch_size))  # with one alone, no batch mates would be seen
            inputs = torch.cat([batch for batch, _ in read(job, shard.split, positions[:n_checked])])
            baseline.check_repeatable(example, inputs)
            check_examples(job, shard.split)
            on_batch(0.0)
            try:
                baseline.check_composition(job.model, inputs, job.plan.parameter, writes)
            finally:
                unchanged.check(writes)
            on_batch(0.0)
            if job.plan.path not in ("direct", "response"):  # these two have looked for the parameter themselves
                needs_sight = job.plan.path != "reference"
                baseline.check_used(job.model, job.plan.parameter, inputs, needs_sight=needs_sight)
            if job.plan.path == "finite":
                check_in_sight(job.model, job.plan.parameter, example)
            on_batch(0.0)
        else:
            with writes:
                intact_logits(job.model, example)
        path = open_engine(job, job.sites[rows], example)
        setup = make_setup(job, job.sites[rows])
        at_once = job.plan.gradient_batch_size or job.plan.batch_size
        statistics = open_statistics(find_statistics(job.spec.criteria), setup, at_once)
        on_batch(READY_SHARE)
        filled, batches = READY_SHARE, reread(job, shard.split, positions)
        if isinstance(path, HasPrefix) and (notes := notes_of(job, shard)):
            filled += (1 - READY_SHARE) * FILL_SHARE * len(notes.missing()) / len(notes.batches)
            fill(job, shard, path, notes, lambda part: on_batch(READY_SHARE + (filled - READY_SHARE) * part))
            if not statistics:  # which need the inputs themselves
                batches = read_noted(job, shard, notes)
        partial = run_batches(
            path,
            job.model,
            batches,
            n_sites=n_sites,
            first_example=first,
            per_class=job.plan.find_split(shard.split).per_class,
            proof_examples=frozenset(job.plan.proof.examples.get(shard.split, ())),
            device=job.device,
            on_step=lambda examples, sites: on_batch(
                filled
                + (1 - filled)
                * (examples + sites / n_sites * min(job.plan.batch_size, last - first - examples))
                / (last - first)
            ),
            proof=bool(job.plan.proof.n_sites),
            top1=job.spec.top1,
            statistics=statistics,
        )
        unchanged.check(writes)
        return partial


def check_examples(job: Job, split: str) -> None:
    """Read some examples from all over a split twice, in two orders, with different random states.

    Raises:
        DataError: one of them differs; the message names it.
    """
    part = job.splits[split]
    if is_stateless(part.dataset, part.collate):
        return
    draw, n = np.random.default_rng(0), len(part.indices)
    chosen = draw.choice(n, size=min(n, N_READ_TWICE), replace=False)
    order = draw.permutation(len(chosen))
    with shaken(1):
        first = _read_all(job, part, chosen)
    with shaken(2):
        again = _read_all(job, part, chosen[order])
    back = np.argsort(order)
    with example_of(part, chosen):
        for before, after in zip(first, again, strict=True):
            baseline.check_repeatable(before, after[torch.from_numpy(back)])


def _read_all(job: Job, part: Split, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    batches = [*load_batches(part.dataset, part.indices[positions], job.plan.batch_size, collate=part.collate)]
    inputs, labels = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(labels)


@contextmanager
def shaken(seed: int) -> Iterator[None]:
    """Context in which the random states of Python, numpy and torch are others; they are restored."""
    drawn = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


def doubt_outputs(job: Job) -> list[str]:
    """A warning where the model's outputs look like probabilities, of which a cross-entropy of logits says nothing."""
    split = next(iter(job.splits))
    if not isinstance(job.loss, CrossEntropy):
        return []
    inputs, _ = next(read(job, split, np.arange(min(2, len(job.splits[split].indices)))))
    outputs = intact_logits(job.model, inputs).double()
    are_probabilities = outputs.min() >= 0 and (outputs.sum(dim=1) - 1).abs().max() < SUM_TOLERANCE
    return [PROBABILITIES] if are_probabilities else []


def reread(job: Job, split: str, positions: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that `read` gives; once each has been worked on, an example in `REREAD_EVERY` is read once more.

    Raises:
        DataError: an example is not what it was.
    """
    part = job.splits[split]
    is_known = is_stateless(part.dataset, part.collate)
    draw, done, left = np.random.default_rng(1), 0, 1.0
    for inputs, labels in read(job, split, positions):
        yield inputs, labels
        left += len(labels) / REREAD_EVERY
        n = 0 if is_known else min(int(left), len(labels))
        left -= n
        for place in draw.choice(len(labels), size=n, replace=False):
            where = positions[done + place : done + place + 1]
            again, label = next(read(job, split, where))
            with example_of(part, where):
                baseline.check_repeatable(inputs[place : place + 1], again)
                baseline.check_repeatable(labels[place : place + 1], label)
        done += len(labels)


def notes_of(job: Job, shard: Shard) -> Notes | None:
    """The notes of the shards with this shard's examples; None where there is no other such shard, or no cache."""
    if job.activations is None or len(sharing(job.plan, shard)) == 1:
        return None
    first, last = shard.examples
    starts = range(first, last, job.plan.batch_size)
    batches = tuple((start, min(last, start + job.plan.batch_size)) for start in starts)
    return Notes(job.activations, f"{job.name} {shard.split}", batches)


def drop_notes(job: Job) -> None:
    """Delete what the shards of this job have noted for each other."""
    for shard in {(shard.split, shard.examples): shard for shard in job.plan.shards}.values():
        if notes := notes_of(job, shard):
            notes.drop()


def sharing(plan: Plan, shard: Shard) -> list[str]:
    """The shards with the same examples."""
    return [other.id for other in plan.shards if (other.split, other.examples) == (shard.split, shard.examples)]


def fill(job: Job, shard: Shard, path: HasPrefix, notes: Notes, on_batch: Callable[[float], None]) -> None:
    """Put what comes before the layer into the cache for every batch of the shard, together with other workers.

    `on_batch` is called with the fraction of the batches that are there. Filling stops where the cache has no room.
    """
    n_batches = len(notes.batches)
    batch = find_start(sharing(job.plan, shard).index(shard.id), n_batches)
    own: set[int] = set()  # not done again, even if they are gone already
    while missing := [batch for batch in notes.missing() if batch not in own]:
        batch = find_next(missing, batch)
        for inputs, labels in read(job, shard.split, np.arange(notes.batches[batch][0], shard.examples[1])):
            if batch in own or notes.has(batch):
                break
            address = notes.activations.address(inputs)
            if not notes.activations.has(address):
                path.keep_prefix(inputs)
                if not notes.activations.has(address):
                    return
            notes.put(batch, address, labels)
            own.add(batch)
            missing.remove(batch)
            on_batch(1 - len(missing) / n_batches)
            batch += 1
    on_batch(1.0)


def read_noted(job: Job, shard: Shard, notes: Notes) -> Iterator[tuple[Tensor, Tensor]]:
    """The shard's batches in order; a batch that the cache holds is not read from the data set.

    The first batch is always read: the path is compared with the model itself on it.
    """
    for batch, (first, last) in enumerate(notes.batches):
        known = notes.get(batch) if batch else None
        if known is not None and notes.activations.hold(known[0]):
            yield make_known(known[0], last - first), known[1].to(job.device)
        else:
            notes.activations.held.clear()
            yield from read(job, shard.split, np.arange(first, last))
    notes.activations.held.clear()


def open_engine(job: Job, sites: Sites, example: Tensor) -> EnginePath:
    """The plan's path for these sites."""
    setup = make_setup(job, sites if job.plan.path == "response" else sites.listed())
    return open_path(job.plan.path, setup, example)


def make_setup(job: Job, sites: Sites) -> Setup:
    """What the engine is told of the job, for these sites."""
    plan = job.plan
    return Setup(job.model, plan.parameter, sites, plan.precision, job.spec.top1, plan.lanes, job.activations, job.loss)


def read(job: Job, split: str, positions: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples at these positions of a split's fixed order: batches on the job's device, their labels checked."""
    part = job.splits[split]
    done = 0
    for inputs, labels in load_batches(
        part.dataset,
        part.indices[positions],
        job.plan.batch_size,
        collate=part.collate,
        pin_memory=job.device.type == "cuda",
    ):
        with example_of(part, positions[done:]):
            baseline.check_labels(labels, job.plan.n_classes)
        done += len(labels)
        yield fit(inputs, job.model), labels.to(job.device, torch.int64)


@contextmanager
def example_of(split: Split, positions: np.ndarray) -> Iterator[None]:
    """Context in which errors about an example, counted among `positions`, name it as the data set does."""
    try:
        yield
    except ExampleError as error:
        index = int(split.indices[positions[error.position]])
        raise DataError(f"{name_example(split.dataset, index)} {error.what}") from None


@contextmanager
def threads_of(plan: Plan) -> Iterator[None]:
    """Context in which torch runs the plan's number of threads, which affects the last bits of results."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

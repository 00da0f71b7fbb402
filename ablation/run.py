"""The whole walk on one screen, without a queue.

    JobSpec -> sites -> Plan -> shards -> PartialSums -> merge/join -> ImportanceTable

In: a spec and folders (`run_spec`), or a loaded `Job` (`run_job`). Out: an `ImportanceTable`.
The service does the same with `run_shard` in many workers and `finish_job` in one of them.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch

from ablation.compiling import COMPILING, compiling_told
from ablation.inputs.folders import Folders
from ablation.intake import failures_told, run_plainly
from ablation.job import Begin, Job, describe_job, load_job, plan_here, say_inputs
from ablation.machine import measure_machine
from ablation.memory import run_smaller
from ablation.partial import Gathered, PartialSums, take_rows
from ablation.plan import Plan, PlanOptions, Shard
from ablation.proof import rms, run_proof
from ablation.shard import doubt_outputs, drop_notes, run_shard, threads_of
from ablation.sites import EveryWeight, find_not_finite
from ablation.spec import JobSpec
from ablation.table import ImportanceTable, make_table


class Kept(Protocol):
    """Where what is done of a job is kept, so that the job goes on from there after it was interrupted.

    Shards of the same sites are kept together: the sums over the examples of those that are done, in plan order.
    """

    seconds: float  # that earlier processes have computed on the job

    def find_plan(self, n_halved: int) -> Plan | None:
        """The plan that the job was begun with; None where there is none, or it is to be cut smaller than that."""

    def start(self, job: Job) -> Job:
        """Note what a job is begun with, or check that it is what it was begun with, and return it with its `begin`."""

    def get(self, shard: Shard) -> tuple[int, PartialSums] | None:
        """How many shards of this one's sites are done, and their sums; None where none is."""

    def put(self, shard: Shard, n_done: int, partial: PartialSums, seconds: float) -> None:
        """Keep the sums over the first `n_done` shards of this one's sites."""


def run_spec(
    spec: JobSpec,
    folders: Folders,
    options: PlanOptions | None = None,
    *,
    device: str | None = None,
    on_progress: Callable[[float, str], None] = lambda fraction, what: None,
    begin: Begin | None = None,
    kept: Kept | None = None,
) -> ImportanceTable:
    """Load, plan and run a job in this process.

    `options`: how it is cut; None: by the plan, for as many threads as torch has. It is not shared, and the machine is
    this one, whatever they say, with as much memory as they allow. `kept`: where shards are kept that are done.
    """
    on_progress(0.0, "reading the model and the data")
    options = options or PlanOptions(torch.get_num_threads())
    machine = measure_machine()
    machine = replace(machine, memory_bytes=min(machine.memory_bytes, options.machine.memory_bytes))
    options = replace(options, is_shared=False, is_kept=kept is not None, machine=machine)

    def make(n_halved: int) -> Job:
        known = kept.find_plan(n_halved) if kept else None
        plan = known or plan_here(spec, folders, replace(options, n_halved=n_halved))
        job = load_job(spec, plan, folders, device=device, begin=begin or Begin())
        return kept.start(job) if kept else job

    last = 0.0

    def show(part: float) -> None:
        nonlocal last
        last = part
        on_progress(part, "examples x sites" if part < 1 else "checking against the reference")

    with compiling_told(lambda: on_progress(last, COMPILING)):
        return run_smaller(
            make,
            lambda job: run_job(job, on_progress=show, kept=kept),
            may_halve=options.batch_size is None,
            on_smaller=lambda plan: on_progress(0.0, f"memory ran out: again, in batches of {plan.batch_size}"),
        )


def run_job(
    job: Job, *, on_progress: Callable[[float], None] = lambda fraction: None, kept: Kept | None = None
) -> ImportanceTable:
    """Every shard in turn, then the table. `on_progress` gets the fraction of the job that is done."""
    started = time.monotonic() - (kept.seconds if kept else 0.0)
    gathered = {split.name: Gathered(job.plan.n_sites) for split in job.plan.splits}
    all_pairs, done = sum(map(_n_pairs, job.plan.shards)), 0.0

    def run(shard: Shard) -> PartialSums:  # one partial at a time is there
        return run_shard(job, shard, on_batch=lambda part: on_progress((done + part * _n_pairs(shard)) / all_pairs))

    for (split, sites), same_sites in groupby(job.plan.shards, key=lambda shard: (shard.split, shard.sites)):
        shards = [*same_sites]
        n_kept, partial = (kept and kept.get(shards[0])) or (0, None)
        if partial is not None:
            gathered[split].add(sites, partial)
            done += sum(map(_n_pairs, shards[:n_kept]))
            on_progress(done / all_pairs)
        for n_done, shard in enumerate(shards[n_kept:], n_kept + 1):
            gathered[split].add(sites, run(shard))
            done += _n_pairs(shard)
            if kept:
                kept.put(shard, n_done, gathered[split].block(sites), time.monotonic() - started)
    totals = {name: split.finish() for name, split in gathered.items()}
    return make_result(job, totals, seconds=time.monotonic() - started)


def _n_pairs(shard: Shard) -> float:
    return float(np.diff(shard.examples)[0]) * float(np.diff(shard.sites)[0])


def finish_job(job: Job, partials: Iterable[PartialSums], *, seconds: float) -> ImportanceTable:
    """Merge and join the partials (in the order of the plan's shards), prove, and make the table.

    Raises:
        ProofError: the table does not agree with the reference.
    """
    return make_result(job, gather_totals(job.plan, partials), seconds=seconds)


def make_result(job: Job, totals: dict[str, PartialSums], *, seconds: float) -> ImportanceTable:
    """The table of every split's sums, proved.

    Raises:
        ProofError: the table does not agree with the reference.
    """
    sites = job.sites
    not_finite = find_not_finite(sites)
    rows = None if not_finite is None else np.flatnonzero(~not_finite)
    measured = totals if rows is None else {name: take_rows(total, rows) for name, total in totals.items()}
    told = failures_told(job.model, lambda: "the examples of the proof")
    with told, run_plainly(), threads_of(job.plan):
        proof = run_proof(job, measured, rows)
        doubts = doubt_outputs(job)
    drop_notes(job)
    about = {
        "spec": job.spec.model_dump(mode="json"),
        "plan": job.plan.model_dump(mode="json", exclude={"shards"}),
        "inputs": say_inputs(job, doubts),
        "baseline": {name: _baseline(total) for name, total in measured.items()},
        "proof": proof,
        "n_not_finite": 0 if not_finite is None else int(not_finite.sum()),
        "seconds": seconds,
        **describe_job(job),
    }
    return make_table(
        indices=None if isinstance(sites, EveryWeight) else sites.indices.cpu().numpy(),
        shape=job.plan.shape,
        weights=sites.weights.cpu().numpy(),
        replacements=sites.replacements.cpu().numpy() if job.spec.criteria else None,
        splits=totals,
        per_class={split.name: split.per_class for split in job.plan.splits},
        top1=job.spec.top1,
        criteria=job.spec.criteria,
        not_finite=not_finite,
        about=about,
    )


def gather_totals(plan: Plan, partials: Iterable[PartialSums]) -> dict[str, PartialSums]:
    """All examples and all sites of every split, from the partials one at a time."""
    gathered = {split.name: Gathered(plan.n_sites) for split in plan.splits}
    for shard, partial in zip(plan.shards, partials, strict=True):
        gathered[shard.split].add(shard.sites, partial)
    return {name: split.finish() for name, split in gathered.items()}


def _baseline(total: PartialSums) -> dict[str, Any]:
    n, scale = total.n_examples, 0.01 * rms(total.delta)
    bound = total.left_out / scale if total.left_out else 0.0
    return {
        "n_examples": n,
        "loss": total.loss / n,
        "accuracy": total.n_correct / n,
        "series_bound": bound if np.isfinite(bound) else None,
    }

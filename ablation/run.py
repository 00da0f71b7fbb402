"""The whole walk on one screen, without a queue.

    JobSpec -> sites -> Plan -> shards -> PartialSums -> merge/join -> ImportanceTable

In: a spec and folders (`run_spec`), or a loaded `Job` (`run_job`). Out: an `ImportanceTable`.
The service does the same with `run_shard` in many workers and `finish_job` in one of them.
"""

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from ablation.inputs.folders import Folders
from ablation.intake import failures_told, run_plainly
from ablation.job import Job, load_job, plan_here
from ablation.machine import measure_machine
from ablation.memory import run_smaller
from ablation.partial import Gathered, PartialSums, take_rows
from ablation.plan import Plan, PlanOptions
from ablation.proof import rms, run_proof
from ablation.shard import drop_notes, run_shard, threads_of
from ablation.sites import EveryWeight, find_not_finite
from ablation.spec import JobSpec
from ablation.table import ImportanceTable, make_table


def run_spec(
    spec: JobSpec,
    folders: Folders,
    options: PlanOptions | None = None,
    *,
    device: str | None = None,
    on_progress: Callable[[float, str], None] = lambda fraction, what: None,
) -> ImportanceTable:
    """Load, plan and run a job in this process.

    `options`: how it is cut; None: by the plan, for as many threads as torch has. It is not shared, and the machine is
    this one, whatever they say.
    """
    on_progress(0.0, "reading the model and the data")
    options = replace(options or PlanOptions(torch.get_num_threads()), is_shared=False, machine=measure_machine())

    def make(n_halved: int) -> Job:
        return load_job(spec, plan_here(spec, folders, replace(options, n_halved=n_halved)), folders, device=device)

    def show(part: float) -> None:
        on_progress(part, "examples x sites" if part < 1 else "checking against the reference")

    return run_smaller(
        make,
        lambda job: run_job(job, on_progress=show),
        may_halve=options.batch_size is None,
        on_smaller=lambda plan: on_progress(0.0, f"memory ran out: again, in batches of {plan.batch_size}"),
    )


def run_job(job: Job, *, on_progress: Callable[[float], None] = lambda fraction: None) -> ImportanceTable:
    """Every shard in turn, then the table. `on_progress` gets the fraction of the job that is done."""
    started = time.monotonic()
    shards = job.plan.shards
    sizes = [float(np.diff(shard.examples)[0] * np.diff(shard.sites)[0]) for shard in shards]

    def run(k: int) -> PartialSums:
        return run_shard(
            job,
            shards[k],
            on_batch=lambda part: on_progress((sum(sizes[:k]) + part * sizes[k]) / sum(sizes)),
        )

    totals = gather_totals(job.plan, map(run, range(len(shards))))  # one partial at a time is there
    return make_result(job, totals, seconds=time.monotonic() - started)


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
    drop_notes(job)
    about = {
        "spec": job.spec.model_dump(mode="json"),
        "plan": job.plan.model_dump(mode="json", exclude={"shards"}),
        "baseline": {name: _baseline(total) for name, total in measured.items()},
        "proof": proof,
        "n_not_finite": 0 if not_finite is None else int(not_finite.sum()),
        "seconds": seconds,
        "versions": {
            "torch": torch.__version__, "torchvision": version("torchvision"), "python": platform.python_version()
        },
    }  # fmt: skip
    return make_table(
        indices=None if isinstance(sites, EveryWeight) else sites.indices.cpu().numpy(),
        shape=job.plan.shape,
        weights=sites.weights.cpu().numpy(),
        replacements=sites.replacements.cpu().numpy(),
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

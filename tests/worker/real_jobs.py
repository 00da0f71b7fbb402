"""Jobs on the built-in model, cut into shards of about a second, and the table they must give."""

from typing import Any

from celery import Celery

from ablation.inputs import catalog
from ablation.job import load_job
from ablation.plan import Plan, PlanOptions, make_plan
from ablation.run import run_job
from ablation.spec import JobSpec, make_spec
from ablation.table import ImportanceTable
from worker import codec
from worker.queue import enqueue_shards
from worker.settings import Settings
from worker.store import JobRecord, JobStore


def plan_real(settings: Settings, shard_s: float, *, engine: str = "auto", **asked: Any) -> tuple[JobSpec, Plan]:
    """A job on `digits`, by default on so many weights that it lasts a while."""
    fields = {
        "model": {"name": "digits_alexnet"},
        "layer": "conv2",
        "data": {"name": "digits", "train": {"per_class": 50, "seed": 1}, "test": {"per_class": 20, "seed": 2}},
        "sites": {"count": 1500, "seed": 3},
    }
    spec = make_spec(fields | asked)
    facts, counts = catalog.model_facts(spec.model.name), catalog.split_counts(spec.data, settings.folders)
    return spec, make_plan(spec, facts, counts, PlanOptions(1, shard_s, engine, batch_size=16))


def run_undisturbed(settings: Settings, spec: JobSpec, plan: Plan) -> ImportanceTable:
    """The table as one process makes it, without store, queue or worker."""
    return run_job(load_job(spec, plan, settings.folders))


def encode(table: ImportanceTable) -> bytes:
    """The bytes that the store holds of a table."""
    return b"".join(codec.encode_blocks(table))


def submit(store: JobStore, celery: Celery, spec: JobSpec, plan: Plan) -> JobRecord:
    """What the API does with a job."""
    job = store.create(spec, plan)
    enqueue_shards(celery, len(plan.shards))
    return job

"""Jobs for the store's tests: a plan of a few shards, and partials made by hand."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ablation.inputs.catalog import LayerFacts, ModelFacts
from ablation.partial import PartialSums
from ablation.plan import Plan, PlanOptions, SplitCounts, make_plan
from ablation.spec import JobSpec, make_spec
from worker import keys
from worker.store import JobRecord, JobStore

N_SITES = 7
FACTS = ModelFacts(
    name="toy",
    n_classes=3,
    input_shape=(5,),
    flops=1e6,
    widest=11,
    layers=(LayerFacts(parameter="fc.weight", kind="Linear", shape=(3, 11), path="direct", flops_after=1e6),),
)


def make_toy(n_shards: int = 3) -> tuple[JobSpec, Plan]:
    """A spec and its plan; cut by hand into `n_shards`."""
    spec = make_spec(
        {
            "model": {"name": "toy"},
            "layer": "fc",
            "data": {"name": "digits", "test": "all"},
            "sites": {"count": N_SITES, "seed": 0},
        }
    )
    counts = {"test": SplitCounts(n_examples=10 * n_shards)}
    plan = make_plan(spec, FACTS, counts, PlanOptions(threads=1, batch_size=10, shard_s=1e-9))
    assert len(plan.shards) >= n_shards
    return spec, plan.model_copy(update={"shards": plan.shards[:n_shards]})


def make_partial(number: int, n_sites: int = N_SITES) -> PartialSums:
    """Sums that tell shards, fields and sites apart."""
    random = np.random.default_rng(number)
    floats = {name: random.normal(size=n_sites) for name in ("delta", "delta_squared", "within", "proof")}
    counts = {name: random.integers(0, 100, size=n_sites, dtype=np.int32) for name in ("touched", "broken", "fixed")}
    statistics = {"gradient": random.normal(size=n_sites)}
    return PartialSums(n_examples=10, n_correct=number, loss=0.1 + number, **floats, **counts, statistics=statistics)


def about_of(store: JobStore, job_id: str) -> dict[str, Any]:
    """What is stored beside a job's table: what the job was, and what it found as a whole."""
    return json.loads(store.client.hget(keys.result(job_id), "about"))


@pytest.fixture
def toy_job(store: JobStore) -> Callable[..., JobRecord]:
    """Makes a queued job of `n_shards`."""

    def make(n_shards: int = 3) -> JobRecord:
        return store.create(*make_toy(n_shards))

    return make

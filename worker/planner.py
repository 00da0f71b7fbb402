"""How is a job of the service planned? By the API, or by a worker where only a worker can open the data.

In: a spec, settings, what is registered. Out: a plan that fits into Redis. Torch-free.
"""

from collections.abc import Mapping

from ablation.errors import SpecError
from ablation.inputs.catalog import Registered, SplitCounts
from ablation.plan import Plan, plan_spec
from ablation.spec import JobSpec
from worker.settings import Settings


def plan_job(
    spec: JobSpec,
    settings: Settings,
    registered: Registered,
    counts: dict[str, SplitCounts] | None = None,
    *,
    machine: Mapping[str, float] | None = None,
    n_halved: int = 0,
) -> Plan | None:
    """Plan a job with these settings; None where a worker must open its data first, for the `counts`.

    `machine`: the workers' `pace` and `memory_bytes`, as far as they are known. `n_halved` as in `make_plan`.

    Raises:
        SpecError: the spec names something that doesn't exist, or the job needs more than Redis may hold.
    """
    options = {"threads": settings.threads, "shard_s": settings.shard_s, "n_halved": n_halved, **(machine or {})}
    plan = plan_spec(spec, settings.folders, registered, counts=counts, **options)
    if plan and plan.estimate.redis_bytes > settings.max_redis_bytes:
        raise SpecError(
            "sites",
            f"{plan.n_sites} sites in {len(plan.shards)} shards",
            f"what fits into {settings.max_redis_bytes} bytes of Redis; this needs {plan.estimate.redis_bytes}",
            "Ask for fewer sites, or raise ABLATION_MAX_REDIS_BYTES.",
        )
    return plan

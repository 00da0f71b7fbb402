"""How is a job of the service planned? By the API, or by a worker where only a worker can open the data.

In: a spec, settings, what is registered. Out: a plan that fits into Redis. Torch-free.
"""

from ablation.errors import SpecError
from ablation.inputs.catalog import Registered, SplitCounts
from ablation.machine import Machine
from ablation.plan import Plan, PlanOptions, plan_spec
from ablation.spec import JobSpec
from worker.settings import Settings


def plan_job(
    spec: JobSpec,
    settings: Settings,
    registered: Registered,
    counts: dict[str, SplitCounts] | None = None,
    *,
    machine: Machine | None = None,
    n_halved: int = 0,
) -> Plan | None:
    """Plan a job with these settings; None where a worker must open its data first, for the `counts`.

    `machine`: the workers' machine; None where it is not known. `n_halved`: how often memory ran out with this job.

    Raises:
        SpecError: the spec names something that doesn't exist, or the job needs more than Redis may hold.
    """
    options = PlanOptions(settings.threads, settings.shard_s, n_halved=n_halved, machine=machine or Machine())
    plan = plan_spec(spec, settings.folders, options, registered, counts)
    if plan and plan.estimate.redis_bytes > settings.max_redis_bytes:
        raise SpecError(
            "sites",
            f"{plan.n_sites} sites in {len(plan.shards)} shards",
            f"what fits into {settings.max_redis_bytes} bytes of Redis; this needs {plan.estimate.redis_bytes}",
            "Ask for fewer sites, or raise ABLATION_MAX_REDIS_BYTES.",
        )
    return plan

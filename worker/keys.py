"""Every key in Redis.

Times are Unix seconds by Redis' own clock (`TIME`), so that workers on several machines agree.
"""

# Celery's queues are Redis lists of these names. Merges have one of their own, so they never wait behind shards.
SHARD_QUEUE = "ablation:queue:shards"
FINALIZE_QUEUE = "ablation:queue:finalize"

SEQUENCE = "ablation:sequence"  # counter: one number a job, in the order of creation
JOBS = "ablation:jobs"  # zset: job id by sequence number, expired ones left out
FINISHED = "ablation:finished"  # zset: job id by the time it came to an end, expired ones left out
TOMBSTONES = "ablation:tombstones"  # zset: id of each expired job by the time it expired
TURNS = "ablation:turns"  # zset: jobs with waiting shards, by the time they joined; the first has its turn
REFUSED = "ablation:refused"  # zset: jobs that a worker has refused, by the time of the first refusal
WORKERS = "ablation:workers"  # zset: worker by the time it was last seen
SWEEP_LOCK = "ablation:sweep-lock"  # string: the worker that sweeps right now

MODELS = "ablation:models"  # hash: facts of registered models by name, from the worker that started last
DATASETS = "ablation:datasets"  # set: names of registered data sets, likewise
MACHINE = "ablation:machine"  # hash: pace (how fast a thread of that worker's machine is), memory_bytes

# Ids of the planning and of the merge where a shard id is expected: both are leased and retried like shards.
PLAN = "@plan"
FINALIZE = "@finalize"


def in_words(shard_id: str) -> str:
    """Name of a shard, the planning or the merge in a message."""
    return {PLAN: "the planning", FINALIZE: "the merge"}.get(shard_id, f"shard {shard_id}")


def in_state(state: str) -> str:
    """Zset: ids of the jobs in this state, by sequence number."""
    return f"ablation:jobs:{state}"


def posted(idempotency_key: str) -> str:
    """Hash: id and key of the job that was posted with this Idempotency-Key, and whether it was planned at once."""
    return f"ablation:posted:{idempotency_key}"


def job(job_id: str) -> str:
    """Hash: status, seq, created_at, started_at, finished_at, n_shards, n_cut, spec, plan, error.

    For the workers: package (the version that accepted the job), found (what the first worker opened, as JSON).

    For the pace: first_done (the shards that were done at the first progress), first_done_at,
    last_done_at. For the turns: turn_began (when the job's turn began).
    """
    return f"ablation:job:{job_id}"


def waiting(job_id: str) -> str:
    """Zset: shards that no worker holds, by the time they were last sent to the queue."""
    return f"ablation:job:{job_id}:waiting"


def leases(job_id: str) -> str:
    """Zset: shards being worked on, by the time of the last beat."""
    return f"ablation:job:{job_id}:leases"


def owners(job_id: str) -> str:
    """Hash: shard -> the worker that holds its lease."""
    return f"ablation:job:{job_id}:owners"


def fractions(job_id: str) -> str:
    """Hash: shard -> the fraction of it that is done, for shards being worked on."""
    return f"ablation:job:{job_id}:fractions"


def attempts(job_id: str) -> str:
    """Hash: shard -> how often it failed; "lost " and the shard -> how often its whole worker was gone."""
    return f"ablation:job:{job_id}:attempts"


def refusals(job_id: str) -> str:
    """Hash: worker -> why it must not work on this job."""
    return f"ablation:job:{job_id}:refusals"


def done(job_id: str) -> str:
    """Set: shards whose partial is stored."""
    return f"ablation:job:{job_id}:done"


def partial(job_id: str, shard_id: str) -> str:
    """List: the chunks of a shard's partial."""
    return f"ablation:job:{job_id}:partial:{shard_id}"


def result(job_id: str) -> str:
    """Hash: about, summary, block_rows (JSON list: rows per block of the table)."""
    return f"ablation:job:{job_id}:result"


def table(job_id: str) -> str:
    """List: the blocks of the table."""
    return f"ablation:job:{job_id}:table"


def draft(job_id: str, shard_id: str, owner: str) -> str:
    """List: a partial or table that is being written; renamed when complete, else it expires."""
    return f"ablation:job:{job_id}:draft:{shard_id}:{owner}"

"""What does a worker do with one shard, and with the merge? Plain functions that take all they need as arguments.

In: a `Worker` and ids. Out: a partial or a table in the store, and messages for what follows.
Not here: signals and Celery's wrappers (`tasks.py`), recovery (`sweeper.py`), the computation (`ablation.shard`,
`ablation.run`).
"""

import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from celery import Celery
from redis.exceptions import OutOfMemoryError, RedisError

from ablation.errors import AblationError, Cancelled, ModelError, Unfit, say_cause
from ablation.inputs.catalog import Registered, dataset_names, model_names
from ablation.plan import Plan
from ablation.spec import JobSpec
from worker import codec, keys, planner
from worker.queue import enqueue, enqueue_finalize, enqueue_shards
from worker.settings import Settings
from worker.states import State
from worker.store import PACKAGE, JobRecord, JobStore
from worker.watchdog import Progress

if TYPE_CHECKING:
    from ablation.job import Job
    from ablation.partial import PartialSums

log = logging.getLogger(__name__)

UNFIT_S = 1.0  # delay before the message of a job that this worker refuses goes back
FULL = {
    "type": "store-full",
    "title": "The store has no room for the job's results.",
    "detail": "Redis holds as much as it may (maxmemory), so the job's sums could not be kept. Delete jobs that are "
    "over (DELETE /v1/jobs/ID), ask for fewer sites, or let the operator give Redis more memory; then post it again.",
}

ENDS = (
    "the model, or the code that makes it or the data, raised {}, which would end the worker; allowed: code that "
    "returns, or raises an Exception. Take the call of sys.exit, exit or quit out of it."
)

_loaded: dict[tuple[str, int], "Job"] = {}  # the last job's model and data, by its id and cut: at most one
_unfit: set[str] = set()  # jobs that this worker must not work on


@dataclass(frozen=True)
class Worker:
    """A worker: its job store, the queue for messages, its settings, its name on leases, what its parent watches."""

    store: JobStore
    celery: Celery
    settings: Settings
    owner: str
    progress: Progress = field(default_factory=Progress)


class Heartbeat:
    """Keeps one lease alive while a shard runs, from a thread and after every batch, and notices a cancel."""

    def __init__(self, store: JobStore, job_id: str, shard_id: str, owner: str, progress: Progress) -> None:
        self.store, self.lease, self.progress = store, (job_id, shard_id, owner), progress
        self.fraction = 0.0
        self.wanted = True
        self.stopping = threading.Event()

    def beat(self) -> None:
        """Send one beat; the shard goes on if Redis is away for a moment."""
        try:
            state = self.store.beat(*self.lease, self.fraction)
        except (RedisError, OSError) as error:
            log.warning("job %s, shard %s: no beat (%s)", *self.lease[:2], error)
        else:
            self.wanted = state in (State.RUNNING, State.FINALIZING)

    def on_batch(self, fraction: float) -> None:
        """Note the fraction done.

        Raises:
            Cancelled: the job is cancelled or has ended, or the lease was taken away.
        """
        self.fraction = fraction
        self.progress.note()
        self.beat()
        if not self.wanted:
            raise Cancelled(f"job {self.lease[0]} does not want shard {self.lease[1]} any more")

    def run(self, beat_s: float) -> None:
        """Beat every `beat_s` until stopped."""
        while not self.stopping.wait(beat_s):
            self.beat()


@contextmanager
def beating(worker: Worker, job_id: str, shard_id: str) -> Iterator[Heartbeat]:
    """Run a heartbeat in a thread; torch and the compiled loops release the interpreter lock while they compute."""
    heart = Heartbeat(worker.store, job_id, shard_id, worker.owner, worker.progress)
    worker.progress.begin(job_id, worker.settings.hang_s * worker.settings.hang_factor)  # until the job is opened
    thread = threading.Thread(target=heart.run, args=(worker.settings.beat_s,), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield heart
    finally:
        worker.progress.end()
        heart.stopping.set()
        thread.join()


def run_next(worker: Worker) -> None:
    """Compute the shard in turn, or plan its job; if another worker claims it first, try the next."""
    unfit: set[str] = set()
    while turn := worker.store.next_shard(worker.settings.turn_s, unfit):
        job_id, shard_id = turn
        if refuse_unfit(worker, job_id, shard_id):
            unfit.add(job_id)
        elif shard_id == keys.PLAN:
            if plan_job(worker, job_id):
                return
        elif run_shard(worker, job_id, shard_id):
            return
    if unfit:  # the remaining shards and this message are for other workers
        time.sleep(UNFIT_S)
        enqueue_shards(worker.celery, 1)


def refuse_unfit(worker: Worker, job_id: str, shard_id: str) -> bool:
    """Refuse the job, and return True, if another version of the package accepted it."""
    if job_id in _unfit:
        return True
    package = worker.store.package_of(job_id)
    if package in (None, PACKAGE):  # None: the job is gone
        return False
    note_unfit(worker, job_id, shard_id, f"the API is weight-ablation {package}, the worker {PACKAGE}")
    return True


def note_unfit(worker: Worker, job_id: str, shard_id: str, why: str) -> None:
    """Refuse the job, since this worker's numbers would differ from those of the worker that began it."""
    log.error("job %s: refused here: %s", job_id, why)
    _unfit.add(job_id)
    if worker.store.refuse(job_id, shard_id, worker.owner, make_unfit_error(why)):
        enqueue(worker.celery, job_id, shard_id)


def run_shard(worker: Worker, job_id: str, shard_id: str) -> bool:
    """Compute one shard and store its partial; the worker that stores the last one sends the merge. It may run twice.

    Returns False where another worker holds the shard, or it is not wanted any more.
    """
    if not worker.store.claim(job_id, shard_id, worker.owner):
        return False
    with settled(worker, job_id, shard_id) as heart:
        from ablation.compiling import COMPILING, compiling_told
        from ablation.devices import is_out_of_memory
        from ablation.shard import run_shard as compute

        record = get_record(worker.store, job_id)
        shard = next((shard for shard in stored_plan(record).shards if shard.id == shard_id), None)
        if shard is None:
            raise Cancelled(f"job {job_id} has been planned again")
        job = load(worker, record)
        worker.progress.allow(find_patience(worker.settings, job.plan, len(job.plan.shards)))
        heart.on_batch(0.0)
        try:
            with compiling_told(lambda: say_once(f"job {job_id}: {COMPILING}")):
                partial = compute(job, shard, on_batch=heart.on_batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            cut_smaller(worker, job_id, error)
            return True
        if worker.store.complete(job_id, shard_id, worker.owner, codec.encode_partial(partial)):
            enqueue_finalize(worker.celery, job_id)
    return True


def find_patience(settings: Settings, plan: Plan, n_parts: int) -> float:
    """How many seconds may pass without progress in one of so many parts of a job."""
    return max(settings.hang_s, settings.hang_factor * plan.estimate.seconds / n_parts)


@cache
def say_once(text: str) -> None:
    """Log a line that a process logs once."""
    log.warning(text)


def plan_job(worker: Worker, job_id: str) -> bool:
    """Open the job's data, plan the job, and send its shards; returns False as `run_shard` does. It may run twice."""
    if not worker.store.claim(job_id, keys.PLAN, worker.owner):
        return False
    with settled(worker, job_id, keys.PLAN):
        plan = cut(worker, get_record(worker.store, job_id).spec)
        if worker.store.set_plan(job_id, worker.owner, plan):
            enqueue_shards(worker.celery, len(plan.shards))
    return True


def cut(worker: Worker, spec: JobSpec, n_halved: int = 0) -> Plan:
    """Plan a job from the data as this worker counts them."""
    from ablation.job import count_splits
    from ablation.layers import registered_here

    counts = count_splits(spec, worker.settings.folders)
    plan = planner.plan_job(
        spec, worker.settings, registered_here(), counts, machine=worker.store.machine(), n_halved=n_halved
    )
    assert plan is not None  # never None with counts
    return plan


def cut_smaller(worker: Worker, job_id: str, error: Exception) -> None:
    """Plan the job again with half the batch, since memory ran out here.

    Raises:
        OutOfMemory: the batch is one example already.
    """
    from ablation.memory import halve

    _loaded.clear()
    record = get_record(worker.store, job_id)
    plan = mark_cut(cut(worker, record.spec, halve(stored_plan(record), error)), record.n_cut)
    if worker.store.cut_again(job_id, record.n_cut, plan):
        log.warning("job %s: memory ran out; planned again with batches of %d", job_id, plan.batch_size)
        enqueue_shards(worker.celery, len(plan.shards))


def mark_cut(plan: Plan, n_cut: int) -> Plan:
    """Give the shards of a job's second or later plan ids of their own."""
    shards = tuple(shard.model_copy(update={"id": f"{shard.id}-cut{n_cut}"}) for shard in plan.shards)
    return plan.model_copy(update={"shards": shards})


def read_partial(payload: bytes) -> "PartialSums":
    """Decode a partial from the store.

    Raises:
        Cancelled: the partial has been dropped, since the job has ended meanwhile.
    """
    if not payload:
        raise Cancelled("the job has ended while it was merged")
    return codec.decode_partial(payload)


def find_registered() -> Registered:
    """Find the registered models and data sets that a job may name; log the reason for each of the others."""
    from ablation.layers import registered_here

    here = registered_here()
    models = {}
    for name in without_built_in(here.models, model_names(), "model"):
        try:
            models[name] = here.models[name]
        except AblationError as error:
            log.warning("not offered: %s", error)
    return Registered(models, without_built_in(here.datasets, dataset_names(), "data set"))


def without_built_in(names: Iterable[str], built_in: Sequence[str], kind: str) -> tuple[str, ...]:
    """Leave out names of built-in models or data sets, which take precedence."""
    for name in set(names) & set(built_in):
        log.warning("not offered: the registered %s %r, since a built-in one has that name; rename it", kind, name)
    return tuple(name for name in names if name not in built_in)


def finalize(worker: Worker, job_id: str) -> None:
    """Merge the partials, prove the table and store it. It may run twice."""
    if refuse_unfit(worker, job_id, keys.FINALIZE):
        time.sleep(UNFIT_S)
        if not worker.store.is_over(job_id):
            enqueue_finalize(worker.celery, job_id)
        return
    if not worker.store.claim_finalize(job_id, worker.owner):
        return
    with settled(worker, job_id, keys.FINALIZE):
        from ablation.run import finish_job
        from ablation.statistics import make_summary

        record = get_record(worker.store, job_id)
        job = load(worker, record)
        worker.progress.allow(find_patience(worker.settings, job.plan, 1))
        partials = map(read_partial, worker.store.partials(job_id, job.plan))
        seconds = worker.store.now() - (record.started_at or record.created_at).timestamp()
        table = finish_job(job, partials, seconds=seconds)
        worker.store.save_table(job_id, worker.owner, table.about, make_summary(table), codec.encode_blocks(table))
        _loaded.clear()


@contextmanager
def settled(worker: Worker, job_id: str, shard_id: str) -> Iterator[Heartbeat]:
    """Record how the work inside ends: cancelled, failed with an error of this package, or to be tried again."""
    try:
        with beating(worker, job_id, shard_id) as heart:
            yield heart
    except Cancelled:
        if worker.store.release(job_id, shard_id, worker.owner):
            enqueue(worker.celery, job_id, shard_id)
    except Unfit as error:
        note_unfit(worker, job_id, shard_id, str(error))
    except AblationError as error:
        log.warning("job %s, shard %s: %s", job_id, shard_id, error)
        fail(worker, job_id, shard_id, make_error(error, worker.settings))
    except OutOfMemoryError as error:
        log.error("job %s, shard %s: %s", job_id, shard_id, error)
        fail(worker, job_id, shard_id, FULL)
    except (SystemExit, KeyboardInterrupt) as error:  # raised by code of the job: signals don't raise in this process
        log.exception("job %s, shard %s: told to end", job_id, shard_id)
        fail(worker, job_id, shard_id, make_error(ModelError(ENDS.format(say_cause(error))), worker.settings))
    except Exception as error:
        log.exception("job %s, shard %s: unexpected", job_id, shard_id)
        if worker.store.retry(
            job_id, shard_id, worker.owner, worker.settings.max_attempts, make_unexpected_error(error, shard_id)
        ):
            enqueue(worker.celery, job_id, shard_id)


def fail(worker: Worker, job_id: str, shard_id: str, error: dict[str, str]) -> None:
    """Mark the job as failed; or release the shard, if the job is being cancelled."""
    if not worker.store.fail(job_id, error):
        worker.store.release(job_id, shard_id, worker.owner)


def get_record(store: JobStore, job_id: str) -> JobRecord:
    """The job.

    Raises:
        Cancelled: the job has been dropped meanwhile.
    """
    record = store.get(job_id)
    if record is None:
        raise Cancelled(f"job {job_id} is gone")
    return record


def stored_plan(record: JobRecord) -> Plan:
    """Plan of a job that has shards or a merge, and so has been planned."""
    assert record.plan is not None
    return record.plan


def load(worker: Worker, record: JobRecord) -> "Job":
    """Load the job's model and data, which are kept until another job comes or this one is planned again.

    Raises:
        Unfit: they are not those that the job was begun with.
    """
    from ablation.job import Begin, load_job, say_date

    key = record.id, record.n_cut
    if key not in _loaded:
        _loaded.clear()
        job = load_job(
            record.spec,
            stored_plan(record),
            worker.settings.folders,
            device=worker.settings.device,
            name=record.id,
            begin=Begin(date=say_date(record.created_at)),
        )
        began_with = worker.store.agree(record.id, job.found)
        if began_with != job.found:
            names = [name for name in began_with if began_with[name] != job.found.get(name)]
            raise Unfit(f"{' and '.join(names)} here are not those that the job was begun with on another worker")
        _loaded[key] = job
    return _loaded[key]


def make_error(error: AblationError, settings: Settings) -> dict[str, str]:
    """Describe an error of this package as the job shows it: type, title, and message without host paths."""
    title = (type(error).__doc__ or type(error).__name__).splitlines()[0]
    return {"type": _kebab(type(error).__name__), "title": title, "detail": hide_paths(str(error), settings)}


def make_unfit_error(why: str) -> dict[str, str]:
    """Describe the failure of a job that every worker refuses."""
    return {
        "type": "no-worker-fits",
        "title": "No worker here may work on this job.",
        "detail": f"Every worker has refused it: {why}. Let all workers have the same version of the package, the same "
        "checkpoints and the same data; then send the spec again.",
    }


def make_unexpected_error(error: Exception, shard_id: str) -> dict[str, str]:
    """Describe an unexpected error by its kind only, since its message may contain anything."""
    return {
        "type": "unexpected-error",
        "title": "The worker failed with an unexpected error.",
        "detail": f"{keys.in_words(shard_id)} ended with {type(error).__name__} each time it was tried. "
        "The worker's log has the details.",
    }


def hide_paths(text: str, settings: Settings) -> str:
    """Replace this installation's folders in `text` by their names, and other absolute paths by their last part."""
    folders = settings.folders
    for name, folder in (("data", folders.data), ("checkpoints", folders.checkpoints), ("cache", folders.cache)):
        text = text.replace(str(folder), name)
    return re.sub(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+", "", text)


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()

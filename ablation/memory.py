"""What is done where memory runs out: the job is begun again, with half of what it carried at once."""

from collections.abc import Callable

from ablation.devices import is_out_of_memory
from ablation.errors import OutOfMemory, shorten
from ablation.job import Job
from ablation.plan import Plan
from ablation.table import ImportanceTable


def run_smaller(
    make: Callable[[int], Job],
    run: Callable[[Job], ImportanceTable],
    *,
    may_halve: bool,
    on_smaller: Callable[[Plan], None] = lambda plan: None,
) -> ImportanceTable:
    """Run the job that `make` makes; where memory runs out, the one that carries half as much at once, and so on.

    Args:
        make: makes the job whose plan is halved so many times (`make_plan`).
        run: runs it.
        may_halve: false where the user has said how much to carry.
        on_smaller: called with each plan after the first.

    Raises:
        OutOfMemory: memory runs out even one example and one site at a time, or the job may not be halved.
    """
    n_halved = 0
    while True:
        job = make(n_halved)
        if n_halved:
            on_smaller(job.plan)
        try:
            return run(job)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not may_halve:
                raise OutOfMemory(
                    f"memory ran out in batches of {job.plan.batch_size} ({shorten(str(error))}). Choose a smaller "
                    "batch size, or leave it to the plan."
                ) from error
            n_halved = halve(job.plan, error)


def halve(plan: Plan, error: Exception) -> int:
    """The number of halvings of the next plan, after memory ran out with this one.

    Raises:
        OutOfMemory: this plan carries one example and one site at a time already.
    """
    if plan.batch_size == plan.lanes == 1:
        raise OutOfMemory(
            f"memory ran out even one example at a time ({shorten(str(error))}). Ask for fewer sites, or use a machine "
            "with more memory."
        ) from error
    return plan.n_halved + 1

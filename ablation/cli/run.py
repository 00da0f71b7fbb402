"""The command `run`: compute a job in this process, without Redis or a server."""

import contextlib
import math
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click

from ablation.cli.display import print_results, progress_bar
from ablation.cli.files import results_folder, write_results
from ablation.cli.options import (
    command_again,
    command_told,
    force_option,
    home_option,
    json_option,
    located,
    out_option,
    run_options,
    spec_options,
)
from ablation.cli.shards import keeping
from ablation.machine import Machine
from ablation.plan import PlanOptions
from ablation.spec import JobSpec
from worker.settings import Settings


@click.command()
@spec_options
@run_options
@click.option("--device", help="torch device: cpu, cuda, cuda:1.  [default: CUDA if there is one]")
@home_option("data/, checkpoints/ and cache/")
@out_option("ablation-out")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run of the same job has kept in --out.")
@force_option
@json_option
def run(
    spec: JobSpec, settings: Settings, out: Path, device: str | None, engine: str, batch_size: int | None,
    *, resume: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compute the utility of weights in this process.

    \b
    ablation run --model alexnet --weights IMAGENET1K_V1 --layer classifier.4 \\
        --data imagefolder --root DIR --train 50/class --test all --sites 4096 --out DIR

    What is done is kept in --out until the results are there. After Ctrl-C, a kill or a full disk, the same command
    with --resume goes on from there.
    """  # \b tells click not to rewrap
    begun = datetime.now(UTC)
    asked = {"engine": engine, "batch_size": batch_size}
    machine = Machine(memory_bytes=settings.memory_bytes or math.inf)
    options = PlanOptions(settings.threads, settings.shard_s, engine, batch_size, machine=machine)
    with (
        interrupted_by_signals(),
        located(spec, settings.folders) as (spec, folders),
        results_folder(out) as held,
        keeping(
            held,
            {"spec": spec.model_dump(mode="json"), **asked},
            resume=resume,
            force=force,
            again=command_again(),
        ) as kept,
    ):
        with progress_bar("starting", is_ticking=True) as update:
            from ablation.devices import find_device  # torch is loaded while the bar is shown
            from ablation.export import write_csv, write_parquet
            from ablation.job import Begin, say_date
            from ablation.run import run_spec
            from ablation.statistics import make_summary

            table = run_spec(
                spec,
                folders,
                options,
                device=str(find_device(device or settings.device)),
                on_progress=update,
                begin=Begin(say_date(begun), command_told()),
                kept=kept,
            )
        summary = make_summary(table)
        write_results(out, csv=partial(write_csv, table), parquet=partial(write_parquet, table), summary=summary)
    print_results(summary, out, as_json)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Context in which SIGTERM, and the SIGHUP of a terminal that is closed, raise as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup a closed terminal is to be ignored
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

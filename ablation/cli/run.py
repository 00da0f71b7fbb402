"""The command `run`: compute a job in this process, without Redis or a server."""

from functools import partial
from pathlib import Path

import click

from ablation.cli.display import print_results, progress_bar
from ablation.cli.files import results_folder, write_results
from ablation.cli.options import home_option, json_option, located, out_option, run_options, spec_options
from ablation.plan import PlanOptions
from ablation.spec import JobSpec
from worker.settings import Settings


@click.command()
@spec_options
@run_options
@click.option("--device", help="torch device: cpu, cuda, cuda:1.  [default: CUDA if there is one]")
@home_option
@out_option("ablation-out")
@json_option
def run(
    spec: JobSpec, settings: Settings, out: Path, device: str | None, engine: str, batch_size: int | None, as_json: bool
) -> None:
    """Compute the utility of weights in this process.

    \b
    ablation run --model alexnet --weights IMAGENET1K_V1 --layer classifier.4 \\
        --data imagefolder --root DIR --train 50/class --test all --sites 4096 --out DIR
    """  # \b tells click not to rewrap
    with located(spec, settings.folders) as (spec, folders), results_folder(out):
        with progress_bar("starting") as update:
            from ablation.devices import find_device  # torch is loaded while the bar is shown
            from ablation.export import write_csv, write_parquet
            from ablation.run import run_spec
            from ablation.statistics import make_summary

            table = run_spec(
                spec,
                folders,
                PlanOptions(settings.threads, settings.shard_s, engine, batch_size),
                device=str(find_device(device or settings.device)),
                on_progress=update,
            )
        summary = make_summary(table)
        write_results(out, csv=partial(write_csv, table), parquet=partial(write_parquet, table), summary=summary)
    print_results(summary, out, as_json)

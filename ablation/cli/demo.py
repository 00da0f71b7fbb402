"""The command `demo`: train the demo model, start the service, run a job, and stop everything."""

import functools
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from ablation.cli.client import Client
from ablation.cli.display import Update, print_results, progress_bar, say_seconds, show_poll
from ablation.cli.files import results_folder
from ablation.cli.options import home_option, out_option
from ablation.cli.server import EXAMPLE, raise_on_signals
from ablation.cli.services import Services, child_environment, python_command
from ablation.compiling import COMPILING
from ablation.errors import ServiceError
from ablation.spec import make_spec
from worker.parent_death import tether
from worker.settings import Settings, make_writable


@click.command()
@out_option("demo-out")
@home_option("cache/, where the trained model is kept")
def demo(settings: Settings, out: Path) -> None:
    """Run the whole service once on real handwritten digits; needs no network, no GPU, no Redis.

    Trains a small AlexNet (the first time), starts Redis, a worker and the API on a free port, computes the utility of
    4,096 weights, downloads the table and stops everything. Results of an earlier demo are replaced. Only the trained
    model is kept, in the cache.
    """
    raise_on_signals()
    make_writable(settings.cache_dir, "--home")
    with results_folder(out), tempfile.TemporaryDirectory(prefix="ablation-demo-") as private:
        own = Settings(home=Path(private), cache_dir=settings.cache_dir, redis_url="")
        services = Services(own, "127.0.0.1", 0, 1, say=click.echo)
        try:
            summary = run_demo(services, out)
        finally:
            services.stop()
    print_results(summary, out, as_json=False)


def run_demo(services: Services, out: Path) -> dict[str, object]:
    """Run everything from training to the downloaded files; returns the summary."""
    services.start()
    click.echo(f"Redis, one worker and the API are starting on {services.url}")
    train(services.settings.cache_dir)
    services.wait_ready()
    with Client(services.url, trust_env=False) as client:
        start = time.monotonic()
        job = client.post(make_spec(EXAMPLE))
        click.echo(f"POST {services.url}/v1/jobs: 4,096 weights of fc2, every train and test example; job {job['id']}")
        with progress_bar("job queued") as update:
            results = client.wait(job, lambda answer: show(answer, update, services), meanwhile=services.tend)
            update(1.0, "job succeeded")
        client.download(job, results, out)
        click.echo(f"from POST to CSV: {say_seconds(time.monotonic() - start)}")
    return results["summary"]


def show(answer: dict[str, Any], update: Update, services: Services) -> None:
    """Show one answer to a poll; and that loops are being compiled, which a worker says in its log, if it is so."""
    is_compiling = answer["progress"]["done"] < 1 and any(COMPILING in child.said() for child in services.children)
    show_poll(answer, update, COMPILING if is_compiling else "")


def train(cache: Path) -> None:
    """Train the demo model unless the cache has it; in a process of its own, since this one doesn't import torch.

    Raises:
        ServiceError: training failed; its output is above the message.
    """
    process = subprocess.Popen(
        python_command("ablation.inputs.demo", "--cache", str(cache)),
        env=child_environment(),
        start_new_session=True,
        preexec_fn=functools.partial(tether, signal.SIGKILL, os.getpid()),
    )
    try:
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if code:
        raise ServiceError(f"training the demo model ended with code {code}")

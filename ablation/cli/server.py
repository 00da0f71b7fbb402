"""The commands that start services: `serve` (everything), `api` and `worker` (one process each, as compose does)."""

import json
import os
import signal
import sys
import time

import click

from ablation.cli.options import WholeNumber, home_option
from ablation.cli.services import Services, check_installed, child_environment, python_command
from worker.settings import Settings, count_cpus, hide_password, warn_of_unknown_variables

TEND_S = 0.2  # interval at which the supervisor checks its processes

EXAMPLE = {
    "model": {"name": "digits_alexnet"},
    "layer": "fc2",
    "data": {"name": "digits", "train": "all", "test": "all"},
    "sites": {"count": 4096},
}


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, envvar="ABLATION_HOST", help="Address to listen on.")
@click.option("--port", type=WholeNumber(0, 65535), default=8000, show_default=True, envvar="ABLATION_PORT",
              help="Port to listen on; 0: any free one.")  # fmt: skip
@click.option("--workers", type=WholeNumber(1), default=1, show_default=True, help="Number of worker processes.")
@home_option("data/, checkpoints/, cache/, redis/ and logs/")
def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Start the whole service and keep it running until Ctrl-C.

    Starts Redis (an embedded one, unless REDIS_URL is set), the API and the workers, and restarts a process that dies.
    One SIGINT or SIGTERM stops everything within 10 seconds, a second one kills it. Jobs that were running go on after
    the next start.
    """
    raise_on_signals()
    warn_of_unknown_variables(os.environ)
    warn_of_threads(workers, settings.threads)
    services = Services(settings, host, port, workers, say=lambda text: click.echo(text, err=True))
    started = False
    try:
        services.start()
        started = True
        click.echo(f"Starting on {services.url} ...", err=True)
        services.wait_ready()
        click.echo(directions(services))
        while True:
            services.tend()
            time.sleep(TEND_S)
    finally:
        services.stop()
        if started:
            click.echo("Stopped. What was running goes on after the next start.", err=True)


@click.command()
@click.option("--host", envvar="ABLATION_HOST", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", envvar="ABLATION_PORT", help="Port to listen on.  [default: 8000]")
def api(host: str | None, port: str | None) -> None:
    """Start the API alone (needs REDIS_URL)."""
    variables = {"ABLATION_HOST": host, "ABLATION_PORT": port}
    become("api", {name: value for name, value in variables.items() if value is not None})


@click.command()
def worker() -> None:
    """Start one worker alone (needs REDIS_URL)."""
    become("worker", {})


def become(module: str, environment: dict[str, str]) -> None:
    """Replace this process by a module of this package, so that signals reach it directly."""
    check_installed()
    sys.stdout.flush()
    os.execve(sys.executable, python_command(module), {**child_environment(), **environment})


def warn_of_threads(workers: int, threads: int) -> None:
    """Warn if the workers have more threads than there are processors."""
    if workers * threads > (n_cpus := count_cpus()):
        click.echo(
            f"Warning: {workers} worker{'s' * (workers > 1)} with {threads} thread{'s' * (threads > 1)} each on "
            f"{n_cpus} CPU{'s' * (n_cpus > 1)} slow each other down; set ABLATION_THREADS={max(1, n_cpus // workers)}",
            err=True,
        )


def raise_on_signals() -> None:
    """Context in which SIGTERM raises as SIGINT does, so that the block's cleanup runs."""

    def stop(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                each, signal.SIG_IGN
            )  # until `Services.stop` handles signals: its beginning must not be interrupted
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def directions(services: Services) -> str:
    """Print the server's address, and commands to try."""
    url, settings = services.url, services.settings
    body = f"-H 'Content-Type: application/json' -d '{json.dumps(EXAMPLE)}'"
    return f"""
weight-ablation is ready at {url}    (API documentation: {url}/docs)

Submit a job, wait for it, download its table:

JOB={url}$(curl -sS -D - -o /dev/null {url}/v1/jobs {body} | tr -d '\\r' | sed -n 's/^location: //Ip')
while curl -sS -w '\\n%{{http_code}}\\n' "$JOB/results?limit=3" | tee /dev/stderr | grep -qx 202; do sleep 1; done
curl -sS -o utility.csv $JOB/results.csv

data sets    {settings.data_dir}
checkpoints  {settings.checkpoint_dir}
cache        {settings.cache_dir}
Redis        {hide_password(settings.redis_url) or settings.home / "redis"}
logs         {settings.home / "logs"}

Ctrl-C stops everything.
"""

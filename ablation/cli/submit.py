"""The command `submit`: post a job to a server, poll it, and download the results."""

from pathlib import Path

import click

from ablation.cli.client import Client
from ablation.cli.display import print_results, progress_bar, show_poll
from ablation.cli.files import results_folder
from ablation.cli.options import force_option, json_option, out_option, spec_options
from ablation.spec import JobSpec


@click.command()
@click.option("--server", default="http://127.0.0.1:8000", show_default=True, envvar="ABLATION_SERVER",
              help="Base URL of the server.")  # fmt: skip
@spec_options
@out_option("ablation-out")
@force_option
@json_option
def submit(server: str, spec: JobSpec, out: Path, force: bool, as_json: bool) -> None:
    """Send a job to a running server, wait for it and download its results.

    --root is a folder below the server's data folder. Ctrl-C leaves the job running and says how to follow it.
    """
    with results_folder(out) as held, Client(server) as client:
        held.check_free(force=force)
        job = client.post(spec)
        click.echo(f"Job {job['id']}: {client.server}{job['urls']['self']}", err=True)
        try:
            with progress_bar("job") as update:
                results = client.wait(job, lambda answer: show_poll(answer, update))
                update(1.0, "job succeeded")
        except KeyboardInterrupt:
            click.echo(
                f"\nJob {job['id']} goes on at the server.\n"
                f"  its state    curl {client.server}{job['urls']['self']}\n"
                f"  its table    curl -o utility.csv {client.server}{job['urls']['csv']}\n"
                f"  cancel it    curl -X POST {client.server}{job['urls']['cancel']}",
                err=True,
            )
            raise
        client.download(job, results, out)
    print_results(results["summary"], out, as_json)

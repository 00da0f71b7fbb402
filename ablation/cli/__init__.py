"""The command line: an edge. Reads the environment, starts services as processes, talks HTTP; imported by nothing.

One file per group of commands: `listings` (models, layers, plan), `run`, `server` (serve, api, worker), `submit`,
`demo`. They share `options` (what a job is), `services` (the supervisor), `client` (HTTP), `display` (what a person
sees) and `files`.
"""

import click

from ablation.cli import demo, listings, run, server, submit
from ablation.errors import AblationError, SpecError

EXIT_FAULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class Commands(click.Group):
    """A group whose commands end with our errors as one red line, and with 130 at Ctrl-C."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except AblationError as error:
            click.secho(f"Error: {error}", fg="red", err=True)
            ctx.exit(EXIT_BAD_INPUT if isinstance(error, SpecError) else EXIT_FAULT)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="weight-ablation")
def main() -> None:
    """How much does the loss change when this weight is set to zero?

    Exactly, for sampled weights of a layer, over a whole data set. Begin with `ablation demo`.
    """


for command in (
    demo.demo, run.run, listings.plan, listings.models, listings.layers,
    server.serve, submit.submit, server.api, server.worker,
):  # fmt: skip
    main.add_command(command)

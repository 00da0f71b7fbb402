"""Every command of `ablation`. Errors end a command with one line on stderr and an exit code."""

import os
import sys
from typing import Any, NoReturn

import click

from ablation.cli import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED, demo, listings, run, server, submit
from ablation.cli.display import say_error, say_notes
from ablation.cli.options import TYPED
from ablation.errors import AblationError, SpecError, say_cause

# What to do next, for messages that have no better advice: where the allowed names are listed.
HINTS = {
    "model.name": "`ablation models` lists them.",
    "layer": "`ablation layers MODEL` lists those of a model.",
    "data.name": "`ablation datasets` lists them.",
}


class Commands(click.Group):
    """A command group that shows errors as one line; of an unexpected one, `ABLATION_TRACEBACK` shows the traceback."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Make the context, and note the words of the command line in it."""
        words = tuple(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[TYPED] = words
        return context

    def main(self, *arguments: Any, **options: Any) -> NoReturn:
        """Run the command given, and exit."""
        try:
            code = super().main(*arguments, **{**options, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:  # `ablation` alone shows its help and is not an error
            error.show()
            code = EXIT_BAD_INPUT
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            say_error(error.format_message() + (f" See `{context.command_path} --help`." if context else ""))
            code = EXIT_BAD_INPUT
        except SpecError as error:
            say_error(f"{error} {'' if error.next_step else HINTS.get(error.field, '')}")
            say_notes(error)
            code = EXIT_BAD_INPUT
        except (AblationError, OSError) as error:  # OSError: a full disk or a read-only file
            say_error(str(error))
            say_notes(error)
            code = EXIT_FAULT
        except click.Abort as error:
            say_notes(error.__cause__)
            code = EXIT_INTERRUPTED
        except Exception as error:
            if os.environ.get("ABLATION_TRACEBACK"):
                raise
            say_error(
                f"{say_cause(error)}. Nobody foresaw this; please report it, with what ABLATION_TRACEBACK=1 shows."
            )
            code = EXIT_FAULT
        sys.exit(code)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=f"""
    \b
    Exit codes:
      0    done
      {EXIT_FAULT}    a fault: the job failed, a service is away, a setting is wrong, a file can't be written
      {EXIT_BAD_INPUT}    bad input: an option, a name or a number that is not possible
      {EXIT_INTERRUPTED}  interrupted by Ctrl-C or SIGTERM
    """,  # \b tells click not to rewrap
)
@click.version_option(package_name="weight-ablation")
def commands() -> None:
    """How much does the loss change when this weight is set to zero?

    Exactly, for sampled weights of a layer, over a whole data set. Begin with `ablation demo`.
    """


for command in (
    demo.demo, run.run, listings.plan, listings.models, listings.layers, listings.datasets,
    server.serve, submit.submit, server.api, server.worker,
):  # fmt: skip
    commands.add_command(command)

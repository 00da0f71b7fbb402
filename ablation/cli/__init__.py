"""The command line. It reads the environment, starts services as processes and talks HTTP; nothing imports it.

`commands` has all commands, one file per group: `listings` (models, layers, datasets, plan), `run`, `server` (serve,
api, worker), `submit`, `demo`. They share `options` (a job spec's options), `services` (the supervisor), `client`
(HTTP), `display` (output for people) and `files`.
"""

import os
import signal

EXIT_FAULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main() -> None:
    """Entry point of `ablation`."""
    # Until everything is loaded there is nothing to undo: Ctrl-C exits here, without a traceback from an import.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    from ablation.cli.commands import commands

    signal.signal(signal.SIGINT, before)
    commands(prog_name="ablation")

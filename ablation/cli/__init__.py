"""The command line: an edge. Reads the environment, starts services as processes, talks HTTP; imported by nothing.

`commands` holds them all, one file per group: `listings` (models, layers, datasets, plan), `run`, `server` (serve, api,
worker), `submit`, `demo`. They share `options` (what a job is), `services` (the supervisor), `client` (HTTP), `display`
(what a person sees) and `files`.
"""

import os
import signal

EXIT_FAULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main() -> None:
    """What `ablation` does."""
    # Until everything is loaded there is nothing to undo: Ctrl-C ends it here, and no import shows its traceback.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    from ablation.cli.commands import commands

    signal.signal(signal.SIGINT, before)
    commands(prog_name="ablation")

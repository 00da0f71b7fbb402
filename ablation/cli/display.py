"""What a person sees: progress, a summary, where the files are.

In: fractions, and the summary that `statistics.make_summary` made. Out: text, progress on stderr, results on stdout.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ablation.cli.files import RESULT_FILES

REDRAW_S = 0.1
LINE_EVERY_S = 5.0  # in a log file, which has no bar

Update = Callable[[float, str], None]


@contextmanager
def progress_bar(what: str) -> Iterator[Update]:
    """A bar to call with (fraction done, what is being done); lines of text where there is no terminal.

    It draws only when it is called, and so needs no thread: services are started from this one meanwhile.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        drawn = 0.0

        def update(fraction: float, what: str) -> None:
            nonlocal drawn
            progress.update(task, completed=fraction, description=what)
            if (now := time.monotonic()) - drawn > REDRAW_S:
                progress.refresh()
                drawn = now

        progress.refresh()
        yield update


def _lines(what: str) -> Update:
    said, said_at = "", 0.0

    def update(fraction: float, what: str) -> None:
        nonlocal said, said_at
        line = f"{fraction:4.0%}  {what}"
        is_news = said[4:] != line[4:] or (fraction >= 1 and said != line)
        if is_news or time.monotonic() - said_at > LINE_EVERY_S:
            click.echo(line, err=True)
            said, said_at = line, time.monotonic()

    return update


def show_poll(answer: dict[str, Any], update: Update) -> None:
    """One answer to a poll, on the bar."""
    progress = answer["progress"]
    update(progress["done"] / max(1, progress["total"]), f"job {answer['status']}")


def print_summary(summary: dict[str, Any]) -> None:
    """The summary as a person reads it."""
    from ablation.statistics import summary_lines  # loads SciPy, which most commands do without

    lines = summary_lines(summary)
    width = max(len(label) for label, _ in lines)
    click.echo()
    for label, text in lines:
        click.echo(f"{label:{width}}  {text}")


def print_files(folder: Path) -> None:
    """Where the results are."""
    click.echo()
    for name in RESULT_FILES:
        click.echo(f"wrote {folder / name}  ({say_bytes((folder / name).stat().st_size)})")


def say_number(value: float) -> str:
    """Three digits, thousands by commas, never an exponent."""
    return f"{Decimal(f'{value:.3g}'):,f}"


def say_seconds(seconds: float) -> str:
    """A duration as people say it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{say_number(seconds / size)} {unit}"
    return f"{say_number(seconds)} s"


def say_bytes(n_bytes: float) -> str:
    """A size as people say it."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 999.5:  # what is above rounds to 1000
            return f"{say_number(n_bytes)} {unit}"
        n_bytes /= 1000
    return f"{say_number(n_bytes)} GB"

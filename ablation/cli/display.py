"""Output for people: progress, a summary, paths of files.

In: fractions, errors, rows, and the summary that `statistics.make_summary` made. Out: text; progress and errors on
stderr, results on stdout. A terminal may show a bar and tables; a file gets plain lines, none of them cut.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ablation.results import RESULT_FILES

REDRAW_S = 0.1
LINE_EVERY_S = 30.0  # between lines of progress in a log file, or
LINE_EVERY = 0.34  # of the work, whichever comes first

Update = Callable[[float, str], None]


@contextmanager
def progress_bar(what: str, *, is_ticking: bool = False) -> Iterator[Update]:
    """Context with a progress bar to call with (fraction done, description); prints lines where there is no terminal.

    It draws only when it is called and uses no thread, since services are started from the calling thread meanwhile.
    Where none are, it may be `is_ticking`: lines then come from a thread, too, while nothing calls it for long.
    """
    if not _is_screen(sys.stderr):
        with _lines(is_ticking) as say:
            yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
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


@contextmanager
def _lines(is_ticking: bool) -> Iterator[Update]:
    """Context with a function that prints lines: what is new, and every `LINE_EVERY_S` where the work stands."""
    said, said_at, done = "", 0.0, 0.0
    last: tuple[float, str] | None = None
    lock, is_over = threading.Lock(), threading.Event()

    def update(fraction: float, what: str) -> None:
        nonlocal said, said_at, done, last
        with lock:
            line, last = f"{fraction:4.0%}  {what}", (fraction, what)
            is_news = said[4:] != line[4:] or fraction - done >= LINE_EVERY or (fraction >= 1 and said != line)
            if is_news or time.monotonic() - said_at > LINE_EVERY_S:
                click.echo(line, err=True)
                said, said_at, done = line, time.monotonic(), fraction

    def tick() -> None:
        while not is_over.wait(min(1.0, LINE_EVERY_S)):
            if last:
                update(*last)

    if is_ticking:
        threading.Thread(target=tick, name="progress", daemon=True).start()
    try:
        yield update
    finally:
        is_over.set()


def _is_screen(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can redraw lines."""
    return stream.isatty() and not Console(file=stream).is_dumb_terminal


def say_error(text: str) -> None:
    """Print an error as one line: red in a terminal, unless NO_COLOR is set."""
    line = " | ".join(part.strip() for part in f"Error: {text}".splitlines() if part.strip())
    Console(stderr=True).print(Text(line, "red"), soft_wrap=True)


def say_notes(error: BaseException | None) -> None:
    """Print what else is to be said with an error, or with an interrupt: what was kept, and how to go on."""
    for note in getattr(error, "__notes__", ()):
        click.echo(note, err=True)


def show_poll(answer: dict[str, Any], update: Update, more: str = "") -> None:
    """Show one answer to a poll on the bar, with `more` of what it is busy with."""
    progress = answer["progress"]
    update(progress["done"] / max(1, progress["total"]), f"job {answer['status']}{': ' * bool(more)}{more}")


def print_results(summary: Mapping[str, Any], folder: Path, as_json: bool) -> None:
    """Print the summary and the paths of the files; or the summary alone, as JSON."""
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)
        print_files(folder)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the summary as text."""
    from ablation.statistics import summary_text  # loads SciPy, which most commands do without

    click.echo()
    click.echo(summary_text(summary))


def print_files(folder: Path) -> None:
    """Print the paths of the results."""
    click.echo()
    for name in RESULT_FILES:
        click.echo(f"wrote {folder / name}  ({say_bytes((folder / name).stat().st_size)})")


def print_json(value: object) -> None:
    """Print as JSON, for programs."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same fields: fitted to a terminal; elsewhere one line per row, for grep and awk."""
    right = [isinstance(value, int | float) for value in rows[0].values()]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *cells, strict=True)]
    longest_word = max(len(word) for row in cells for word in row[-1].split() or [""])
    # In a terminal too narrow for that, wrapped lines read better than columns of a few letters.
    if not _is_screen(sys.stdout) or Console().width < sum(widths[:-1]) + 3 * len(widths) + longest_word:
        for line in (rows[0], *cells):
            parts = zip(line, widths, right, strict=True)
            click.echo(
                "  ".join(f"{text:{'>' if is_right else '<'}{width}}" for text, width, is_right in parts).rstrip()
            )
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="")
    for name, width, is_right in zip(rows[0], [*widths[:-1], None], right, strict=True):
        table.add_column(name, justify="right" if is_right else "left", width=width, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # a name may look like markup
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ("x" if value and isinstance(value[0], int) else " ").join(str(part) for part in value)
    if value is None or isinstance(value, bool):
        return {None: "", False: "no", True: "yes"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def say_number(value: float) -> str:
    """Format a number with three digits, commas between thousands, and no exponent."""
    return f"{Decimal(f'{value:.3g}'):,f}"


def say_seconds(seconds: float) -> str:
    """Format a duration for people."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{say_number(seconds / size)} {unit}"
    return f"{say_number(seconds)} s"


def say_bytes(n_bytes: float) -> str:
    """Format a size for people."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 999.5:  # larger values round to 1000
            return f"{say_number(n_bytes)} {unit}"
        n_bytes /= 1000
    return f"{say_number(n_bytes)} GB"

"""Numbers as people say them; progress, tables and errors in terminals and files."""

import re
import subprocess
import sys
import time

import pytest

from ablation.cli import display
from ablation.cli.display import print_table, progress_bar, say_bytes, say_error, say_number, say_seconds
from ablation.inputs.catalog import model_facts, model_names
from tests.cli.terminal import ABLATION, in_terminal, plain_environment


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0123, "0.0123 s"),
        (90, "90 s"),
        (120, "2 min"),
        (3 * 3600, "3 h"),
        (182.5 * 86400, "182 days"),
        (50_300 * 86400, "50,300 days"),
    ],
)
def test_seconds(seconds: float, said: str) -> None:
    assert say_seconds(seconds) == said


@pytest.mark.parametrize(
    ("n_bytes", "said"),
    [(17, "17 B"), (4096, "4.1 kB"), (999_700, "1 MB"), (4.3e9, "4.3 GB"), (5e12, "5,000 GB")],
)
def test_bytes(n_bytes: float, said: str) -> None:
    assert say_bytes(n_bytes) == said


@pytest.mark.parametrize(("value", "said"), [(1.573e6, "1,570,000"), (0, "0"), (12.34, "12.3"), (1e-6, "0.000001")])
def test_numbers_have_no_exponents(value: float, said: str) -> None:
    assert say_number(value) == said


def test_progress_in_a_log_file_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("starting") as update:
        for step in range(1001):
            update(step / 1000, "examples")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].split() == ["0%", "examples"]
    assert lines[-1].split() == ["100%", "examples"]
    assert len(lines) < 5


def test_a_log_hears_of_work_that_says_nothing_for_long(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "LINE_EVERY_S", 0.05)
    lines: list[str] = []
    deadline = time.monotonic() + 60
    with progress_bar("starting", is_ticking=True) as update:
        update(0.25, "examples")
        while len(lines) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            lines += capfd.readouterr().err.splitlines()
    assert {*lines} == {" 25%  examples"}


# How it looks where


def test_an_error_is_red_in_a_terminal_unless_colours_are_not_wanted() -> None:
    wrong = [*ABLATION, "layers", "nothing"]
    line = re.escape("Error: model.name: got 'nothing'; ") + ".*"
    assert re.fullmatch(rf"\x1b\[31m{line}\x1b\[0m\n", in_terminal(wrong, columns=60))
    assert re.fullmatch(rf"{line}\n", in_terminal(wrong, NO_COLOR="1"))
    assert re.fullmatch(rf"{line}\n", in_terminal(wrong, TERM="dumb"))
    in_file = subprocess.run(wrong, env=plain_environment(), stderr=subprocess.PIPE, text=True)
    assert re.fullmatch(rf"{line}\n", in_file.stderr)


def test_an_error_of_several_lines_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    say_error("two\n\tkeys [bold]are[/] missing\n")
    assert capsys.readouterr().err == "Error: two | keys [bold]are[/] missing\n"


@pytest.mark.parametrize("looks", [{}, {"COLUMNS": "60"}, {"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}])
def test_a_table_in_a_file_is_a_line_a_row(looks: dict[str, str]) -> None:
    command = [*ABLATION, "models"]
    said = subprocess.run(command, env=plain_environment(**looks), stdout=subprocess.PIPE, text=True).stdout
    header, *rows = said.splitlines()
    assert header.split() == ["name", "layers", "classes", "input", "gflops", "weights"]
    assert len(rows) == len(model_names())
    assert [row.split()[0] for row in rows] == [*model_names()]
    assert "\x1b" not in said
    assert said.isascii()
    assert not any(row.endswith(" ") for row in rows)
    everything = next(row for row in rows if row.startswith("vit_b_16 "))
    assert everything.split()[5:] == [*model_facts("vit_b_16").weights]


def test_a_table_in_a_terminal_fits_and_has_no_colour() -> None:
    said = in_terminal([*ABLATION, "models"], columns=100)
    assert "───" in said
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 100
    for name in model_names():
        assert f" {name} " in said
    assert "IMAGENET1K_SWAG_LINEAR_V1" in said  # a name is never broken


@pytest.mark.parametrize("narrow", [{"COLUMNS": "60"}, {"TERM": "dumb"}])
def test_a_narrow_or_dumb_terminal_gets_whole_lines(narrow: dict[str, str]) -> None:
    said = in_terminal([*ABLATION, "models"], **narrow)
    in_file = subprocess.run([*ABLATION, "models"], env=plain_environment(), stdout=subprocess.PIPE, text=True)
    assert said == in_file.stdout


PROGRESS = """
from ablation.cli.display import progress_bar
with progress_bar("starting") as update:
    update(0.0, "examples")
    update(1.0, "examples")
"""


def test_progress_is_drawn_in_a_terminal_and_told_in_a_dumb_one() -> None:
    drawn = in_terminal([sys.executable, "-c", PROGRESS])
    assert "\x1b[" in drawn
    assert "━" in drawn
    assert in_terminal([sys.executable, "-c", PROGRESS], TERM="dumb") == "  0%  examples\n100%  examples\n"


def test_datasets_say_what_is_not_known_by_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        [{"name": "a[b]", "needs_root": True, "train": 60000}, {"name": "c", "needs_root": False, "train": None}]
    )
    assert capsys.readouterr().out == "name  needs_root   train\na[b]         yes  60,000\nc             no\n"

"""However a command ends, it is quiet: the right exit code, at most one line, never a traceback."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ablation.cli.commands import commands
from tests.cli.terminal import ABLATION

# Runs a module as a process and presses Ctrl-C just when it begins to import another one.
INTERRUPTED = """
import os, runpy, signal, sys
module, moment, *arguments = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in a shell's background has ignored
class Interrupter:
    def find_spec(name, *_):
        if name == moment:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
print("it went on")
"""
RUN = ["run", "--model", "digits_alexnet", "--layer", "fc2", "--data", "digits", "--test", "all", "--sites", "1"]


@pytest.mark.parametrize(
    ("module", "moment", "arguments"),
    [
        ("ablation.cli", "click", ["models"]),
        ("ablation.cli", "ablation.cli.submit", ["models"]),
        ("ablation.cli", "torch", RUN),
        ("api", "api.app", []),
        ("worker", "celery.platforms", []),
        ("worker", "worker.tasks", []),
    ],
)
def test_ctrl_c_while_it_loads_is_quiet(module: str, moment: str, arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, module, moment, *arguments]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (130, "", "")


@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"], ["layers", "resnet18"], ["--help"]])
def test_nobody_who_reads_is_quiet(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([*ABLATION, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode == 1


def test_help_names_every_exit_code() -> None:
    said = CliRunner().invoke(commands, ["--help"]).stdout
    assert re.findall(r"^ +(\d+)  ", said, re.MULTILINE) == ["0", "1", "2", "130"]


def test_a_full_disk_is_one_line_and_code_1() -> None:
    """/dev/full takes nothing: what is written to it ends as on a full disk."""
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*ABLATION, "models", "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_command_shows_the_help_and_is_code_2() -> None:
    ended = CliRunner().invoke(commands, [])
    assert ended.exit_code == 2
    assert "Commands:" in ended.stderr

"""What `serve` says: directions that can be pasted anywhere and shown to anyone, and a word about too many threads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ablation.cli.commands import commands
from ablation.cli.server import directions, warn_of_threads
from ablation.cli.services import Services, listen
from worker.settings import Settings, count_cpus


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    """Services with an address, not started."""
    settings = Settings(home=tmp_path, redis_url="redis://:secret@host:6379/0")
    with listen("127.0.0.1", 0, "--host", "--port") as listener:
        yield Services(settings, "127.0.0.1", 0, 1, say=print, listener=listener)


def test_directions_show_no_password_and_need_no_new_curl(services: Services) -> None:
    said = directions(services)
    assert "redis://host:6379/0" in said
    assert "secret" not in said
    assert "--json" not in said


def test_more_threads_than_processors_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_threads(1, count_cpus())
    assert capsys.readouterr().err == ""
    warn_of_threads(2, count_cpus())
    assert "ABLATION_THREADS=" in capsys.readouterr().err


def test_a_misspelt_variable_is_warned_of(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0, "--host", "--port") as taken:  # so that it ends at once
        port = taken.getsockname()[1]
        command = ["serve", "--port", str(port), "--home", str(tmp_path)]
        result = CliRunner().invoke(commands, command, env={"ABLATION_TREADS": "2"})
    assert result.stderr.splitlines()[0] == (
        "Warning: ABLATION_TREADS is not a setting and has no effect. Did you mean ABLATION_THREADS?"
    )


def test_what_did_not_start_does_not_stop(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0, "--host", "--port") as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(commands, ["serve", "--port", str(port), "--home", str(tmp_path)])
    assert result.exit_code == 1
    assert "--port" in result.stderr
    assert "Stopped" not in result.stderr

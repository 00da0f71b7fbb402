"""A mistake is told in the same words by the command line, by a server, and by the command that asks the server."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from ablation.cli.commands import commands
from tests.api.conftest import serving
from worker.settings import Settings
from worker.store import JobStore

DIGITS = {"name": "digits", "test": "all"}
FIELDS = {"model": {"name": "digits_alexnet"}, "layer": "fc2", "data": DIGITS, "sites": {"count": 4}}

MISTAKES = {
    "an unknown model": (["--model", "digits_alexnett"], {"model": {"name": "digits_alexnett"}}),
    "an unknown layer": (["--layer", "fc9"], {"layer": "fc9"}),
    "a count too large": (["--sites", "65537"], {"sites": {"count": 65537}}),
    "a negative count": (["--sites", "-1"], {"sites": {"count": -1}}),
    "more per class than there is": (["--test", "51/class"], {"data": {**DIGITS, "test": {"per_class": 51}}}),
    "a missing root": (["--data", "mnist"], {"data": {**DIGITS, "name": "mnist"}}),
    "an unknown precision": (["--precision", "half"], {"precision": "half"}),
    "no split": ([], {"data": {"name": "digits"}}),
}


@pytest.fixture
def api(settings: Settings, store: JobStore) -> Iterator[httpx.Client]:
    with serving(settings) as client:
        yield client


def test_the_same_mistake_is_told_in_the_same_words(api: httpx.Client, settings: Settings, tmp_path: Path) -> None:
    right = ["--model", "digits_alexnet", "--layer", "fc2", "--data", "digits", "--sites", "4"]
    here, there = ["--home", str(settings.home)], ["--server", str(api.base_url), "--out", str(tmp_path)]
    told = {}
    for name, (options, fields) in MISTAKES.items():
        split = [] if name == "no split" else ["--test", "all"]
        answer = api.post("/v1/jobs", json={**FIELDS, **fields})
        assert answer.status_code == 422, name
        expected = f"Error: {answer.json()['detail']}\n"
        planned = CliRunner().invoke(commands, ["plan", *right, *split, *options, *here])
        submitted = CliRunner().invoke(commands, ["submit", *right, *split, *options, *there])
        told[name] = [planned.output, submitted.output]
        assert told[name] == [expected, expected], name
        assert (planned.exit_code, submitted.exit_code) == (2, 2), name
    assert len({str(lines) for lines in told.values()}) == len(MISTAKES)


def test_an_error_that_nobody_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("ablation.cli.listings.own_registered", fail)
    told = CliRunner().invoke(commands, ["datasets"])
    assert told.output == (
        "Error: RuntimeError: first. Nobody foresaw this; please report it, with what ABLATION_TRACEBACK=1 shows.\n"
    )
    assert told.exit_code == 1
    shown = CliRunner().invoke(commands, ["datasets"], env={"ABLATION_TRACEBACK": "1"})
    assert isinstance(shown.exception, RuntimeError)

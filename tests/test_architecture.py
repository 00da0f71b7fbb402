"""Who may import whom: the contracts hold, each of them fails when it should, and the map tells what they say."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ablation

ROOT = Path(__file__).parent.parent
PACKAGES = ("ablation", "api", "worker")
SIBLINGS = "statistics, export"

FORBIDDEN = [
    ("api/schemas.py", "import torch", "The API, the front desk"),
    ("api/routes.py", "from ablation.models import load_model", "The API, the front desk"),
    ("api/dependencies.py", "def late():\n    import worker.tasks", "The API, the front desk"),
    ("worker/store.py", "from worker import runner", "The API, the front desk"),
    ("ablation/table.py", "import pandas", "The API, the front desk"),
    ("worker/queue.py", "import api.schemas", "One arrow"),
    ("ablation/run.py", "import worker.store", "One arrow"),
    ("ablation/cache.py", "import redis", "The science knows no service"),
    ("ablation/cli/__init__.py", "import worker.tasks", "The command line knows"),
    ("ablation/cli/client.py", "import api.app", "The command line knows"),
    ("worker/runner.py", "import ablation.cli.files", "Nothing imports the command line"),
    ("ablation/spec.py", "import ablation.plan", "Inside ablation"),
    ("ablation/statistics.py", "import ablation.export", "Inside ablation"),
    ("ablation/helpers.py", "", "Inside ablation"),  # a file that the map does not know
]


def config() -> dict[str, list[dict[str, list[str]]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]


def lint(folder: Path) -> dict[str, bool]:
    """Contract name -> whether it is kept, by the files in `folder`."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"COLUMNS": "500"})
    verdicts = dict(re.findall(r"^(.+?) (KEPT|BROKEN)", run.stdout, re.MULTILINE))
    assert len(verdicts) == len(config()["contracts"]), run.stdout + run.stderr
    assert (run.returncode == 0) == (set(verdicts.values()) == {"KEPT"})
    return {name: verdict == "KEPT" for name, verdict in verdicts.items()}


def test_every_contract_is_kept() -> None:
    assert [name for name, kept in lint(ROOT).items() if not kept] == []


@pytest.mark.parametrize(("file", "line", "contract"), FORBIDDEN, ids=[f"{file}:{line}" for file, line, _ in FORBIDDEN])
def test_a_forbidden_import_breaks_its_contract(tmp_path: Path, file: str, line: str, contract: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    broken = [name for name, kept in lint(tmp_path).items() if not kept]
    assert any(name.startswith(contract) for name in broken), broken


def test_every_contract_has_an_import_that_breaks_it() -> None:
    for contract in config()["contracts"]:
        assert any(str(contract["name"]).startswith(start) for _, _, start in FORBIDDEN), contract["name"]


def test_the_map_tells_the_order_of_the_contract() -> None:
    layers = next(contract["layers"] for contract in config()["contracts"] if contract.get("containers"))
    assert [layer.replace(" | ", ", ") for layer in reversed(layers)] == read_map()


def read_map() -> list[str]:
    """The names of the map in the package's docstring: down the left column, then down the right one."""
    lines = [line[4:] for line in (ablation.__doc__ or "").splitlines() if line.startswith("    ")]
    assert SIBLINGS in (ablation.__doc__ or "")
    right = next(line.index(SIBLINGS) for line in lines if SIBLINGS in line)
    entries = [line[:right] for line in lines] + [line[right:] for line in lines]
    return [entry.split("  ")[0].rstrip("/") for entry in entries if entry.strip()]


def test_the_front_desk_is_all_of_the_worker_but_the_back_room() -> None:
    """A new file of the worker must be put on one side or the other."""
    files = {f"worker.{path.stem}" for path in (ROOT / "worker").glob("*.py")} - {"worker.__init__", "worker.__main__"}
    contract = next(one for one in config()["contracts"] if str(one["name"]).startswith("The API"))
    desk = {name for name in contract["source_modules"] if name.startswith("worker.")}
    room = {name for name in contract["forbidden_modules"] if name.startswith("worker.")}
    assert desk | room == files

"""Who may import whom: the contracts hold, each of them fails when it should, and the map tells what they say."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ablation", "api", "worker")
SIBLINGS = "statistics, export"
MAPS = [
    path for path in ROOT.glob("ablation/**/__init__.py") if "(a file imports only files above it" in path.read_text()
]

FORBIDDEN = [
    ("api/schemas.py", "import torch", "The API, the front desk"),
    ("api/routes.py", "from ablation.inputs.models import load_model", "The API, the front desk"),
    ("api/dependencies.py", "def late():\n    import worker.tasks", "The API, the front desk"),
    ("worker/store.py", "from worker import runner", "The API, the front desk"),
    ("ablation/table.py", "import pandas", "The API, the front desk"),
    ("worker/queue.py", "import api.schemas", "One arrow"),
    ("ablation/run.py", "import worker.store", "One arrow"),
    ("ablation/cache.py", "import redis", "The science knows no service"),
    ("ablation/cli/__init__.py", "import worker.tasks", "The command line knows"),
    ("ablation/cli/client.py", "import api.app", "The command line knows"),
    ("worker/runner.py", "import ablation.cli.files", "Nothing imports the command line"),
    ("ablation/spec.py", "import ablation.plan", "Inside ablation,"),
    ("ablation/statistics.py", "import ablation.export", "Inside ablation,"),
    ("ablation/helpers.py", "", "Inside ablation,"),  # a file that the map does not know
    ("ablation/inputs/catalog.py", "import ablation.inputs.models", "Inside ablation.inputs"),
    ("ablation/engine/loss.py", "import ablation.engine.carried.rules", "Inside ablation.engine,"),
    ("ablation/engine/responses/direct.py", "import ablation.engine.carried.rules", "Inside ablation.engine,"),
    ("ablation/engine/carried/finite.py", "import ablation.engine.responses.head", "Inside ablation.engine,"),
    ("ablation/engine/carried/tape.py", "import ablation.engine.carried.rules", "Inside ablation.engine.carried"),
    (
        "ablation/engine/responses/by_unit.py",
        "import ablation.engine.responses.rows",
        "Inside ablation.engine.responses",
    ),
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


def test_the_maps_tell_the_order_of_the_contracts() -> None:
    layered = {
        contract["containers"][0]: contract["layers"] for contract in config()["contracts"] if "containers" in contract
    }
    assert set(layered) == {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in MAPS}
    for package, layers in layered.items():
        order = [{name.strip() for name in layer.split("|")} for layer in reversed(layers)]
        told = read_map(importlib.import_module(package))
        at = {name: place for place, names in enumerate(order) for name in names}
        assert set(told) == set(at), package
        assert [at[name] for name in told] == sorted(at.values()), f"{package}: the map is not in the contract's order"


def read_map(package: ModuleType) -> list[str]:
    """The names in the map of a package's docstring; of two columns, the left one comes first."""
    lines = [line[4:] for line in (package.__doc__ or "").splitlines() if line.startswith("    ")]
    entries = [line for line in lines if line.strip()]
    if any(SIBLINGS in line for line in lines):
        right = next(line.index(SIBLINGS) for line in lines if SIBLINGS in line)
        entries = [line[:right] for line in lines] + [line[right:] for line in lines]
    names = [entry.split("  ")[0].removesuffix(" *") for entry in entries if entry.strip()]
    return [name.rstrip("/") for entry in names for name in entry.split(", ")]


def test_the_front_desk_is_all_of_the_worker_but_the_back_room() -> None:
    """A new file of the worker must be put on one side or the other."""
    files = {f"worker.{path.stem}" for path in (ROOT / "worker").glob("*.py")} - {"worker.__init__", "worker.__main__"}
    contract = next(one for one in config()["contracts"] if str(one["name"]).startswith("The API"))
    desk = {name for name in contract["source_modules"] if name.startswith("worker.")}
    room = {name for name in contract["forbidden_modules"] if name.startswith("worker.")}
    assert desk | room == files

"""Where compiled loops are kept, so that none is ever run that its source doesn't say any more."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest

from ablation.engine import compiled

ENGINE = Path(compiled.__file__).parent


def test_every_file_with_compiled_loops_is_found() -> None:
    """The text of each of them is in the name of the folder where all are kept: loops call each other across files."""
    found = {path.relative_to(ENGINE).as_posix() for path in compiled.find_loops(ENGINE)}
    decorated = {
        path.relative_to(ENGINE).as_posix()
        for path in ENGINE.rglob("*.py")
        if "\n@kernel" in path.read_text() and path.stem != "triton_rows"  # which Triton keeps by itself
    }
    assert decorated
    assert decorated <= found


def test_another_text_of_any_of_them_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ENGINE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    folders = [compiled._cache_folder.__wrapped__()]
    for path in compiled.find_loops(tmp_path):
        with path.open("a") as file:
            file.write("# another text")
        folders.append(compiled._cache_folder.__wrapped__())
    assert len(set(folders)) == len(folders) > 5
    assert {Path(folder).parent for folder in folders} == {tmp_path / "__pycache__"}


def test_without_a_place_to_keep_them_they_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, asked = numba.njit, []

    def njit(*, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**options)

    with monkeypatch.context() as patch:
        patch.setattr(numba, "njit", njit)
        plus_one = compiled.kernel(lambda x: x + 1)
    assert plus_one(1) == 2
    assert asked == [True, False]


BYTES_OF_A_SHARD = """
import sys
import numpy as np
from tests.worker.real_jobs import plan_real
from ablation.engine.responses.loops.records import close_class
from ablation.job import load_job
from ablation.shard import run_shard
from worker.settings import Settings
if sys.argv[1] == "after":  # as three Linears do, whose sums are closed from Python
    close_class(np.zeros(4), np.zeros(4), np.zeros(4), 9)
settings = Settings(home=sys.argv[2])
data = {"name": "digits", "test": {"per_class": 9}}
spec, plan = plan_real(settings, 60, layer="fc2", data=data, sites={"count": 4096}, engine="response")
print(run_shard(load_job(spec, plan, settings.folders), plan.shards[0]).within.tobytes().hex())
"""


@pytest.mark.slow
def test_bytes_do_not_depend_on_what_the_process_has_run_before(home: Path) -> None:
    """A part that was loaded alone may be another copy than the one inside a loop, and round differently."""

    def run(order: str) -> str:
        command = [sys.executable, "-c", BYTES_OF_A_SHARD, order, str(home)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    assert run("alone") == run("after")


def test_numbas_own_setting_is_left_alone() -> None:
    before = numba.config.CACHE_DIR
    compiled.kernel(lambda x: x)
    assert before == numba.config.CACHE_DIR

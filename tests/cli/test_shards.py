"""`ablation run` goes on from what it has kept, however it ended: the same bytes as undisturbed."""

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ablation.cli.commands import commands
from ablation.cli.files import results_folder, write_results
from ablation.cli.run import interrupted_by_signals
from ablation.cli.shards import keeping
from ablation.export import write_csv, write_parquet
from ablation.job import load_job, plan_here
from ablation.plan import PlanOptions
from ablation.run import run_spec
from ablation.shard import run_shard
from ablation.spec import JobSpec, make_spec
from ablation.statistics import make_summary
from ablation.table import ImportanceTable
from tests.cli.terminal import ABLATION, plain_environment
from worker.settings import Settings

JOB = ["--model", "digits_alexnet", "--layer", "fc2", "--data", "digits", "--test", "400", "--sites", "50"]
SPEC = {
    "model": {"name": "digits_alexnet"},
    "layer": "fc2",
    "data": {"name": "digits", "test": {"count": 400}},
    "sites": {"count": 50},
}
OPTIONS = PlanOptions(threads=1, shard_s=1e-3, batch_size=64)  # 4 shards, each of 128 examples but the last


def go_on(out: Path, home: Path, *options: str, job: list[str] = JOB) -> Result:
    """`ablation run`, in this process."""
    more = ["--batch-size", "64", "--home", str(home), "--out", str(out), *options]
    environment = {"ABLATION_THREADS": "1", "ABLATION_SHARD_S": "1e-3"}
    return CliRunner().invoke(commands, ["run", *job, *more], env=environment)


def begin(out: Path, home: Path, n_done: int, spec: JobSpec | None = None) -> ImportanceTable | None:
    """What `ablation run` does, but for its options; interrupted once `n_done` shards are kept."""
    spec, folders = spec or make_spec(SPEC), Settings(home=home).folders
    asked: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "engine": "auto", "batch_size": 64}
    table, notes = None, []
    try:
        with results_folder(out) as held, keeping(held, asked, resume=False, force=False, again="go on") as kept:

            def interrupt(fraction: float, what: str) -> None:
                if kept.n_done >= n_done:
                    raise KeyboardInterrupt

            table = run_spec(spec, folders, OPTIONS, device="cpu", on_progress=interrupt, kept=kept)
            write_results(
                out,
                csv=lambda stream: write_csv(table, stream),
                parquet=lambda stream: write_parquet(table, stream),
                summary=make_summary(table),
            )
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", [])
    where = f"{n_done} of 4 shards are kept in {out / '.shards'}. Go on from there with\n  go on"
    assert notes == ([where] if table is None and n_done else [])
    return table


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, home: Path) -> bytes:
    out = tmp_path_factory.mktemp("undisturbed")
    assert begin(out, home, 100)
    assert {path.name for path in out.iterdir()} == {"utility.csv", "utility.parquet", "summary.json"}
    return (out / "utility.csv").read_bytes()


def test_nothing_is_kept_of_a_job_that_has_done_nothing(tmp_path: Path, home: Path) -> None:
    begin(tmp_path / "new", home, 0)
    begin(tmp_path, home, 0)
    assert [*tmp_path.iterdir()] == []


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, home: Path, undisturbed: bytes) -> None:
    begin(tmp_path, home, 2)
    begun = json.loads((tmp_path / ".shards" / "job.json").read_text())["date"]
    refused = go_on(tmp_path, home)
    assert refused.exit_code == 2
    assert "In it is an unfinished job on fc2 of digits_alexnet, begun" in refused.stderr
    assert "2 of 4 shards are done. Go on from there with --resume, or begin anew with --force." in refused.stderr
    done = go_on(tmp_path, home, "--resume")
    assert done.exit_code == 0, done.output
    assert "Going on with an unfinished job" in done.stderr
    assert " 64%  examples x sites" in done.stderr  # 256 of 400 examples
    assert (tmp_path / "utility.csv").read_bytes() == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"utility.csv", "utility.parquet", "summary.json"}
    assert json.loads((tmp_path / "summary.json").read_text())["about"]["date"] == begun


def test_force_begins_anew_and_resume_without_anything_begins(tmp_path: Path, home: Path, undisturbed: bytes) -> None:
    begin(tmp_path / "a", home, 3)
    for out, option in (("a", "--force"), ("b", "--resume")):
        done = go_on(tmp_path / out, home, option)
        assert done.exit_code == 0, done.output
        assert "Going on" not in done.stderr
        assert ("Nothing is kept in" in done.stderr) == (option == "--resume")
        assert (tmp_path / out / "utility.csv").read_bytes() == undisturbed


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def lose(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("test-0.sums", damage, "can't be read"),
        ("job.json", damage, "can't be read, or is of another version of this package. Begin anew with --force."),
        ("job.json", lose, "can't be read, or is of another version of this package. Begin anew with --force."),
    ],
)
def test_what_is_damaged_is_said(
    tmp_path: Path, home: Path, undisturbed: bytes, name: str, spoil: Callable[[Path], None], says: str
) -> None:
    begin(tmp_path, home, 2)
    spoil(tmp_path / ".shards" / name)
    done = go_on(tmp_path, home, "--resume")
    assert says in done.stderr
    assert done.exit_code == (0 if name.endswith("sums") else 2), done.output
    if done.exit_code == 0:
        assert (tmp_path / "utility.csv").read_bytes() == undisturbed
    else:
        assert (tmp_path / ".shards" / "test-0.sums").exists()


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        (["--top1"], "spec.top1: false then, true now"),
        (["--layer", "fc1"], 'spec.layer: "fc2" then, "fc1" now'),
        (["--sites", "51"], "spec.sites.count: 50 then, 51 now"),
        (["--batch-size", "32"], "batch_size: 64 then, 32 now"),
        (["--engine", "finite"], 'engine: "auto" then, "finite" now'),
    ],
)
def test_another_job_is_refused_with_what_differs(tmp_path: Path, home: Path, changes: list[str], differs: str) -> None:
    begin(tmp_path, home, 1)
    refused = go_on(tmp_path, home, *changes, "--resume")
    assert refused.exit_code == 2
    assert f"What differs is {differs}. Ask for the same, or begin anew with --force." in refused.stderr
    assert (tmp_path / ".shards" / "test-0.sums").exists()


def test_another_model_data_or_version_is_refused(tmp_path: Path, home: Path) -> None:
    """What was found is changed where it is noted: what is found the next time differs from that."""
    begin(tmp_path, home, 1)
    noted = tmp_path / ".shards" / "job.json"
    right = json.loads(noted.read_text())
    for way in (("model",), ("data", "test"), ("versions", "torch"), ("device", "hardware")):
        wrong = json.loads(json.dumps(right))
        place = wrong["found"]
        for name in way[:-1]:
            place = place[name]
        place[way[-1]] = "something else"
        noted.write_text(json.dumps(wrong))
        refused = go_on(tmp_path, home, "--resume")
        assert refused.exit_code == 2
        assert f'What differs is {".".join(way)}: "something else" then, ' in refused.stderr
        assert "shards are kept" not in refused.stderr  # the same command would not go on
    assert (tmp_path / ".shards" / "test-0.sums").exists()


def test_results_are_not_replaced_without_force(tmp_path: Path, home: Path, undisturbed: bytes) -> None:
    (tmp_path / "utility.csv").write_text("mine")
    for option in ([], ["--resume"]):
        refused = go_on(tmp_path, home, *option)
        assert refused.exit_code == 2
        assert "--out: got " in refused.stderr
        assert (
            "utility.csv is in it. Choose another with --out, or replace what is there with --force." in refused.stderr
        )
        assert "%" not in refused.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["utility.csv"]
        assert (tmp_path / "utility.csv").read_text() == "mine"
    assert go_on(tmp_path, home, "--force").exit_code == 0
    assert (tmp_path / "utility.csv").read_bytes() == undisturbed


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path, home: Path) -> None:
    with (
        results_folder(tmp_path) as held,
        keeping(held, {"spec": make_spec(SPEC).model_dump(mode="json")}, resume=False, force=False, again=""),
    ):
        for option in ([], ["--resume"], ["--force"]):
            refused = go_on(tmp_path, home, *option)
            assert refused.exit_code == 2
            assert "Another `ablation run` is writing to it." in refused.stderr


def test_a_smaller_plan_drops_what_was_kept_of_the_larger(tmp_path: Path, home: Path) -> None:
    """Where memory runs out, batches are halved, and what was summed up in the larger ones can't be used."""

    from ablation.job import plan_here

    spec, folders = make_spec(SPEC), Settings(home=home).folders
    options = replace(OPTIONS, batch_size=None, is_shared=False, is_kept=True)
    asked = {"spec": spec.model_dump(mode="json"), "engine": "auto", "batch_size": None}
    with results_folder(tmp_path) as held, keeping(held, asked, resume=False, force=False, again="") as kept:
        large = kept.start(load_job(spec, plan_here(spec, folders, options), folders, device="cpu"))
        shard = large.plan.shards[0]
        kept.put(shard, 1, run_shard(large, shard), 1.5)
        assert kept.find_plan(0) == large.plan
        assert kept.find_plan(1) is None
        small = load_job(spec, plan_here(spec, folders, replace(options, n_halved=1)), folders, device="cpu")
        kept.start(small)
        assert (kept.n_done, kept.n_shards) == (0, len(small.plan.shards))
        assert kept.get(small.plan.shards[0]) is None
        assert kept.find_plan(0) == kept.find_plan(1) == small.plan


def test_a_long_job_on_a_whole_layer_is_cut_so_that_little_is_lost(home: Path, tmp_path: Path) -> None:
    spec = make_spec({**SPEC, "sites": "all", "data": {"name": "digits", "test": "all"}})
    folders = Settings(home=home).folders
    one = plan_here(spec, folders, PlanOptions(1, 1e-6, batch_size=64, is_shared=False))
    cut = plan_here(spec, folders, PlanOptions(1, 1e-6, batch_size=64, is_shared=False, is_kept=True))
    assert (one.path, len(one.shards)) == ("response", 1)
    assert [shard.sites for shard in cut.shards] == [(0, 65536)] * 8
    assert cut.shards[3].examples == (192, 256)
    long = plan_here(spec, folders, PlanOptions(1, 60, is_shared=False, is_kept=True))
    assert len(long.shards) == 1  # a job of seconds is not
    table = begin(tmp_path, home, 100, spec)
    assert table
    np.testing.assert_allclose(table.about["proof"]["sum_error"], 0, atol=1e-2)


# --- real processes, real signals, a real limit -------------------------------------------------------------------


def start(
    out: Path, home: Path, *options: str, job: list[str], limit_bytes: int | None = None
) -> "subprocess.Popen[str]":
    """`ablation run` in a process of its own; files beyond `limit_bytes` end for it as on a full disk."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a suite in a shell's background has ignored
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [*ABLATION, "run", *job, "--home", str(home), "--out", str(out), *options]
    environment = plain_environment(ABLATION_THREADS="1", ABLATION_SHARD_S="1e-4", PYTHONUNBUFFERED="1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, preexec_fn=prepare, **pipes)


SLOW = [*JOB[:-4], "--test", "all", "--sites", "60", "--batch-size", "4"]  # 42 shards of three batches


def wait_for_more(process: "subprocess.Popen[str]", out: Path) -> None:
    """Wait until the process has kept another shard."""
    files = out / ".shards"

    def kept() -> list[int]:
        return [file.stat().st_mtime_ns for file in files.glob("*.sums")]

    before, deadline = kept(), time.monotonic() + 120
    while kept() == before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_and_a_kill_in_mid_job_change_no_byte(tmp_path: Path, home: Path) -> None:
    out = tmp_path / "out"
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = start(out, home, *(["--resume"] if out.exists() else []), job=SLOW)
        wait_for_more(process, out)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert "Traceback" not in said
        assert [path.name for path in out.iterdir()] == [".shards"]
        if code == 130:
            assert f"shards are kept in {out / '.shards'}. Go on from there with" in said
            command = shlex.split(said.splitlines()[-1])
            assert command == ["ablation", "run", *SLOW, "--home", str(home), "--out", str(out), "--resume"]
    environment = {"ABLATION_THREADS": "1", "ABLATION_SHARD_S": "1e-4"}
    for options in (command[1:], ["run", *SLOW, "--home", str(home), "--out", str(tmp_path / "undisturbed")]):
        done = CliRunner().invoke(commands, options, env=environment)
        assert done.exit_code == 0, done.output
    assert (out / "utility.csv").read_bytes() == (tmp_path / "undisturbed" / "utility.csv").read_bytes()


def test_sigterm_and_a_closed_terminal_end_as_ctrl_c_does() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, before := signal.SIG_DFL)  # a suite under nohup has it ignored
        with pytest.raises(KeyboardInterrupt), interrupted_by_signals():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == before


def test_where_no_room_is_left_the_file_and_what_is_kept_are_named(tmp_path: Path, home: Path) -> None:
    """The sums of 300 sites take 9 kB, their CSV takes 20 kB."""
    out = tmp_path / "out"
    with start(out, home, job=[*JOB[:-1], "300"], limit_bytes=20_000) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    error, kept, command = said.splitlines()[-3:]
    assert (
        error
        == f"Error: {out / 'utility.csv'} can't be written: File too large. Make room for it, or choose another place."
    )
    assert re.fullmatch(rf"(\d+) of \1 shards are kept in {out}/.shards. Go on from there with", kept), kept
    assert command.endswith("--resume")
    assert [path.name for path in out.iterdir()] == [".shards"]
    again = CliRunner().invoke(commands, shlex.split(command)[1:])  # with room, what is kept is enough
    assert again.exit_code == 0, again.output
    assert len((out / "utility.csv").read_text().splitlines()) == 301


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path, home: Path) -> None:
    with start(tmp_path / "out", home, job=JOB, limit_bytes=0) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.startswith(
        f"Error: --out: got '{tmp_path / 'out'}'; allowed: a folder that you may write to. (File too"
    )

"""What is done of a job that `ablation run` has begun, kept in a hidden folder of `--out` until the results are there.

In: a folder, what was asked for, and sums of shards. Out: the plan and the sums of an earlier process that was
interrupted, if it worked on the same job. Each file is written whole, so that nothing but the shard under way is lost,
however the process ends. Not here: when shards run (`ablation.run`).

    .shards/job.json         what was asked for, the plan, and what it was found to be of
    .shards/SPLIT-N.sums     sums over the examples of the first shards of these sites: N is the first site
    .shards/lock             held by the process that works on the job
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ablation.cli.files import Held
from ablation.errors import SpecError
from ablation.plan import Plan, Shard
from ablation.results import UNFINISHED

if TYPE_CHECKING:
    from ablation.job import Job
    from ablation.partial import PartialSums

FORMAT = 1  # of the files; others are not read
JOB, LOCK, SUMS = "job.json", "lock", "*.sums"


class Shards:
    """The shards of one job that are done, in the folder of its results; an `ablation.run.Kept`."""

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        """`asked` is what the job was asked to be, and how it was asked to be computed, as plain JSON."""
        self.out, self.folder, self.asked = out, out / UNFINISHED, dict(asked)
        self.job: dict[str, Any] | None = _read_job(self.folder)
        # How many shards are done, by the file of their sums.
        self.done = {file.name: int(_peek(file).get("n_done", 0)) for file in self.folder.glob(SUMS)}
        self.seconds = 0.0

    @property
    def n_shards(self) -> int:
        """How many shards the job has."""
        return len(self.job["plan"]["shards"]) if self.job else 0

    @property
    def n_done(self) -> int:
        """How many shards are done."""
        return sum(self.done.values()) if self.job else 0

    def describe(self) -> str:
        """What is there, for a message."""
        assert self.job is not None
        spec = self.job["asked"]["spec"]
        return (
            f"an unfinished job on {spec['layer']} of {spec['model']['name']}, begun {self.job['date']}: "
            f"{self.n_done} of {self.n_shards} shards are done"
        )

    def check_asked(self) -> None:
        """Check that this is the job that was begun here.

        Raises:
            SpecError: it is another one; the message says what differs.
        """
        assert self.job is not None
        self._check(self.job["asked"], self.asked)

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        there, here = _flat(before), _flat(now)
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if names:
            shown = "; ".join(f"{name}: {_short(there.get(name))} then, {_short(here.get(name))} now" for name in names)
            raise SpecError(
                "--resume",
                str(self.out),
                "the job that was begun there, on the same model, data and versions",
                f"What differs is {shown}. Ask for the same, or begin anew with --force.",
            )

    def clear(self) -> None:
        """Remove everything but the lock."""
        for file in [*self.folder.glob(SUMS), *self.folder.glob("*")]:  # the job last: without it, sums are of nothing
            if file.name != LOCK:
                file.unlink(missing_ok=True)
        self.job, self.done, self.seconds = None, {}, 0.0

    def find_plan(self, n_halved: int) -> Plan | None:
        """The plan that the job was begun with; None where there is none, or it is to be cut smaller than that."""
        if self.job is None:
            return None
        plan = Plan.model_validate_json(json.dumps(self.job["plan"]))  # lists become tuples
        return plan if n_halved <= plan.n_halved else None

    def start(self, job: "Job") -> "Job":
        """Note what a job is begun with, or check that it is what it was begun with, and return it with its `begin`.

        Raises:
            SpecError: the model, the data or the versions are others than those that it was begun with.
        """
        from dataclasses import replace

        from ablation.job import Begin, describe_job

        told = describe_job(job)
        found = {
            "model": job.found["model"],
            "data": {name: hash for name, hash in job.found.items() if name in job.splits},
            "device": told["device"],
            "versions": {name: version for name, version in told["versions"].items() if name != "python"},
        }
        if self.job is not None and self.find_plan(job.plan.n_halved) is not None:
            self._check(self.job["found"], found)
            self.seconds = max((float(_peek(file)["seconds"]) for file in self.folder.glob(SUMS)), default=0.0)
            return replace(job, begin=Begin(self.job["date"], self.job["command"]))
        self.clear()  # of what is there of a larger cut, for which memory did not suffice
        begun = {"format": FORMAT, "asked": self.asked, "found": found, "plan": job.plan.model_dump(mode="json")}
        self.job = {**begun, "date": job.begin.date, "command": job.begin.command}
        text = json.dumps(self.job).encode()
        self._write(self.folder / JOB, lambda stream: stream.write(text))
        return job

    def get(self, shard: Shard) -> "tuple[int, PartialSums] | None":
        """How many shards of this one's sites are done, and their sums; None where none is, or they can't be read."""
        from ablation.partial import make_partial
        from worker.codec import decode_columns

        file = self._file(shard)
        if not file.exists():
            return None
        try:
            columns, about = decode_columns(file.read_bytes())
            return int(about["n_done"]), make_partial(about["totals"], columns)
        except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's errors are ValueErrors and OSErrors
            click.echo(f"Warning: {file} can't be read ({error}); these shards run again.", err=True)
            return None

    def put(self, shard: Shard, n_done: int, partial: "PartialSums", seconds: float) -> None:
        """Keep the sums over the first `n_done` shards of this one's sites.

        Raises:
            WriteError: they can't be written.
        """
        from ablation.partial import TOTALS, held
        from worker.codec import write_columns

        about = {"n_done": n_done, "seconds": seconds, "totals": {name: getattr(partial, name) for name in TOTALS}}
        file = self._file(shard)
        self._write(file, lambda stream: write_columns(stream, held(partial), about))
        self.done[file.name] = n_done

    def _file(self, shard: Shard) -> Path:
        return self.folder / f"{shard.split}-{shard.sites[0]}.sums"

    def _write(self, path: Path, write: Any) -> None:
        from ablation.export import write_whole

        write_whole(path, write)


@contextlib.contextmanager
def keeping(held: Held, asked: Mapping[str, Any], *, resume: bool, force: bool, again: str) -> Iterator[Shards]:
    """Context with what is kept of the job in the folder of its results; afterwards nothing is, unless it broke off.

    Where it breaks off, `again`, the command that goes on from there, is shown with the error.

    Raises:
        SpecError: an unfinished job is there and neither `resume` nor `force` says what to do with it, or it is another
            one, or another process works on it; or there are results already.
    """
    folder = held.folder / UNFINISHED
    was_there = folder.is_dir()
    folder.mkdir(exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        _lock(lock, held.folder)
        shards = Shards(held.folder, asked)
        try:
            _decide(shards, held, resume=resume, force=force)
        except BaseException:
            if not was_there:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            yield shards
        except BaseException as error:
            if not shards.n_done:
                shutil.rmtree(folder, ignore_errors=True)
            elif not isinstance(error, SpecError):
                error.add_note(
                    f"{shards.n_done} of {shards.n_shards} shards are kept in {folder}. Go on from there with\n"
                    f"  {again}"
                )
            raise
        shards.clear()
        shutil.rmtree(folder, ignore_errors=True)


def _decide(shards: Shards, held: Held, *, resume: bool, force: bool) -> None:
    """Say whether the job goes on or begins anew."""
    if shards.n_done and resume:
        shards.check_asked()
        click.echo(f"Going on with {shards.describe()}.", err=True)
        return
    if shards.n_done and not force:
        next_step = f"In it is {shards.describe()}. Go on from there with --resume, or begin anew with --force."
        raise SpecError("--out", str(shards.out), "a folder without an unfinished job", next_step)
    if shards.done and shards.job is None and not force:
        next_step = f"{JOB} there can't be read, or is of another version of this package. Begin anew with --force."
        raise SpecError("--out", str(shards.folder), "shards that a run of this version has kept", next_step)
    held.check_empty(force=force)
    if resume:
        click.echo(f"Nothing is kept in {shards.out}; beginning anew.", err=True)
    shards.clear()


def _lock(file: Any, out: Path) -> None:
    """Hold the lock for as long as the file is open; the system releases it if this process dies.

    Raises:
        SpecError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        next_step = "Another `ablation run` is writing to it. Wait until it is done, or choose another with --out."
        raise SpecError("--out", str(out), "a folder that nobody else writes to", next_step) from None
    except OSError:  # a file system without locks: nothing is known of others
        return


def _read_job(folder: Path) -> dict[str, Any] | None:
    """What is noted of the job; None where nothing is, or it can't be read."""
    try:
        noted = json.loads((folder / JOB).read_bytes())
    except (OSError, ValueError):
        return None
    return noted if isinstance(noted, dict) and noted.get("format") == FORMAT else None


def _peek(file: Path) -> dict[str, Any]:
    """What a file of sums says of itself, without reading them."""
    import pyarrow as pa

    try:
        with file.open("rb") as stream:
            return json.loads(pa.ipc.open_stream(stream).schema.metadata[b"about"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {
        long: part for key, each in value.items() for long, part in _flat(each, f"{name}.{key}".lstrip(".")).items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}..."

"""Pictures that can't be read: a job is refused before the work, or leaves them out and says so."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ablation.cli.commands import commands
from ablation.errors import DataError, SpecError
from ablation.inputs.catalog import NOTHING
from ablation.inputs.data import draw_readable, find_bad_pictures, load_data
from ablation.plan import PlanOptions
from ablation.run import run_spec
from ablation.spec import CountOfExamples, JobSpec, PerClass, make_spec
from ablation.statistics import make_summary
from ablation.table import ImportanceTable
from worker import runner
from worker.planner import plan_job
from worker.queue import make_celery
from worker.runner import Worker
from worker.settings import Settings
from worker.states import State
from worker.store import JobStore

N_CLASSES, N_TRAIN, N_TEST = 10, 4, 3  # of the demo model; pictures a class


def picture(seed: int, suffix: str, size: int = 40) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size + 3, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, {"jpg": "JPEG", "tif": "TIFF", "ppm": "PPM"}.get(suffix, suffix.upper()))
    return stream.getvalue()


def write_folder(root: Path) -> None:
    """Ten classes of JPEGs, all of them good."""
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        for label in range(N_CLASSES):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for number in range(n):
                (folder / f"{number}.jpg").write_bytes(picture(100 * label + number, "jpg"))


@pytest.fixture
def root(settings: Settings, tmp_path: Path) -> Path:
    """A folder of pictures below the data folder of the service; its name is the test's own."""
    folder = settings.folders.data / tmp_path.name
    write_folder(folder)
    return folder


def ask(root: Path, **data: object) -> JobSpec:
    return make_spec(
        {
            "model": {"name": "digits_alexnet"},
            "layer": "fc2",
            "data": {"name": "imagefolder", "root": root.name, "train": "all", "test": "all", **data},
            "sites": {"count": 5},
        }
    )


# --- which files -----------------------------------------------------------------------------------------------------

SUFFIXES = ("jpg", "png", "webp", "bmp", "ppm", "tif")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_cut_is_found_by_its_header_and_its_end(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    whole = picture(1, suffix)
    contents = {"a": whole, "b": whole[: len(whole) // 2], "c": whole[:-3], "d": b"", "e": b"hello", "f": whole}
    for name, content in contents.items():
        (tmp_path / "test" / "cat" / f"{name}.{suffix}").write_bytes(content)
    dataset = load_data("imagefolder", tmp_path)
    seen: list[float] = []
    bad = find_bad_pictures(dataset, np.arange(6), is_full=False, on_progress=seen.append)
    if suffix in ("png", "jpg"):
        bad.pop(2, "")  # Pillow reads a JPEG whose last letters are missing, and a PNG without its last checksum
    assert set(bad) - {2} == {1, 3, 4}
    assert seen == [0.0]
    assert "UnidentifiedImageError" in bad[4]
    assert str(tmp_path) not in "".join(bad.values())


def test_a_picture_that_is_bad_inside_is_found_on_request(tmp_path: Path) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    whole = bytearray(picture(1, "png"))
    whole[len(whole) // 2] ^= 0xFF  # the checksum of a block is wrong
    (tmp_path / "test" / "cat" / "a.png").write_bytes(whole)
    dataset = load_data("imagefolder", tmp_path)
    assert find_bad_pictures(dataset, np.arange(1), is_full=False) == {}
    assert find_bad_pictures(dataset, np.arange(1), is_full=True).keys() == {0}


def test_trailing_bytes_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    for suffix in ("jpg", "png"):
        (tmp_path / "test" / "cat" / f"a.{suffix}").write_bytes(picture(1, suffix) + b"\0" * 20)
    assert find_bad_pictures(load_data("imagefolder", tmp_path), np.arange(2), is_full=False) == {}


def test_other_data_has_no_bad_pictures() -> None:
    assert find_bad_pictures(load_data("digits"), np.arange(5), is_full=True) == {}


def test_what_is_drawn_can_be_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for name in ("0/0", "3/1", "3/2"):
        (tmp_path / "test" / f"{name}.jpg").write_bytes(b"no")
    dataset = load_data("imagefolder", tmp_path)
    labels = np.asarray(dataset.targets)
    every, bad = draw_readable(dataset, "all", None, is_full=False)
    assert sorted(bad) == [0, 10, 11]
    assert every.tolist() == [n for n in range(30) if n not in bad]
    for asked in (CountOfExamples(count=20, seed=3), PerClass(per_class=1, seed=2)):
        drawn, bad = draw_readable(dataset, asked, labels, is_full=False)
        again, _ = draw_readable(dataset, asked, labels, is_full=False)
        assert drawn.tolist() == again.tolist()
        assert not set(drawn.tolist()) & {0, 10, 11}
        assert set(bad) <= {0, 10, 11}
        assert len(drawn) == (20 if isinstance(asked, CountOfExamples) else 10)
    with pytest.raises(SpecError, match="got 28; allowed: 1 to 27"):
        draw_readable(dataset, CountOfExamples(count=28), None, is_full=False)
    for path, _ in dataset.samples:
        Path(path).write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of the 30 pictures .*example 0 \(0/0.jpg\): UnidentifiedImageError"):
        draw_readable(dataset, "all", None, is_full=False)


# --- jobs ------------------------------------------------------------------------------------------------------------


def run(spec: JobSpec, settings: Settings, **options: object) -> ImportanceTable:
    return run_spec(spec, settings.folders, PlanOptions(threads=1), device="cpu", **options)


def test_a_bad_picture_of_the_last_split_stops_a_job_before_the_work(settings: Settings, root: Path) -> None:
    (root / "test" / "9" / "2.jpg").write_bytes(picture(1, "jpg")[:900])
    seen: list[float] = []
    with pytest.raises(DataError) as caught:
        run(ask(root), settings, on_progress=lambda fraction, what: seen.append(fraction))
    assert set(seen) == {0.0}
    assert str(caught.value).startswith(
        "1 of the 30 pictures of the test split can't be read: example 29 (9/2.jpg): OSError: "
    )
    assert '--bad-images skip (in a job spec: "bad_images": "skip" in data).' in str(caught.value)
    run(ask(root, test=None), settings)  # what is not asked for is not checked


def test_bad_pictures_are_left_out_counted_and_listed(settings: Settings, root: Path, tmp_path: Path) -> None:
    for name in ("train/0/0", "train/4/1", "test/9/2"):
        (root / f"{name}.jpg").write_bytes(b"no picture")
    table = run(ask(root, bad_images="skip"), settings)
    for split, n, names in (("train", 38, ["example 0 (0/0.jpg)", "example 17 (4/1.jpg)"]), ("test", 29, None)):
        told = table.about["data"]["splits"][split]
        assert (told["n_examples"], told["n_skipped"]) == (n, N_CLASSES * (N_TRAIN if split == "train" else N_TEST) - n)
        assert [*told["skipped"]] == (names or ["example 29 (9/2.jpg)"])
        assert all(reason.startswith("UnidentifiedImageError: ") for reason in told["skipped"].values())
        assert make_summary(table)["splits"][split]["skipped"] == told["n_skipped"]
    for path in root.rglob("*.jpg"):
        if path.read_bytes() == b"no picture":
            path.unlink()
    without = run(ask(root), settings)
    for name, values in without.columns.items():
        assert values.tobytes() == table.columns[name].tobytes(), name


def test_the_command_line_says_what_is_left_out(settings: Settings, root: Path, tmp_path: Path) -> None:
    (root / "test" / "1" / "0.jpg").write_bytes(b"no picture")
    job = [
        "--model",
        "digits_alexnet",
        "--layer",
        "fc2",
        "--data",
        "imagefolder",
        "--root",
        str(root),
        "--test",
        "2/class",
    ]
    more = ["--sites", "3", "--home", str(settings.home), "--out", str(tmp_path / "out")]
    for options in ([], ["--bad-images", "skip", "--check-images", "full"]):
        done = CliRunner().invoke(commands, ["run", *job, *more, *options])
        about = None
        if options:
            assert done.exit_code == 0, done.output
            about = json.loads((tmp_path / "out" / "summary.json").read_text())["about"]
            assert about["data"]["splits"]["test"]["n_examples"] == 20
            assert about["spec"]["data"]["check_images"] == "full"
            assert str(root.parent) not in json.dumps(about)
            assert f"--root {root.name} " in about["command"]
            n_skipped = about["data"]["splits"]["test"]["n_skipped"]
            assert ("1 that can't be read: example 3 (1/0.jpg)" in done.stdout) == bool(n_skipped)
        else:
            assert (done.exit_code, "can't be read" in done.stderr) in ((1, True), (0, False))
            for path in (tmp_path / "out").glob("*"):
                path.unlink()


def test_a_job_over_http_leaves_bad_pictures_out(settings: Settings, root: Path, store: JobStore) -> None:
    (root / "train" / "0" / "0.jpg").write_bytes(b"no picture")
    spec, celery = ask(root, bad_images="skip"), make_celery(settings)
    job = store.create(spec, None)
    assert job
    runner.plan_job(Worker(store, celery, settings, "a"), job.id)
    planned = store.get(job.id)
    assert planned
    assert planned.plan, planned.error
    assert [split.n_examples for split in planned.plan.splits] == [39, 30]
    for shard in planned.plan.shards:
        runner.run_shard(Worker(store, celery, settings, "a"), job.id, shard.id)
    runner.finalize(Worker(store, celery, settings, "a"), job.id)
    over = store.get(job.id)
    assert over
    assert over.status is State.SUCCEEDED, over.error
    assert store.about(job.id)["data"]["splits"]["train"]["n_skipped"] == 1
    assert store.summary(job.id)["splits"]["train"]["skipped"] == 1


def test_a_bad_picture_fails_a_job_over_http_at_its_first_shard(
    settings: Settings, root: Path, store: JobStore
) -> None:
    (root / "test" / "9" / "2.jpg").write_bytes(b"no picture")
    plan = plan_job(ask(root), settings, NOTHING)
    assert plan
    job = store.create(ask(root), plan)
    assert job
    runner.run_shard(Worker(store, make_celery(settings), settings, "a"), job.id, plan.shards[0].id)
    failed = store.get(job.id)
    assert failed
    assert failed.error
    assert failed.error["type"] == "data-error"
    assert "example 29 (9/2.jpg): UnidentifiedImageError" in failed.error["detail"]
    assert str(root.parent) not in failed.error["detail"]

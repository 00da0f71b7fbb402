"""What a worker finds where it starts; that it says so is in `test_main.py`."""

from importlib.metadata import version
from pathlib import Path

import pytest

from ablation.inputs.catalog import Registered
from tests.worker.conftest import FACTS
from worker.inventory import describe, describe_registered, files_below, join, list_folder, subfolders
from worker.settings import Settings
from worker.store import JobStore


def test_versions_folders_and_what_is_in_them(settings: Settings, store: JobStore, tmp_path: Path) -> None:
    for folder in ("data/mnist", "data/pictures", "data/.hidden", "checkpoints/below", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("data/README", "checkpoints/net.pt", "checkpoints/below/a.safetensors", "elsewhere/secret.pt"):
        (tmp_path / file).touch()
    for link, target in (
        ("data/out", "elsewhere"), ("data/in", "data/mnist"),
        ("checkpoints/out.pt", "elsewhere/secret.pt"), ("checkpoints/in.pt", "checkpoints/net.pt"),
        ("checkpoints/away", "elsewhere"), ("checkpoints/circle", "checkpoints"),
    ):  # fmt: skip
        (tmp_path / link).symlink_to(tmp_path / target)
    told = describe(
        settings.model_copy(update={"data_dir": tmp_path / "data", "checkpoint_dir": tmp_path / "checkpoints"})
    )
    lines = told.replace("worker: ", "").splitlines()
    assert lines[0].startswith(f"weight-ablation {version('weight-ablation')}, torch {version('torch')}, torchvision ")
    assert lines[1].startswith(f"Redis {store.client.info('server')['redis_version']} at {settings.redis_url}")
    assert f"data {tmp_path}/data: in, mnist, pictures" in lines
    assert f"checkpoints {tmp_path}/checkpoints: below/a.safetensors, in.pt, net.pt" in lines
    assert f"cache {settings.cache_dir}" in lines


def test_a_password_is_not_said(settings: Settings, store: JobStore) -> None:
    store.client.config_set("requirepass", "secret")
    try:
        told = describe(settings.model_copy(update={"redis_url": settings.redis_url.replace("://", "://:secret@")}))
    finally:
        store.client.config_set("requirepass", "")
    assert "secret" not in told
    assert settings.redis_url in told


def test_what_can_t_be_read_is_said(tmp_path: Path) -> None:
    for find in (subfolders, files_below):
        assert list_folder(tmp_path, find) == "none"
        assert list_folder(tmp_path / "nothing", find) == "can't be read (No such file or directory)"


@pytest.mark.parametrize(
    ("n", "end"), [(0, "none"), (1, "name0"), (20, "name18, name19"), (1025, "name19, and 1,005 more")]
)
def test_of_many_names_the_first(n: int, end: str) -> None:
    assert join([f"name{k}" for k in range(n)]).endswith(end)


def test_what_is_registered_is_named() -> None:
    told = describe_registered(Registered({"zebra": FACTS, "ape": FACTS}, ("herd",)))
    assert told == "worker: registered models: ape, zebra\nworker: registered data sets: herd"

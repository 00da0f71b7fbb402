from pathlib import Path

import pytest
from pydantic import ValidationError
from redis import Redis

from ablation.errors import ServiceError
from worker.settings import Settings, load_settings


def test_folders_are_below_home_unless_chosen(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, cache_dir=tmp_path / "elsewhere")
    assert settings.folders.data == tmp_path / "data"
    assert settings.folders.checkpoints == tmp_path / "checkpoints"
    assert settings.folders.cache == tmp_path / "elsewhere"


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ABLATION_HOME", str(tmp_path))
    monkeypatch.setenv("ABLATION_LEASE_S", "3")
    monkeypatch.setenv("REDIS_URL", "redis://somewhere:1/0")
    settings = load_settings()
    assert (settings.lease_s, settings.redis_url) == (3.0, "redis://somewhere:1/0")
    assert settings.data_dir == tmp_path / "data"


def test_relative_folders_do_not_depend_on_where_a_process_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings(home=Path("here")).data_dir == tmp_path / "here" / "data"


def test_settings_are_frozen_and_checked() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.threads = 9  # type: ignore[misc]
    with pytest.raises(ValidationError, match="max_attempts"):
        Settings(max_attempts=0)


def test_the_password_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("a/b@c:d%\n")
    monkeypatch.setenv("REDIS_URL", "redis://somewhere:1/0")
    monkeypatch.setenv("ABLATION_REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    with Redis.from_url(load_settings().redis_url) as client:
        connection = client.connection_pool.connection_kwargs
    assert connection["password"] == "a/b@c:d%"
    assert (connection["host"], connection["port"], connection["db"]) == ("somewhere", 1, 0)


def test_a_password_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ABLATION_REDIS_PASSWORD_FILE", str(tmp_path / "nowhere"))
    with pytest.raises(ServiceError, match="nowhere"):
        load_settings()

from pathlib import Path

import pytest
from pydantic import ValidationError
from redis import Redis

from ablation.errors import ServiceError
from worker.settings import Settings, hide_password, load_settings


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


def test_a_password_needs_a_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("secret")
    monkeypatch.setenv("REDIS_URL", "")
    monkeypatch.setenv("ABLATION_REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    assert load_settings().redis_url == ""


def test_a_home_that_is_given_goes_first_and_the_password_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text("secret")
    monkeypatch.setenv("ABLATION_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("REDIS_URL", "redis://somewhere:1/0")
    monkeypatch.setenv("ABLATION_REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    settings = load_settings(tmp_path)
    assert (settings.home, settings.redis_url) == (tmp_path, "redis://:secret@somewhere:1/0")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("ABLATION_THREADS", "abc", "a valid integer"),
        ("ABLATION_THREADS", "0", "greater than or equal to 1"),
        ("ABLATION_SHARD_S", "-1", "greater than 0"),
        ("REDIS_URL", "http://host", "redis://host:6379/0, rediss://host:6379/0 or unix:///path"),
        ("REDIS_URL", "redis://host:port/0", "redis://host:6379/0, rediss://host:6379/0 or unix:///path"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ServiceError) as error:
        load_settings()
    assert str(error.value).startswith(f"{name}: got {value!r}; allowed: {allowed}. ")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6379/0", "redis://host:6379/0"),
        ("rediss://user:secret@host/0", "rediss://host/0"),
        ("redis://:sec/r@et@host:6379/0", "redis://host:6379/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert hide_password(url) == shown


def test_a_wrong_address_does_not_show_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "http://:secret@host")
    with pytest.raises(ServiceError, match="got 'http://host'"):
        load_settings()

from pathlib import Path

import pytest
from pydantic import ValidationError
from redis import Redis

from ablation.errors import ServiceError
from worker.queue import make_celery
from worker.settings import (
    OTHER_VARIABLES,
    Address,
    Settings,
    hide_password,
    load_settings,
    make_writable,
    variable_of,
    warn_of_unknown_variables,
)

PAGE = Path(__file__).parents[2] / "docs" / "05-operations.md"


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


def test_a_lease_has_several_beats_unless_the_lease_itself_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().beat_s == 1
    assert Settings(lease_s=2).beat_s == 0.25
    monkeypatch.setenv("ABLATION_BEAT_S", "2")
    monkeypatch.setenv("ABLATION_LEASE_S", "-1")
    with pytest.raises(ServiceError, match=r"^ABLATION_LEASE_S: got '-1'"):
        load_settings()


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
        ("ABLATION_THREADS", "abc", "a whole number"),
        ("ABLATION_THREADS", "0", "1 or more"),
        ("ABLATION_SHARD_S", "-1", "more than 0"),
        ("REDIS_URL", "http://host", "redis://host:6379/0, rediss://host:6379/0 or unix:///path"),
        ("REDIS_URL", "redis://host:port/0", "redis://host:6379/0, rediss://host:6379/0 or unix:///path"),
        ("ABLATION_HOME", "~nobody-of-this-name", "a path, or ~ and a user who has a home folder here"),
        ("ABLATION_CACHE_DIR", "~nobody-of-this-name/x", "a path, or ~ and a user who has a home folder here"),
        ("ABLATION_DEVICE", "gpu", "cpu, cuda or cuda:1"),
        ("ABLATION_THREADS", "1000000", "1024 or less"),
        ("ABLATION_SHARD_S", "inf", "86400.0 or less"),
        ("ABLATION_SHARD_S", "nan", "86400.0 or less"),
        ("ABLATION_LEASE_S", "1e9", "3600.0 or less"),
        ("ABLATION_BEAT_S", "3", "at most a third of ABLATION_LEASE_S, which is 8"),
        ("ABLATION_SWEEP_S", "11", "5.0 or less"),
        ("ABLATION_LOST_S", "inf", "86400.0 or less"),
        ("ABLATION_RESULT_DAYS", "inf", "36500.0 or less"),
        ("ABLATION_RESULT_DAYS", "1e300", "36500.0 or less"),
        ("ABLATION_TOMBSTONE_DAYS", "1e300", "36500.0 or less"),
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
        ("redis://host:6379/0?password=secret", "redis://host:6379/0"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock"),
        ("redis://host/0?password=sec@ret", "redis://..."),
        ("redis://:sec?r@et@host", "redis://..."),
        (":secret@host", "host"),
        ("", ""),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert hide_password(url) == shown


def test_a_wrong_address_does_not_show_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "http://:secret@host")
    with pytest.raises(ServiceError, match="got 'http://host'"):
        load_settings()


def test_an_option_of_the_address_that_redis_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://host/0?passwort=secret")
    with pytest.raises(ServiceError, match=r"REDIS_URL: got 'redis://host/0'; allowed: redis://host"):
        load_settings()


def test_a_password_may_be_an_option_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery takes it only before the host."""
    monkeypatch.setenv("REDIS_URL", "redis://somewhere:1/0?username=me&password=a%2Fb%40c")
    settings = load_settings()
    with Redis.from_url(settings.redis_url) as client:
        known = client.connection_pool.connection_kwargs
    assert (known["username"], known["password"]) == ("me", "a/b@c")
    with make_celery(settings).connection_for_write() as connection:
        assert (connection.userid, connection.password) == ("me", "a/b@c")


def test_a_password_may_be_an_option_of_a_socket(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, redis_client: Redis
) -> None:
    monkeypatch.setenv("REDIS_URL", f"{settings.redis_url}?password=a%2Fb%40c")
    redis_client.config_set("requirepass", "a/b@c")
    try:
        found = load_settings()
        with Redis.from_url(found.redis_url) as client:
            assert client.ping()
        with make_celery(found).connection_for_write() as connection:
            connection.ensure_connection(max_retries=1)
    finally:
        redis_client.config_set("requirepass", "")


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ABLATION_HOME", str(tmp_path))
    for name in ("ABLATION_DATA_DIR", "ABLATION_THREADS", "ABLATION_DEVICE", "ABLATION_REDIS_PASSWORD_FILE"):
        monkeypatch.setenv(name, "")
    settings = load_settings()
    assert settings == Settings(home=tmp_path, redis_url=settings.redis_url)
    assert settings.data_dir == tmp_path / "data"


def test_a_variable_that_nobody_reads_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_unknown_variables(["ABLATION_TREADS", "ABLATION_XYZZY", "ABLATION_THREADS", "PATH", "ABLATION_FD"])
    assert capsys.readouterr().err.splitlines() == [
        "Warning: ABLATION_TREADS is not a setting and has no effect. Did you mean ABLATION_THREADS?",
        "Warning: ABLATION_XYZZY is not a setting and has no effect.",
    ]


def test_a_folder_that_can_t_be_written_is_named(tmp_path: Path) -> None:
    make_writable(tmp_path / "a" / "b", "ABLATION_CACHE_DIR")
    assert [*(tmp_path / "a" / "b").iterdir()] == []
    (tmp_path / "file").touch()
    with pytest.raises(
        ServiceError, match=r"ABLATION_CACHE_DIR: got .*/file/below'; allowed: a folder that you may write"
    ):
        make_writable(tmp_path / "file" / "below", "ABLATION_CACHE_DIR")


# What the page says where the default is no plain value.
DEFAULTS = {
    "home": "~/.ablation",
    "beat_s": "an eighth of the lease",
    "threads": "number of CPUs",
    "max_redis_bytes": "4 GiB",
}


def test_the_page_on_operations_has_every_variable_with_its_default_and_meaning() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    said = {name.strip("`"): (default.strip(), meaning) for name, default, meaning in rows}
    expected = {}
    for kind in (Settings, Address):
        for field, about in kind.model_fields.items():
            plain = "" if about.default_factory or about.default is None else str(about.default)
            expected[variable_of(field)] = (DEFAULTS.get(field, plain), about.description)
    others = {name: said.pop(name) for name in OTHER_VARIABLES if name in said}
    assert said == expected
    assert all(meaning for _, meaning in others.values())
    assert set(others) | {"ABLATION_REDIS_URL"} == set(OTHER_VARIABLES)  # the last is REDIS_URL's other name

"""Every setting of an installation, read from the environment once.

In: environment variables, `ABLATION_` plus the field's name (and plain `REDIS_URL`); an empty one counts as unset.
Out: a frozen `Settings`, handed down, and the `Address` of the API.
Not here: the job spec (what a user asks) and the plan (what the spec makes of it).
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

from pydantic import AliasChoices, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ablation.errors import ServiceError
from ablation.inputs.folders import Folders
from ablation.spec import allowed_by

AnySettings = TypeVar("AnySettings", bound=BaseSettings)

PREFIX = "ABLATION_"
BLOCK_BYTES = 4096  # that a folder must have room for
BEATS = 3  # fewest beats within a lease, so that a late or lost one does no harm
MAX_SWEEP_S = 5.0  # a worker reports at every sweep, and counts as gone after 10 s of silence
HOUR_S, DAY_S, CENTURY_DAYS = 3600.0, 86400.0, 36500.0  # a larger value is taken for a wrong unit
# Variables that are no settings: those that `ablation submit` and compose read, and the other name of REDIS_URL.
OTHER_VARIABLES = ("ABLATION_SERVER", "ABLATION_TRACEBACK", "ABLATION_REDIS_MAXMEMORY", "ABLATION_REDIS_URL")


def count_cpus() -> int:
    """Number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _below_home(name: str) -> Callable[[dict[str, Any]], Path]:
    """Default of a folder, once `home` is known."""
    return lambda chosen: chosen["home"] / name


class Settings(BaseSettings):
    """The operator's choices; a job can't change them."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    redis_url: str = Field(
        default="",
        validation_alias=AliasChoices("redis_url", "ABLATION_REDIS_URL"),
        description="redis://host:6379/0 or unix:///path; empty: `ablation serve` starts its own",
    )
    redis_password_file: Path | None = Field(
        default=None, description="a file with the password of redis_url (a container's secret)"
    )
    home: Path = Field(
        default=Path("~/.ablation"),
        validate_default=True,
        description="folder of data, checkpoints, cache, Redis' files and logs",
    )
    data_dir: Path = Field(default_factory=_below_home("data"), description="data sets; default: data/ below home")
    checkpoint_dir: Path = Field(
        default_factory=_below_home("checkpoints"), description="checkpoint files; default: checkpoints/ below home"
    )
    cache_dir: Path = Field(
        default_factory=_below_home("cache"), description="activations, demo model; default: cache/ below home"
    )
    cache_bytes: int = Field(
        default=8 << 30, ge=0, description="activations kept between jobs take at most this much; 0: none are kept"
    )
    threads: int = Field(
        default_factory=count_cpus, ge=1, le=1024, description="threads per worker; the plan records it"
    )
    shard_s: float = Field(default=60, gt=0, le=DAY_S, description="a shard aims at this many seconds")
    lease_s: float = Field(default=8, gt=0, le=HOUR_S, description="a lease without a beat for this long is stale")
    beat_s: float = Field(
        default_factory=lambda chosen: chosen["lease_s"] / 8, gt=0, description="seconds between two beats of a lease"
    )
    sweep_s: float = Field(default=2, gt=0, le=MAX_SWEEP_S, description="seconds between two sweeps")
    lost_s: float = Field(
        default=30, gt=0, le=DAY_S, description="a waiting shard without a message for this long is sent again"
    )
    turn_s: float = Field(
        default=10, ge=0, le=DAY_S, description="a job's turn lasts this many seconds; then other jobs go first"
    )
    max_attempts: int = Field(
        default=5, ge=1, le=1000, description="a shard that fails or ends its process this often fails its job"
    )
    max_losses: int = Field(
        default=12, ge=1, le=1000, description="a shard whose whole worker is gone this often fails its job"
    )
    hang_s: float = Field(
        default=300, gt=0, le=DAY_S, description="a shard without progress for this long has its process killed"
    )
    hang_factor: float = Field(
        default=10, ge=1, le=1e6, description="but not before this many times its planned seconds have passed"
    )
    result_days: float = Field(default=7, gt=0, le=CENTURY_DAYS, description="results are kept this long")
    tombstone_days: float = Field(
        default=30, gt=0, le=CENTURY_DAYS, description="the record of an expired job is kept this much longer"
    )
    max_jobs: int = Field(default=10_000, ge=1, description="jobs that may be queued or running at once")
    max_redis_bytes: int = Field(default=4 << 30, gt=0, description="bytes that one job may hold in Redis")
    memory_bytes: int | None = Field(
        default=None, gt=0, description="bytes of memory that a job may take on a worker; default: all of the machine's"
    )
    redis_answer_s: float = Field(
        default=2, ge=0.1, le=HOUR_S, description="a request waits for Redis for about this long, then it is 503"
    )
    max_connections: int = Field(default=2000, ge=1, description="connections that the API keeps open at once")
    max_streams: int = Field(default=500, ge=1, description="streams of events that the API has open at once")
    max_downloads: int = Field(default=16, ge=1, description="files that the API sends at once")
    max_body_bytes: int = Field(
        default=64 << 20, ge=8 << 20, description="bodies that the API reads or works on take at most this much at once"
    )
    client_s: float = Field(
        default=10,
        gt=0,
        le=HOUR_S,
        description="a client is given up that sends nothing for so long, or takes nothing for six times as long",
    )
    device: str | None = Field(
        default=None, description="torch device of the worker: cpu, cuda, cuda:1; default: CUDA if there, else CPU"
    )

    @field_validator("home", "data_dir", "checkpoint_dir", "cache_dir", "redis_password_file", mode="before")
    @classmethod
    def _whole_path(cls, given: object) -> Path | None:
        if given is None:
            return None
        try:
            return Path(str(given)).expanduser().absolute()
        except RuntimeError:  # ~somebody
            raise ValueError("a path, or ~ and a user who has a home folder here") from None

    @field_validator("device")
    @classmethod
    def _device_name(cls, device: str | None) -> str | None:
        if device and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError("cpu, cuda or cuda:1")
        return device

    @field_validator("beat_s")
    @classmethod
    def _several_beats_a_lease(cls, beat_s: float, info: ValidationInfo) -> float:
        lease_s = info.data.get("lease_s", beat_s * BEATS)  # absent if it is invalid
        if beat_s > lease_s / BEATS:
            raise ValueError(f"at most a third of ABLATION_LEASE_S, which is {lease_s:g}")
        return beat_s

    @field_validator("redis_url")
    @classmethod
    def _redis_address(cls, url: str) -> str:
        try:
            if url:
                from redis import Redis  # of the service alone; a library without it reads its settings, too

                Redis.from_url(url).connection_pool.make_connection()  # connects to nothing yet
        except ModuleNotFoundError:
            pass
        except (ValueError, TypeError):  # another scheme, a port that is no number, an unknown option
            raise ValueError("redis://host:6379/0, rediss://host:6379/0 or unix:///path") from None
        return _user_first(url)

    @property
    def folders(self) -> Folders:
        """Folders that a job may read from."""
        return Folders(self.data_dir, self.checkpoint_dir, self.cache_dir, self.cache_bytes)


class Address(BaseSettings):
    """Address that the API listens on."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    host: str = Field(default="127.0.0.1", description="the address that the API listens on")
    port: int = Field(default=8000, ge=0, le=65535, description="the port that the API listens on; 0: any free one")
    fd: int | None = Field(
        default=None, ge=0, description="file descriptor of a listening socket, instead of host and port"
    )


def load_settings(home: Path | None = None) -> Settings:
    """Read the settings from this process's environment, with the password inserted; `home` overrides ABLATION_HOME.

    Raises:
        ServiceError: a variable is not what it may be, or the password can't be read.
    """
    settings = read_environment(Settings, **({"home": home} if home else {}))
    if settings.redis_password_file is None:
        return settings
    return settings.model_copy(update={"redis_url": add_password(settings.redis_url, settings.redis_password_file)})


def read_environment(kind: type[AnySettings], **given: Any) -> AnySettings:
    """Read settings of this kind from the environment; `given` overrides it.

    Raises:
        ServiceError: a variable is not what it may be; the message names it.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    name = variable_of(field)
    shown = hide_password(str(first["input"])) if field == "redis_url" else str(first["input"])
    raise ServiceError(
        f"{name}: got {shown!r}; allowed: {allowed_by(first)}. Set it to that, or unset it for its default."
    )


def variable_of(field: str) -> str:
    """Name of a setting's environment variable."""
    return "REDIS_URL" if field == "redis_url" else f"{PREFIX}{field}".upper()


def warn_of_unknown_variables(names: Iterable[str]) -> None:
    """Warn of each ABLATION_* variable that is not a setting, most often because it is misspelt."""
    known = [*OTHER_VARIABLES, *(variable_of(field) for kind in (Settings, Address) for field in kind.model_fields)]
    endings = [
        name.removeprefix(PREFIX) for name in known
    ]  # without the common prefix, which would make all names similar
    for name in sorted(names):
        if name.startswith(PREFIX) and name not in known:
            near = get_close_matches(name.removeprefix(PREFIX), endings, n=1)
            hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
            print(f"Warning: {name} is not a setting and has no effect.{hint}", file=sys.stderr, flush=True)


def make_writable(folder: Path, name: str) -> None:
    """Make a folder and check that files can be created in it, and hold something: a full disk takes empty ones.

    Raises:
        ServiceError: they can't; it names the option or variable that chose the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(BLOCK_BYTES))
    except OSError as error:
        raise ServiceError(
            f"{name}: got {str(folder)!r}; allowed: a folder that you may write to. ({error.strerror}) Choose another "
            f"with {name}."
        ) from None


def hide_password(url: str) -> str:
    """Redis URL as it may be shown: without user, password and options."""
    scheme, separator, rest = url.partition("://")
    place, _, options = (rest if separator else url).partition("?")
    if "@" in options:  # in a URL as malformed as this the end of the password is not known
        place = "..."
    return (scheme + separator if separator else "") + place.rpartition("@")[2]


def _user_first(url: str) -> str:
    """Move user and password from the options, where Celery fails on them, to before the host."""
    place, _, text = url.partition("?")
    options = dict(parse_qsl(text))
    user, password = (quote(options.pop(name, ""), safe="") for name in ("username", "password"))
    if "@" not in place and (user or password):
        place = place.replace("://", f"://{user}:{password}@", 1)
    return f"{place}?{urlencode(options)}" if options else place


def add_password(redis_url: str, file: Path) -> str:
    """Insert the password in `file` into a URL: `redis://host` becomes `redis://:password@host`.

    Raises:
        ServiceError: the file can't be read.
    """
    try:
        password = file.read_text().strip()
    except OSError as error:
        raise ServiceError(
            f"ABLATION_REDIS_PASSWORD_FILE: got {str(file)!r} ({error.strerror}); allowed: a file that this process "
            "may read. Make it readable, or put the password into REDIS_URL."
        ) from error
    scheme, _, place = redis_url.partition("://")
    return redis_url and f"{scheme}://:{quote(password, safe='')}@{place}"

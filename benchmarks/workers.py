"""Two workers on two cores against one on one core, one thread each: the same job's time and bytes.

It starts `ablation serve` with an embedded Redis and a new cache for each number of workers. Two jobs on
AlexNet (random weights) and pictures in a folder, JPEGs of 256x256 which the benchmark writes: 4,096 weights of
classifier.4, cut along the examples, and all 16,777,216, cut along the units over activations that the workers share.
The time is from POST to success. A small job before it lets every worker import its modules.

    python -m benchmarks.workers
"""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.environment import write_result
from benchmarks.service import wait_until_ready

N = 6144  # enough examples that the merge, by one worker, is a small part
PORT = "18766"
JOB = {
    "model": {"name": "alexnet", "weights": "none"},
    "layer": "classifier.4",
    "data": {"name": "imagefolder", "root": "pictures", "test": "all"},
}
CASES = {"4,096 weights": {"count": 4096, "seed": 0}, "all weights": "all"}


def write_pictures(folder: Path) -> None:
    """Write class folders, named by class numbers of the model, with smooth random pictures."""
    random = np.random.default_rng(0)
    for k in range(N):
        name = folder / "test" / f"{k % 8}" / f"{k}.jpg"
        name.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(name)


def run_job(client: httpx.Client, sites: Any, n_examples: Any = "all") -> tuple[float, str]:
    """Seconds from POST to success, and the hash of the CSV."""
    data = {**JOB["data"], "test": n_examples}  # type: ignore[dict-item]
    started = time.perf_counter()
    job = client.post("/v1/jobs", json={**JOB, "data": data, "sites": sites}).raise_for_status().json()
    while (status := client.get(f"/v1/jobs/{job['id']}").json()["status"]) not in ("succeeded", "failed"):
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    if status == "failed":
        raise RuntimeError(client.get(f"/v1/jobs/{job['id']}").json()["error"])
    whole = hashlib.sha256()
    with client.stream("GET", f"/v1/jobs/{job['id']}/results.csv") as answer:
        for piece in answer.iter_bytes():
            whole.update(piece)
    return seconds, whole.hexdigest()


def run_service(n_workers: int, home: Path) -> dict[str, tuple[float, str]]:
    """Run every case on `n_workers` workers."""
    serve = subprocess.Popen(
        [
            *(sys.executable, "-m", "ablation.cli", "serve", "--port", PORT, "--home", str(home)),
            *("--workers", str(n_workers)),
        ],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "ABLATION_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, range(n_workers)),  # otherwise one worker decodes on the other core
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
            wait_until_ready(client)
            time.sleep(10)  # until all workers are ready
            run_job(client, {"count": 256}, {"count": 256})
            return {name: run_job(client, sites) for name, sites in CASES.items()}
    finally:
        serve.send_signal(signal.SIGTERM)
        serve.wait(30)


def main() -> None:
    """Measure, print and store the results."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder) / "data" / "pictures")
        for n_workers in (1, 2):
            home = Path(folder) / f"home{n_workers}"
            home.mkdir()
            (home / "data").symlink_to(Path(folder) / "data")
            runs[n_workers] = run_service(n_workers, home)
            print(n_workers, runs[n_workers], flush=True)
    write_result(
        "workers",
        {
            name: {
                "one_worker_s": runs[1][name][0],
                "two_workers_s": runs[2][name][0],
                "times": runs[1][name][0] / runs[2][name][0],
                "bytes_equal": runs[1][name][1] == runs[2][name][1],
            }
            for name in CASES
        },
    )


if __name__ == "__main__":
    main()

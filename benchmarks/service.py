"""The service: time of the demo job from POST to CSV, and of a status poll while the worker is busy.

Starts `ablation serve` (embedded Redis, one worker, the API) in a folder of its own. The demo model is trained before
the clock starts. Then a long job keeps the worker busy on every core while the job is polled.

    python -m benchmarks.service
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.environment import write_result

DEMO = {
    "model": {"name": "digits_alexnet"},
    "layer": "fc2",
    "data": {"name": "digits", "train": "all", "test": "all"},
    "sites": {"count": 4096, "seed": 0},
}
LONG = {**DEMO, "layer": "conv2", "sites": {"count": 18432}}
POLLS = 300
ROUNDS = 3


def wait_until_ready(client: httpx.Client, within_s: float = 120) -> None:
    """Wait until /readyz answers 200."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError("the service did not get ready")


def post_to_csv_s(client: httpx.Client) -> float:
    """Seconds from POST to the last byte of the CSV."""
    started = time.perf_counter()
    job = client.post("/v1/jobs", json=DEMO).raise_for_status().json()
    while client.get(f"/v1/jobs/{job['id']}/results").status_code == 202:
        time.sleep(0.05)
    client.get(f"/v1/jobs/{job['id']}/results.csv").raise_for_status()
    return time.perf_counter() - started


def poll_ms(client: httpx.Client) -> list[float]:
    """Milliseconds of status polls while the worker runs a long job, which is then cancelled."""
    job = client.post("/v1/jobs", json=LONG).raise_for_status().json()
    while client.get(f"/v1/jobs/{job['id']}").json()["progress"]["done"] == 0:
        time.sleep(0.1)
    times = []
    for _ in range(POLLS):
        started = time.perf_counter()
        status = client.get(f"/v1/jobs/{job['id']}").raise_for_status().json()["status"]
        times.append(1e3 * (time.perf_counter() - started))
        if status != "running":
            raise RuntimeError(f"the worker is not busy: the job is {status}")
        time.sleep(0.02)
    client.post(f"/v1/jobs/{job['id']}/cancel")
    return sorted(times)


def main() -> None:
    """Measure, print and store the results."""
    with tempfile.TemporaryDirectory() as home:
        subprocess.run([sys.executable, "-m", "ablation.inputs.demo", "--cache", str(Path(home) / "cache")], check=True)
        port = "18765"
        serve = subprocess.Popen(
            [sys.executable, "-m", "ablation.cli", "serve", "--port", port, "--home", home],
            stdout=subprocess.DEVNULL,
            env=os.environ,
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                wait_until_ready(client)
                first = post_to_csv_s(client)
                later = [post_to_csv_s(client) for _ in range(ROUNDS)]
                polls = poll_ms(client)
        finally:
            serve.send_signal(signal.SIGTERM)
            serve.wait(30)
    write_result(
        "service",
        {
            "claim": "demo job (4,096 weights, 1,797 examples) from POST to CSV; status polls while the worker is busy",
            "post_to_csv_first_s": first,
            "post_to_csv_s": statistics.median(later),
            "poll_median_ms": statistics.median(polls),
            "poll_p99_ms": polls[int(0.99 * len(polls))],
            "polls": POLLS,
        },
    )


if __name__ == "__main__":
    main()

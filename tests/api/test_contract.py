"""Schemathesis sends what the OpenAPI document allows, and what it does not, to the real process.

All of its checks but one: what a spec means (is there such a layer? is a split asked for?) is not in its schema, so a
body that fits the schema may be refused. And all addresses but one: a stream of events ends only when its job does.
"""

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.api.test_main import COMMAND, PATIENCE_S, environment
from worker.settings import Settings
from worker.store import JobStore

OPTIONS = [
    "--checks=all", "--exclude-checks=positive_data_acceptance", "--exclude-path-regex=/events$",
    "--max-examples=5", "--seed=1", "--request-timeout=30", "--workers=2", "--suppress-health-check=all",
]  # fmt: skip


@pytest.mark.parametrize("phases", ["examples,fuzzing,stateful", "coverage"])
def test_the_service_does_what_its_document_says(
    settings: Settings, store: JobStore, tmp_path: Path, phases: str
) -> None:
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.5):
            store.note_worker("a-worker")  # `/readyz` is to be 200 until the end

    store.note_worker("a-worker")
    worker = threading.Thread(target=live)
    worker.start()
    variables = {**environment(settings), "ABLATION_PORT": "0"}
    with subprocess.Popen(COMMAND, env=variables, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            address = next(
                found[1] for line in process.stderr if (found := re.search(r"running on (http://\S+)", line))
            )
            command = [Path(sys.executable).parent / "schemathesis", "run", f"{address}/openapi.json", *OPTIONS]
            run = subprocess.run([*command, f"--phases={phases}"], cwd=tmp_path, capture_output=True, text=True)
        finally:
            over.set()
            worker.join()
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, run.stdout
    assert int(re.findall(r"(\d+) generated", run.stdout)[-1]) > 50, run.stdout
    assert "Traceback" not in log

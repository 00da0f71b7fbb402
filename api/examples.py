"""What do requests and answers look like? One job from its spec to its rows, for the OpenAPI document.

Plain data, as it goes over the wire. The tests check each example against its schema.
"""

import http
from typing import Any

_JOB_ID = "5f0c9a1be7d24630"

_SPEC: dict[str, Any] = {
    "model": {"name": "digits_alexnet"},
    "layer": "fc2",
    "data": {"name": "digits", "train": "all", "test": {"per_class": 10, "seed": 0}},
    "sites": {"count": 64, "seed": 0},
}

_FULL_SPEC: dict[str, Any] = {
    "model": {"name": "digits_alexnet", "weights": None, "seed": 0},
    "layer": "fc2",
    "data": {"name": "digits", "root": None, "train": "all", "test": {"per_class": 10, "seed": 0}},
    "sites": {"count": 64, "seed": 0},
    "value": "zero",
    "precision": "mixed",
    "verify": 8,
    "top1": False,
    "criteria": [],
}

_PLAN: dict[str, Any] = {
    "parameter": "fc2.weight",
    "kind": "Linear",
    "shape": [256, 256],
    "n_sites": 64,
    "path": "direct",
    "precision": "mixed",
    "batch_size": 256,
    "threads": 2,
    "splits": [
        {"name": "train", "n_examples": 1297, "per_class": None},
        {"name": "test", "n_examples": 100, "per_class": 10},
    ],
    "n_shards": 2,
    "proof": {"n_sites": 8, "examples": {"train": [21, 53, 97, 348, 398, 660, 822], "test": [85]}},
    "estimate": {
        "n_examples": 1397,
        "passes": 1.34,
        "seconds": 2.5,
        "memory_bytes": 328_999_032,
        "redis_bytes": 14_848,
    },
}

_JOB: dict[str, Any] = {
    "id": _JOB_ID,
    "status": "queued",
    "progress": {"done": 0.0, "total": 2},
    "eta_seconds": 2.5,
    "created_at": "2026-01-05T12:00:00.250000Z",
    "started_at": None,
    "finished_at": None,
    "spec": _FULL_SPEC,
    "plan": _PLAN,
    "error": None,
    "urls": {
        "self": f"/v1/jobs/{_JOB_ID}",
        "cancel": f"/v1/jobs/{_JOB_ID}/cancel",
        "results": f"/v1/jobs/{_JOB_ID}/results",
        "csv": f"/v1/jobs/{_JOB_ID}/results.csv",
        "parquet": f"/v1/jobs/{_JOB_ID}/results.parquet",
        "events": f"/v1/jobs/{_JOB_ID}/events",
    },
}

_RUNNING: dict[str, Any] = {
    **_JOB,
    "status": "running",
    "progress": {"done": 1.25, "total": 2},
    "eta_seconds": 1.0,
    "started_at": "2026-01-05T12:00:00.750000Z",
}

_CANCELLING: dict[str, Any] = {**_RUNNING, "status": "cancelling"}

_CANCELLED: dict[str, Any] = {
    **_RUNNING,
    "status": "cancelled",
    "eta_seconds": None,
    "finished_at": "2026-01-05T12:00:02.500000Z",
}

_PENDING: dict[str, Any] = {name: _RUNNING[name] for name in ("id", "status", "progress", "eta_seconds")}

_COLUMNS = [
    "index", "out", "in", "weight", "magnitude",
    "utility_train", "stderr_train", "touched_train", "utility_test", "stderr_test", "touched_test",
]  # fmt: skip

_RESULTS: dict[str, Any] = {
    "columns": _COLUMNS,
    "rows": [
        [137, 0, 137, -0.0625, 0.0625, 1.25e-06, 2.5e-07, 412, -3.5e-06, 1.75e-06, 31],
        [260, 1, 4, 0.03125, 0.03125, 0.0, 0.0, 0, 0.0, 0.0, 0],
    ],
    "total_rows": 64,
    "summary": {"n_sites": 64},
}

_CSV = ",".join(_COLUMNS) + "\n137,0,137,-0.0625,0.0625,1.25e-06,2.5e-07,412,-3.5e-06,1.75e-06,31\n"

_EVENTS = (
    'event: status\ndata: {"id":"5f0c9a1be7d24630","status":"succeeded","progress":{"done":2.0,"total":2},'
    '"eta_seconds":null,"error":null}\nid: succeeded:1.25\n\n'
)

_MODEL: dict[str, Any] = {
    "name": "alexnet",
    "weights": ["IMAGENET1K_V1"],
    "n_classes": 1000,
    "input_shape": [3, 224, 224],
    "flops": 1_428_376_832.0,
    "n_layers": 16,
    "layers_url": "/v1/models/alexnet/layers",
}

_LAYER: dict[str, Any] = {
    "name": "classifier.4",
    "parameter": "classifier.4.weight",
    "kind": "Linear",
    "shape": [4096, 4096],
    "n_weights": 16_777_216,
    "path": "direct",
}

_DATASET: dict[str, Any] = {
    "name": "cifar10",
    "needs_root": True,
    "n_classes": 10,
    "n_examples": {"train": 50_000, "test": 10_000},
    "n_per_class": {"train": [5000] * 10, "test": [1000] * 10},
}

_DETAILS = {
    400: "The body is not JSON: EOF while parsing a value at line 1 column 9. Send a job spec; /docs shows one.",
    404: f"There is no job '{_JOB_ID}'; GET /v1/jobs lists those there are.",
    409: f"Job {_JOB_ID} is running; cancel it first, or wait until it is over.",
    410: f"Job {_JOB_ID} has expired; send its spec again to have it computed again.",
    413: "The body is too large; allowed: 8388608 bytes. Ask for fewer indices, or for a count.",
    415: "Content-Type: got 'text/plain'; allowed: application/json, application/*+json.",
    422: "sites.count: got 0; allowed: greater than or equal to 1.",
    429: "10000 jobs are queued or at work, and no more are allowed at once.",
    500: "This is a fault of the service, not of the request; its log has the details.",
    503: "A part of the service is away. Ask again in 5 seconds.",
}


def _problem(status: int, detail: str) -> dict[str, Any]:
    title = http.HTTPStatus(status).phrase
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, "instance": "/v1/jobs"}


EXAMPLES: dict[str, Any] = {
    "spec": _SPEC,
    "job": _JOB,
    "running": _RUNNING,
    "cancelling": _CANCELLING,
    "cancelled": _CANCELLED,
    "jobs": {"data": [_JOB], "next_cursor": None},
    "pending": _PENDING,
    "results": _RESULTS,
    "csv": _CSV,
    "events": _EVENTS,
    "plan": _PLAN,
    "models": {"data": [_MODEL], "next_cursor": None},
    "layers": {"data": [_LAYER], "next_cursor": None},
    "datasets": {"data": [_DATASET], "next_cursor": None},
    "alive": {"status": "ok", "checks": {}},
    "ready": {"status": "ok", "checks": {"redis": "ok", "workers": "1"}},
    **{f"problem-{status}": _problem(status, detail) for status, detail in _DETAILS.items()},
}
EXAMPLES["problem-422"] |= {
    "field": "sites.count",
    "given": 0,
    "allowed": "greater than or equal to 1",
    "next_step": "",
}

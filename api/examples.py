"""Examples of requests and answers for the OpenAPI document: one job from its spec to its rows.

Plain data, as it is sent. The tests check each example against its schema.
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

_FLIP_SIGN: dict[str, Any] = {
    "model": {"name": "digits_alexnet"},
    "layer": "fc2",
    "data": {"name": "digits", "test": "all"},
    "sites": "all",
    "value": "flip_sign",
}

_FULL_SPEC: dict[str, Any] = {
    "model": {"name": "digits_alexnet", "weights": None, "seed": 0},
    "layer": "fc2",
    "data": {
        "name": "digits",
        "root": None,
        "classes": None,
        "exif": "ignore",
        "train": "all",
        "test": {"per_class": 10, "seed": 0},
        "bad_images": "refuse",
        "check_images": "headers",
    },
    "sites": {"count": 64, "seed": 0},
    "value": "zero",
    "precision": "mixed",
    "verify": 8,
    "top1": False,
    "criteria": [],
    "loss": "cross_entropy",
}

_PLAN: dict[str, Any] = {
    "parameter": "fc2.weight",
    "kind": "Linear",
    "shape": [256, 256],
    "n_classes": 10,
    "n_sites": 64,
    "path": "direct",
    "precision": "mixed",
    "batch_size": 256,
    "n_halved": 0,
    "lanes": 1,
    "gradient_batch_size": None,
    "threads": 2,
    "inputs": {
        "weights": "its own, trained on the digits",
        "preprocessing": "grey, 8x8, values from 0 to 1",
        "classes": {"train": "10 by name, of the model's 10", "test": "10 by name, of the model's 10"},
        "notes": [],
    },
    "splits": [
        {"name": "train", "n_examples": 1297, "per_class": None},
        {"name": "test", "n_examples": 100, "per_class": 10},
    ],
    "n_shards": 2,
    "proof": {"n_sites": 8, "examples": {"train": [349, 662, 824], "test": [85]}},
    "estimate": {
        "n_examples": 1397,
        "passes": 1.41,
        "seconds": 0.21,
        "memory_bytes": 329_002_360,
        "redis_bytes": 10_496,
    },
}

_JOB: dict[str, Any] = {
    "id": _JOB_ID,
    "status": "queued",
    "progress": {"done": 0.0, "total": 2},
    "eta_seconds": None,
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

_FAILED: dict[str, Any] = {
    **_RUNNING,
    "status": "failed",
    "eta_seconds": None,
    "finished_at": "2026-01-05T12:00:02.500000Z",
    "error": {
        "type": "data-error",
        "title": "A data set or one of its examples can't be used.",
        "detail": "example 17 of 'pets' (cats/17.jpg) can't be read: image file is truncated",
    },
}

_CANCELLING: dict[str, Any] = {**_RUNNING, "status": "cancelling", "eta_seconds": None}

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

_SPLIT_SUMMARY: dict[str, Any] = {
    "n_examples": 1297,
    "skipped": 0,
    "loss": 0.015625,
    "accuracy": 0.9969,
    "series_bound": 0.0,
    "provably_without_effect": 9,
    "float32_would_call_zero": 31,
    "negative": 27,
    "mean_utility": 2.5e-06,
    "reliability": 0.25,
}

_CORRELATIONS = {"pearson": 0.375, "spearman": 0.5, "pearson_touched": 0.375, "spearman_touched": 0.4375}

_PROOF: dict[str, Any] = {
    "n_sites": 8,
    "n_examples": 8,
    "arithmetic_error": 3.2e-07,
    "arithmetic_bound": 0.0001,
    "model_rounding_median": 1.5e-06,
    "model_rounding_p99": 1.2e-05,
    "sum_error": 2.1e-06,
    "sum_bound": 0.01,
}

_BASELINE = ("n_examples", "loss", "accuracy", "series_bound")

_ABOUT: dict[str, Any] = {
    "spec": _FULL_SPEC,
    "plan": {name: value for name, value in _PLAN.items() if name != "n_shards"},
    "inputs": {**_PLAN["inputs"], "warnings": []},
    "baseline": {
        "train": {name: _SPLIT_SUMMARY[name] for name in _BASELINE},
        "test": {**{name: _SPLIT_SUMMARY[name] for name in _BASELINE}, "n_examples": 100},
    },
    "proof": _PROOF,
    "n_not_finite": 0,
    "seconds": 1.75,
    "model": {
        "name": "digits_alexnet",
        "kind": "DigitsAlexNet",
        "weights": None,
        "file": "digits_alexnet-1.safetensors",
        "hash": "3b1f" * 16,
    },
    "data": {
        "name": "digits",
        "splits": {
            "train": {
                "kind": "Pictures", "n_examples": 1297, "n_available": 1297, "fingerprint": "a07c" * 16,
                "n_skipped": 0, "skipped": {},
            },
            "test": {
                "kind": "Pictures", "n_examples": 100, "n_available": 500, "fingerprint": "5e92" * 16,
                "n_skipped": 0, "skipped": {},
            },
        },
    },
    "device": {"name": "cpu", "hardware": "AMD EPYC 9B14 (AVX512)"},
    "versions": {"python": "3.11.7", "weight-ablation": "0.2.0", "torch": "2.9.0", "torchvision": "0.24.0",
                 "numpy": "2.3.4", "numba": "0.62.1", "pillow": "12.0.0"},
    "date": "2026-01-05T12:00:00Z",
    "command": None,
}  # fmt: skip

_SUMMARY: dict[str, Any] = {
    "sites": 64,
    "weights_in_layer": 65_536,
    "layer": "fc2",
    "parameter": "fc2.weight",
    "path": "direct",
    "precision": "mixed",
    "weights": "its own, trained on the digits",
    "preprocessing": "grey, 8x8, values from 0 to 1",
    "classes": {"train": "10 by name, of the model's 10", "test": "10 by name, of the model's 10"},
    "notes": [],
    "warnings": [],
    "splits": {"train": _SPLIT_SUMMARY, "test": {**_SPLIT_SUMMARY, "n_examples": 100, "reliability": None}},
    "magnitude": {"train": _CORRELATIONS, "test": _CORRELATIONS},
    "criteria": {},
    "proof": _PROOF,
    "not_finite": 0,
    "seconds": 1.75,
    "about": _ABOUT,
    "train_test": {
        **_CORRELATIONS,
        "ceiling": None,
        "ratio": None,
        "ceiling_at": {"100": None, "1000": None, "10000": None, "100000": None},
        "examples_for_ceiling": {"0.9": None, "0.99": None},
    },
}

_RESULTS: dict[str, Any] = {
    "columns": _COLUMNS,
    "rows": [
        [137, 0, 137, -0.0625, 0.0625, 1.25e-06, 2.5e-07, 412, -3.5e-06, 1.75e-06, 31],
        [260, 1, 4, 0.03125, 0.03125, 0.0, 0.0, 0, 0.0, 0.0, 0],
    ],
    "total_rows": 64,
    "summary": _SUMMARY,
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
    "whole_layer_path": "response",
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
    404: f"There is no job '{_JOB_ID}'; GET /v1/jobs lists those that exist.",
    405: "PUT is not possible here; allowed: GET, HEAD, POST.",
    408: "The body has not come on for 10 seconds, or too slowly. Send it again.",
    409: f"Job {_JOB_ID} is running; cancel it first, or wait until it is over.",
    410: f"Job {_JOB_ID} has expired or was deleted; send its spec again to compute it again.",
    413: "The body is too large; allowed: 8388608 bytes. Ask for fewer indices, or for a count.",
    415: "Content-Type: got 'text/plain'; allowed: application/json, application/*+json.",
    422: "sites.count: got 0; allowed: 1 or more.",
    429: "10000 jobs are queued or running, and no more are allowed at once.",
    500: "This is a fault of the service, not of the request; its log has the details.",
    503: "A part of the service is away. Ask again in 5 seconds.",
}


def _problem(status: int, detail: str) -> dict[str, Any]:
    title = http.HTTPStatus(status).phrase
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, "instance": "/v1/jobs"}


EXAMPLES: dict[str, Any] = {
    "spec": _SPEC,
    "flip-sign": _FLIP_SIGN,
    "job": _JOB,
    "running": _RUNNING,
    "cancelling": _CANCELLING,
    "cancelled": _CANCELLED,
    "failed": _FAILED,
    "jobs": {"data": [_JOB], "next_cursor": None},
    "pending": _PENDING,
    "results": _RESULTS,
    "csv": _CSV,
    "events": _EVENTS,
    "plan": _PLAN,
    "models": {"data": [_MODEL], "next_cursor": None, "is_complete": True},
    "layers": {"data": [_LAYER], "next_cursor": None},
    "datasets": {"data": [_DATASET], "next_cursor": None, "is_complete": True},
    "alive": {"status": "ok", "checks": {}},
    "ready": {"status": "ok", "checks": {"redis": "ok", "workers": "1"}},
    **{f"problem-{status}": _problem(status, detail) for status, detail in _DETAILS.items()},
}
EXAMPLES["problem-422"] |= {
    "field": "sites.count",
    "given": 0,
    "allowed": "1 or more",
    "next_step": "",
}

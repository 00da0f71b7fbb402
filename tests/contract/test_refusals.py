"""Every refusal: what was given, what is allowed, what to do next; at once where the API can know it."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.contract.conftest import QUICK, Service

Say = Callable[[str], None]


def spec(**changes: Any) -> dict[str, Any]:
    return {**QUICK, **changes}


def data(**changes: Any) -> dict[str, Any]:
    return spec(data={"name": "digits", "test": "all", **changes})


FIRST_THREE = {"class00": 0, "class01": 1, "class02": 2}


def pets(**changes: Any) -> dict[str, Any]:
    """A job on picture files, whose classes are the model's first three."""
    return spec(data={"name": "imagefolder", "root": "pets", "test": "all", "classes": FIRST_THREE, **changes})


def random(name: str, **changes: Any) -> dict[str, Any]:
    """A job on a model of torchvision that has learned nothing."""
    return spec(model={"name": name, "weights": "none"}, **changes)


def smoothed(smoothing: float) -> dict[str, Any]:
    return spec(loss={"name": "cross_entropy", "label_smoothing": smoothing})


def weighted(*weights: float) -> dict[str, Any]:
    return spec(loss={"name": "cross_entropy", "class_weights": list(weights)})


STRIPES = {**QUICK, "data": {"name": "stripes", "test": "all"}}


def weights(name: str) -> dict[str, Any]:
    return spec(model={"name": "digits_alexnet", "weights": name})


# What was wrong: the spec, the field that is named, what else the message says.
AT_ONCE = {
    "unknown model": (spec(model={"name": "alexnett"}), "model.name", "Did you mean 'alexnet'"),
    "a model like none": (spec(model={"name": "qqqq"}), "model.name", "GET /v1/models lists them."),
    "a layer like none": (spec(layer="qqqq"), "layer", "GET /v1/models/NAME/layers lists those of a model."),
    "unknown layer": (spec(layer="fc22"), "layer", "Did you mean 'fc2'"),
    "layer without weights": (random("alexnet", layer="features.2"), "layer", "A MaxPool2d has none"),
    "container": (random("alexnet", layer="features"), "layer", "one of the layers inside it"),
    "torchvision without weights": (spec(model={"name": "resnet18"}), "model.weights", "'none' (initialised from"),
    "classes that the model has not": (pets(classes=None), "data.classes", "The model has no 'class00'."),
    "a mapping with a class left out": (pets(classes={"class00": 1}), "data.classes", "There is none for 'class01'."),
    "a mapping to what is no class": (pets(classes={"class00": 10}), "data.classes.class00", "0 to 9"),
    "a mapping that is none": (pets(classes=[1, 2]), "data.classes", "an object"),
    "a mapping to true": (pets(classes={"class00": True}), "data.classes", "a class number or a class name"),
    "more classes than the model has": (pets(root="many"), "data.classes", "There is none for 'class03'."),
    "a fine-tuned head for other classes": (weights("seven.safetensors"), "data.classes", "allowed: the 7 classes"),
    "several state dicts": (weights("two.pth"), "model.weights", "one of two.pth:model, two.pth:model_ema"),
    "turning what are no files": (data(exif="apply"), "data.exif", "'ignore', but for imagefolder and imagenet"),
    "an unknown way to turn": (pets(exif="turn"), "data.exif", "'ignore' or 'apply'"),
    "count larger than the layer": (spec(sites={"count": 65537}), "sites.count", "1 to 65536, the weights of fc2"),
    "negative count": (spec(sites={"count": -1}), "sites.count", "1 or more"),
    "count of zero": (spec(sites={"count": 0}), "sites.count", "1 or more"),
    "true as a count": (spec(sites={"count": True}), "sites.count", "a whole number"),
    "text as a count": (spec(sites={"count": "5"}), "sites.count", "a whole number"),
    "fraction as a count": (spec(sites={"count": 5.0}), "sites.count", "a whole number"),
    "duplicate indices": (spec(sites={"indices": [3, 5, 3]}), "sites.indices", "3 is given twice"),
    "index out of range": (spec(sites={"indices": [3, 65536]}), "sites.indices", "0 to 65535"),
    "negative index": (spec(sites={"indices": [-1]}), "sites.indices.0", "0 or more"),
    "no index": (spec(sites={"indices": []}), "sites.indices", "1 or more of them"),
    "unknown form of sites": (spec(sites="some"), "sites", '"all", {"count": k'),
    "no split": (spec(data={"name": "digits"}), "data", "'train', 'test' or both"),
    "more per class than there is": (data(test={"per_class": 51}), "data.test.per_class", "1 to 50"),
    "more in all than there is": (data(test={"count": 501}), "data.test.count", "1 to 500"),
    "unknown data set": (data(name="mnits"), "data.name", "Did you mean 'mnist'"),
    "missing root": (pets(root=None), "data.root", "Say where imagefolder is"),
    "absent root": (pets(root="cats"), "data.root", "no such folder"),
    "needless root": (data(root="pets"), "data.root", "digits is bundled"),
    "root with ..": (pets(root="../secret"), "data.root", "must not lead out of that folder"),
    "absolute root": (pets(root="/etc"), "data.root", "must not lead out of that folder"),
    "root with NUL": (pets(root="pets\0"), "data.root", "must not lead out of that folder"),
    "root through a link": (pets(root="link"), "data.root", "must not lead out of that folder"),
    "files of the data set missing": (data(name="cifar10", root="pets"), "data.root", "Missing: test_batch"),
    "unknown weights": (weights("IMAGENET1K_V1"), "model.weights", "a file below the checkpoint folder"),
    "checkpoint with ..": (weights("../secret/out.safetensors"), "model.weights", "must not lead out"),
    "absolute checkpoint": (weights("/etc/passwd"), "model.weights", "must not lead out"),
    "checkpoint through a link": (weights("link.safetensors"), "model.weights", "must not lead out"),
    "checkpoint with NUL": (weights("good\0.pth"), "model.weights", "must not lead out"),
    "unknown field": (spec(layers="fc2"), "layers", "Did you mean 'layer'"),
    "field missing": ({name: value for name, value in QUICK.items() if name != "layer"}, "layer", "it is required"),
    "infinite value": (spec(value={"constant": "Infinity"}), "value.constant", "a finite number"),
    "infinite scale": (spec(value={"scale": "Infinity"}), "value.scale", "a finite number"),
    "unknown value": (spec(value="flipsign"), "value", "Did you mean 'flip_sign'"),
    "unknown form of a value": (spec(value={"scales": 2}), "value", "Did you mean 'scale'"),
    "unknown precision": (spec(precision="float16"), "precision", "'mixed', 'float32' or 'float64'"),
    "unknown criterion": (spec(criteria=["taylor9"]), "criteria.0", "one of taylor1. Did you mean 'taylor1'?"),
    "a criterion twice": (spec(criteria=["taylor1", "taylor1"]), "criteria", "'taylor1' is given twice"),
    "unknown loss": (spec(loss="hinge"), "loss", '"cross_entropy" or {"name"'),
    "a loss object": (spec(loss={"object": "Focal"}), "loss", "Objects are for ablation.ablate alone."),
    "too much smoothing": (smoothed(1.5), "loss.label_smoothing", "less than 1"),
    "negative class weight": (weighted(*[1.0] * 9, -1), "loss.class_weights", "finite numbers of at least 0"),
    "class weights of 0": (weighted(*[0] * 10), "loss.class_weights", "at least one number above 0"),
    "too few class weights": (weighted(1.0, 2.0), "loss.class_weights", "10 numbers, one for each class"),
    "negative seed": (spec(sites={"count": 5, "seed": -1}), "sites.seed", "0 or more"),
    "not an object": ([QUICK], "spec", ""),
}  # fmt: skip


@pytest.mark.parametrize(("body", "field", "message"), AT_ONCE.values(), ids=AT_ONCE)
def test_refused_at_once(
    service: Service, say: Say, request: pytest.FixtureRequest, body: Any, field: str, message: str
) -> None:
    answer = service.client.post("/v1/jobs", json=body)
    problem = check_problem(answer, 422)
    assert problem["field"] == field
    assert message in problem["detail"]
    assert problem["allowed"]
    planned = check_problem(service.client.post("/v1/plans", json=body), 422)
    assert planned["detail"] == problem["detail"]
    say(f"{request.node.callspec.id}: 422 {problem['detail']}")


def check_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document that an answer is."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert {"type", "title", "detail", "instance"} <= set(problem)
    assert "Traceback" not in answer.text
    assert not {"/home/", "/tmp/", "/root/"} & set(answer.text.split('"')), answer.text
    return problem


JSON = {"content-type": "application/json"}
NOT_READ = {
    "broken JSON": (b'{"model": ', JSON, 400),
    "JSON after the end": (b"{} {}", JSON, 400),
    "invalid UTF-8": (b'{"layer": "\xff"}', JSON, 400),
    "deep nesting": (b"[" * 100_000, JSON, 400),
    "empty body": (b"", JSON, 400),
    "form instead of JSON": (b"layer=fc2", {"content-type": "application/x-www-form-urlencoded"}, 415),
    "text instead of JSON": (b"{}", {"content-type": "text/plain"}, 415),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/plans"])
@pytest.mark.parametrize(("body", "headers", "status"), NOT_READ.values(), ids=NOT_READ)
def test_a_body_that_is_no_spec_is_refused(
    service: Service, say: Say, request: pytest.FixtureRequest,
    path: str, body: bytes, headers: dict[str, str], status: int,
) -> None:  # fmt: skip
    problem = check_problem(service.client.post(path, content=body, headers=headers), status)
    say(f"{request.node.callspec.id}: {status} {problem['detail']}")


@pytest.mark.parametrize("told", [True, False], ids=["with its length", "in chunks"])
def test_a_body_of_100_mb_is_refused(service: Service, say: Say, told: bool) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 20)

    body = b" " * (100 << 20) if told else chunks()
    problem = check_problem(service.client.post("/v1/jobs", content=body, headers=JSON), 413)
    assert "8" in problem["detail"]
    assert service.client.get("/healthz").status_code == 200
    say(f"a body of 100 MB {'with its length' if told else 'in chunks'}: 413 {problem['detail']}")


# What is wrong: the spec, the type of the job's error, what its detail says.
BY_THE_JOB = {
    "a truncated JPEG": (pets(root="damaged", train="all"), "data-error", "class01/1.jpg"),
    "a checkpoint with a missing key": (weights("missing.safetensors"), "checkpoint-error", "fc2.bias is missing"),
    "a checkpoint with an unexpected key": (
        weights("unexpected.safetensors"), "checkpoint-error", "fc4.weight is unknown",
    ),
    "a checkpoint of another shape": (
        weights("narrow.safetensors"), "checkpoint-error", "fc2.weight has shape (256, 255), wanted (256, 256)",
    ),
    "a pickle with code in it": (weights("code.pth"), "checkpoint-error", "code.pth can't be read"),
    "a bare pickle with code in it": (weights("code.pkl"), "checkpoint-error", "code.pkl can't be read"),
    "no checkpoint at all": (weights("text.safetensors"), "checkpoint-error", "text.safetensors can't be read"),
    "weights that are not finite": (
        weights("nan.safetensors"), "checkpoint-error", "numbers that are not finite in conv1.bias",
    ),
    "activations that are not finite": (
        {**pets(), "model": {"name": "digits_alexnet", "weights": "huge.safetensors"}},
        "data-error", "(class00/0.jpg) gives NaN or infinite",
    ),
    "a batch norm without running statistics": (
        {**STRIPES, "model": {"name": "batch_net"}, "layer": "4"}, "model-error", "has no running statistics",
    ),
    "a model that is not deterministic": (
        {**STRIPES, "model": {"name": "restless_net"}, "layer": "3"}, "model-error", "logits differ by",
    ),
    "a model whose examples see each other": (
        {**STRIPES, "model": {"name": "mean_net"}, "layer": "3"}, "model-error", "logits differ by",
    ),
    "registered data that can't be opened": (
        spec(model={"name": "stripe_net"}, layer="3", data={"name": "broken_data", "test": "all"}),
        "data-error", "'broken_data' can't be opened",
    ),
    "more registered data than there is": (
        spec(model={"name": "stripe_net"}, layer="3", data={"name": "stripes", "test": {"count": 31}}),
        "spec-error", "1 to 30",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "kind", "message"), BY_THE_JOB.values(), ids=BY_THE_JOB)
def test_refused_by_the_job(
    service: Service, say: Say, request: pytest.FixtureRequest, body: dict[str, Any], kind: str, message: str
) -> None:
    url, job = service.over(body)
    assert job["status"] == "failed", job
    assert job["error"]["type"] == kind
    assert message in job["error"]["detail"]
    assert str(service.home) not in str(job)
    for address in ("results", "results.csv", "results.parquet"):
        problem = check_problem(service.client.get(f"{url}/{address}"), 409)
        assert job["error"]["detail"].rstrip(".") in problem["detail"]
    say(f"{request.node.callspec.id}: failed, {job['error']['detail']}")
    assert not (service.home / "surprise.txt").exists()


def test_a_model_that_can_not_be_made_is_not_offered(service: Service, say: Say) -> None:
    problem = check_problem(service.client.post("/v1/jobs", json=spec(model={"name": "broken_net"})), 422)
    assert problem["field"] == "model.name"
    log = (service.home / "logs" / "worker-1.log").read_text()
    assert "not offered: the registered model 'broken_net' can't be made: FileNotFoundError" in log
    say("a registered model whose factory fails: 422, and the worker's log says why it is not offered")

"""The cut: every (example, site) in exactly one shard, blocks of one class whole, a pure function of its arguments."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablation.cost import PREPARE_S
from ablation.errors import SpecError
from ablation.inputs.catalog import LayerFacts, ModelFacts
from ablation.plan import LANE_VALUES, MAX_SITES_PER_SHARD, PARTIAL_BYTES, Plan, PlanOptions, SplitCounts, make_plan
from ablation.spec import make_spec

FACTS = ModelFacts(
    name="net",
    n_classes=10,
    input_shape=(3, 32, 32),
    flops=1e8,
    widest=100_000,
    layers=(
        LayerFacts(
            parameter="conv.weight",
            kind="Conv2d",
            shape=(16, 8, 3, 3),
            path="finite",
            flops_after=9e7,
            flops_spread=5e7,
            values_after=300_000,
            values_spread=200_000,
            widest_spread=50_000,
        ),
        LayerFacts(
            parameter="fc.weight", kind="Linear", shape=(2048, 1024), path="direct", response=True, flops_after=5e6
        ),
    ),
)


def plan(layer="fc", sites=100, train="all", test=None, n=5000, **options) -> Plan:
    counts = {name: SplitCounts(n_examples=n, n_per_class=(n // 10,) * 10) for name in ("train", "test")}
    asked = {"count": sites} if isinstance(sites, int) else sites
    verify = options.pop("verify", 8)
    facts = FACTS.model_copy(update={"layers": options.pop("facts", FACTS.layers)})
    spec = make_spec(
        {"model": {"name": "net"}, "layer": layer, "data": {"name": "d", "train": train, "test": test}, "sites": asked,
         "verify": verify, "value": options.pop("value", "zero"),
         "loss": options.pop("loss", "cross_entropy")}
    )  # fmt: skip
    return make_plan(spec, facts, counts, PlanOptions(**{"threads": 2, **options}))


@given(
    layer=st.sampled_from(["conv", "fc"]),
    sites=st.integers(1, 1152),
    n=st.integers(10, 4000),
    per_class=st.one_of(st.none(), st.integers(1, 200)),
    shard_s=st.sampled_from([0.001, 0.1, 5.0, 1e6]),
    batch_size=st.one_of(st.none(), st.integers(1, 300)),
)
def test_every_pair_is_in_exactly_one_shard(layer, sites, n, per_class, shard_s, batch_size) -> None:
    n -= n % 10
    train = "all" if per_class is None else {"per_class": min(per_class, n // 10)}
    cut = plan(layer, sites, train, n=n, shard_s=shard_s, batch_size=batch_size)
    split = cut.splits[0]
    pairs = sum((s.examples[1] - s.examples[0]) * (s.sites[1] - s.sites[0]) for s in cut.shards)
    assert pairs == split.n_examples * sites
    assert len({shard.id for shard in cut.shards}) == len(cut.shards)
    by_sites: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for shard in cut.shards:
        by_sites.setdefault(shard.sites, []).append(shard.examples)
    ends = sorted(by_sites)
    assert ends[0][0] == 0
    assert ends[-1][1] == sites
    for blocks in by_sites.values():
        assert blocks[0][0] == 0
        assert blocks[-1][1] == split.n_examples
        assert all(a[1] == b[0] for a, b in itertools.pairwise(blocks))
        if split.per_class:
            assert all(start % split.per_class == 0 for start, _ in blocks)


def test_proof_examples_come_from_everywhere() -> None:
    cut = plan(train="all", test="all", n=5000, shard_s=0.1)
    assert len(cut.shards) > 4
    for shard in cut.shards:
        first, last = shard.examples
        assert any(first <= position < last for position in cut.proof.examples[shard.split])


def test_no_proof() -> None:
    assert plan(verify=0).proof.n_sites == 0
    assert plan(verify=0).proof.examples == {}


def test_whole_layers_are_cut_along_sites() -> None:
    cut = plan(sites="all", engine="direct")
    assert cut.n_sites == 2048 * 1024
    assert max(s.sites[1] - s.sites[0] for s in cut.shards) <= MAX_SITES_PER_SHARD


@given(
    shape=st.sampled_from([(2048, 1024), (37, 1024), (1, 1024), (3, 1 << 20), (50, 1)]),
    n=st.integers(10, 4000),
    shard_s=st.sampled_from([0.001, 5.0, 1e6]),
    test=st.sampled_from([None, "all", {"per_class": 1}]),
)
def test_rows_are_cut_between_units_over_all_examples(shape, n, shard_s, test) -> None:
    n -= n % 10
    layer = FACTS.layers[1].model_copy(update={"shape": shape})
    cut = plan(facts=(layer,), sites="all", test=test, n=n, shard_s=shard_s, engine="response")
    n_units, fan_in = shape
    for split in cut.splits:
        shards = [shard for shard in cut.shards if shard.split == split.name]
        assert {shard.examples for shard in shards} == {(0, split.n_examples)}
        assert min(n_units, 2) <= len(shards) <= n_units
        ends = [0, *(shard.sites[1] for shard in shards)]
        assert [shard.sites[0] for shard in shards] == ends[:-1]
        assert ends[-1] == n_units * fan_in
        assert all(end % fan_in == 0 for end in ends)
        units = np.diff(ends) // fan_in
        bytes_per_unit = fan_in * (28 + 8 * bool(split.per_class))
        assert units.max() == 1 or units.max() * bytes_per_unit <= PARTIAL_BYTES
    assert len({shard.id for shard in cut.shards}) == len(cut.shards)


def test_as_many_shards_of_rows_as_the_work_wants() -> None:
    few, many = (plan(sites="all", engine="response", shard_s=shard_s) for shard_s in (1e6, 0.25))
    assert len(few.shards) == 2
    assert len(many.shards) == pytest.approx(many.estimate.seconds / 0.25, rel=0.2)


def test_what_redis_will_hold() -> None:
    """The store's own test compares it with what is there."""
    whole = plan(sites="all", test="all", engine="response")
    assert whole.estimate.redis_bytes == 2048 * 1024 * (2 * 28 + 4 + 2 * 20) + 1024 * (len(whole.shards) + 1)
    unproved = plan(sites="all", engine="response", verify=0)
    assert unproved.estimate.redis_bytes == 2048 * 1024 * (20 + 4 + 20) + 1024 * (len(unproved.shards) + 1)
    drawn = plan(sites=100, train={"per_class": 3}, batch_size=10, shard_s=1e-9)
    blocks = {shard.examples for shard in drawn.shards}
    assert drawn.estimate.redis_bytes == 100 * (len(blocks) * 36 + 8 + 4 + 20) + 1024 * (len(drawn.shards) + 1)


def test_the_same_arguments_give_the_same_plan() -> None:
    assert plan().model_dump_json() == plan().model_dump_json()
    assert Plan.model_validate_json(plan().model_dump_json()) == plan()


def test_estimates_order_paths_and_grow_with_work() -> None:
    engines = ("direct", "finite", "rerun", "reference")
    direct, finite, rerun, reference = (plan(engine=engine).estimate for engine in engines)
    assert direct.passes < finite.passes < rerun.passes < reference.passes
    assert plan(n=1000).estimate.seconds < plan(n=2000).estimate.seconds


def test_as_many_sites_at_once_as_their_deltas_fit() -> None:
    assert plan("fc").lanes == 1  # direct: has its own way of many at once
    assert plan("conv", 100).lanes == 100
    wide = plan("conv", 1000)
    assert (wide.lanes, wide.batch_size) == (1000, 1)
    assert wide.lanes * wide.batch_size * 50_000 <= LANE_VALUES
    few = plan("conv", 10)
    assert (few.lanes, few.batch_size) == (10, 128)
    assert plan("conv", 1000, batch_size=16).lanes == LANE_VALUES // 50_000 // 16
    assert plan("conv", engine="rerun").lanes == 1


@pytest.mark.parametrize("sites", [1, 10, 1000])
@pytest.mark.parametrize("batch_size", [None, 16])
def test_every_halving_carries_half_as_much(sites: int, batch_size: int | None) -> None:
    plans = [plan("conv", sites, batch_size=batch_size, n_halved=n) for n in range(20)]
    carried = [each.lanes * each.batch_size for each in plans]
    least = batch_size or 1
    n = carried.index(least)
    assert all(2 * after <= before <= 4 * after for before, after in itertools.pairwise(carried[: n + 1]))
    assert set(carried[n:]) == {least}


def test_memory_holds_deltas_and_the_products_of_a_batch() -> None:
    few, other = (plan("conv", 1, engine=engine, batch_size=64).estimate.memory_bytes for engine in ("finite", "rerun"))
    assert few - other == 64 * (12 * 50_000 + 8 * 300_000)
    many = plan("conv", 20, batch_size=64)
    assert many.lanes == 20
    assert many.estimate.memory_bytes - few >= 64 * 12 * 19 * 50_000


SMOOTHED = {"name": "cross_entropy", "label_smoothing": 0.1}


@pytest.mark.parametrize("engine", ["auto", "direct", "finite", "rerun", "reference"])
@pytest.mark.parametrize("loss", [SMOOTHED, {"name": "cross_entropy", "class_weights": [1] * 10}, {"object": "Focal"}])
def test_response_functions_are_for_plain_cross_entropy(loss: dict[str, object], engine: str) -> None:
    for sites in (100, "all"):
        path = "direct" if engine == "auto" else engine
        assert plan(loss=loss, engine=engine, sites=sites, n=100).path == path
    assert plan(loss={**SMOOTHED, "label_smoothing": 0}, sites="all", n=100).path == "response"
    assert plan(loss="cross_entropy", sites="all", n=100).path == "response"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("flip_sign", "response"), ({"scale": 1}, "response"), ({"scale": 101}, "response"),
        ({"scale": -99}, "response"),
        ({"scale": 102}, "direct"), ({"scale": -100}, "direct"), (100, "response"), (-101, "direct"),
    ],
)  # fmt: skip
def test_float32_deltas_are_planned_for_small_steps_alone(value, path) -> None:
    """A scale s moves a weight of 1 by s - 1."""
    assert plan(sites="all", value=value).path == path


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"layer": "fcc"}, "layer", "Did you mean 'fc'"),
        ({"layer": "conv", "sites": 1153}, "sites.count", "1 to 1152"),
        ({"layer": "conv", "sites": {"indices": [3, 1152]}}, "sites.indices", "0 to 1151"),
        ({"train": {"per_class": 501}}, "data.train.per_class", "1 to 500"),
        ({"train": None, "test": {"count": 5001}}, "data.test.count", "1 to 5000"),
        ({"engine": "fast"}, "engine", "auto, direct, response, finite, rerun, reference"),
        ({"layer": "conv", "engine": "direct"}, "engine", "not part of a classifier head"),
        ({"layer": "conv", "engine": "response", "sites": "all"}, "engine", "all weights of a layer"),
        ({"engine": "response", "sites": "all", "loss": SMOOTHED}, "engine", "cross-entropy without label smoothing"),
        (
            {"loss": {"name": "cross_entropy", "class_weights": [1, 2]}},
            "loss.class_weights",
            "10 numbers, one for each",
        ),
        (
            {"engine": "response", "value": {"scale": 102}},
            "engine",
            "a constant of at most 100 or a scale of -99 to 101",
        ),
    ],
)
def test_refusals(options, field, words) -> None:
    with pytest.raises(SpecError) as caught:
        plan(**options)
    assert caught.value.field == field
    assert words in str(caught.value)


@pytest.mark.parametrize(("seconds", "n_shards"), [(1.5, 1), (5, 2), (20, 8), (50, 8), (700, 12)])
def test_a_job_of_seconds_is_cut_for_workers_to_share(seconds: float, n_shards: int) -> None:
    one_s = (plan(n=4000, verify=0, batch_size=1).estimate.seconds - PREPARE_S) / 4000
    options = {"n": round(seconds / one_s), "verify": 0, "batch_size": 1}
    cut = plan(**options)
    assert len(cut.shards) == pytest.approx(n_shards, abs=1 if n_shards > 8 else 0)
    assert len(plan(**options, is_shared=False).shards) == max(1, math.ceil(seconds / 60))

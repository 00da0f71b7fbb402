"""How many examples and sites were asked for: all up to what there is, and refusals that say how many there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablation.errors import SpecError
from ablation.inputs.catalog import LayerFacts, SplitCounts
from ablation.plan import count_asked, count_sites
from ablation.spec import CountOfExamples, JobSpec, PerClass, make_spec

COUNTS = SplitCounts(n_examples=60, n_per_class=(10, 12, 9, 14, 15))
LAYER = LayerFacts(parameter="fc2.weight", kind="Linear", shape=(7, 11), path="direct", flops_after=1e3)


def spec(sites: object) -> JobSpec:
    return make_spec({"model": {"name": "net"}, "layer": "fc2", "data": {"name": "d", "test": "all"}, "sites": sites})


def test_all_examples() -> None:
    assert count_asked("test", "all", COUNTS).model_dump() == {"name": "test", "n_examples": 60, "per_class": None}


@given(st.integers(1, 60))
def test_a_count_of_examples(n: int) -> None:
    split = count_asked("train", CountOfExamples(count=n), COUNTS)
    assert (split.name, split.n_examples, split.per_class) == ("train", n, None)


@given(st.integers(1, 9))
def test_the_same_number_of_every_class(k: int) -> None:
    split = count_asked("train", PerClass(per_class=k), COUNTS)
    assert (split.n_examples, split.per_class) == (5 * k, k)


def test_more_than_the_smallest_class_has_is_refused_with_its_number() -> None:
    with pytest.raises(SpecError, match="1 to 9, the examples of class 2") as caught:
        count_asked("train", PerClass(per_class=10), COUNTS)
    assert (caught.value.field, caught.value.given) == ("data.train.per_class", 10)


def test_more_examples_than_there_are_is_refused_with_their_number() -> None:
    with pytest.raises(SpecError, match="1 to 60") as caught:
        count_asked("test", CountOfExamples(count=61), COUNTS)
    assert (caught.value.field, caught.value.given) == ("data.test.count", 61)


def test_per_class_without_known_classes_is_refused() -> None:
    unknown = SplitCounts(n_examples=60)
    with pytest.raises(SpecError, match="no class counts") as caught:
        count_asked("test", PerClass(per_class=1), unknown)
    assert caught.value.field == "data.test.per_class"
    assert count_asked("test", CountOfExamples(count=60), unknown).n_examples == 60


@pytest.mark.parametrize(
    ("sites", "n"),
    [("all", 77), ({"count": 1}, 1), ({"count": 77}, 77), ({"indices": [76]}, 1), ({"indices": [5, 0, 76]}, 3)],
)
def test_sites(sites: object, n: int) -> None:
    assert count_sites(spec(sites), LAYER) == n


@pytest.mark.parametrize(
    ("sites", "field", "given_value", "words"),
    [
        ({"count": 78}, "sites.count", 78, "1 to 77, the weights of fc2"),
        ({"indices": [0, 77, 3]}, "sites.indices", 77, "0 to 76, the flat indices of fc2"),
    ],
)
def test_sites_beyond_the_layer_are_refused(sites: object, field: str, given_value: int, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        count_sites(spec(sites), LAYER)
    assert (caught.value.field, caught.value.given) == (field, given_value)

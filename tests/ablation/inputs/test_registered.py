"""What an operator registers by entry points: a real package, installed by pip, in a folder on the path."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ablation.errors import DataError, ModelError, OutOfMemory, SpecError
from ablation.inputs import catalog
from ablation.inputs.data import load_data
from ablation.inputs.folders import Folders
from ablation.inputs.models import load_model
from ablation.inputs.registered import DATASETS, MODELS, registered_names
from ablation.job import load_job, plan_here
from ablation.layers import describe_registered, registered_here
from ablation.plan import PlanOptions
from ablation.run import run_spec
from ablation.spec import DataSpec, make_spec
from tests.compare import brute_force

SPEC = {
    "model": {"name": "stripe_net", "seed": 4},
    "layer": "3",
    "data": {"name": "stripes", "train": {"per_class": 5, "seed": 1}, "test": "all"},
    "sites": {"count": 40, "seed": 2},
}


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    for name in ("data/far", "checkpoints", "cache"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "far" / "stripes.json").write_text(json.dumps({"train": 21, "test": 12}))
    return Folders(data=tmp_path / "data", checkpoints=tmp_path / "checkpoints", cache=tmp_path / "cache")


def test_nothing_is_registered_without_the_package() -> None:
    assert registered_names(MODELS) == registered_names(DATASETS) == ()
    with pytest.raises(SpecError, match="one of 81 models"):
        load_model("stripe_net")


@pytest.mark.usefixtures("registered")
def test_names_and_facts_stand_beside_the_built_in_ones() -> None:
    here = registered_here()
    kinds = ("stripe", "broken", "batch", "restless", "mean", "deadly", "hungry", "endless", "leaving")
    nets = {f"{kind}_net" for kind in kinds}
    assert set(catalog.model_names(here)) - set(catalog.model_names()) == nets
    assert catalog.dataset_names(here)[-2:] == ("broken_data", "stripes")
    facts = catalog.model_facts("stripe_net", here)
    assert (facts.n_classes, facts.input_shape) == (3, (1, 9, 9))
    assert {layer.name: layer.path for layer in facts.layers if layer.kind != "ReLU"} == {
        "0": "finite", "0.bias": "finite", "3": "direct", "3.bias": "direct", "5": "direct", "5.bias": "direct"
    }  # fmt: skip
    assert catalog.facts_from_line(catalog.line_from_facts(facts)) == facts
    assert len(catalog.model_facts("alexnet", here).layers) == 16  # the built-in one


@pytest.mark.usefixtures("registered")
def test_a_job_on_registered_parts_is_the_brute_force_on_them(folders: Folders) -> None:
    table = run_spec(make_spec(SPEC), folders)
    model, transform = load_model("stripe_net", seed=4, folders=folders)
    test = load_data("stripes", folders.data, "test", transform)
    inputs, labels = (torch.stack([x for x, _ in test]), torch.tensor([y for _, y in test]))
    truth = brute_force(model, "3.weight", table.columns["index"], inputs, labels).mean(1)
    assert len(test) == 30
    np.testing.assert_allclose(table.columns["utility_test"], truth, rtol=0, atol=1e-6 * np.abs(truth).max())
    assert np.abs(truth).max() > 1e-3


@pytest.mark.usefixtures("registered")
def test_where_memory_runs_out_the_job_begins_again_with_smaller_batches(folders: Folders) -> None:
    """The net takes 32 examples at once; what it wants for more no machine has."""
    spec = make_spec(
        {**SPEC, "model": {"name": "hungry_net"}, "layer": "0", "data": {"name": "stripes", "train": "all"}}
    )
    told: list[str] = []
    table = run_spec(spec, folders, on_progress=lambda _, what: told.append(what))
    smaller = [what for what in dict.fromkeys(told) if what.startswith("memory")]
    assert smaller == [f"memory ran out: again, in batches of {size}" for size in (128, 64, 32)]
    assert (table.about["plan"]["batch_size"], table.about["plan"]["n_halved"]) == (32, 3)
    small = run_spec(spec, folders, PlanOptions(2, batch_size=32))
    np.testing.assert_allclose(table.columns["utility_train"], small.columns["utility_train"], rtol=1e-5, atol=1e-12)
    with pytest.raises(OutOfMemory, match=r"^memory ran out in batches of 33 .*Choose a smaller batch size"):
        run_spec(spec, folders, PlanOptions(2, batch_size=33))


@pytest.mark.usefixtures("registered")
def test_the_root_of_registered_data_may_be_named(folders: Folders) -> None:
    far = make_spec({**SPEC, "data": {"name": "stripes", "root": "far", "train": "all", "test": "all"}})
    plan = plan_here(far, folders, PlanOptions(threads=1))
    assert [(split.name, split.n_examples) for split in plan.splits] == [("train", 21), ("test", 12)]
    assert catalog.split_counts(far.data, folders, registered_here()) is None  # only a worker can count
    with pytest.raises(SpecError, match="no such folder"):
        catalog.find_root(DataSpec(name="stripes", root="near", test="all"), folders, registered_here())
    with pytest.raises(SpecError, match="1 to 7, the examples of class 0"):
        plan_here(
            make_spec({**SPEC, "data": {**far.data.model_dump(), "train": {"per_class": 8}}}),
            folders,
            PlanOptions(threads=1),
        )


@pytest.mark.usefixtures("registered")
def test_the_seed_makes_a_registered_model(folders: Folders) -> None:
    first, again, other = (load_model("stripe_net", seed=seed, folders=folders)[0][0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.usefixtures("registered")
def test_a_registered_model_takes_a_checkpoint(folders: Folders) -> None:
    model, _ = load_model("stripe_net", seed=9, folders=folders)
    torch.save(model.state_dict(), folders.checkpoints / "mine.pth")
    loaded, _ = load_model("stripe_net", "mine.pth", folders=folders)
    assert torch.equal(loaded[0].weight, model[0].weight)
    with pytest.raises(SpecError, match="allowed: a file below the checkpoint folder"):
        load_model("stripe_net", "IMAGENET1K_V1", folders=folders)


@pytest.mark.usefixtures("registered")
def test_what_fails_says_so(folders: Folders) -> None:
    with pytest.raises(ModelError, match=r"'broken_net' can't be made: FileNotFoundError: the weights of broken_net"):
        describe_registered("broken_net")
    with pytest.raises(DataError, match=r"train split of the registered data set 'stripes' can't be opened: TypeError"):
        load_data("stripes", None, "train")
    with pytest.raises(DataError, match=r"FileNotFoundError: there is no train in data\. Its factory takes"):
        load_data("broken_data", folders.data, "train")
    with pytest.raises(ModelError, match="running statistics"):
        run_spec(make_spec({**SPEC, "model": {"name": "batch_net"}, "layer": "4"}), folders)


def test_classes_of_registered_parts_are_matched_by_their_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: Folders
) -> None:
    package = tmp_path / "named-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: named\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[ablation.models]\nnamed_net = named_parts:net\n[ablation.datasets]\nnamed_data = named_parts:Data\n"
    )
    (tmp_path / "named_parts.py").write_text(
        "import torch\n"
        "def net():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
        "    model.classes, model.example_input_array = ['eel', 'cat', 'dog'], torch.zeros(1, 4)\n"
        "    return model, None\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __init__(self, root, split):\n"
        "        self.class_to_idx = {'cat': 0, 'dog': 1, 'eel': 2} if split == 'train' else {'dog': 0, 'eel': 1}\n"
        "    __len__ = lambda self: 6\n"
        "    __getitem__ = lambda self, k: (torch.arange(4.0) * k, k % len(self.class_to_idx))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    facts = describe_registered("named_net")
    assert facts.classes == ("eel", "cat", "dog")
    assert catalog.facts_from_line(catalog.line_from_facts(facts)) == facts
    parts = {"layer": "0", "data": {"name": "named_data", "train": "all", "test": "all"}, "sites": "all"}
    spec = make_spec({**parts, "model": {"name": "named_net"}})
    plan = plan_here(spec, folders, PlanOptions(threads=1))
    assert plan.inputs is not None
    assert plan.inputs.classes == {"train": "3 by name, of the model's 3", "test": "2 by name, of the model's 3"}
    job = load_job(spec, plan, folders, device="cpu")
    assert [[split.dataset[k][1] for k in range(6)] for split in job.splits.values()] == [
        [1, 2, 0, 1, 2, 0], [2, 0, 2, 0, 2, 0],
    ]  # fmt: skip
    with pytest.raises(SpecError, match="Its factory makes it: leave the weights out"):
        load_model("named_net", "none", folders=folders)
    torch.save({"model": {"0.weight": torch.zeros(2, 4), "0.bias": torch.ones(2)}}, folders.checkpoints / "two.pth")
    tuned = make_spec(
        {**parts, "model": {"name": "named_net", "weights": "two.pth"}, "data": {**parts["data"], "train": None}}
    )
    plan = plan_here(tuned, folders, PlanOptions(threads=1))
    assert (plan.n_classes, plan.shape) == (2, (2, 4))
    assert load_job(tuned, plan, folders, device="cpu").model[0].bias.tolist() == [1, 1]
    describe_registered.cache_clear()


def test_a_registered_data_set_without_examples_by_index_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "streams-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: streams\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[ablation.datasets]\nendless = streams:make\nempty = streams:make_empty\n"
    )
    (tmp_path / "streams.py").write_text(
        "from torch.utils.data import IterableDataset\n"
        "class Endless(IterableDataset):\n"
        "    __iter__ = lambda self: iter(())\n"
        "make = lambda root, split: Endless()\n"
        "make_empty = lambda root, split: []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError) as caught:
        load_data("endless", None, "train")
    assert str(caught.value) == (
        "the train split of the registered data set 'endless' is an Endless, which has no examples by index; "
        "let its factory give a map-style Dataset."
    )
    with pytest.raises(DataError, match=r"^the test split of the registered data set 'empty' has no examples; give at"):
        load_data("empty", None, "test")

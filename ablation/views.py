"""Public views of models, layers and plans: the same objects with `--json` and over HTTP.

In: facts and plans. Out: plain records, without a plan's shards, which may be many. The facts of a data set are shown
as they are.
"""

from pydantic import BaseModel, Field

from ablation.inputs.catalog import LayerFacts, ModelFacts
from ablation.plan import Estimate, InputsPlan, Path, Plan, ProofPlan, SplitPlan, possible_paths
from ablation.spec import Precision


class ModelView(BaseModel):
    """One model that a job may name."""

    name: str
    weights: tuple[str, ...]
    n_classes: int
    input_shape: tuple[int, ...]
    flops: float
    n_layers: int


class LayerView(BaseModel):
    """One layer that may be a target, and the paths that `auto` takes for it."""

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    n_weights: int
    path: str = Field(description="how sampled weights are computed: direct, finite or rerun")
    whole_layer_path: str = Field(
        description="how all weights of the layer are computed: response, direct, finite or rerun"
    )


class PlanView(BaseModel):
    """How a job is cut and what it will cost."""

    parameter: str
    kind: str
    shape: tuple[int, ...]
    n_classes: int
    n_sites: int
    path: Path
    precision: Precision
    batch_size: int
    n_halved: int
    lanes: int
    gradient_batch_size: int | None
    threads: int
    inputs: InputsPlan | None
    splits: tuple[SplitPlan, ...]
    n_shards: int
    proof: ProofPlan
    estimate: Estimate


def model_view(facts: ModelFacts) -> ModelView:
    """The public view of a model."""
    same = {name: getattr(facts, name) for name in ModelView.model_fields if name != "n_layers"}
    return ModelView(n_layers=len(facts.layers), **same)


def layer_view(layer: LayerFacts) -> LayerView:
    """The public view of a layer."""
    same = {name: getattr(layer, name) for name in LayerView.model_fields if name != "whole_layer_path"}
    return LayerView(whole_layer_path=possible_paths(layer, is_whole=True)[0], **same)


def plan_view(plan: Plan) -> PlanView:
    """The public view of a plan."""
    same = {name: getattr(plan, name) for name in PlanView.model_fields if name != "n_shards"}
    return PlanView(n_shards=len(plan.shards), **same)

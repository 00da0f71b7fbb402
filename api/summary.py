"""The schema of a finished job's summary, which `ablation.statistics.make_summary` makes.

Not here: how the numbers are computed; the docstrings of `ablation/statistics.py` and `ablation/proof.py` say that.
A summary has exactly these members; null stands for a number that does not exist.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ablation.plan import Path
from ablation.spec import Precision


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


class _Exactly(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SplitSummary(_Exactly):
    """One split: the intact model's loss and accuracy, and statistics of the utilities."""

    n_examples: int
    loss: float = Field(description="mean cross-entropy of the intact model, in nats")
    skipped: int = Field(description="pictures that can't be read and were left out")
    accuracy: float = Field(description="share of examples that the intact model answers right")
    series_bound: float | None = Field(
        description="what series left out of any utility at most, in units of 0.01 rms utility; null: infinite"
    )
    provably_without_effect: int = Field(description="sites that changed no logit of any example")
    float32_would_call_zero: int = Field(description="sites whose loss is the intact one in float32")
    negative: int = Field(description="sites without which the loss is lower")
    mean_utility: float | None
    reliability: float | None = Field(
        description="share of the variance over sites that is no sampling noise; null: not known"
    )


class Correlations(_Exactly):
    """Correlations over all sites, and over the touched ones alone; null where they are undefined."""

    pearson: float | None
    spearman: float | None
    pearson_touched: float | None
    spearman_touched: float | None


class Agreement(Correlations):
    """Correlation of the utilities on train and test, and the highest that sampling noise allows."""

    ceiling: float | None = Field(description="the largest Pearson's r that the noise allows")
    ratio: float | None = Field(description="pearson / ceiling")
    ceiling_at: dict[str, float | None] = Field(description="the ceiling with that many examples per split")
    examples_for_ceiling: dict[str, int | None] = Field(description="examples per split that such a ceiling needs")


class Proof(_Exactly):
    """The job's own check against the reference; null where an error is infinite, or a bound is not promised."""

    n_sites: int
    n_examples: int
    arithmetic_error: float | None
    arithmetic_bound: float | None
    model_rounding_median: float | None
    model_rounding_p99: float | None
    sum_error: float | None
    sum_bound: float


class ModelOf(_Exactly):
    """The network that was measured."""

    name: str
    kind: str = Field(description="its class")
    weights: str | None = Field(description="as they were asked for")
    file: str | None = Field(description="name of the file that they are from; null: from none")
    hash: str | None = Field(description="BLAKE2b of 32 bytes over the numbers of its state, in their order")


class SplitOf(_Exactly):
    """One split that was measured on."""

    kind: str = Field(description="class of the data set")
    n_examples: int = Field(description="how many were used")
    n_available: int = Field(description="how many there are")
    fingerprint: str | None = Field(description="BLAKE2b of 32 bytes that tells these examples from others")
    n_skipped: int = Field(description="pictures that can't be read and were left out")
    skipped: dict[str, str] = Field(description="the first of them, with the reason")


class DataOf(_Exactly):
    """The data that was measured on."""

    name: str
    splits: dict[str, SplitOf]


class DeviceOf(_Exactly):
    """What computed it."""

    name: str
    hardware: str


class InputsOf(_Exactly):
    """What was measured on what, in words, and what was noticed in its files."""

    weights: str | None = Field(description="which weights were measured; null: not known")
    preprocessing: str | None = Field(description="how pictures became the model's inputs; null: not known")
    classes: dict[str, str] = Field(description="how classes of the data became those of the model, by split")
    notes: list[str] = Field(description="what was left out of files or converted, one sentence each")
    warnings: list[str] = Field(description="what makes the numbers doubtful, one sentence each; best empty")


class About(_Exactly):
    """All that it takes to do a job again: the same object as `about` in the metadata of the Parquet file."""

    spec: dict[str, Any] = Field(description="as it was asked for")
    plan: dict[str, Any] = Field(description="how it was cut, without the shards")
    inputs: InputsOf
    baseline: dict[str, dict[str, int | float | None]] = Field(description="the intact model on each split")
    proof: Proof | None
    n_not_finite: int
    seconds: float
    model: ModelOf
    data: DataOf
    device: DeviceOf
    versions: dict[str, str] = Field(description="of Python and of the packages that the numbers depend on")
    date: str | None = Field(description="when it was begun: ISO 8601, in UTC")
    command: str | None = Field(description="what was typed; of files and folders the name alone")


class Summary(_Exactly):
    """A finished job as a whole."""

    sites: int
    weights_in_layer: int
    layer: str = Field(description="as it was asked for")
    parameter: str
    path: Path
    precision: Precision
    weights: str | None = Field(description="which weights were measured, in words; null in results of older versions")
    preprocessing: str | None = Field(description="how pictures became the model's inputs, in words; null: not known")
    classes: dict[str, str] = Field(description="how classes of the data became those of the model, by split")
    notes: list[str] = Field(description="what was left out of files or converted, one sentence each")
    warnings: list[str] = Field(description="what makes the numbers doubtful, one sentence each; best empty")
    splits: dict[str, SplitSummary]
    magnitude: dict[str, Correlations] = Field(description="of |utility| with |w|, by split")
    criteria: dict[str, dict[str, Correlations]] = Field(
        description="of the utility with what a criterion predicts, by criterion and split; empty where none was asked"
    )
    proof: Proof | None = Field(description="null: `verify` was 0, or no site was run")
    not_finite: int = Field(description="sites that were not run, since their replacement is not a finite number")
    seconds: float = Field(description="from the first shard's start to the table")
    about: About
    train_test: Agreement = Field(  # type: ignore[assignment]  # it may be absent, but never null
        default=None, description="there if both splits were asked for", json_schema_extra=_without_default
    )

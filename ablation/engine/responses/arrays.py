"""The compiled loops (`rows.py`) as the paths use them: tensors in, tensors out, cut over threads.

For heads whose function is ReLU, none, or one that `activations.py` knows, and whose last Linear is float32 or
narrower: then v_c - v_y is right to the last digit in float32. Others go by matrix operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from ablation.engine.loss import Intact
from ablation.engine.responses.head import HeadBatch, OpenHead
from ablation.engine.responses.loops import curved
from ablation.engine.responses.loops import rows as row_loops
from ablation.engine.responses.loops.activations import Function
from ablation.engine.threads import run_ranges

WORD = 64  # examples whose activity is one number


@dataclass(frozen=True)
class Given:
    """One batch, as the loops take it."""

    y: np.ndarray  # (units, examples), float64: of all units, or of those whose rows are summed
    q: np.ndarray  # (examples, classes), float32
    z: np.ndarray  # (examples, classes), float64
    labels: np.ndarray


def join_given(parts: Sequence[Given]) -> Given:
    """The examples of all parts, one part's after the other's."""
    alike = (np.concatenate([getattr(part, name) for part in parts]) for name in ("q", "z", "labels"))
    return Given(np.concatenate([part.y for part in parts], axis=1), *alike)


@dataclass(frozen=True)
class Rows:
    """A batch's layer inputs, for whole rows."""

    x: np.ndarray  # (examples, inputs), float32

    @cached_property
    def largest(self) -> np.ndarray:
        """Of each example, in size."""
        return np.maximum(self.x.max(axis=1), -self.x.min(axis=1)).astype(np.float64)

    @cached_property
    def active(self) -> np.ndarray:
        """Which are not 0, (words, inputs): a bit for each example."""
        bits = np.packbits(self.x != 0, axis=0, bitorder="little")
        padded = np.zeros((-(-len(self.x) // WORD) * 8, self.x.shape[1]), np.uint8)
        padded[: len(bits)] = bits
        words = padded.reshape(-1, 8, self.x.shape[1]).transpose(0, 2, 1)
        return np.ascontiguousarray(words).view(np.uint64)[:, :, 0]


class Loops:
    """What of a head the loops need for every batch."""

    def __init__(
        self, has_relu: bool, columns: Float32[np.ndarray, "units classes"] | None, function: Function | None = None
    ) -> None:
        self.has_relu = has_relu
        self.function = function  # None: ReLU or none
        self.is_logit = columns is None
        self.columns = np.zeros((1, 1), np.float32) if columns is None else columns

    def of_batch(self, intact: Intact, batch: HeadBatch) -> Given:
        """A batch, once for all sites."""
        return Given(
            y=batch.y.double().T.contiguous().cpu().numpy(),
            q=intact.rest.float().contiguous().cpu().numpy(),
            z=intact.logits.double().contiguous().cpu().numpy(),
            labels=intact.labels.cpu().numpy(),
        )

    def score_sites(
        self,
        steps: Float64[Tensor, " sites"],
        units: Int64[Tensor, " sites"],
        inputs: Int64[Tensor, " sites"],
        x: Float[Tensor, "inputs examples"],
        batch: Given,
    ) -> tuple[Float64[Tensor, "sites examples"], Bool[Tensor, "sites examples"]]:
        """The loss delta of every pair, in nats, and whether any logit moves."""
        delta = torch.empty(len(steps), x.shape[1], dtype=torch.float64)
        touched = torch.empty(delta.shape, dtype=torch.bool)
        args = [each.numpy() for each in (steps, units, inputs)]
        out = delta.numpy(), touched.numpy()

        def run(first: int, last: int) -> None:
            part = slice(first, last)
            where = *(each[part] for each in args), x.numpy(), batch.y
            given = batch.q, batch.z, batch.labels, self.columns, self.is_logit
            if self.function is None:
                row_loops.score_sites(*where, self.has_relu, *given, *(each[part] for each in out))
            else:
                curved.score_curved_sites(*where, self.function, *given, *(each[part] for each in out))

        run_ranges(run, len(steps))
        return delta, touched

    def add_rows(
        self,
        units: Int64[np.ndarray, " units"],
        steps: Float32[np.ndarray, "units inputs"],
        rows: Rows,
        batch: Given,
        runs: Any,
        sums: dict[str, np.ndarray],
        bounds: Float64[np.ndarray, " units"],
    ) -> None:
        """Add the sums over a batch of all weights of some units; see `row_loops.add_rows`."""
        given = (
            batch.q, batch.z, batch.labels, self.columns, self.is_logit, runs.ends, runs.closes, runs.per_class,
            sums["delta"], sums["delta_squared"], sums["touched"], sums["open"], sums["open_squared"], sums["within"],
            bounds,
        )  # fmt: skip
        if self.function is None:
            row_loops.add_rows(units, steps, rows.x, rows.largest, rows.active, batch.y, self.has_relu, *given)
        else:
            curved.add_curved_rows(units, steps, rows.x, rows.largest, batch.y, self.function, *given)


def open_loops(head: OpenHead) -> Loops | None:
    """The loops for a head, on the host; None where they don't fit."""
    is_narrow = head.last is None or head.last.given.dtype != torch.float64
    if not is_narrow or not head.head.is_known:
        return None
    return Loops(head.head.is_relu, None if head.last is None else head.last.columns, head.head.function)

"""The compiled loops of a head (`loops/rows.py`) as the paths use them: tensors in, tensors out, cut over threads.

For heads whose function is one that `loops/activations.py` knows, and whose last Linear is float32 or narrower: then
v_c - v_y is right to the last digit in float32. Others go by matrix operations.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from ablation.engine.deltas import Runs
from ablation.engine.loss import Intact
from ablation.engine.responses.head import HeadBatch, OpenHead
from ablation.engine.responses.loops import rows as row_loops
from ablation.engine.responses.loops.records import Batch, Follows, Sums
from ablation.engine.responses.loops.rows import Inputs, Places
from ablation.engine.threads import run_ranges

WORD = 64  # examples whose activity is one number
NO_SUMS = np.zeros((0, 0))  # in place of sums that are not wanted


def look_up_inputs(x: Float32[np.ndarray, "examples inputs"]) -> Inputs:
    """Properties of a batch's inputs that the loops over whole rows look up."""
    bits = np.packbits(x != 0, axis=0, bitorder="little")
    padded = np.zeros((-(-len(x) // WORD) * 8, x.shape[1]), np.uint8)
    padded[: len(bits)] = bits
    words = np.ascontiguousarray(padded.reshape(-1, 8, x.shape[1]).transpose(0, 2, 1))
    largest = np.maximum(x.max(axis=1), -x.min(axis=1)).astype(np.float64)
    return Inputs(largest, words.view(np.uint64)[:, :, 0])


@dataclass(frozen=True)
class Loops:
    """The loops for one head."""

    follows: Follows

    def of_batch(self, intact: Intact, batch: HeadBatch) -> Batch:
        """The record of a batch, made once for all sites."""
        return Batch(
            x=batch.x.float().contiguous().cpu().numpy(),
            y=batch.y.double().T.contiguous().cpu().numpy(),
            q=intact.rest.float().contiguous().cpu().numpy(),
            z=intact.logits.double().contiguous().cpu().numpy(),
            labels=intact.labels.cpu().numpy(),
        )

    def score_sites(
        self, places: Places, x: Float[Tensor, "inputs examples"], batch: Batch
    ) -> tuple[Float[Tensor, "sites examples"], Bool[Tensor, "sites examples"]]:
        """The loss delta of every pair, in nats, and whether any logit moves."""
        delta = torch.empty(len(places.steps), x.shape[1], dtype=torch.float64)
        touched = torch.empty(delta.shape, dtype=torch.bool)

        def run(first: int, last: int) -> None:
            part = slice(first, last)
            own = Places(*(each[part] for each in places))
            row_loops.score_sites(own, x.numpy(), batch, self.follows, delta[part].numpy(), touched[part].numpy())

        run_ranges(run, len(delta))
        return delta, touched

    def add_rows(
        self,
        units: Int64[np.ndarray, " units"],
        steps: Float32[np.ndarray, "units inputs"],
        batch: Batch,
        inputs: Inputs,
        runs: Runs,
        sums: Sums,
    ) -> None:
        """Add the sums over a batch of all weights of some units, whose y is that of `batch`."""
        row_loops.add_rows(units, steps, batch, inputs, self.follows, runs, sums)


def open_loops(head: OpenHead) -> Loops | None:
    """The compiled loops for a head on the host; None where they cannot compute it."""
    is_narrow = head.last is None or head.last.given.dtype != torch.float64
    if not is_narrow or head.head.function is None:
        return None
    columns = np.zeros((1, 1), np.float32) if head.last is None else head.last.columns
    return Loops(Follows(columns, head.last is None, head.head.function))

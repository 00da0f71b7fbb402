"""From per-example deltas to `PartialSums`: added up batch by batch in float64, in a fixed order.

For splits sorted into blocks of one class, the variance within each class is closed as soon as its last example is in,
so that nothing is kept per class.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from ablation.engine.deltas import Deltas
from ablation.engine.loss import Intact
from ablation.partial import PartialSums, zero


class Sums:
    """Running sums of one shard; `finish` turns them into a frozen partial."""

    def __init__(self, n_sites: int, per_class: int | None, device: torch.device) -> None:
        self.n_sites = n_sites
        self.per_class = per_class
        self.n_seen = 0
        self.n_correct = 0
        self.loss = 0.0
        self.float = {
            name: torch.zeros(n_sites, dtype=torch.float64, device=device)
            for name in ("delta", "delta_squared", "within", "proof", "open", "open_squared")
        }
        self.count = {
            name: torch.zeros(n_sites, dtype=torch.int64, device=device) for name in ("touched", "broken", "fixed")
        }

    def add_intact(self, intact: Intact) -> None:
        """Count one batch of the intact network. Call after that batch's deltas were added."""
        self.n_seen += len(intact.loss)
        self.n_correct += int(intact.correct.sum())
        self.loss += float(intact.loss.double().sum())

    def add(self, deltas: Deltas, intact: Intact, in_proof: Bool[Tensor, " examples"]) -> None:
        """Add some sites' deltas on the batch that comes next."""
        rows, delta = deltas.rows, deltas.delta
        squared = delta * delta
        self.float["delta"][rows] += delta.sum(dim=1)
        self.float["delta_squared"][rows] += squared.sum(dim=1)
        if in_proof.any():
            self.float["proof"][rows] += delta[:, in_proof].sum(dim=1)
        self.count["touched"][rows] += deltas.touched.sum(dim=1)
        self.count["broken"][rows] += (intact.correct & ~deltas.correct).sum(dim=1)
        self.count["fixed"][rows] += (~intact.correct & deltas.correct).sum(dim=1)
        if self.per_class:
            self._add_blocks(rows, delta, squared, self.per_class)

    def _add_blocks(
        self, rows: slice, delta: Float64[Tensor, "sites examples"], squared: Tensor, per_class: int
    ) -> None:
        """Cut the batch where classes end, and close the variance of each class that does."""
        first, n = 0, delta.shape[1]
        while first < n:
            last = min(n, first + per_class - (self.n_seen + first) % per_class)
            self.float["open"][rows] += delta[:, first:last].sum(dim=1)
            self.float["open_squared"][rows] += squared[:, first:last].sum(dim=1)
            if (self.n_seen + last) % per_class == 0:
                self._close(rows, per_class)
            first = last

    def _close(self, rows: slice, per_class: int) -> None:
        total, total_squared = self.float["open"][rows], self.float["open_squared"][rows]
        if per_class > 1:
            spread = (total_squared - total * total / per_class).clamp(min=0)
            self.float["within"][rows] += per_class / (per_class - 1) * spread
        total.zero_()
        total_squared.zero_()

    def finish(self) -> PartialSums:
        """The frozen partial."""
        if not self.n_seen:
            return zero(self.n_sites)
        floats: dict[str, np.ndarray] = {
            name: self.float[name].cpu().numpy() for name in self.float if "open" not in name
        }
        counts: dict[str, np.ndarray] = {name: self.count[name].cpu().numpy() for name in self.count}
        return PartialSums(n_examples=self.n_seen, n_correct=self.n_correct, loss=self.loss, **floats, **counts)

"""From per-example deltas to `PartialSums`: added up batch by batch in float64, in a fixed order.

For splits sorted into blocks of one class, the variance within a class is computed as soon as its last example has been
added, so that nothing is stored per class.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from ablation.engine.deltas import Deltas, DeviceResponses, Responses, make_runs
from ablation.engine.loss import Intact
from ablation.partial import PartialSums, make_partial


class Sums:
    """Running sums of one shard; `finish` turns them into a frozen partial."""

    def __init__(
        self,
        n_sites: int,
        per_class: int | None,
        device: torch.device,
        *,
        proof: bool,
        top1: bool,
        statistics: Iterable[str] = (),
    ) -> None:
        self.n_sites = n_sites
        self.per_class = per_class
        self.n_seen = 0
        self.n_correct = 0
        self.loss = 0.0
        self.proved: list[Responses] = []  # responses on the proof's examples, batch by batch
        self.n_proved = 0
        self.bounds: Tensor | None = None  # per unit: bound of what the response functions leave out
        self.float = {
            name: torch.zeros(n_sites, dtype=torch.float64, device=device)
            for name in (
                *("delta", "delta_squared"),
                *(("proof",) if proof else ()),
                *(("within", "class_delta", "class_delta_squared") if per_class else ()),
            )
        }
        self.count = {
            name: torch.zeros(n_sites, dtype=torch.int32, device=device)
            for name in ("touched", *(("broken", "fixed") if top1 else ()))
        }
        self.statistics = {name: torch.zeros(n_sites, dtype=torch.float64, device=device) for name in statistics}

    def add_intact(self, intact: Intact) -> None:
        """Add one batch of the intact network, after that batch's deltas."""
        self.n_seen += len(intact.loss)
        self.n_correct += int(intact.correct.sum())
        self.loss += float(intact.loss.double().sum())

    def add(self, deltas: Deltas | Responses, intact: Intact, in_proof: Bool[Tensor, " examples"]) -> None:
        """Add some sites' deltas on the next batch."""
        if not isinstance(deltas, Deltas):
            self._add_responses(deltas, in_proof)
            return
        rows, delta = deltas.rows, deltas.delta
        squared = delta * delta
        self.float["delta"][rows] += delta.sum(dim=1)
        self.float["delta_squared"][rows] += squared.sum(dim=1)
        if "proof" in self.float and in_proof.any():
            self.float["proof"][rows] += delta[:, in_proof].sum(dim=1)
        self.count["touched"][rows] += deltas.touched.sum(dim=1)
        if "broken" in self.count:
            self.count["broken"][rows] += (intact.correct & ~deltas.correct).sum(dim=1)
            self.count["fixed"][rows] += (~intact.correct & deltas.correct).sum(dim=1)
        if self.per_class:
            self._add_blocks(rows, delta, squared, self.per_class)

    def _add_responses(self, responses: Responses, in_proof: Bool[Tensor, " examples"]) -> None:
        """Let response functions add to these sums' own memory, on their device or on the host."""
        on_device = isinstance(responses, DeviceResponses)
        if self.bounds is None:
            home = responses.device if isinstance(responses, DeviceResponses) else torch.device("cpu")
            self.bounds = torch.zeros(responses.n_units, dtype=torch.float64, device=home)
            self.float = {name: tensor.to(home) for name, tensor in self.float.items()}
            self.count = {name: tensor.to(home) for name, tensor in self.count.items()}

        def given(tensor: Tensor) -> Any:
            return tensor if on_device else tensor.numpy()

        sums = {name: given(tensor) for name, tensor in (self.float | self.count).items()}
        responses.add(sums, make_runs(len(in_proof), self.n_seen, self.per_class), given(self.bounds))
        if "proof" in self.float and in_proof.any():
            self.n_proved += int(in_proof.sum())
            self.proved.append(responses.of_examples(in_proof.nonzero()[:, 0].cpu().numpy()))

    def _add_proved(self) -> None:
        """Add the proof's examples of all batches at once, since each call reads and writes the sums of all sites."""
        if not self.proved:
            return
        assert self.bounds is not None
        responses = self.proved[0].joined(self.proved[1:])
        delta, unused = self.float["proof"], torch.zeros_like(self.bounds)
        on_device = isinstance(responses, DeviceResponses)
        arrays = (delta, unused) if on_device else (delta.numpy(), unused.numpy())
        responses.add({"delta": arrays[0]}, make_runs(self.n_proved, 0, None), arrays[1])

    def _add_blocks(
        self, rows: slice, delta: Float64[Tensor, "sites examples"], squared: Tensor, per_class: int
    ) -> None:
        """Cut the batch where classes end, and compute the variance of each class that is complete."""
        first, n = 0, delta.shape[1]
        while first < n:
            last = min(n, first + per_class - (self.n_seen + first) % per_class)
            self.float["class_delta"][rows] += delta[:, first:last].sum(dim=1)
            self.float["class_delta_squared"][rows] += squared[:, first:last].sum(dim=1)
            if (self.n_seen + last) % per_class == 0:
                self._close(rows, per_class)
            first = last

    def _close(self, rows: slice, per_class: int) -> None:
        total, total_squared = self.float["class_delta"][rows], self.float["class_delta_squared"][rows]
        if per_class > 1:
            deviation = (total_squared - total * total / per_class).clamp(min=0)
            self.float["within"][rows] += per_class / (per_class - 1) * deviation
        total.zero_()
        total_squared.zero_()

    def finish(self) -> PartialSums:
        """Return the frozen partial."""
        self._add_proved()
        floats = {name: values for name, values in self.float.items() if "class_delta" not in name}
        totals = {
            "n_examples": self.n_seen,
            "n_correct": self.n_correct,
            "loss": self.loss,
            "left_out": 0.0 if self.bounds is None else float(self.bounds.max()),
        }
        arrays = {name: values.cpu().numpy() for name, values in (floats | self.count | self.statistics).items()}
        return make_partial(totals, arrays)

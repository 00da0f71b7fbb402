"""The forms that a delta can take beside plain numbers (ablations, *shape): what structure saves (DESIGN.md 3.3).

    Block     one unit moves: a short run of entries along one axis, elsewhere for each ablation
    Columns   after a ReLU only open units move: of each row of a batch, a few columns, the same for all ablations
    Product   a Linear's result that is not computed before it is known which entries are needed

All of them can be written out with `dense`. Not here: where deltas are kept (`shadows.py`), and who makes which
(`rules.py`, `products.py`).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ablation.engine.carried.linear_relu import column_rows, picked, product, reaches, run_rows, sizes
from ablation.engine.compiled import is_ready
from ablation.engine.increments import relu_delta


@dataclass(frozen=True)
class Block:
    """A delta that is 0 along one axis but for a short run of entries, each ablation's at a place of its own."""

    axis: int  # of the tensor, without the axis of the ablations
    first: Int64[Tensor, " ablations"]
    numbers: Float[Tensor, "ablations ..."]  # the tensor's shape, with `axis` cut to the run
    size: int  # of the whole axis

    @property
    def length(self) -> int:
        """Of the run."""
        return self.numbers.shape[self.axis + 1]

    @property
    def rank(self) -> int:
        """Of the tensor."""
        return self.numbers.dim() - 1

    def places(self) -> Int64[Tensor, "ablations run"]:
        """Which entries along the axis the run is."""
        return self.first[:, None] + torch.arange(self.length, device=self.first.device)

    def dense(self) -> Float[Tensor, "ablations ..."]:
        """With all entries along the axis."""
        shape = list(self.numbers.shape)
        shape[self.axis + 1] = self.size
        places = self.places().view(len(self.first), *[1] * self.axis, -1, *[1] * (len(shape) - self.axis - 2))
        return self.numbers.new_zeros(shape).scatter_(self.axis + 1, places.expand(self.numbers.shape), self.numbers)

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """What another tensor has at the same entries of its `axis`: (ablations, *shape with that axis cut)."""
        axis %= tensor.dim()
        taken = tensor.index_select(axis, self.places().flatten())
        return taken.unflatten(axis, (len(self.first), self.length)).movedim(axis, 0)


@dataclass(frozen=True)
class Columns:
    """A matrix's delta of which, row by row, only these columns move; `numbers` (ablations, columns) of each row."""

    columns: tuple[Int64[Tensor, " _"], ...]
    numbers: tuple[Float[Tensor, "ablations _"], ...]
    size: int

    def dense(self) -> Float[Tensor, "ablations rows size"]:
        """With all columns."""
        whole = self.numbers[0].new_zeros(len(self.numbers[0]), len(self.numbers), self.size)
        for row, (columns, numbers) in enumerate(zip(self.columns, self.numbers, strict=True)):
            whole[:, row, columns] = numbers
        return whole


@dataclass(frozen=True)
class Product:
    """dA B, with what moves of A."""

    factor: Columns | Block
    matrix: Float[Tensor, "inputs outputs"]

    def dense(self) -> Float[Tensor, "ablations rows outputs"]:
        """All entries."""
        if isinstance(self.factor, Block):
            return self._of_block
        return torch.stack([self.row(row) for row in range(len(self.factor.columns))], dim=1)

    def row(self, row: int) -> Float[Tensor, "ablations outputs"]:
        """All entries of one row."""
        if isinstance(self.factor, Block):
            return self._of_block[:, row]
        columns, numbers = self.factor.columns[row], self.factor.numbers[row]
        if not self._is_fused(numbers):
            return numbers @ self._rows(columns)
        return product(numbers, picked(self.matrix.T, torch.arange(self.matrix.shape[1]), columns))

    def _is_fused(self, numbers: Tensor) -> bool:
        """Whether the loops of `linear_relu.py` are for these: a Linear's matrix lies transposed."""
        return is_ready(numbers, self.matrix) and self.matrix.T.is_contiguous()

    def relu(self, x: Tensor) -> Columns:
        """What is left of it behind a ReLU whose input is `x`.

        Only units that x + dx can open for any ablation are computed, by the length of dA and of the unit's column of B
        (`fused.reaches`): the few ablations that move most reach more units than the others.
        """
        columns, numbers = zip(*self._relu_rows(x), strict=True)
        return Columns(columns, numbers, x.shape[1])

    def _relu_rows(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The columns that move and their numbers, of each row."""
        base, factor = x.to(self.matrix.dtype), self.factor
        if isinstance(factor, Columns) and self._is_fused(factor.numbers[0]):
            return column_rows(self.matrix.T, factor.columns, factor.numbers, base)
        if isinstance(factor, Block) and factor.length > 1 and self._is_fused(factor.numbers):
            return run_rows(self.matrix.T, factor.first, factor.numbers, base)
        return [self._row(row, x[row]) for row in range(len(x))]

    def _row(self, row: int, x: Tensor) -> tuple[Tensor, Tensor]:
        base = x.to(self.matrix.dtype)
        if isinstance(self.factor, Block):  # costs little
            dx = self._of_block[:, row]
            opened = ((x > 0) | ~(dx.amax(dim=0) <= -x)).nonzero()[:, 0]  # NaN opens
            return opened, relu_delta(base[opened], dx.index_select(1, opened))
        inputs, da = self.factor.columns[row], self.factor.numbers[row]
        reach = reaches(x, sizes(self._rows(inputs).T))
        size, order = sizes(da).sort(descending=True)
        moving = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        parts = []
        split = max(1, len(order) // 16)
        for lanes, largest in ((order[:split], size[:1]), (order[split:], size[split : split + 1])):
            if len(lanes):
                units = (reach <= largest).nonzero()[:, 0]
                moved = relu_delta(base[units], da[lanes] @ self._rows(inputs, units))
                moving[units] |= (moved != 0).any(dim=0)
                parts.append((lanes, units, moved))
        opened = moving.nonzero()[:, 0]
        numbers = da.new_zeros(len(da), len(opened))
        for lanes, units, moved in parts:
            own = moving[units].nonzero()[:, 0]
            places = torch.searchsorted(opened, units[own])
            some = da.new_zeros(len(lanes), len(opened)).index_copy_(1, places, moved.index_select(1, own))
            numbers.index_copy_(0, lanes, some)
        return opened, numbers

    def _rows(self, inputs: Tensor, outputs: Tensor | None = None) -> Tensor:
        """Some rows of the matrix, and some columns; picked the way it lies in memory (a Linear's is transposed)."""
        if self.matrix.stride(0) != 1:
            return self.matrix.index_select(0, inputs) if outputs is None else self.matrix[inputs[:, None], outputs]
        turned = self.matrix.T
        return (turned.index_select(1, inputs) if outputs is None else turned[outputs[:, None], inputs]).T

    @cached_property
    def _of_block(self) -> Float[Tensor, "ablations rows outputs"]:
        """Ablations of the same unit share its rows of the matrix."""
        assert isinstance(self.factor, Block)
        numbers, length = self.factor.numbers, self.factor.length
        if length == 1:
            return numbers * self.matrix[self.factor.first][:, None]
        result = numbers.new_empty(*numbers.shape[:2], self.matrix.shape[1])
        starts, unit = self.factor.first.unique(return_inverse=True)
        for k, start in enumerate(starts.tolist()):
            lanes = (unit == k).nonzero()[:, 0]
            result[lanes] = numbers[lanes] @ self.matrix[start : start + length]
        return result

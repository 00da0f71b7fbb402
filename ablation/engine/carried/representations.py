"""How a delta is stored where it has structure, instead of as a dense tensor (ablations, *shape).

    Block     one unit moves: a short interval along one axis, whose position differs between ablations
    Columns   after a ReLU only active units move: in each matrix row a few columns, the same ones for all ablations
    Product   the result of a Linear, computed only where its entries are needed

`dense` returns the dense tensor of each. Not here: where deltas are kept (`shadows.py`), and who makes which
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
    """A delta that is 0 along one axis except for a short interval, at a position of its own for each ablation."""

    axis: int  # counted in the tensor, without the ablations' axis
    first: Int64[Tensor, " ablations"]
    numbers: Float[Tensor, "ablations ..."]  # the tensor's shape, with `axis` cut to the interval
    size: int  # the length of the whole axis

    @property
    def length(self) -> int:
        """Length of the interval."""
        return self.numbers.shape[self.axis + 1]

    @property
    def rank(self) -> int:
        """Number of the tensor's axes."""
        return self.numbers.dim() - 1

    def places(self) -> Int64[Tensor, "ablations length"]:
        """Positions of the interval's entries along the axis."""
        return self.first[:, None] + torch.arange(self.length, device=self.first.device)

    def dense(self) -> Float[Tensor, "ablations ..."]:
        """The dense delta."""
        shape = list(self.numbers.shape)
        shape[self.axis + 1] = self.size
        places = self.places().view(len(self.first), *[1] * self.axis, -1, *[1] * (len(shape) - self.axis - 2))
        return self.numbers.new_zeros(shape).scatter_(self.axis + 1, places.expand(self.numbers.shape), self.numbers)

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """Another tensor's entries at the same positions of its `axis`: (ablations, *shape with that axis cut)."""
        axis %= tensor.dim()
        taken = tensor.index_select(axis, self.places().flatten())
        return taken.unflatten(axis, (len(self.first), self.length)).movedim(axis, 0)


@dataclass(frozen=True)
class Columns:
    """The delta of a matrix that is nonzero only in some columns of each matrix row.

    For each matrix row, `columns` holds which they are and `numbers` (ablations, columns) their deltas.
    """

    columns: tuple[Int64[Tensor, " _"], ...]
    numbers: tuple[Float[Tensor, "ablations _"], ...]
    size: int

    def dense(self) -> Float[Tensor, "ablations rows size"]:
        """The dense delta."""
        whole = self.numbers[0].new_zeros(len(self.numbers[0]), len(self.numbers), self.size)
        for row, (columns, numbers) in enumerate(zip(self.columns, self.numbers, strict=True)):
            whole[:, row, columns] = numbers
        return whole


@dataclass(frozen=True)
class Product:
    """The product dA B, by the entries of A that move."""

    factor: Columns | Block
    matrix: Float[Tensor, "inputs outputs"]

    def dense(self) -> Float[Tensor, "ablations rows outputs"]:
        """The dense delta."""
        if isinstance(self.factor, Block):
            return self._of_block
        return torch.stack([self.row(row) for row in range(len(self.factor.columns))], dim=1)

    def row(self, row: int) -> Float[Tensor, "ablations outputs"]:
        """The dense delta of one matrix row."""
        if isinstance(self.factor, Block):
            return self._of_block[:, row]
        columns, numbers = self.factor.columns[row], self.factor.numbers[row]
        if not self._is_fused(numbers):
            return numbers @ self._rows(columns)
        return product(numbers, picked(self.matrix.T, torch.arange(self.matrix.shape[1]), columns))

    def _is_fused(self, numbers: Tensor) -> bool:
        """Whether the compiled loops of `linear_relu.py` take these: a Linear's weight is stored transposed."""
        return is_ready(numbers, self.matrix) and self.matrix.T.is_contiguous()

    def relu(self, x: Tensor) -> Columns:
        """Return the delta of relu(x), where `x` is the intact product and this its delta.

        Only units that some ablation can activate are computed: those within reach of the length of dA times the
        length of the unit's column of B (`linear_relu.reaches`). The few ablations with the largest dA are bounded
        separately.
        """
        columns, numbers = zip(*self._relu_rows(x), strict=True)
        return Columns(columns, numbers, x.shape[1])

    def _relu_rows(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Moving columns and their deltas for each matrix row."""
        base, factor = x.to(self.matrix.dtype), self.factor
        if isinstance(factor, Columns) and self._is_fused(factor.numbers[0]):
            return column_rows(self.matrix.T, factor.columns, factor.numbers, base)
        if isinstance(factor, Block) and factor.length > 1 and self._is_fused(factor.numbers):
            return run_rows(self.matrix.T, factor.first, factor.numbers, base)
        return [self._row(row, x[row]) for row in range(len(x))]

    def _row(self, row: int, x: Tensor) -> tuple[Tensor, Tensor]:
        base = x.to(self.matrix.dtype)
        if isinstance(self.factor, Block):  # cheap: one unit moves
            dx = self._of_block[:, row]
            active = ((x > 0) | ~(dx.amax(dim=0) <= -x)).nonzero()[:, 0]  # NaN counts as active
            return active, relu_delta(base[active], dx.index_select(1, active))
        inputs, da = self.factor.columns[row], self.factor.numbers[row]
        reach = reaches(x, sizes(self._rows(inputs).T))
        size, order = sizes(da).sort(descending=True)
        moving = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        parts = []
        split = max(1, len(order) // 16)
        for ablations, largest in ((order[:split], size[:1]), (order[split:], size[split : split + 1])):
            if len(ablations):
                units = (reach <= largest).nonzero()[:, 0]
                moved = relu_delta(base[units], da[ablations] @ self._rows(inputs, units))
                moving[units] |= (moved != 0).any(dim=0)
                parts.append((ablations, units, moved))
        active = moving.nonzero()[:, 0]
        numbers = da.new_zeros(len(da), len(active))
        for ablations, units, moved in parts:
            own = moving[units].nonzero()[:, 0]
            places = torch.searchsorted(active, units[own])
            some = da.new_zeros(len(ablations), len(active)).index_copy_(1, places, moved.index_select(1, own))
            numbers.index_copy_(0, ablations, some)
        return active, numbers

    def _rows(self, inputs: Tensor, outputs: Tensor | None = None) -> Tensor:
        """Rows, and columns, of the matrix, read in the order in which it is stored (a Linear's is transposed)."""
        if self.matrix.stride(0) != 1:
            return self.matrix.index_select(0, inputs) if outputs is None else self.matrix[inputs[:, None], outputs]
        turned = self.matrix.T
        return (turned.index_select(1, inputs) if outputs is None else turned[outputs[:, None], inputs]).T

    @cached_property
    def _of_block(self) -> Float[Tensor, "ablations rows outputs"]:
        """The dense product; ablations of the same unit share its rows of the matrix."""
        assert isinstance(self.factor, Block)
        numbers, length = self.factor.numbers, self.factor.length
        if length == 1:
            return numbers * self.matrix[self.factor.first][:, None]
        result = numbers.new_empty(*numbers.shape[:2], self.matrix.shape[1])
        starts, unit = self.factor.first.unique(return_inverse=True)
        for k, start in enumerate(starts.tolist()):
            ablations = (unit == k).nonzero()[:, 0]
            result[ablations] = numbers[ablations] @ self.matrix[start : start + length]
        return result

"""A Linear in the base's precision on inputs that are mostly 0, as behind a ReLU: only active inputs are multiplied.

    y_nu = b_u + sum over j with x_nj != 0 of x_nj W_uj

The compiled loop computes in float64 with weights of float32 or less, whose products are exact there. A result depends
neither on the other examples of the batch nor on the number of threads.
"""

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ablation.engine.compiled import kernel
from ablation.engine.threads import run_ranges

SPARSE = 0.4  # share of active inputs up to which leaving out the others pays
SKIP_WEIGHTS = 1 << 18  # the least number of weights of which leaving out some pays
FEW_EXAMPLES, BLOCK_UNITS = 16, 128  # so few go block by block, of so many units
CACHED_INPUTS, CACHED_UNITS = 128, 1024  # of the weight, in float32: half of a core's cache


class Linear:
    """A Linear whose `weight` (units, inputs) is given in the model's data type and used in `dtype`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.given = weight.detach()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype
        is_narrow = dtype == torch.float64 and self.given.element_size() <= 4
        self.may_skip = (
            is_narrow and not self.given.is_cuda and self.given.numel() >= SKIP_WEIGHTS
            and all(bool(end.isfinite()) for end in self.given.aminmax())  # else 0 times infinity might be left out
        )  # fmt: skip

    @cached_property
    def weight(self) -> Tensor:
        """The weight in the data type of the computation."""
        return self.given.to(self.dtype)

    @cached_property
    def columns(self) -> np.ndarray:
        """The transposed weight (inputs, units), float32, on the host: the weights of one input are contiguous."""
        return self.given.float().cpu().T.contiguous().numpy()

    def of_units(self, units: Tensor) -> "Linear":
        """The Linear restricted to some of its units."""
        if len(units) == len(self.given):
            return self
        return Linear(self.given[units], None if self.bias is None else self.bias[units], self.dtype)

    def __call__(self, x: Float[Tensor, "examples inputs"]) -> Float[Tensor, "examples units"]:
        """The Linear's output."""
        x = x.to(self.dtype)
        if len(x) <= FEW_EXAMPLES and self.given.dtype != self.dtype:
            return self._of_few(x)
        if not self.may_skip or int(x.count_nonzero()) > SPARSE * x.numel():
            return F.linear(x, self.weight, self.bias)
        y = torch.zeros(len(x), len(self.given), dtype=self.dtype) if self.bias is None else self.bias.repeat(len(x), 1)
        inputs, outputs = x.contiguous().numpy(), y.numpy()
        columns = self.columns

        def run(first: int, last: int) -> None:
            add_active(inputs[first:last], columns, outputs[first:last])

        run_ranges(run, len(x), parts_per_thread=1)  # each part brings the whole weight into its core's cache
        return y

    def _of_few(self, x: Float[Tensor, "examples inputs"]) -> Float[Tensor, "examples units"]:
        """Compute by blocks of units, which are converted one at a time: copying the whole weight would cost most."""
        y = torch.cat([F.linear(x, block.to(self.dtype)) for block in self.given.split(BLOCK_UNITS)], dim=1)
        return y if self.bias is None else y.add_(self.bias)


@kernel
def add_active(x, columns, y):
    """Add to y (examples, units) the products of the inputs that are not 0, tile by tile."""
    lists, lengths = np.empty((x.shape[0], CACHED_INPUTS), np.int32), np.empty(x.shape[0], np.int32)
    for first in range(0, x.shape[1], CACHED_INPUTS):
        last = min(first + CACHED_INPUTS, x.shape[1])
        for n in range(x.shape[0]):
            n_active = 0
            for j in range(first, last):
                lists[n, n_active] = j
                n_active += x[n, j] != 0
            lengths[n] = n_active
        for begin in range(0, y.shape[1], CACHED_UNITS):
            end = min(begin + CACHED_UNITS, y.shape[1])
            for n in range(x.shape[0]):
                add_products(x[n], columns, begin, end, lists[n, : lengths[n]], y[n])


@kernel
def add_products(x, columns, begin, end, active, y):
    """Add the products of one example's active inputs to its units from begin to end: eight inputs at a time."""
    own, a = y[begin:end], 0
    while a + 8 <= len(active):
        j0, j1, j2, j3 = active[a], active[a + 1], active[a + 2], active[a + 3]
        j4, j5, j6, j7 = active[a + 4], active[a + 5], active[a + 6], active[a + 7]
        x0, x1, x2, x3, x4, x5, x6, x7 = x[j0], x[j1], x[j2], x[j3], x[j4], x[j5], x[j6], x[j7]
        w0, w1, w2, w3 = (
            columns[j0, begin:end], columns[j1, begin:end], columns[j2, begin:end], columns[j3, begin:end]
        )  # fmt: skip
        w4, w5, w6, w7 = (
            columns[j4, begin:end], columns[j5, begin:end], columns[j6, begin:end], columns[j7, begin:end]
        )  # fmt: skip
        for u in range(end - begin):
            own[u] += ((x0 * w0[u] + x1 * w1[u]) + (x2 * w2[u] + x3 * w3[u])) + (
                (x4 * w4[u] + x5 * w5[u]) + (x6 * w6[u] + x7 * w7[u])
            )
        a += 8
    for k in range(a, len(active)):
        x0, w0 = x[active[k]], columns[active[k], begin:end]
        for u in range(end - begin):
            own[u] += x0 * w0[u]

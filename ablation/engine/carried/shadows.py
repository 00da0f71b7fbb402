"""Where deltas are kept: each storage has a shadow, which holds its numbers' changes under every ablation.

In: deltas of tensors. Out: the deltas of any tensor on the same storage. A view of a tensor is the same view of the
shadow, so views need no rule, and a write through one view is seen by all.

Where structure saves work, a shadow keeps its structured representation (`representations.py`) until its dense deltas
are asked for.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ablation.engine.carried.representations import Block, Columns, Product


@dataclass(frozen=True)
class _Dense:
    deltas: Tensor  # (ablations, numbers of the storage)

    def of(self, tensor: Tensor) -> Tensor:
        strides = (self.deltas.stride(0), *tensor.stride())
        offset = self.deltas.storage_offset() + tensor.storage_offset()
        return self.deltas.as_strided((len(self.deltas), *tensor.shape), strides, offset)


@dataclass(frozen=True)
class _Blocks:
    """A storage cut into periods of `period` numbers; in each period one interval moves, which begins at `first`."""

    deltas: Tensor  # (ablations, periods, length of the interval)
    first: Int64[Tensor, " ablations"]
    gap: int  # divides every `first` and the length of the interval
    period: int

    def of(self, tensor: Tensor) -> Block | None:
        """The block of a view; None where the view cuts or mixes units."""
        length, far = self.deltas.shape[2], self.deltas.stride(1)
        shape, strides, unit = list(tensor.shape), [0] * tensor.dim(), None
        inner = tensor.storage_offset() % self.period  # the largest place within a period that is not along the unit
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if size == 1 or stride % self.period == 0:
                strides[axis] = 0 if size == 1 else stride // self.period * far
            elif size * stride == self.period and self.gap % stride == 0 and unit is None:
                unit, shape[axis], strides[axis] = axis, length // stride, stride
            else:
                strides[axis] = stride
                inner += (size - 1) * stride
        if unit is None or inner >= strides[unit]:
            return None
        offset = tensor.storage_offset() // self.period * far + tensor.storage_offset() % self.period
        offset += self.deltas.storage_offset()
        numbers = self.deltas.as_strided((len(self.deltas), *shape), (self.deltas.stride(0), *strides), offset)
        return Block(unit, self.first // strides[unit], numbers, tensor.shape[unit])

    def dense(self) -> _Dense:
        n, n_periods, _ = self.deltas.shape
        return _Dense(Block(1, self.first, self.deltas, self.period).dense().view(n, n_periods * self.period))


_Shadow = _Dense | _Blocks | Columns | Product


class Shadows:
    """The shadows of all storages that move, for `n` ablations, in one precision."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.n = n
        self.dtype = dtype
        self._lost: dict[int, StorageWeakRef] = {}
        self._held: dict[int, tuple[StorageWeakRef, _Shadow]] = {}  # valid as long as the storage lives

    def lose(self, tensor: Tensor) -> None:
        """Record that the tensor may differ under an ablation in a way that has no delta."""
        self._lost[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())

    def is_lost(self, tensor: Tensor) -> bool:
        """Whether `lose` was called for the tensor's storage."""
        alive = self._lost.get(tensor.untyped_storage()._cdata)
        return alive is not None and not alive.expired()

    def moves(self, tensor: Tensor) -> bool:
        """Whether anything is known to move on the tensor's storage."""
        return self._get(tensor) is not None

    def delta(self, tensor: Tensor) -> Tensor | None:
        """The tensor's delta (ablations, *shape); None where it has none."""
        shadow = self._get(tensor)
        if isinstance(shadow, _Blocks) and (block := shadow.of(tensor)) is not None:
            return block.dense()
        return None if shadow is None else self._whole(tensor, shadow).of(tensor)

    def representation(self, tensor: Tensor) -> Block | Columns | Product | None:
        """The structured representation of the tensor's delta; None where it has none."""
        shadow = self._get(tensor)
        if isinstance(shadow, _Blocks):
            return shadow.of(tensor)
        return shadow if isinstance(shadow, Columns | Product) and _is_matrix(tensor) else None

    def put(self, tensor: Tensor, move: Tensor | Block | Columns | Product) -> None:
        """Record the delta of a new tensor, or of one that has been written to.

        Shadows are never modified in place: two tensors may share one, and a rule may still hold the earlier one.
        """
        if _is_whole(tensor):
            self._hold(tensor, self._make(tensor, move))
            return
        shadow = self._get(tensor)
        if shadow is None:
            deltas = torch.zeros(self.n, _size(tensor), dtype=self.dtype, device=tensor.device)
        else:
            deltas = self._whole(tensor, shadow).deltas.clone()
        _Dense(deltas).of(tensor).copy_(move if isinstance(move, Tensor) else move.dense())
        self._hold(tensor, _Dense(deltas))

    def _whole(self, tensor: Tensor, shadow: _Shadow) -> _Dense:
        """Return the dense shadow, and keep it in place of the structured one."""
        if isinstance(shadow, _Dense):
            return shadow
        whole = shadow.dense()
        dense = _Dense(whole.reshape(self.n, -1)) if isinstance(whole, Tensor) else whole
        self._hold(tensor, dense)
        return dense

    def _make(self, tensor: Tensor, move: Tensor | Block | Columns | Product) -> _Shadow:
        if isinstance(move, Block):
            return self._blocks(tensor, move)
        if isinstance(move, Columns | Product) and _is_matrix(tensor):
            return move
        return self._dense(tensor, move if isinstance(move, Tensor) else move.dense())

    def _dense(self, tensor: Tensor, move: Tensor) -> _Dense:
        """Return the deltas in the order of the tensor's storage, without a copy where they already are."""
        order = _storage_order(tensor)
        numbers = move.to(self.dtype).expand(self.n, *tensor.shape).permute(0, *[axis + 1 for axis in order])
        deltas = numbers.reshape(self.n, -1)
        return _Dense(deltas if deltas.shape[1] == 1 or deltas.stride(1) == 1 else deltas.contiguous())

    def _blocks(self, tensor: Tensor, move: Block) -> _Blocks:
        order = _storage_order(tensor)
        before = order.index(move.axis)
        gap = 1
        for axis in order[before + 1 :]:
            gap *= tensor.shape[axis]
        numbers = move.numbers.to(self.dtype).permute(0, *[axis + 1 for axis in order])
        deltas = numbers.reshape(self.n, -1, move.length * gap)
        deltas = deltas if deltas.stride(2) == 1 or deltas.shape[2] == 1 else deltas.contiguous()
        return _Blocks(deltas, move.first * gap, gap, tensor.shape[move.axis] * gap)

    def _get(self, tensor: Tensor) -> _Shadow | None:
        alive, shadow = self._held.get(tensor.untyped_storage()._cdata, (None, None))
        return None if alive is None or alive.expired() else shadow

    def _hold(self, tensor: Tensor, shadow: _Shadow) -> None:
        storage = tensor.untyped_storage()
        for key in [key for key, (alive, _) in self._held.items() if alive.expired()]:
            del self._held[key]
        self._held[storage._cdata] = (StorageWeakRef(storage), shadow)


def _size(tensor: Tensor) -> int:
    """How many numbers the tensor's storage has."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _is_matrix(tensor: Tensor) -> bool:
    """Whether the tensor is a contiguous matrix that covers all of its storage."""
    return tensor.dim() == 2 and tensor.is_contiguous() and tensor.numel() == _size(tensor)


def _storage_order(tensor: Tensor) -> list[int]:
    """The axes, from the one with the largest steps in memory to the one with the smallest."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))


def _is_whole(tensor: Tensor) -> bool:
    """Whether every number of the storage is exactly one entry of the tensor."""
    expected = 1
    for axis in reversed(_storage_order(tensor)):
        if tensor.shape[axis] != 1 and tensor.stride(axis) != expected:
            return False
        expected *= tensor.shape[axis]
    return expected == _size(tensor)

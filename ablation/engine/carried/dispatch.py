"""Finite differences carried forward: every value is a pair (base, delta), for many ablations at once.

It is forward-mode differentiation with a finite increment instead of an infinitesimal one, so it is exact for any
network (docs/03-engine.md). The network itself runs as it always does, in float64 from the target on. This mode sees
each operation that PyTorch executes (`aten`), and computes, beside its result, by how much that result would change
under every ablation: by the operation's rule (`rules.py`) or, where it has none, by the general rule, which runs the
operation again on base + delta. Nothing is traced: branches, loops, views and in-place writes are the model's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ablation.engine.carried.representations import Block, Columns, Product
from ablation.engine.carried.shadows import Shadows
from ablation.engine.carried.tape import Player
from ablation.errors import ModelError
from ablation.precision import Lifts
from ablation.sites import Sites

Representation = Block | Columns | Product
# PyTorch counts these as writes, but they change a tensor's layout alone and none of its numbers.
_LAYOUT_ONLY = {"as_strided_", "detach_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_"}


class Changed:
    """Marks a result without a delta (an index, a mask) that may differ under an ablation: an error once it is read."""


CHANGED = Changed()
Move = Tensor | Representation | Changed | None  # one result's delta: (ablations, *shape), or a structured one
Moves = list[Move] | None  # all results' deltas; None: the rule does not cover this call


class NotCarriedError(ModelError):
    """A number that the model decides by (a branch, an index, a mask) changes under an ablation."""


@dataclass(frozen=True)
class Rule:
    """How one operation carries a change; `along` tells which axis of the result a block of units goes on along."""

    function: Callable[..., Moves]
    along: Callable[..., int | None]


@dataclass(frozen=True)
class Entries:
    """The ablated entries of one view of the target: coordinates by axis, 0 and step 0 for those outside of it."""

    place: tuple[Tensor, ...]
    step: Tensor  # (ablations,) replacement minus weight, float64


class Carry(TorchDispatchMode):
    """While active, carries the deltas of the target's ablations through every operation.

    `rules` is a table by operation; with `{}` the general rule is used for everything.
    """

    def __init__(
        self, target: Tensor, sites: Sites, rules: Mapping[Any, Rule], dtype: torch.dtype, lifts: Lifts,
        player: Player,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lifts = lifts
        self.player = player
        self.target = target
        self.index = sites.indices
        self.step = sites.steps
        self.rules = rules
        self.shadows = Shadows(len(sites), dtype)
        self.without_rule: set[str] = set()  # operations that the general rule was used for

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and its rule."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if lost := [tensor for tensor in tensors if self.shadows.is_lost(tensor)]:
            result = func(*args, **kwargs)
            if any(_share(tensor, result) for tensor in lost) and not _written(func, args, kwargs):
                return result  # a view
            raise NotCarriedError(f"{func} reads an index or a mask that may change under an ablation")
        moving = [tensor for tensor in tensors if self.is_target(tensor) or self.shadows.moves(tensor)]
        if not moving or func.overloadpacket.__name__ in _LAYOUT_ONLY:
            return self.player.run(func, args, kwargs)
        written = _written(func, args, kwargs)
        if any(self.is_target(tensor) for tensor in written):
            raise NotCarriedError("the model writes to the target parameter")
        call = self._before(func, args, kwargs, written, moving)
        result = self.player.run(func, args, kwargs)
        results = list(result) if isinstance(result, tuple | list) else [result]
        if not written and any(_share(tensor, one) for tensor in moving for one in results):
            return result  # a view: its shadow is the same view of the shadow
        for tensor, move in zip(written or results, self._moves(call, written or results), strict=False):
            if isinstance(move, Changed):
                self.shadows.lose(tensor)
            elif move is not None:
                self.shadows.put(tensor, move)
        return result

    def _moves(self, call: "Call", results: list[Any]) -> list[Move]:
        """Apply the rule to one block of units, else the rule as it is, else the general rule."""
        rule = self.rules.get(_functional(call.func))
        if rule is None:
            return self._general(call)
        options = {name: value for name, value in call.kwargs.items() if name != "out"}
        if (block := call.common_block()) is not None:
            axis = rule.along(block, results[0], *call.args, **options)
            if axis is not None:
                moves = rule.function(call.on(block), results[0], *call.args, **options)
                if moves is not None:
                    return [
                        Block(axis, block.first, move.expand(-1, *_cut(result, axis, block.length)), block.size)
                        if isinstance(move, Tensor)
                        else move
                        for move, result in zip(moves, results, strict=False)
                    ]
        moves = rule.function(call, results[0], *call.args, **options)
        return self._general(call) if moves is None else moves

    def _general(self, call: "Call") -> list[Move]:
        self.without_rule.add(f"{call.func.namespace}.{call.name}")
        return _general(call)

    def _before(self, func: Any, args: Any, kwargs: Any, written: list[Tensor], moving: list[Tensor]) -> "Call":
        """Return the call with its arguments as they are before it; those that it writes to are copied."""
        copies = {
            id(tensor): tensor.clone()
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor) and any(_share(tensor, one) for one in written)
        }
        names = {id(copies.get(id(tensor), tensor)): tensor for tensor in moving}
        representations = {
            key: self.shadows.representation(tensor) for key, tensor in names.items() if not self.is_target(tensor)
        }
        deltas: dict[int, Tensor] = {}
        if written:  # a write may change a tensor's layout, and with it how its delta is read
            deltas = {key: self._delta(names[key]) for key, known in representations.items() if known is None}
        args, kwargs = tree_map_only(Tensor, lambda tensor: copies.get(id(tensor), tensor), (args, kwargs))
        return Call(self, func, args, kwargs, names, representations, deltas)

    def _delta(self, tensor: Tensor) -> Tensor:
        delta = self.shadows.delta(tensor)
        assert delta is not None
        return delta

    # --- the target itself: its delta is written out only where it must be, since the target may be large ---

    def is_target(self, tensor: Tensor) -> bool:
        """Whether the tensor is the target parameter or a view of it."""
        return tensor.untyped_storage()._cdata == self.target.untyped_storage()._cdata

    def entries(self, view: Tensor) -> Entries | None:
        """Return the ablated entries of a view of the target; None where the view repeats an entry (`expand`)."""
        if _repeated(view) is not None:
            return None
        left = self.index - view.storage_offset()
        inside = left >= 0
        place: dict[int, Tensor] = {}
        strides = view.stride()
        for axis in sorted(range(view.dim()), key=lambda axis: (-strides[axis], axis)):
            stride, size = strides[axis], view.shape[axis]
            place[axis] = torch.zeros_like(left) if size == 1 else left.div(stride, rounding_mode="floor")
            left = left - place[axis] * stride
            inside = inside & (place[axis] >= 0) & (place[axis] < size)
        inside = inside & (left == 0)
        return Entries(tuple(place[axis] * inside for axis in range(view.dim())), self.step * inside)

    def target_delta(self, view: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return the dense delta of a view of the target for some of the ablations."""
        axis = _repeated(view)
        if axis is not None:
            return self.target_delta(view.select(axis, 0), rows).unsqueeze(axis + 1).expand(-1, *view.shape)
        entries = self.entries(view)
        assert entries is not None
        steps = entries.step[rows].to(self.shadows.dtype)
        delta = torch.zeros(len(steps), *view.shape, dtype=steps.dtype, device=view.device)
        ablations = torch.arange(len(steps), device=view.device)
        return delta.index_put_((ablations, *(place[rows] for place in entries.place)), steps)


@dataclass(frozen=True)
class Call:
    """One operation on values as they were before it, for its rule."""

    carry: Carry
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    _names: dict[int, Tensor]  # id of each moving argument -> the tensor itself
    _representations: dict[int, Representation | None]
    _deltas: dict[int, Tensor]
    _on: Block | None = None

    @property
    def n(self) -> int:
        """The number of ablations."""
        return self.carry.shadows.n

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the deltas."""
        return self.carry.shadows.dtype

    @property
    def name(self) -> str:
        """The operation's name without the underscore of in-place operations."""
        return str(_functional(self.func).__name__)

    @property
    def is_part(self) -> bool:
        """Whether the rule runs on a block of units alone."""
        return self._on is not None

    # --- for the rules ---

    def moves(self, value: Any) -> bool:
        """Whether an argument has a delta."""
        return id(value) in self._names

    def delta(self, value: Any) -> Tensor | None:
        """The delta of an argument, (ablations, *shape); None where it has none."""
        tensor = self._names.get(id(value))
        if tensor is None:
            return None
        if self._on is not None:
            return self._representations[id(value)].numbers  # type: ignore[union-attr, return-value]
        if self.carry.is_target(tensor):
            return self.carry.target_delta(tensor)
        if id(value) not in self._deltas:  # written out once, however many ablations ask
            known = self._representations[id(value)]
            self._deltas[id(value)] = self.carry._delta(tensor) if known is None else known.dense()
        return self._deltas[id(value)]

    def base(self, value: Any) -> Any:
        """The argument or result itself in the data type of the deltas, cut to the block where the rule runs on one."""
        return self.exact(self.carry.lifts.narrow(value, self.dtype)) if isinstance(value, Tensor) else value

    def exact(self, value: Any) -> Any:
        """The argument or result itself in its own data type, cut to the block where the rule runs on one."""
        if not isinstance(value, Tensor) or self._on is None:
            return value
        from_end = self._on.axis - self._on.rank
        if value.dim() < -from_end or value.shape[from_end] != self._on.size:
            return value
        taken = self._on.of(value, from_end)
        return taken[(slice(None), *[None] * (self._on.rank + 1 - taken.dim()))]

    def representation(self, value: Any) -> Representation | None:
        """The structured representation of an argument's delta (`representations.py`), where it has one."""
        return self._representations.get(id(value))

    def entries(self, value: Any) -> Entries | None:
        """The ablated entries of the target or a view of it; None where the tensor is none."""
        is_target = isinstance(value, Tensor) and self.carry.is_target(value)
        return self.carry.entries(value) if is_target else None

    # --- for the dispatch mode ---

    def common_block(self) -> Block | None:
        """The block that all moving arguments share; None where anything else moves."""
        moving = [self._representations.get(key) for key in self._names]
        first = moving[0]
        if not isinstance(first, Block):
            return None
        for other in moving[1:]:
            if not isinstance(other, Block) or other.length != first.length or other.size != first.size:
                return None
            if other.numbers.dim() != first.numbers.dim() or other.axis != first.axis:
                return None
            if not (other.first is first.first or torch.equal(other.first, first.first)):
                return None
        return first

    def on(self, block: Block) -> "Call":
        """Return this call restricted to the units of a block, in every argument."""
        return Call(
            self.carry, self.func, self.args, self.kwargs, self._names, self._representations, self._deltas, block
        )

    def again(self, ablation: int | None = None) -> list[Any]:
        """Run the operation again with one ablation's deltas added to its arguments, or with none of them."""

        def moved(tensor: Tensor) -> Tensor:
            if ablation is None or id(tensor) not in self._names:
                return tensor.clone()
            name, rows = self._names[id(tensor)], slice(ablation, ablation + 1)
            if self.carry.is_target(name):
                return tensor + self.carry.target_delta(name, rows)[0]
            block = self._representations[id(tensor)]
            if isinstance(block, Block):
                return tensor + Block(block.axis, block.first[rows], block.numbers[rows], block.size).dense()[0]
            delta = self.delta(tensor)
            assert delta is not None
            return tensor + delta[ablation]

        args, kwargs = tree_map_only(Tensor, moved, (self.args, self.kwargs))
        result = self.func(*args, **kwargs)
        results = list(result) if isinstance(result, tuple | list) else [result]
        return [each.clone() if isinstance(each, Tensor) else each for each in results]


def _general(call: Call) -> list[Move]:
    """Apply the general rule: run the operation once more for every ablation, and subtract. It is exact, but slow.

    The intact result comes from a call of its own, so that where nothing moves, the difference is exactly 0.

    Raises:
        NotCarriedError: a result changes that is neither a floating-point tensor nor a tensor that nobody may read.
    """
    intact = call.again()
    moves: list[list[Tensor]] = [[] for _ in intact]
    changed: set[int] = set()
    for ablation in range(call.n):
        for place, (own, other) in enumerate(zip(intact, call.again(ablation), strict=True)):
            if isinstance(own, Tensor) and own.is_floating_point() and own.shape == other.shape:
                moves[place].append(torch.where(other == own, 0, other - own).to(call.dtype))  # also for -inf
            elif isinstance(own, Tensor) and own.shape == other.shape:
                changed.update([] if torch.equal(own, other) else [place])
            elif not isinstance(own, Tensor) and own == other:
                continue
            else:
                raise NotCarriedError(f"the result of {call.func} changes its shape or value under an ablation")
    return [CHANGED if place in changed else torch.stack(each) if each else None for place, each in enumerate(moves)]


def _share(tensor: Tensor, result: Any) -> bool:
    return isinstance(result, Tensor) and tensor.untyped_storage()._cdata == result.untyped_storage()._cdata


def _cut(result: Tensor, axis: int, length: int) -> list[int]:
    return [length if place == axis else size for place, size in enumerate(result.shape)]


def _repeated(view: Tensor) -> int | None:
    """The first axis along which a view repeats one number (stride 0); None where there is none."""
    axes = (axis for axis in range(view.dim()) if view.stride(axis) == 0 and view.shape[axis] != 1)
    return next(axes, None)


def _functional(func: Any) -> Any:
    """The out-of-place variant of an operation."""
    packet = func.overloadpacket
    name = packet.__name__.removesuffix("_")
    return getattr(torch.ops.aten, name, packet) if func.namespace == "aten" else packet


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    schema = func._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
    places = [given.get(argument.name) for argument in schema if argument.alias_info and argument.alias_info.is_write]
    return [leaf for leaf in tree_leaves(places) if isinstance(leaf, Tensor)]

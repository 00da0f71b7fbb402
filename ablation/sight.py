"""Does everything that depends on a parameter stay in torch's sight on its way to the logits?

The path `finite` computes deltas beside the operations that torch executes in its own thread. Numbers may leave its
sight and come back without a delta: by NumPy, `tolist()`, another thread, or an extension that writes to memory. Then
an ablation seems to have no effect, although it has one.

In: a model, parameters, a small batch. Out: how their effect gets out of sight, or None. The model runs twice, as it is
and with other numbers in the parameters. Every operation's arguments are looked at: what doesn't follow, by operations
that torch has seen, from the parameters has to be the same in both runs; and what does follow from them has to be what
the last operation on it has left.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ablation.baseline import make_other
from ablation.errors import ModelError
from ablation.precision import as_found, in_own_precision, run
from ablation.sharing import find_holders, replaced, tied

# Methods that hand a tensor's numbers to something that torch doesn't see.
EXITS = {"numpy", "__array__", "tolist", "__dlpack__", "__reduce_ex__", "__cuda_array_interface__"}
# Operations whose results tell the model something about numbers: what it does may follow from them, in sight.
_ASKED = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "index"}
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WHOLE = 1 << 14  # tensors up to this size are compared as a whole; of larger ones, so many numbers,
SUMMED = 1 << 21  # and up to this size their sum


@dataclass(frozen=True)
class _Step:
    """One operation: what it was given that doesn't follow from the parameters, and what it made."""

    name: str
    given: tuple[tuple[int | None, Any], ...]  # the number of the storage (None: never seen before), and its contents
    numbers: tuple[Any, ...]
    made: tuple[int, ...]  # the numbers of the storages of its results that don't follow from the parameters


class _Watch(TorchDispatchMode):
    """Follows what depends on some tensors through every operation."""

    def __init__(self, targets: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        super().__init__()
        self.following: dict[int, StorageWeakRef] = {}
        self.held = {_storage(tensor): StorageWeakRef(tensor.untyped_storage()) for tensor in held}
        self.numbered: dict[int, tuple[StorageWeakRef, int]] = {}
        self.left: dict[int, dict[tuple[Any, ...], Any]] = {}  # what was left in what follows, by storage and view
        self.steps: list[_Step] = []
        self.asked = False  # whether the model has been told anything that may differ
        self.exit: str | None = None
        for tensor in targets:
            self.held.pop(_storage(tensor), None)
            self._follow(tensor)

    def follows(self, tensor: Tensor) -> bool:
        """Whether the tensor follows from the targets by operations that were seen."""
        if not _has_storage(tensor):
            return False
        alive = self.following.get(_storage(tensor))
        return alive is not None and not alive.expired()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and look at what it is given and what it makes."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and _has_storage(leaf)]
        written = _written(func, args, kwargs)
        skipped = {id(tensor) for tensor in written} if name in _OVERWRITING or "out" in kwargs else set()
        moving = [tensor for tensor in tensors if self.follows(tensor)]
        for tensor in moving:
            if id(tensor) not in skipped:
                self._check_left(tensor, name)
        given = tuple(
            (self._number(tensor), _contents(tensor))
            for tensor in tensors
            if id(tensor) not in skipped and not self.follows(tensor) and not self._is_held(tensor)
        )
        numbers = tuple(leaf for leaf in leaves if isinstance(leaf, bool | int | float | complex))
        self.asked = self.asked or (bool(moving) and name in _ASKED)
        result = func(*args, **kwargs)
        if name in _EMPTY and isinstance(result, Tensor) and _has_storage(result):
            result.zero_()  # what nobody has written is the same in every run
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _has_storage(leaf)]
        made = [*results, *written]
        for storage in {_storage(tensor) for tensor in written}:
            self.left.pop(storage, None)
        if moving:
            for tensor in made:
                self._follow(tensor)
                self.left.setdefault(_storage(tensor), {})[_view(tensor)] = _contents(tensor)
            made = []
        own = tuple(self._number(tensor, new=True) or 0 for tensor in made if not self.follows(tensor))
        self.steps.append(_Step(name, given, numbers, own))
        return result

    def _follow(self, tensor: Tensor) -> None:
        if not self.follows(tensor):
            self.following[_storage(tensor)] = StorageWeakRef(tensor.untyped_storage())
            self.left.pop(_storage(tensor), None)

    def _check_left(self, tensor: Tensor, name: str) -> None:
        contents = _contents(tensor)
        left = self.left.setdefault(_storage(tensor), {})
        if left.setdefault(_view(tensor), contents) != contents and self.exit is None:
            self.exit = f"something that torch doesn't see writes to a tensor before {name} reads it"

    def _is_held(self, tensor: Tensor) -> bool:
        alive = self.held.get(_storage(tensor))
        return alive is not None and not alive.expired()

    def _number(self, tensor: Tensor, *, new: bool = False) -> int | None:
        """The number of a storage by which both runs know it; None where no operation has made it."""
        alive, number = self.numbered.get(_storage(tensor), (None, 0))
        if alive is not None and not alive.expired():
            return number
        if not new:
            return None
        number = len(self.steps) + 1
        self.numbered[_storage(tensor)] = StorageWeakRef(tensor.untyped_storage()), number
        return number


class _Exits(TorchFunctionMode):
    """Notices calls that hand numbers which follow from the targets to something that torch doesn't see."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call, and note it if it is an exit."""
        name = getattr(call, "__name__", "")
        if name == "__get__" and hasattr(call, "__self__"):
            name = getattr(call.__self__, "__name__", "")
        if name in EXITS and args and isinstance(args[0], Tensor) and self.watch.follows(args[0]):
            self.watch.exit = self.watch.exit or f"the model reads its numbers by {name}()"
        return call(*args, **(kwargs or {}))


def find_unseen(model: torch.nn.Module, parameters: Sequence[str], inputs: Tensor) -> str | None:
    """How the effect of these parameters gets out of torch's sight; None where all of it stays in sight.

    Run the model once before, so that what it prepares in its first run is there.
    """
    with tied(model), as_found(model):
        own = list({id(each): each for each in map(model.get_parameter, parameters)}.values())
        held = [holder.tensor for holder in find_holders(model) if holder.kind]
        try:
            intact, logits = _run(model, inputs, own, [each.detach().contiguous().clone() for each in own], held)
        except Exception as error:
            return f"the model fails while its operations are watched ({type(error).__name__}: {error})"
        if intact.exit is not None:
            return intact.exit
        try:
            moved, others = _run(model, inputs, own, [make_other(each.detach().contiguous()) for each in own], held)
        except Exception:  # a model that checks its numbers: what the first run has shown has to do
            return None
    if moved.exit is not None:
        return moved.exit
    return _compare(intact, moved) or _compare_logits(intact, logits, moved, others)


def check_in_sight(model: torch.nn.Module, parameter: str, inputs: Tensor) -> None:
    """Refuse a parameter whose effect gets out of sight on its way, for the path `finite`.

    Raises:
        ModelError: it does; the message says how.
    """
    how = find_unseen(model, [parameter], inputs)
    if how is not None:
        raise ModelError(
            f"the path 'finite' can't follow what {parameter} changes: {how}. Use engine='rerun', which runs the "
            "model itself for every weight."
        )


def _run(
    model: torch.nn.Module, inputs: Tensor, own: Sequence[Tensor], numbers: Sequence[Tensor], held: Sequence[Tensor]
) -> tuple[_Watch, Any]:
    """Run the model with these numbers in the place of its own; returns what was seen, and the logits."""
    watch = _Watch(numbers, held)
    with ExitStack() as stack:
        for before, after in zip(own, numbers, strict=True):
            stack.enter_context(replaced(model, before, after))
        stack.enter_context(torch.random.fork_rng([]))
        torch.manual_seed(0)
        for mode in (in_own_precision(model), _Exits(watch), watch):
            stack.enter_context(mode)
        return watch, run(model, inputs)


def _compare(intact: _Watch, moved: _Watch) -> str | None:
    """What differs between two runs, although nothing that torch has seen makes it differ."""
    asked = intact.asked or moved.asked
    excused: set[int | None] = set()
    for own, other in zip(intact.steps, moved.steps, strict=False):
        if own.name != other.name or len(own.given) != len(other.given):
            return None if asked else f"the model goes on otherwise at {other.name}, by numbers that torch doesn't see"
        same_numbers = repr(own.numbers) == repr(other.numbers)
        if not same_numbers and not asked:
            return f"{own.name} is given numbers that come from it unseen"
        is_excused = not same_numbers
        for (number, before), (_, after) in zip(own.given, other.given, strict=True):
            if number in excused or (asked and own.name == "lift_fresh" and before != after):
                is_excused = True
            elif before != after:
                return f"{own.name} is given a tensor that comes from it unseen"
        if is_excused:
            excused.update(own.made)
    if len(intact.steps) != len(moved.steps) and not asked:
        return "the model makes more or fewer operations, by numbers that torch doesn't see"
    return None


def _compare_logits(intact: _Watch, logits: Any, moved: _Watch, others: Any) -> str | None:
    if not (isinstance(logits, Tensor) and isinstance(others, Tensor)):
        return None
    is_seen = intact.follows(logits) or moved.follows(others) or intact.asked
    return None if is_seen or _contents(logits) == _contents(others) else "the logits come from it unseen"


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _contents(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor's numbers from others."""
    flat = tensor.detach()
    flat = torch.view_as_real(flat.resolve_conj()) if flat.is_complex() else flat
    if flat.numel() > WHOLE:
        some = flat.reshape(-1)[:: flat.numel() // WHOLE + 1]
        flat = torch.cat([some.double(), flat.sum(dtype=torch.float64)[None]]) if flat.numel() <= SUMMED else some
    numbers = torch.cat([flat.reshape(-1)]).cpu().view(torch.uint8)
    return (tuple(tensor.shape), tensor.dtype, hashlib.blake2b(numbers.numpy().tobytes(), digest_size=16).digest())


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    schema = func._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
    places = [given.get(each.name) for each in schema if each.alias_info and each.alias_info.is_write]
    return [leaf for leaf in tree_leaves(places) if isinstance(leaf, Tensor) and _has_storage(leaf)]

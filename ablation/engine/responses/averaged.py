"""Convolutions whose channel is averaged before the last Linear: sampled weights, or all weights of a channel.

In: a batch. Out: the intact network, and the deltas of single weights (path `direct`) or their sums over the batch for
whole channels (path `response`). The loops (`loops/averaged.py`) run on the
host whatever the device, since all that they need of a batch is the layer's input and one number per position.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ablation.engine.deltas import Deltas, Runs
from ablation.engine.interface import Setup
from ablation.engine.loss import Intact, make_intact
from ablation.engine.responses.loops import averaged
from ablation.engine.responses.loops.activations import find_function
from ablation.engine.responses.loops.averaged import Layout, Weights
from ablation.engine.responses.loops.records import Batch, Follows, Sums
from ablation.engine.responses.way import AveragedConvolution
from ablation.engine.threads import run_ranges
from ablation.errors import ModelError
from ablation.precision import FromTargetOn, as_found, run_with
from ablation.sites import EveryWeight, Sites

PAIRS_AT_ONCE = 1 << 20  # (site, example) pairs held together: 8 MB a float64 matrix


@dataclass(frozen=True)
class ConvolutionBatch:
    """The values of the intact network on one batch that response functions need."""

    x: Float[Tensor, "examples inputs height width"]  # the convolution's input
    y: Float[Tensor, "examples channels positions"]  # before f: of the target's channels alone
    scale: Float[Tensor, " channels"]  # what BatchNorm multiplies them by
    first: int  # where they lie among the last Linear's inputs
    logits: Float[Tensor, "examples classes"]


class OpenConvolution:
    """An averaged convolution with its model."""

    def __init__(self, model: torch.nn.Module, convolution: AveragedConvolution, dtype: torch.dtype) -> None:
        self.model = model
        self.convolution = convolution
        self.weight = model.get_parameter(convolution.weight).detach().to(dtype)

    def run(self, inputs: Tensor) -> ConvolutionBatch:
        """The intact network on one batch."""
        watch = _Watch(self.weight, self.convolution)
        with as_found(self.model):
            logits = run_with(self.model, self.convolution.weight, self.weight, inputs, mode=watch)
        assert watch.x is not None
        assert watch.y is not None
        return ConvolutionBatch(watch.x, watch.y, watch.scale, watch.first, logits)


class _Watch(FromTargetOn):
    """Follows the target's channels from call to call; keeps the convolution's input and the input of the function."""

    def __init__(self, target: Tensor, convolution: AveragedConvolution) -> None:
        super().__init__(target)
        self.convolution = convolution
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        self.scale = target.new_ones(len(target))
        self.first = 0
        self._value: Tensor = target
        self._position = 0

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = getattr(call, "__name__", "")
        if not any(leaf is self._value for leaf in leaves) or name == "__get__":
            return super().__torch_function__(call, types, args, kwargs)
        is_pool = self._position == self.convolution.pool
        if self._position == 0:
            self.x = leaves[0].clone()
        elif name == "batch_norm":
            given = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {})).arguments
            self._scale(given)
        elif name == "cat":
            self.first = 0
            for leaf in leaves[: [leaf is self._value for leaf in leaves].index(True)]:
                self.first += leaf.shape[1]
        elif self.y is None and (is_pool or find_function(name, args, kwargs or {}) is not None):
            self.y = self._value[:, self._own].flatten(2).clone()
        result = super().__torch_function__(call, types, args, kwargs)
        if isinstance(result, Tensor):
            self._value = result
            self._position += 1
        return result

    @property
    def _own(self) -> slice:
        """The target's channels among those of the value that is followed."""
        return slice(self.first, self.first + len(self.scale))

    def _scale(self, given: dict[str, Any]) -> None:
        own = self._own
        scale = (given["running_var"][own].to(self.scale.dtype) + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"][own].to(self.scale.dtype)
        self.scale = self.scale * scale


@dataclass(frozen=True)
class Geometry:
    """The properties of a convolution that are the same in every batch."""

    convolution: AveragedConvolution
    shape: tuple[int, ...]  # of the weight
    follows: Follows
    device: torch.device

    def layout(self, units: Int64[np.ndarray, " channels"], height: int, width: int) -> Layout:
        """The layout of channels and positions, for a padded input of this height and width."""
        (down, right), (dy, dx), (kh, kw) = self.convolution.stride, self.convolution.dilation, self.shape[2:]
        rows = np.arange((height - dy * (kh - 1) - 1) // down + 1) * down
        columns = np.arange((width - dx * (kw - 1) - 1) // right + 1) * right
        shifts = (np.arange(kh) * dy)[:, None] * width + np.arange(kw) * dx
        return Layout(units, (rows[:, None] * width + columns).flatten(), shifts.flatten())


@dataclass(frozen=True)
class ChannelBatch:
    """One batch in the loops' layout, with its scale and positions."""

    geometry: Geometry
    record: Batch  # x is padded
    scale: Float64[np.ndarray, " channels"]  # what BatchNorm multiplies the channels by
    layout: Layout

    @cached_property
    def by_input(self) -> Batch:
        """The record with x (examples, inputs, positions): for single weights."""
        return self.record._replace(x=self.record.x.reshape(*self.record.x.shape[:2], -1))

    @cached_property
    def by_position(self) -> Batch:
        """The record with x (examples, positions, inputs): for whole channels."""
        x = torch.from_numpy(self.record.x).flatten(2).transpose(1, 2).contiguous()
        return self.record._replace(x=x.numpy())

    @cached_property
    def largest(self) -> Float64[np.ndarray, "examples positions"]:
        """The largest |x| over the input channels."""
        return torch.from_numpy(self.record.x).abs().amax(dim=1).flatten(1).double().numpy()

    def score(self, sites: Sites) -> tuple[Tensor, Tensor]:
        """The loss delta of every (site, example), in nats, and whether any logit moves."""
        n_inputs, n_kernel = self.geometry.shape[1], int(np.prod(self.geometry.shape[2:]))
        indices = sites.indices.cpu().numpy()
        order = np.argsort(indices // (n_inputs * n_kernel), kind="stable")
        where, sources = indices // (n_inputs * n_kernel), indices // n_kernel % n_inputs
        steps = sites.steps.cpu().numpy() * self.scale[where]
        shifts = self.layout.shifts[indices % n_kernel]
        weights = Weights(*(each[order] for each in (where, sources, shifts, steps)))
        delta = np.empty((len(indices), len(self.record.labels)))
        touched = np.empty(delta.shape, np.bool_)

        def run(first: int, last: int) -> None:
            part = slice(first, last)
            own = Weights(*(each[part] for each in weights))
            averaged.score_weights(own, self.layout, self.by_input, self.geometry.follows, delta[part], touched[part])

        run_ranges(run, len(indices))
        back = np.argsort(order)
        return torch.from_numpy(delta[back]), torch.from_numpy(touched[back])


@dataclass(frozen=True)
class ChannelResponses:
    """The response functions of whole channels on one batch, ready to be summed over its examples."""

    batch: ChannelBatch
    sites: EveryWeight

    @property
    def rows(self) -> slice:
        """The rows of the table: all of the shard's."""
        return slice(0, len(self.sites))

    @property
    def n_units(self) -> int:
        """Number of channels."""
        return len(self.sites) // int(np.prod(self.batch.geometry.shape[1:]))

    def add(self, sums: dict[str, np.ndarray], runs: Runs, bounds: np.ndarray) -> None:
        """Add the sums over the batch to `sums`, each (sites), and what the series left out to `bounds` (channels)."""
        n_inputs, *kernel = self.batch.geometry.shape[1:]
        shape = self.n_units, n_inputs, int(np.prod(kernel))
        first_channel = self.sites.first // (shape[1] * shape[2])
        batch = self.batch

        def taken(name: str, part: slice, dtype: type = np.float64) -> np.ndarray:
            if name in sums:
                return sums[name].reshape(shape)[part]
            return np.zeros((part.stop - part.start, *shape[1:]), dtype)

        def run(first: int, last: int) -> None:
            part, of_class = slice(first, last), slice(first, last if runs.per_class else first)
            own = self.sites[first * shape[1] * shape[2] : last * shape[1] * shape[2]]
            steps = own.steps.cpu().numpy().reshape(last - first, *shape[1:])
            steps = steps * batch.scale[first_channel + first : first_channel + last, None, None]
            averaged.add_channels(
                np.arange(first_channel + first, first_channel + last),
                np.ascontiguousarray(steps.transpose(0, 2, 1).astype(np.float32)),
                batch.layout, batch.largest, batch.by_position, batch.geometry.follows, runs,
                Sums(
                    delta=taken("delta", part), delta_squared=taken("delta_squared", part),
                    touched=taken("touched", part, np.int32), class_delta=taken("class_delta", of_class),
                    class_delta_squared=taken("class_delta_squared", of_class), within=taken("within", of_class),
                    bounds=bounds[part],
                ),
            )  # fmt: skip

        run_ranges(run, self.n_units)

    def of_examples(self, chosen: np.ndarray) -> "ChannelResponses":
        """The response functions of some of the examples."""
        return replace(self, batch=replace(self.batch, record=self.batch.record.of_examples(chosen)))

    def joined(self, others: Sequence["ChannelResponses"]) -> "ChannelResponses":
        """The response functions of these examples followed by those of `others`."""
        record = self.batch.record.joined([other.batch.record for other in others])
        return replace(self, batch=replace(self.batch, record=record))

    def deltas_of(self, rows: Int64[np.ndarray, " rows"], intact: Intact) -> Deltas:
        """The deltas of some rows of the table, example by example."""
        delta, touched = self.batch.score(self.sites.pick(rows))
        return Deltas(slice(0, len(rows)), delta, touched, intact.correct.expand(delta.shape))


class AveragedChannels:
    """The paths `direct` and `response` of one job with an averaged convolution."""

    def __init__(self, setup: Setup, convolution: AveragedConvolution) -> None:
        if setup.precision == "float64" or setup.top1:
            raise ModelError(
                "engine='direct' and 'response' take a convolution's weights in 'mixed' or 'float32', without top1; "
                "use engine='finite'."
            )
        self.open_convolution = OpenConvolution(setup.model, convolution, setup.base_dtype)
        self.sites = setup.sites
        last = None if convolution.last is None else setup.model.get_parameter(convolution.last).detach().float().cpu()
        self.geometry = Geometry(
            convolution,
            tuple(self.open_convolution.weight.shape),
            Follows(
                np.zeros((1, 1), np.float32) if last is None else last.T.contiguous().numpy(),
                last is None,
                convolution.function,
            ),
            self.open_convolution.weight.device,
        )

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Any]]:
        """One batch: the intact network, and the deltas or the sums of all sites."""
        batch = self.open_convolution.run(inputs)
        intact = make_intact(batch.logits, labels, torch.float32)
        record = self._of_batch(batch, intact)
        if isinstance(self.sites, EveryWeight):
            return intact, iter([ChannelResponses(record, self.sites)])
        return intact, self._deltas(record, intact)

    def _deltas(self, batch: ChannelBatch, intact: Intact) -> Iterator[Deltas]:
        at_once = max(1, PAIRS_AT_ONCE // len(intact.labels))
        for first in range(0, len(self.sites), at_once):
            rows = slice(first, min(first + at_once, len(self.sites)))
            delta, touched = (each.to(self.geometry.device) for each in batch.score(self.sites[rows]))
            yield Deltas(rows, delta, touched, intact.correct.expand(touched.shape))

    def _of_batch(self, batch: ConvolutionBatch, intact: Intact) -> ChannelBatch:
        down, right = self.geometry.convolution.padding
        x = F.pad(batch.x.cpu().float(), (right, right, down, down)).contiguous()
        record = Batch(
            x=x.numpy(),
            y=batch.y.cpu().double().transpose(0, 1).contiguous().numpy(),
            q=intact.rest.cpu().float().contiguous().numpy(),
            z=intact.logits.cpu().double().contiguous().numpy(),
            labels=intact.labels.cpu().numpy(),
        )
        layout = self.geometry.layout(np.arange(len(batch.scale)) + batch.first, x.shape[2], x.shape[3])
        return ChannelBatch(self.geometry, record, batch.scale.cpu().double().numpy(), layout)

"""Activations kept between jobs: the target's input for a batch, shared by all jobs with the same prefix.

In: an address made of everything that the numbers depend on (the model's weights, the batch itself, the parameter, the
precision, versions), and a record of tensors. Out: the record, or None. One file per batch, below a folder.

A file is written under another name, then renamed, so two workers may write the same record and neither waits. It
begins with the hash of the rest, by which a damaged file is recognised. Beyond the size limit the least recently used
files are removed. The cache is never needed: without it, or if its folder is emptied in mid-job, the numbers are
computed again.

Shards of one job that need the same examples also leave each other notes of where the record of a batch is, so that it
is found without reading the batch again (`Notes`). Notes are not used by other jobs, since a file may have changed.
"""

import hashlib
import io
import os
import pickle
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HASH_BYTES = 32


class Known(Tensor):
    """Placeholder for a batch of inputs that need not be read: number of examples, and address of their record."""

    address: str


def make_known(address: str, n_examples: int) -> Known:
    """Make the placeholder of a batch whose record is `held`."""
    known = torch.empty(n_examples, 0).as_subclass(Known)
    known.address = address
    return known


@dataclass(frozen=True)
class Activations:
    """One job's view of the cache; `about` hashes everything that its batches have in common."""

    folder: Path
    limit_bytes: int
    about: str
    n_examples: int  # of the whole job: unless all of them fit, none are kept
    held: dict[str, Any] = field(
        default_factory=dict
    )  # the record that is needed next, so that it can't be removed meanwhile

    def address(self, inputs: Tensor) -> str:
        """Address of the record of one batch."""
        if isinstance(inputs, Known):
            return inputs.address
        return hash_of([self.about, str(inputs.dtype), str(tuple(inputs.shape)), inputs])

    def get(self, address: str) -> Any:
        """The record, or None; marks it as used."""
        if address in self.held:
            return self.held[address]
        path = self._path(address)
        try:
            data = path.read_bytes()
            if hashlib.blake2b(data[_HASH_BYTES:], digest_size=_HASH_BYTES).digest() != data[:_HASH_BYTES]:
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
        except OSError:
            return None
        try:
            return torch.load(io.BytesIO(data[_HASH_BYTES:]), weights_only=True)
        except pickle.UnpicklingError:  # a module's output has a class of its own: it isn't kept
            return None

    def has(self, address: str) -> bool:
        """Whether there is a record."""
        return self._path(address).exists()

    def drop(self, address: str) -> None:
        """Remove the record, if there is one."""
        with suppress(OSError):
            self._path(address).unlink(missing_ok=True)

    def hold(self, address: str) -> bool:
        """Keep this record, and no other, in memory; False where there is none."""
        self.held.clear()
        record = self.get(address)
        if record is not None:
            self.held[address] = record
        return record is not None

    def put(self, address: str, record: Any, n_examples: int) -> None:
        """Store a record of tensors in plain lists, tuples and dicts, of a batch of `n_examples`.

        Does nothing where there is no room for it, and never raises.
        """
        buffer = io.BytesIO()
        torch.save(record, buffer)
        payload = buffer.getvalue()
        if len(payload) * max(1.0, self.n_examples / n_examples) > self.limit_bytes:
            return
        path = self._path(address)
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(payload))
            with unfinished.open("wb") as file:
                file.write(hashlib.blake2b(payload, digest_size=_HASH_BYTES).digest())
                file.write(payload)
            unfinished.replace(path)
        except OSError:  # a full disk or a read-only folder: the job goes on without the record
            with suppress(OSError):
                unfinished.unlink()

    def _path(self, address: str) -> Path:
        return self.folder / address[:2] / address

    def _make_room(self, n_bytes: int) -> None:
        """Remove the least recently used files until `n_bytes` more fit; other workers may be doing the same."""
        found = []
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + n_bytes <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


@dataclass(frozen=True)
class Notes:
    """Notes that the shards of one job share about an interval of examples: the address of each batch's record.

    Workers that begin at once fill the cache together without communicating: each begins at another place (`start`) and
    continues with what is missing.
    """

    activations: Activations
    about: str  # the job, and the split
    batches: tuple[tuple[int, int], ...]  # first position and one past the last, per batch

    def put(self, batch: int, address: str, labels: Tensor) -> None:
        """Note the address of a batch's record, and its labels."""
        self.activations.put(self._address(batch), (address, labels.cpu()), len(labels))

    def get(self, batch: int) -> tuple[str, Tensor] | None:
        """Address and labels of a batch that has been noted."""
        return self.activations.get(self._address(batch))

    def has(self, batch: int) -> bool:
        """Whether this batch has been noted."""
        return self.activations.has(self._address(batch))

    def missing(self) -> list[int]:
        """The batches that have not been noted yet."""
        return [batch for batch in range(len(self.batches)) if not self.has(batch)]

    def drop(self) -> None:
        """Remove the notes when the job is over."""
        for batch in range(len(self.batches)):
            self.activations.drop(self._address(batch))

    def _address(self, batch: int) -> str:
        return hash_of([self.activations.about, self.about, str(self.batches[batch])])


def find_start(shard: int, n_batches: int) -> int:
    """Position where the shard of this number begins to fill: 0, 1/2, 1/4, 3/4, 1/8 ... (van der Corput's sequence).

    However many shards run at once, their positions are spaced evenly.
    """
    place, step = 0.0, 0.5
    while shard:
        place += step * (shard % 2)
        shard, step = shard // 2, step / 2
    return int(place * n_batches)


def find_next(missing: list[int], batch: int) -> int:
    """The batch to fill next: this one if it is missing, else the middle of the longest missing stretch.

    The middle, because another worker may be filling the stretch from its beginning.
    """
    if batch in missing:
        return batch
    ends = [k for k in range(1, len(missing)) if missing[k] != missing[k - 1] + 1]
    runs = [missing[first:last] for first, last in zip([0, *ends], [*ends, len(missing)], strict=True)]
    longest = max(runs, key=len)
    return longest[len(longest) // 2]


def hash_of(parts: Iterable[str | Tensor]) -> str:
    """Hash of texts and of tensors' numbers."""
    whole = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in parts:
        if isinstance(part, Tensor):
            data = part.detach().cpu().contiguous().flatten()
            whole.update(data.view(torch.uint8).numpy().data)
        else:
            whole.update(part.encode() + b"\0")
    return whole.hexdigest()

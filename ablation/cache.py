"""Activations kept between jobs: what a batch is when it reaches the target, for every job on the same prefix.

In: an address made of everything that the numbers depend on (the model's weights, the batch itself, the parameter, the
precision, versions), and a record of tensors. Out: the record, or None. One file per batch, below a folder.

A file is written whole under another name, then renamed: two workers that want the same write the same bytes twice, and
neither waits. It begins with the hash of the rest, so a damaged one is no record. Beyond the size limit the files that
were used longest ago go first. Nothing here is ever needed: without it, or with its folder emptied in mid-job, the
numbers are computed again.
"""

import hashlib
import io
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HASH_BYTES = 32


@dataclass(frozen=True)
class Activations:
    """One job's view of the cache: `about` is the address of all that its batches have in common."""

    folder: Path
    limit_bytes: int
    about: str
    n_examples: int  # of the whole job: what can't be kept of all of them is not worth keeping of the first

    def address(self, inputs: Tensor) -> str:
        """Where the record of one batch belongs."""
        return hash_of([self.about, str(inputs.dtype), str(tuple(inputs.shape)), inputs])

    def get(self, address: str) -> Any:
        """The record; None where there is none. Marks it as used."""
        path = self._path(address)
        try:
            data = path.read_bytes()
            if hashlib.blake2b(data[_HASH_BYTES:], digest_size=_HASH_BYTES).digest() != data[:_HASH_BYTES]:
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
        except OSError:
            return None
        return torch.load(io.BytesIO(data[_HASH_BYTES:]), weights_only=True)

    def put(self, address: str, record: Any, n_examples: int) -> None:
        """Keep a record of tensors in plain lists, tuples and dicts, of a batch of so many examples.

        Without room for it, don't. Never an error.
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
        except OSError:  # a full disk, a folder that can't be written: the job goes on without
            with suppress(OSError):
                unfinished.unlink()

    def _path(self, address: str) -> Path:
        return self.folder / address[:2] / address

    def _make_room(self, n_bytes: int) -> None:
        """Remove what was used longest ago until `n_bytes` more fit; other workers may be doing the same."""
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


def hash_of(parts: Iterable[str | Tensor]) -> str:
    """One hash of texts and of tensors' numbers."""
    whole = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in parts:
        if isinstance(part, Tensor):
            data = part.detach().cpu().contiguous().flatten()
            whole.update(data.view(torch.uint8).numpy().data)
        else:
            whole.update(part.encode() + b"\0")
    return whole.hexdigest()

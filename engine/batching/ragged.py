"""Ragged, sequences of different lengths in flat buffers, and Arena, reusable memory that steps are built into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike

from engine import _C

OPTIONAL_FIELDS = ("advantage", "old_logprob", "ref_logprob", "value", "returns")  # a Sample's [L], a Packed's <name>_T
Rows = Sequence[ArrayLike]  # one list or array of numbers per sequence


@dataclass(frozen=True, eq=False)
class Ragged:
    """N concatenated sequences, one buffer per field. Sequence i predicts L tokens and has L + 1 ids, tokens[offsets[i] : offsets[i + 1]].

    Raises ValueError for a field of the wrong type or size, and for one that Packed does not have.
    """

    tokens: np.ndarray  # int32 [sum of L + 1]
    offsets: np.ndarray  # int64 [N + 1], into tokens
    mask: np.ndarray  # uint8 [sum of L]
    per_token: Mapping[str, np.ndarray] = field(default_factory=dict)  # name in OPTIONAL_FIELDS -> float32 [sum of L]
    per_sequence: Mapping[str, np.ndarray] = field(default_factory=dict)  # the same -> float32 [N], repeated for all tokens

    def __post_init__(self) -> None:
        _check("offsets", self.offsets, np.int64, None)
        count = len(self.offsets) - 1
        if count < 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise ValueError(f"offsets={self.offsets} must be [N + 1], from 0 to len(tokens)={len(self.tokens)}")
        _check("tokens", self.tokens, np.int32, None)
        _check("mask", self.mask, np.uint8, len(self.tokens) - count)
        for fields, size in ((self.per_token, len(self.mask)), (self.per_sequence, count)):
            for name, values in fields.items():
                if name not in OPTIONAL_FIELDS or (name in self.per_token and name in self.per_sequence):
                    raise ValueError(f"field {name!r} is unknown or given twice; use each of {', '.join(OPTIONAL_FIELDS)} at most once")
                _check(name, values, np.float32, size)

    @staticmethod
    def of(
        tokens: Rows, mask: Rows, per_token: Mapping[str, Rows] | None = None, per_sequence: Mapping[str, ArrayLike] | None = None
    ) -> Ragged:
        """Build from one list or array per sequence: `tokens` of L + 1 ids, `mask` and each field of `per_token` of L values.

        Raises ValueError, naming field and sequence, for a row of the wrong length or an id outside int32.
        """
        ids, offsets = _flatten("tokens", tokens, np.int32, _C.flatten_ints)
        bounds = offsets - np.arange(len(offsets))

        def flat(name: str, rows: Rows, dtype: DTypeLike, read: _Reader) -> np.ndarray:
            values, starts = _flatten(name, rows, dtype, read)
            if len(starts) != len(bounds):
                raise ValueError(f"{name} has {len(starts) - 1} rows for {len(bounds) - 1} sequences; give one for each")
            if (wrong := np.flatnonzero(np.diff(starts) != np.diff(bounds))).size:
                i = int(wrong[0])
                raise ValueError(f"sequence {i}: {name} has {np.diff(starts)[i]} entries for {np.diff(bounds)[i]} predicted tokens")
            return values

        return Ragged(
            tokens=ids,
            offsets=offsets,
            mask=flat("mask", mask, np.uint8, _C.flatten_flags),
            per_token={name: flat(name, rows, np.float32, _C.flatten_floats) for name, rows in (per_token or {}).items()},
            per_sequence={name: np.asarray(values, np.float32) for name, values in (per_sequence or {}).items()},
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """L of each sequence, int64 [N]; -1 for a sequence without ids, which `plan` rejects."""
        return np.diff(self.offsets) - 1

    @cached_property
    def starts(self) -> np.ndarray:
        """Offset of each sequence in a field with L values per sequence, int64 [N]."""
        return self.offsets[:-1] - np.arange(len(self.offsets) - 1)


class Arena:
    """Reusable memory for steps, one buffer per field, which grows to the largest step. Building a step overwrites the one before.

    pinned: page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, size: int) -> torch.Tensor:
        """An uninitialized tensor [size]."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = self._allocate(dtype, size + size // 8 + 1)
        return buffer[:size]

    def _allocate(self, dtype: torch.dtype, size: int) -> torch.Tensor:
        if self.pinned:
            return torch.empty(size, dtype=dtype, pin_memory=True)
        # numpy requests huge pages, torch does not.
        return torch.from_numpy(np.empty(size * dtype.itemsize, np.uint8)).view(dtype)


_Reader = Callable[[list[Any]], tuple[np.ndarray, np.ndarray]]


def _flatten(name: str, rows: Rows, dtype: DTypeLike, read: _Reader) -> tuple[np.ndarray, np.ndarray]:
    """(all rows concatenated, offset of each row, int64 [N + 1])."""
    if all(isinstance(row, list) for row in rows):
        try:
            return read(list(rows))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}; give a list of numbers for each sequence") from None
    arrays = [np.asarray(row) for row in rows]
    for i, array in enumerate(arrays):
        if array.ndim != 1 or (array.size and not np.can_cast(array.dtype, dtype, "same_kind")):
            raise ValueError(f"sequence {i}: {name} is {array.dtype} of shape {array.shape}; give one dimension of {np.dtype(dtype)}")
    offsets = np.concatenate(([0], np.cumsum([len(array) for array in arrays]))).astype(np.int64)
    return np.concatenate([*arrays, np.empty(0, dtype)], dtype=dtype, casting="same_kind"), offsets


def _check(name: str, values: np.ndarray, dtype: DTypeLike, size: int | None) -> None:
    fits = values.ndim == 1 and values.dtype == dtype and values.flags.c_contiguous and values.flags.aligned
    if not fits or size not in (None, len(values)):
        expected_size = "" if size is None else f" of {size} entries"
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}; pass contiguous {np.dtype(dtype)}{expected_size}")

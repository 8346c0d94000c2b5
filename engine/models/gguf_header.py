"""Checks the structure of a GGUF file before the gguf library reads it, which trusts every count and length in it.

The format: magic, version, counts of tensors and of metadata; the metadata (key, type, value); name, sizes, type and offset of every
tensor; then their data, each at a multiple of the alignment. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

MAX_TENSORS, MAX_KEYS, MAX_ELEMENTS = 100_000, 10_000, 1 << 22  # of a file; elements of all arrays together
_WIDTHS = {
    **dict.fromkeys((GGUFValueType.UINT8, GGUFValueType.INT8, GGUFValueType.BOOL), 1),
    **dict.fromkeys((GGUFValueType.UINT16, GGUFValueType.INT16), 2),
    **dict.fromkeys((GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32), 4),
    **dict.fromkeys((GGUFValueType.UINT64, GGUFValueType.INT64, GGUFValueType.FLOAT64), 8),
}


def check_gguf(path: Path) -> None:
    """Raise ValueError unless all counts, lengths and offsets of the file lie within it and within reason."""
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: too short for a GGUF file; fetch it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            _Header(content).check()
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{path}: truncated or not a GGUF file ({error}); fetch it again") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}; fetch it again") from None


class _Header:
    """A position in the header of a GGUF file."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at, self.elements, self.alignment = content, 0, 0, 32

    def check(self) -> None:
        magic, version = self.number("I", 4), self.number("I", 4)
        if magic != GGUF_MAGIC or version not in (2, 3):
            raise ValueError("not a GGUF file of version 2 or 3")
        tensors, keys = self.number("Q", 8), self.number("Q", 8)
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise ValueError(f"{tensors} tensors and {keys} keys are too many")
        for _ in range(keys):
            self._field()
        if self.alignment < 1 or self.alignment & (self.alignment - 1) or self.alignment > 1 << 16:
            raise ValueError(f"general.alignment={self.alignment} must be a power of two")
        parts = sorted(self._tensor() for _ in range(tensors))
        start = -(-self.at // self.alignment) * self.alignment
        for (_, end), (begin, _) in zip([(0, 0), *parts], [*parts, (len(self.content) - start, 0)], strict=True):
            if begin < end:
                raise ValueError("the data of a tensor overlaps another's or is beyond the end of the file")

    def number(self, code: str, width: int) -> int:
        """The unsigned integer here; moves on behind it."""
        (value,) = struct.unpack_from("<" + code, self.content, self.at)
        self.at += width
        return value

    def _text(self) -> str:
        length = self.number("Q", 8)
        self._skip(length)
        return self.content[self.at - length : self.at].decode()

    def _skip(self, length: int) -> None:
        if length > len(self.content) - self.at:
            raise ValueError(f"a length of {length} is beyond the end of the file")
        self.at += length

    def _field(self) -> None:
        key, kind = self._text(), GGUFValueType(self.number("I", 4))
        if key == "general.alignment":
            if kind != GGUFValueType.UINT32:
                raise ValueError(f"general.alignment is of type {kind.name}, not UINT32")
            self.alignment = self.number("I", 4)
        elif kind == GGUFValueType.ARRAY:
            kind, count = GGUFValueType(self.number("I", 4)), self.number("Q", 8)
            self.elements += count
            if self.elements > MAX_ELEMENTS or kind == GGUFValueType.ARRAY:
                raise ValueError(f"{key:.60} has {count} elements of type {kind.name}, which is not supported")
            self._values(kind, count)
        else:
            self._values(kind, 1)

    def _values(self, kind: GGUFValueType, count: int) -> None:
        if kind != GGUFValueType.STRING:
            return self._skip(_WIDTHS[kind] * count)
        for _ in range(count):
            self._text()

    def _tensor(self) -> tuple[int, int]:
        """Start and end of a tensor's data, in bytes from the start of all data."""
        name, dims = self._text(), self.number("I", 4)
        if not 1 <= dims <= 4:
            raise ValueError(f"{name:.60} has {dims} dimensions")
        sizes = [self.number("Q", 8) for _ in range(dims)]
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(self.number("I", 4))]
        offset, elements = self.number("Q", 8), math.prod(sizes)
        if elements < 1 or sizes[0] % block or offset % self.alignment:
            raise ValueError(f"{name:.60} has sizes {sizes} and offset {offset}, which do not fit its type or the alignment")
        return offset, offset + elements // block * width

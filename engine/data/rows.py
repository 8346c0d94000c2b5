"""Stream the rows of a data source: a .jsonl file, a folder written by datasets.save_to_disk, or a Hugging Face dataset."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from engine.files import one_line, parse_json

if TYPE_CHECKING:
    from datasets import Dataset


MAX_LINE = 64 << 20  # bytes of a row


@dataclass(frozen=True)
class Source:
    """Settings of a data source."""

    path: str  # a .jsonl file, a folder written by save_to_disk, or a Hugging Face datasets id
    weight: float = 1.0  # passes over the rows per epoch of a mixture; may be fractional
    split: str = "train"  # of a dataset; ignored for files
    limit: int = 0  # use only the first `limit` rows; 0: all
    name: str = ""  # configuration of a dataset that has several

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("source.path is empty; give a .jsonl file, a folder written by save_to_disk, or a Hugging Face datasets id")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"source.weight={self.weight} must be a positive number; use 1.0 for one pass per epoch")
        if self.limit < 0:
            raise ValueError(f"source.limit={self.limit} must be at least 0; use 0 for all rows")

    @property
    def is_file(self) -> bool:
        """Whether `path` is the name of a .jsonl file, which may not exist."""
        return self.path.endswith(".jsonl")


def read_rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream (where, row); `where` is "file.jsonl:12", lines from 1, or "id[12]", rows from 0. Blank lines are skipped.

    Raises ValueError if the source is missing or empty, and, with the line number, if a row is not a JSON object in strict UTF-8.
    NaN literals and duplicate keys are errors; a byte-order mark and CRLF are accepted.
    """
    rows = islice(_lines(source.path) if source.is_file else _records(source), source.limit or None)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"path={source.path!r} has no rows; give a source with at least one")
    yield first
    yield from rows


@contextmanager
def whole_file(path: Path, writes: bool) -> Iterator[TextIO | None]:
    """Context manager of a file for rows, which is created at `path` only if the context exits without an exception.

    Yields None if `writes` is False, for ranks that do not write.
    """
    if not writes:
        yield None
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def identity(source: Source) -> dict[str, Any]:
    """Values, for a cache key, that change when the rows of `source` change; JSON types. Raises ValueError if the source is missing."""
    if not source.is_file:
        fingerprint = _dataset(source)._fingerprint  # the cache key of the datasets library
        return {"path": source.path, "split": source.split, "limit": source.limit, "fingerprint": fingerprint}
    stat = _existing(source.path).stat()
    times = {"mtime": stat.st_mtime_ns, "ctime": stat.st_ctime_ns}  # the latter changes even if a tool restores the former
    return {"path": str(Path(source.path).resolve()), "limit": source.limit, "size": stat.st_size, **times}


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"path={path!r} does not exist or is not a file; give the path of a .jsonl file")
    return Path(path)


def read_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream (where, row) of .jsonl lines as bytes. `name` replaces the file name in `where` and in errors. Raises like read_rows."""
    for number, line in enumerate(lines, 1):
        where = f"{name}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_LINE:
            raise ValueError(f"{where}: the line is longer than {MAX_LINE >> 20} MiB; a row must be a line of its own")
        if line.strip():
            yield where, _parsed(line, where)


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, with at most a byte more of each than read_lines accepts, so that no line fills the memory."""
    return iter(lambda: file.readline(MAX_LINE + 1), b"")


def _lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with _existing(path).open("rb") as file:  # binary, because text mode would also split lines at a lone carriage return
        yield from read_lines(bounded_lines(file), path)


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line.rstrip(), constants=False)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    return row


def _records(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(_dataset(source)):
        yield f"{source.path}[{number}]", dict(row)


def _dataset(source: Source) -> Dataset:
    """The memory-mapped dataset, with rows of Python values."""
    import datasets  # slow to import, and not needed for .jsonl files

    try:
        if Path(source.path).exists():
            data = datasets.load_from_disk(source.path)
        else:
            data = datasets.load_dataset(source.path, source.name or None, split=source.split)
    except Exception as error:  # of any kind, for a folder that is damaged
        raise ValueError(
            f"path={source.path!r} cannot be loaded as a .jsonl file, a folder written by save_to_disk, or a datasets id with "
            f"split={source.split!r}: {one_line(error)}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            raise ValueError(f"split={source.split!r} is not in {source.path}; use one of {', '.join(map(str, data))}")
        data = data[source.split]
    assert isinstance(data, datasets.Dataset)
    return data.with_format(None)

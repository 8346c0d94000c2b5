"""A source tokenised once, into files that are memory-mapped ever after."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np

from engine.data.rows import Source, identity, read_rows
from engine.data.template import ChatTemplate
from engine.data.tokenizer import tokenizer_hash
from engine.types import Sample

TooLong = Literal["error", "truncate", "drop"]

_FORMAT = 1  # of the files below; part of the cache's key
_FILES = {"tokens": np.int32, "trained": np.uint8, "offsets": np.int64}


@dataclass(frozen=True)
class Counts:
    """What became of a source. rows = kept + dropped; the truncated ones are among the kept."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0  # predicted ones, the sum of L
    trained: int = 0  # those that the mask counts


class Corpus:
    """The samples of a prepared source, in its order. Lazy: a sample's tokens and mask are read-only views of memory-mapped files.

    `trained` on disk speaks of the token at its own place (0 for a sequence's first), so that one set of offsets serves both files.
    """

    def __init__(self, folder: Path) -> None:
        self.counts = Counts(**json.loads((folder / "counts.json").read_text()))
        sizes = {"tokens": self.counts.tokens + self.counts.kept, "offsets": self.counts.kept + 1}
        sizes["trained"] = sizes["tokens"]
        self._tokens, self._trained, self._offsets = (_mapped(folder / f"{name}.bin", _FILES[name], sizes[name]) for name in _FILES)

    def __len__(self) -> int:
        return self.counts.kept

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a corpus of {len(self)}")
        start, end = self._offsets[i], self._offsets[i + 1]
        return Sample(tokens=self._tokens[start:end], mask=self._trained[start + 1 : end])

    @property
    def lengths(self) -> np.ndarray:
        """L of every sample, int64 [len(self)]."""
        return np.diff(self._offsets) - 1


def prepare(source: Source, chat: ChatTemplate, *, max_length: int, too_long: TooLong = "error", cache: Path) -> Corpus:
    """Tokenise `source` into a folder below `cache`, or open the one that an equal call has left there.

    `max_length` bounds L, a row's predicted tokens; `too_long` says what becomes of a longer row. Truncation cuts on the right, and drops
    the row when nothing trained is left. Rows are streamed; the folder appears whole or not at all, so processes may prepare side by side.
    Raises ValueError for a bad row, naming its line, and for a source of which no row is left.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1")
    if too_long not in get_args(TooLong):
        raise ValueError(f"too_long={too_long!r} must be one of {', '.join(get_args(TooLong))}")
    key = [_FORMAT, identity(source), tokenizer_hash(chat.tokenizer), chat.text, max_length, too_long]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = Path(cache) / f"{Path(source.path).stem}-{digest[:32]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".preparing-", dir=folder.parent) as scratch:
            work = Path(scratch) / "corpus"
            work.mkdir()
            _write(work, _fitting(source, chat, max_length, too_long), source.path)
            _publish(work, folder)
    return Corpus(folder)


def _fitting(source: Source, chat: ChatTemplate, max_length: int, too_long: TooLong) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """(tokens, mask, "kept" | "truncated" | "dropped") of every row."""
    for where, row in read_rows(source):
        try:
            tokens, mask = chat.encode_row(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if len(mask) <= max_length:
            yield tokens, mask, "kept"
        elif too_long == "error":
            raise ValueError(
                f"{where} has {len(mask)} tokens, over max_length={max_length} (policy too_long=error); "
                "set too_long=truncate or drop, or raise max_length"
            )
        else:
            tokens, mask = tokens[: max_length + 1], mask[:max_length]
            yield tokens, mask, "truncated" if too_long == "truncate" and mask.any() else "dropped"


def _write(work: Path, rows: Iterator[tuple[np.ndarray, np.ndarray, str]], path: str) -> None:
    count, end = Counter[str](), 0
    with ExitStack() as stack:
        tokens_file, trained_file, offsets_file = (stack.enter_context((work / f"{name}.bin").open("wb")) for name in _FILES)
        offsets_file.write(np.int64(0).tobytes())
        for tokens, mask, fate in rows:
            count.update(rows=1, truncated=fate == "truncated", dropped=fate == "dropped")
            if fate == "dropped":
                continue
            end += len(tokens)
            tokens_file.write(tokens.tobytes())
            trained_file.write(b"\0" + mask.tobytes())
            offsets_file.write(np.int64(end).tobytes())
            count.update(kept=1, tokens=len(mask), trained=int(mask.sum()))
    if not count["kept"]:
        raise ValueError(f"{path}: all {count['rows']} rows are too long and were dropped; raise max_length")
    (work / "counts.json").write_text(json.dumps(asdict(Counts(**count))))


def _publish(work: Path, folder: Path) -> None:
    for path in work.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on empty files
    try:
        work.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process has just finished the same work
            raise


def _mapped(path: Path, dtype: type, size: int) -> np.ndarray:
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes for {size} values; delete {path.parent} to prepare it again")
    return np.memmap(path, dtype, mode="r", shape=(size,)).view(np.ndarray)

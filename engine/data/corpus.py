"""Tokenize a source once and cache the result in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np

from engine.config.choices import BadRows, TooLong
from engine.data.rows import Source, identity, read_rows
from engine.data.template import ChatTemplate
from engine.data.tokenizer import tokenizer_hash
from engine.files import block_digests, damage, read_object, refusing
from engine.types import Sample

Sequences = list[tuple[np.ndarray, np.ndarray]]  # of one row, each (tokens int32 [L + 1], mask uint8 [L])

COMPLAINTS = 10  # number of error messages about bad rows that are stored
_FORMAT = 4  # version of the files below; part of the cache key
DIGESTS = "digests.json"  # of the blocks of every other file
_FILES = {"tokens": np.int32, "trained": np.uint8, "offsets": np.int64}


@dataclass(frozen=True)
class Counts:
    """Counts of a source's rows and tokens. rows = kept + dropped + bad; kept includes the truncated ones."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0  # predicted tokens, the sum of L
    trained: int = 0  # tokens where the mask is 1
    bad: int = 0
    complaints: tuple[str, ...] = ()  # error messages of the first bad rows

    def note(self, path: str) -> str:
        """One line for the log."""
        bad = f", {self.bad} bad ({'; '.join(self.complaints)}{' ...' if self.bad > len(self.complaints) else ''})" if self.bad else ""
        outcomes = f"{self.rows} rows, {self.truncated} truncated, {self.dropped} dropped{bad}"
        return f"{path}: {outcomes}; {self.tokens:,} tokens, {self.trained:,} of them trained"


@dataclass(frozen=True)
class Reader:
    """Converts a row to sequences: `encode(chat, row)` returns exactly `sequences` of them, or raises ValueError for a bad row."""

    name: str  # part of the cache key
    sequences: int
    encode: Callable[[ChatTemplate, Mapping[str, Any]], Sequences]


ONE = Reader("one", 1, lambda chat, row: [chat.encode_row(row)])


class Corpus:
    """The samples of a prepared source, in the order of its rows. Tokens and masks are read-only views of memory-mapped files.

    `digest` identifies the samples: equal digests mean equal tokens and masks, wherever the source is and whenever it was written.
    `key` identifies the source, tokenizer and settings, as JSON values: equal keys mean equal samples. The file `trained` has a value per
    token (0 for the first of a sequence), so that the offsets of `tokens` apply to it, too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with refusing(folder, "it is damaged: delete it to prepare it again"):
            counts = read_object(folder / "counts.json")
            self.counts = Counts(**{**counts, "complaints": tuple(counts["complaints"])})
            self.key: dict[str, Any] = read_object(folder / "key.json")
            self._samples = self.counts.kept * self.key["sequences"]
            self._digests: dict[str, list[str]] = read_object(folder / DIGESTS)
            samples = [self._digests[f"{name}.bin"] for name in _FILES]
        self.digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
        sizes = {"tokens": self.counts.tokens + self._samples, "offsets": self._samples + 1}
        sizes["trained"] = sizes["tokens"]
        self._tokens, self._trained, self._offsets = (mapped(folder / f"{name}.bin", _FILES[name], sizes[name]) for name in _FILES)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a corpus of {len(self)}")
        start, end = self._offsets[i], self._offsets[i + 1]
        return Sample(tokens=self._tokens[start:end], mask=self._trained[start + 1 : end])

    def damage(self, rank: int = 0, ranks: int = 1) -> str | None:
        """Why the files differ from what was written; None if they do not. Each of `ranks` ranks reads a share of them."""
        for name, digests in self._digests.items():
            if problem := damage(self.folder / name, digests, rank, ranks):
                return f"{problem}; delete {self.folder} to prepare it again"
        return None

    def predicted(self, i: int) -> slice:
        """The slice of sample i in an array over all predicted tokens of the corpus, [sum of L]."""
        return slice(int(self._offsets[i]) - i, int(self._offsets[i + 1]) - i - 1)

    @property
    def lengths(self) -> np.ndarray:
        """L of every sample, int64 [len(self)]."""
        return np.diff(self._offsets) - 1


def prepare(
    source: Source,
    chat: ChatTemplate,
    *,
    max_length: int,
    too_long: TooLong = "error",
    bad_rows: BadRows = "error",
    cache: Path,
    reader: Reader = ONE,
) -> Corpus:
    """Tokenize `source` into a folder in `cache`, or open the folder if an equal call has already created it.

    `max_length` limits L, the predicted tokens of a sequence. `too_long` selects what to do with a row that has a longer one: "error",
    "drop" or "truncate". Truncation cuts on the right; it drops the row if a sequence has no trained tokens left, or if its sequences
    become equal. Rows are streamed. The folder is created atomically, so processes may prepare the same source concurrently.
    Raises ValueError, which names the line, for a bad row, unless bad_rows="drop", and if no rows remain.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1 token")
    for name, value, options in (("too_long", too_long, get_args(TooLong)), ("bad_rows", bad_rows, get_args(BadRows))):
        if value not in options:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(options)}")
    key = {
        "format": _FORMAT,
        "reader": reader.name,
        "sequences": reader.sequences,
        "data": identity(source),
        "tokenizer": tokenizer_hash(chat.tokenizer),
        "template": chat.text,
        "max_length": max_length,
        "too_long": too_long,
        "bad_rows": bad_rows,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = Path(cache) / f"{Path(source.path).stem}-{digest[:32]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".preparing-", dir=folder.parent) as scratch:
            work = Path(scratch) / "corpus"
            work.mkdir()
            (work / "key.json").write_text(json.dumps(key))
            _write(work, _fitting(source, chat, reader, max_length, too_long, bad_rows), source.path)
            if source.is_file and identity(source) != key["data"]:
                raise ValueError(f"{source.path} was changed while it was read; start again when it is complete")
            _publish(work, folder)
    return Corpus(folder)


def _fitting(
    source: Source, chat: ChatTemplate, reader: Reader, max_length: int, too_long: TooLong, bad_rows: BadRows
) -> Iterator[tuple[Sequences, str, str]]:
    """(sequences, "kept" | "truncated" | "dropped" | "bad", error message of a bad row) of every row."""
    for where, row in read_rows(source):
        try:
            sequences = reader.encode(chat, row)
        except ValueError as error:
            if bad_rows == "error":
                raise ValueError(f"{where}: {error}") from error
            yield [], "bad", f"{where}: {error}"
            continue
        mask = max((mask for _, mask in sequences), key=len)
        if len(mask) <= max_length:
            yield sequences, "kept", ""
        elif too_long == "error":
            prompt = int(mask.argmax()) + 1
            long_prompt = f", {prompt} of them in the prompt" if prompt > max_length else ""
            raise ValueError(
                f"{where} has {len(mask)} tokens{long_prompt}, more than max_length={max_length}, with too_long=error; "
                "set too_long=truncate or drop, or raise max_length"
            )
        else:
            cut = [(tokens[: max_length + 1], mask[:max_length]) for tokens, mask in sequences]
            distinct = {tokens.tobytes() for tokens, _ in cut}
            usable = all(mask.any() for _, mask in cut) and len(distinct) == len(cut)
            yield cut, "truncated" if too_long == "truncate" and usable else "dropped", ""


def _write(work: Path, rows: Iterator[tuple[Sequences, str, str]], path: str) -> None:
    count, end, complaints = Counter[str](), 0, list[str]()
    with ExitStack() as stack:
        tokens_file, trained_file, offsets_file = (stack.enter_context((work / f"{name}.bin").open("wb")) for name in _FILES)
        offsets_file.write(np.int64(0).tobytes())
        for sequences, outcome, complaint in rows:
            count.update(rows=1, **{name: int(outcome == name) for name in ("truncated", "dropped", "bad")})
            if complaint and len(complaints) < COMPLAINTS:
                complaints.append(complaint)
            if outcome in ("dropped", "bad"):
                continue
            count.update(kept=1)
            for tokens, mask in sequences:
                end += len(tokens)
                tokens_file.write(tokens.tobytes())
                trained_file.write(b"\0" + mask.tobytes())
                offsets_file.write(np.int64(end).tobytes())
                count.update(tokens=len(mask), trained=int(mask.sum()))
    if not count["kept"]:
        if complaints:
            raise ValueError(f"{path}: all {count['rows']} rows are bad; the first: {complaints[0]}")
        raise ValueError(f"{path}: all {count['rows']} rows are too long and were dropped; raise max_length")
    (work / "counts.json").write_text(json.dumps(asdict(Counts(**count, complaints=tuple(complaints)))))


def _publish(work: Path, folder: Path) -> None:
    (work / DIGESTS).write_text(json.dumps({path.name: block_digests(path) for path in sorted(work.iterdir())}))
    for path in work.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure could leave empty files under the new name
    try:
        work.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process has created it in the meantime
            raise


def mapped(path: Path, dtype: type, size: int) -> np.ndarray:
    """The `size` values of a file, read-only and memory-mapped. Raises ValueError if the file has another size."""
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes for {size} values; delete {path.parent} to prepare it again")
    return np.memmap(path, dtype, mode="r", shape=(size,)).view(np.ndarray)

"""Reads files that others wrote: plain names, regular files, bounded sizes, strict JSON. Whatever is wrong is a ValueError of one line.

A model folder, a run folder or a cache may come from anywhere. Nothing in this module runs code that a file names, and nothing opens a
device, a pipe or a link that leaves the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Any

MAX_JSON = 512 << 20  # bytes of a JSON file that is read whole
BLOCK = 4 << 20  # bytes that have a digest of their own


def is_plain_name(name: Any) -> bool:
    """Whether `name` is the name of a file, without a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and name.isprintable() and len(name) < 256


def plain_file(folder: Path, name: Any) -> Path:
    """The regular file `name` directly in `folder`. Raises ValueError for a path, a missing file, a device, and a link out of it.

    A link may point into its own folder or, in the cache of the Hugging Face hub, to the repository's blobs.
    """
    if not is_plain_name(name):
        raise ValueError(f"{name!r:.80} is not the plain name of a file in {folder}; use one")
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve()
        regular = S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is missing or cannot be read ({one_line(error)}); fetch the folder again") from None
    if not regular:
        raise ValueError(f"{path} is not a regular file; replace it by one")
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" and len(home.parents) > 1 else home
    if real.parent not in (home, blobs) and path.is_symlink():
        raise ValueError(f"{path} is a link to {real}, which is outside its folder; put the file itself there")
    return path


def read_object(path: Path, kind: str = "a JSON object") -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, which names the file, if it is no `kind`."""
    file = plain_file(path.parent, path.name)
    if (size := file.stat().st_size) > MAX_JSON:
        raise ValueError(f"{path}: {size} bytes are too many for {kind}; fetch the file again")
    try:
        value = parse_json(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not {kind}: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not {kind}, but a JSON {type(value).__name__}")
    return value


def parse_json(content: bytes, *, constants: bool = True) -> Any:
    """The value of JSON text in UTF-8.

    Raises ValueError for anything else, for duplicate keys, for deep nesting and, without `constants`, for NaN and Infinity.
    """
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=float if constants else _no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} ({error.reason}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not valid JSON: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"duplicate key {next(key for key, _ in pairs if key in seen or seen.add(key))!r:.80}")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


@contextmanager
def refusing(what: object, way_out: str) -> Iterator[None]:
    """Context in which a library reads what others wrote: whatever it raises becomes a ValueError of one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library written in Rust is no Exception
        raise ValueError(f"{what}: {one_line(error)}; {way_out}") from None


def one_line(error: BaseException) -> str:
    """The kind and the message of an error, on one line of at most 300 characters."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:300] if message else type(error).__name__


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def block_digests(path: Path) -> list[str]:
    """The SHA-256 of every 4 MiB of a file, in order."""
    with path.open("rb") as file:
        return [hashlib.sha256(block).hexdigest() for block in iter(lambda: file.read(BLOCK), b"")]


def damage(path: Path, digests: list[str], rank: int = 0, ranks: int = 1) -> str | None:
    """Why a file differs from the `digests` of its blocks; None if it does not. Each of `ranks` ranks reads a share of the blocks."""
    with path.open("rb") as file:
        if -(-os.fstat(file.fileno()).st_size // BLOCK) != len(digests):
            return f"{path} is damaged (its size differs)"
        for i in range(rank, len(digests), ranks):
            file.seek(i * BLOCK)
            if hashlib.sha256(file.read(BLOCK)).hexdigest() != digests[i]:
                return f"{path} is damaged (sha256 of block {i} differs)"
    return None


def follow_umask(path: Path) -> None:
    """Give a file the permissions of an ordinary new file: safetensors lets only the owner read what it writes."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)

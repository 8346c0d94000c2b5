"""What a model says of the tokens of many samples: computed a block at a time, and kept on disk for a run that needs it again and again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor

from engine.batching.build import batch, scatter
from engine.data.corpus import Corpus, mapped
from engine.files import read_object
from engine.megatron.policy import Policy
from engine.types import Sample, Step

MICROBATCHES_PER_BLOCK = 16  # microbatches of each replica and pipeline stage that are planned together; what an interruption can cost


def score_samples(
    policy: Policy, verb: Callable[[Step], list[Tensor]], samples: Iterable[Sample], budget: int
) -> Iterator[tuple[list[Sample], list[np.ndarray]]]:
    """`samples` in order, in blocks, with what a verb of the policy (logprobs, values) says of every predicted token of each, float32 [L].

    Only rank 0 is told the values. All ranks must iterate, over the same samples. `budget` is the tokens of a microbatch; no sample may
    be longer.
    """
    for block in _blocks(samples, MICROBATCHES_PER_BLOCK * policy.parallel.pp * policy.grid.dp * budget):
        step = batch(block, budget, **policy.batch_options)
        mine = enumerate(scatter(verb(step), step, len(block)) if step else [])
        found = {i: values.numpy() for i, values in mine if values is not None and policy.is_replica_writer}
        parts: list[dict[int, np.ndarray]] = [{}] * policy.world.size
        dist.gather_object(found, parts if policy.world.rank == 0 else None)
        whole = {i: values for part in parts for i, values in part.items()}
        yield block, [whole[i] for i in range(len(block))] if policy.world.rank == 0 else []


def _blocks(samples: Iterable[Sample], tokens: int) -> Iterator[list[Sample]]:
    """Each as many samples as reach `tokens`, so that all but the last fill their microbatches."""
    block: list[Sample] = []
    size = 0
    for sample in samples:
        block.append(sample)
        size += sample.length
        if size >= tokens:
            yield block
            block, size = [], 0
    if block:
        yield block


def cached_logprobs(
    folder: Path, policy: Policy, corpora: Sequence[Corpus], budget: int, report: Callable[[str], None] = lambda _: None
) -> list[np.ndarray]:
    """The log-probs under `policy`, as it started, of every predicted token of each corpus: float32 [sum of L], memory-mapped.

    Computed once, into `folder`; later calls open them there, and go on where an earlier one was interrupted, on any layout. A block's
    values reach the disk before the note that they are there, so a kill at any instant costs a block at most. All ranks must call it.
    Raises ValueError, naming what differs, when `folder` was written with other weights, data, template or length, and when a bit of it
    has changed.
    """
    weights = policy.origin_hash()
    key = _key(weights, corpora)
    blocks = policy.world.rank0_first(lambda: _opened(folder, key, corpora))
    if problem := policy.world.first_error(_damage(folder, blocks, policy.world.rank, policy.world.size)):
        raise ValueError(problem)
    done = blocks[-1].done if blocks else 0
    ends = [0, *accumulate(int(corpus.lengths.sum()) for corpus in corpora)]
    count = sum(map(len, corpora))
    if done < count:
        kept = _Kept(folder, blocks) if policy.world.rank == 0 else None
        for block, values in score_samples(policy, policy.logprobs, _samples(corpora, done), budget):
            done += len(block)
            if kept:
                kept.append(values, done)
            report(f"reference log-probs of {done} of {count} sequences")
        if kept:
            kept.close()
    values = policy.world.rank0_first(lambda: mapped(folder / "logprobs.bin", np.float32, ends[-1]))
    return [values[start:end] for start, end in pairwise(ends)]


def _samples(corpora: Sequence[Corpus], start: int) -> Iterator[Sample]:
    """All samples in order, from number `start` on."""
    for corpus in corpora:
        yield from (corpus[i] for i in range(min(start, len(corpus)), len(corpus)))
        start = max(0, start - len(corpus))


class _Block(NamedTuple):
    """A line of the file `blocks`: the first `done` samples end at byte `end` of logprobs.bin; `sha256` is that of the bytes since the line
    before."""

    done: int
    end: int
    sha256: str

    @property
    def line(self) -> bytes:
        return f"{self.done} {self.end} {self.sha256}\n".encode()

    @staticmethod
    def read(path: Path) -> list[_Block]:
        """The blocks of a file. Without the last line if a kill cut it. Raises ValueError for a line that is damaged."""
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        found = [re.fullmatch(rb"(\d{1,18}) (\d{1,18}) ([0-9a-f]{64})", line) for line in lines]
        blocks = [_Block(int(match[1]), int(match[2]), match[3].decode()) for match in found if match]
        if len(blocks) < len(lines) or any(a.done >= b.done or a.end > b.end for a, b in pairwise(blocks)):
            raise ValueError(f"{path} is damaged; delete {path.parent}, and it will be computed again")
        return blocks


class _Kept:
    """A folder of log-probs while it is written."""

    def __init__(self, folder: Path, blocks: list[_Block]) -> None:
        self.end = blocks[-1].end if blocks else 0
        self.values, self.log = (folder / "logprobs.bin").open("r+b"), (folder / "blocks").open("a+b")
        self.values.truncate(self.values.seek(self.end))  # what a kill left behind the last whole block
        self.log.truncate(sum(len(block.line) for block in blocks))

    def append(self, values: list[np.ndarray], done: int) -> None:
        """Write the values, then the line that says so: each is on the disk before the next is written."""
        content = b"".join(value.astype(np.float32).tobytes() for value in values)
        self.end += len(content)
        block = _Block(done, self.end, hashlib.sha256(content).hexdigest())
        for file, data in ((self.values, content), (self.log, block.line)):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self.values.close()
        self.log.close()


def _damage(folder: Path, blocks: list[_Block], rank: int, ranks: int) -> str | None:
    """Why the log-probs differ from what was written; None if they do not. Each of `ranks` ranks reads a share of the blocks."""
    starts = [0, *(block.end for block in blocks)]
    with (folder / "logprobs.bin").open("rb") as file:
        for i in range(rank, len(blocks), ranks):
            file.seek(starts[i])
            if hashlib.sha256(file.read(blocks[i].end - starts[i])).hexdigest() != blocks[i].sha256:
                return f"{folder / 'logprobs.bin'} is damaged (sha256 of block {i} differs); delete {folder}, and it will be computed again"
    return None


def _key(weights: str, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """What the log-probs are a function of, by the names that a user knows."""
    how = {"template": ("template", "tokenizer"), "length": ("max_length", "too_long", "bad_rows")}
    said = {name: sorted({json.dumps([corpus.key[part] for part in parts]) for corpus in corpora}) for name, parts in how.items()}
    return {"weights": weights, "data": [corpus.digest for corpus in corpora]} | {name: _digest(value) for name, value in said.items()}


def _opened(folder: Path, key: dict[str, Any], corpora: Sequence[Corpus]) -> list[_Block]:
    """Make the folder or check that it is of `key`; the blocks that it holds."""
    if not (folder / "key.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "logprobs.bin").touch()
        _write(folder / "key.json", json.dumps(key, indent=1))  # last: with it the folder is whole
    there = read_object(folder / "key.json", "the key of a folder of log-probs")
    if differing := [name for name, value in key.items() if there.get(name) != value]:
        paths = f" ({', '.join(_changed(there.get('data'), corpora))})" if "data" in differing else ""
        raise ValueError(
            f"{folder} holds log-probs of other {' and '.join(differing)} than this run's{paths}; delete it to compute them again, "
            "or choose another out="
        )
    blocks = _Block.read(folder / "blocks")
    lengths = np.concatenate([[0], *(corpus.lengths for corpus in corpora)]).cumsum()
    if any(block.done >= len(lengths) or block.end != 4 * lengths[block.done] for block in blocks):
        raise ValueError(f"{folder / 'blocks'} is damaged; delete {folder}, and it will be computed again")
    return blocks


def _changed(there: Any, corpora: Sequence[Corpus]) -> list[str]:
    """The paths of the corpora that are not the ones whose digests are `there`."""
    digests = there if isinstance(there, list) else []
    return [corpus.key["data"]["path"] for i, corpus in enumerate(corpora) if digests[i : i + 1] != [corpus.digest]]


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk when this returns."""
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

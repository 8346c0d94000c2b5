"""What a model says of the tokens of many samples: computed a block at a time, and kept on disk for a run that needs it again and again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from engine.batching.build import batch, scatter
from engine.data.corpus import Corpus, mapped
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
    Raises ValueError, naming what differs, when `folder` was written with other weights, data, template or length.
    """
    weights = policy.origin_hash()
    key = _key(weights, corpora)
    done = policy.world.rank0_first(lambda: _opened(folder, key))
    ends = [0, *accumulate(int(corpus.lengths.sum()) for corpus in corpora)]
    count = sum(map(len, corpora))
    if done < count:
        kept = _Kept(folder, done, corpora) if policy.world.rank == 0 else None
        for block, values in score_samples(policy, policy.logprobs, _samples(corpora, done), budget):
            done += len(block)
            if kept:
                kept.append(values, done)
            report(f"reference log-probs of {done} of {count} sequences")
    values = policy.world.rank0_first(lambda: mapped(folder / "logprobs.bin", np.float32, ends[-1]))
    return [values[start:end] for start, end in pairwise(ends)]


def _samples(corpora: Sequence[Corpus], start: int) -> Iterator[Sample]:
    """All samples in order, from number `start` on."""
    for corpus in corpora:
        yield from (corpus[i] for i in range(min(start, len(corpus)), len(corpus)))
        start = max(0, start - len(corpus))


class _Kept:
    """A folder of log-probs while it is written."""

    def __init__(self, folder: Path, done: int, corpora: Sequence[Corpus]) -> None:
        self.folder = folder
        lengths = np.concatenate([corpus.lengths for corpus in corpora])
        self.file = (folder / "logprobs.bin").open("r+b")
        size = self.file.seek(0, os.SEEK_END)
        if size < 4 * lengths[:done].sum():
            raise ValueError(f"{folder} is damaged: {size} bytes do not hold the log-probs of {done} sequences; delete it")
        self.file.seek(4 * int(lengths[:done].sum()))
        self.file.truncate()  # what a kill left behind the last whole block

    def append(self, values: list[np.ndarray], done: int) -> None:
        for value in values:
            self.file.write(value.astype(np.float32).tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        _write(self.folder / "done", str(done))


def _key(weights: str, corpora: Sequence[Corpus]) -> dict[str, str]:
    """What the log-probs are a function of, by the names that a user knows."""
    how = {"template": ("template", "tokenizer"), "length": ("max_length", "too_long", "bad_rows")}
    data = [[corpus.key["data"], corpus.key["reader"]] for corpus in corpora]
    said = {name: sorted({json.dumps([corpus.key[part] for part in parts]) for corpus in corpora}) for name, parts in how.items()}
    return {"weights": weights} | {name: _digest(value) for name, value in {"data": data, **said}.items()}


def _opened(folder: Path, key: dict[str, str]) -> int:
    """Make the folder or check that it is of `key`; how many samples it holds."""
    if not (folder / "key.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "logprobs.bin").touch()
        _write(folder / "key.json", json.dumps(key, indent=1))  # last: with it the folder is whole
    try:
        there = json.loads((folder / "key.json").read_text())
        done = int((folder / "done").read_text()) if (folder / "done").exists() else 0
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read ({error}); delete it, and it will be computed again") from None
    if differing := [name for name, value in key.items() if there.get(name) != value]:
        raise ValueError(
            f"{folder} holds log-probs of other {' and '.join(differing)} than this run's; delete it to compute them again, "
            "or choose another out="
        )
    return done


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

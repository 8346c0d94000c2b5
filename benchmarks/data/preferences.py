"""python -m benchmarks preferences: Write preference pairs for gsm8k_dpo and gsm8k_reward from GSM8K's graded model solutions.

    python -m benchmarks preferences FILE.jsonl cache/gsm8k_pairs     writes train.jsonl and held_out.jsonl

FILE.jsonl is example_model_solutions.jsonl of openai/grade-school-math. A pair is a right and a wrong solution of one problem.
"""

from __future__ import annotations

import argparse
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.data.rows import Source, read_rows
from engine.data.wordproblems import write

TRAINED = 512
HELD_OUT_SHARE = 5  # one in 5 problems is held out


def pairs(rows: Iterable[dict[str, Any]], seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows {"prompt", "chosen", "rejected"}: right and wrong solutions of each problem, paired at random, each used at most once."""
    rng = random.Random(seed)
    for row in rows:
        graded = [value for value in row.values() if isinstance(value, dict)]
        rng.shuffle(graded)
        right, wrong = ([_plain(s["solution"]) for s in graded if s["is_correct"] == verdict] for verdict in (True, False))
        for chosen, rejected in zip(right, wrong, strict=False):
            yield {"prompt": row["question"], "chosen": chosen, "rejected": rejected}


def is_held_out(row: dict[str, str]) -> bool:
    """Decided by the problem, so that no problem is in both files."""
    return zlib.crc32(row["prompt"].encode()) % HELD_OUT_SHARE == 0


def _plain(solution: str) -> str:
    """Removes the calculator annotations, <<1+2=3>>."""
    return re.sub(r"<<.*?>>", "", solution).strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("solutions", help="example_model_solutions.jsonl of openai/grade-school-math")
    parser.add_argument("out", type=Path, help="output folder, for train.jsonl and held_out.jsonl")


def main(arguments: argparse.Namespace) -> None:
    """Write the two files and print how many pairs each has."""
    rows = list(pairs(row for _, row in read_rows(Source(arguments.solutions))))
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = {"train": [row for row in rows if not is_held_out(row)][:TRAINED], "held_out": [row for row in rows if is_held_out(row)]}
    for name, part in files.items():
        write(arguments.out / f"{name}.jsonl", part)
        print(f"{arguments.out / name}.jsonl: {len(part)} pairs")

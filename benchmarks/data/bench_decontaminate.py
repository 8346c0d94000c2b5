"""Decontamination, measured: generated prompts with known repeats against generated evaluations, time and peak memory of the command.

Prompts have log-normal lengths (mean about 120 words) over a vocabulary with Zipf's frequencies; a share of evaluation prompts begins with
the same instruction, as real ones do. Repeats hold 60 % of a test instance or all of it, near misses 40 %: the first must all be found,
and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.support.timing import RESULTS, environment

EVALUATIONS = 5
REPEATS, NEAR_MISSES = 2000, 2000
TEMPLATE = "Answer the following question and put your final answer at the very end of your reply"
LIMIT_SECONDS, LIMIT_GIB = 600, 4
WORD_MEAN, WORD_SPREAD = 4.5, 0.75  # of the logarithm of a prompt's words: median 90, mean 119, and 1 in 1000 over 900


class Language:
    """Texts of random words, a function of the seed."""

    def __init__(self, seed: int):
        self.draw = np.random.default_rng(seed)
        letters = self.draw.integers(97, 123, (50_000, 12), dtype=np.uint8)
        lengths = self.draw.integers(2, 12, 50_000)
        self.words = np.array([bytes(row[:n]).decode() for row, n in zip(letters, lengths, strict=True)], dtype=object)
        self.chance = np.cumsum(1 / np.arange(10, 50_010))  # Zipf's, flattened at its head
        self.chance /= self.chance[-1]

    def text(self, count: int) -> list[str]:
        return self.words[np.searchsorted(self.chance, self.draw.random(count))].tolist()

    def length(self) -> int:
        return 8 + int(self.draw.lognormal(WORD_MEAN, WORD_SPREAD))


def instances(language: Language, count: int) -> list[list[str]]:
    """Test instances of 20 to 99 words; every second begins with the template."""
    return [[*(TEMPLATE.split() if i % 2 else []), *language.text(int(language.draw.integers(20, 100)))] for i in range(count)]


def train_prompts(language: Language, count: int, tests: list[list[str]]) -> Iterator[tuple[bool, list[str]]]:
    """(is it a repeat, words) for each prompt; repeats and near misses lie at random places among the others."""
    planted = language.draw.permutation(count)[: REPEATS + NEAR_MISSES]
    kinds = dict.fromkeys(planted[:REPEATS].tolist(), True) | dict.fromkeys(planted[REPEATS:].tolist(), False)
    for number in range(count):
        words = language.text(language.length())
        if number in kinds:
            words[4:4] = _part(language, tests, kinds[number])
        yield kinds.get(number, False), words


def _part(language: Language, tests: list[list[str]], repeat: bool) -> list[str]:
    test = tests[int(language.draw.integers(len(tests)))]
    share = language.draw.choice([0.6, 1.0]) if repeat else 0.4
    length = int(np.ceil(share * len(test)))
    start = int(language.draw.integers(len(test) - length + 1))
    return test[start : start + length]


def generate(folder: Path, prompts: int, tests: int) -> set[int]:
    """Write train.jsonl and the evaluations, and return the numbers of the rows that must be found."""
    language = Language(0)
    texts = instances(language, tests)
    for number in range(EVALUATIONS):
        rows = [{"question": " ".join(words)} for words in texts[number::EVALUATIONS]]
        (folder / f"eval{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    repeats = set()
    with (folder / "train.jsonl").open("w") as file:
        for number, (repeat, words) in enumerate(train_prompts(language, prompts, texts)):
            message = {"role": "user", "content": " ".join(words)}
            file.write(json.dumps({"messages": [message]}) + "\n")
            if repeat:
                repeats.add(number)
    return repeats


def measure(folder: Path) -> tuple[float, float, float]:
    """Seconds, core seconds and peak GiB of the command on what `generate` wrote."""
    evaluations = [str(path) for path in sorted(folder.glob("eval*.jsonl"))]
    words = ["decontaminate", "--train", str(folder / "train.jsonl"), "--eval", *evaluations, "--report", str(folder / "report.json")]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "engine", *words, "--remove", "instances", "--out", str(folder / "clean")])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the command ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def page(facts: dict[str, object]) -> str:
    head = (
        "# Decontamination\n\nTülu 3's rule (8-gram, more than half of a test instance), by `python -m engine decontaminate`, with a clean "
        "copy written: one process, one pass to find and one to copy.\n"
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"{head}\n| what | value |\n|---|---|\n{rows}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--tests", type=int, default=10_000)
    parser.add_argument("--name", default="decontaminate", help="of the page in benchmarks/results")


def main(arguments: argparse.Namespace) -> int:
    """Generate, run once, check, write the page. Returns 1 when a repeat is missed, or another row is found, or a limit is passed."""
    facts: dict[str, object] = dict(environment())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = generate(folder, arguments.prompts, arguments.tests)
        size = (folder / "train.jsonl").stat().st_size
        seconds, core_seconds, gib = measure(folder)
        found = set(json.loads((folder / "report.json").read_text())["sets"][0]["rows_hitting"])
    facts |= {
        "command": f"python -m benchmarks decontaminate --prompts {arguments.prompts} --tests {arguments.tests}",
        "training prompts": f"{arguments.prompts} in {size / 2**20:.0f} MiB",
        "test instances": f"{arguments.tests} in {EVALUATIONS} evaluations",
        "seconds": f"{seconds:.1f} (limit {LIMIT_SECONDS})",
        "core seconds": f"{core_seconds:.1f}",
        "peak memory, GiB": f"{gib:.2f} (limit {LIMIT_GIB})",
        "prompts a second": f"{arguments.prompts / seconds:.0f}",
        "repeats found": f"{len(found & expected)} of {len(expected)}",
        f"other rows found, {NEAR_MISSES} near misses among them": len(found - expected),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{arguments.name}.md").write_text(page(facts), encoding="utf-8")
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(page(facts))
    return 0 if found == expected and seconds <= LIMIT_SECONDS and gib <= LIMIT_GIB else 1

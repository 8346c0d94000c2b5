"""python -m benchmarks decontaminate: Measure time, peak memory and recall of decontamination on generated prompts with planted repeats.

Prompts have log-normal lengths (mean about 120 words) and words with Zipf frequencies. As in real data, a share of the evaluation prompts
begins with the same instruction. Repeats contain 60 % or 100 % of a test instance, near misses 40 %. All repeats must be found, and nothing
else.
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
    """Texts of random words, determined by the seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        letters = self.rng.integers(97, 123, (50_000, 12), dtype=np.uint8)
        lengths = self.rng.integers(2, 12, 50_000)
        self.words = np.array([bytes(row[:n]).decode() for row, n in zip(letters, lengths, strict=True)], dtype=object)
        self.cdf = np.cumsum(1 / np.arange(10, 50_010))  # Zipf, with a flattened head
        self.cdf /= self.cdf[-1]

    def text(self, count: int) -> list[str]:
        return self.words[np.searchsorted(self.cdf, self.rng.random(count))].tolist()

    def length(self) -> int:
        return 8 + int(self.rng.lognormal(WORD_MEAN, WORD_SPREAD))


def instances(language: Language, count: int) -> list[list[str]]:
    """Test instances of 20 to 99 words; every second begins with the template."""
    return [[*(TEMPLATE.split() if i % 2 else []), *language.text(int(language.rng.integers(20, 100)))] for i in range(count)]


def train_prompts(language: Language, count: int, tests: list[list[str]]) -> Iterator[tuple[bool, list[str]]]:
    """(whether it is a repeat, words) for each prompt. Repeats and near misses are at random positions."""
    planted = language.rng.permutation(count)[: REPEATS + NEAR_MISSES]
    kinds = dict.fromkeys(planted[:REPEATS].tolist(), True) | dict.fromkeys(planted[REPEATS:].tolist(), False)
    for number in range(count):
        words = language.text(language.length())
        if number in kinds:
            words[4:4] = _part(language, tests, kinds[number])
        yield kinds.get(number, False), words


def _part(language: Language, tests: list[list[str]], repeat: bool) -> list[str]:
    test = tests[int(language.rng.integers(len(tests)))]
    share = language.rng.choice([0.6, 1.0]) if repeat else 0.4
    length = int(np.ceil(share * len(test)))
    start = int(language.rng.integers(len(test) - length + 1))
    return test[start : start + length]


def generate(folder: Path, prompts: int, tests: int) -> set[int]:
    """Write train.jsonl and the evaluations. Return the indices of the training rows that must be found."""
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
    """Run the command on the files of `generate`. Returns seconds, CPU seconds and peak memory in GiB."""
    evaluations = [str(path) for path in sorted(folder.glob("eval*.jsonl"))]
    options = ["decontaminate", "--train", str(folder / "train.jsonl"), "--eval", *evaluations, "--report", str(folder / "report.json")]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "engine", *options, "--remove", "instances", "--out", str(folder / "clean")])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"`python -m engine decontaminate` ended with status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def page(facts: dict[str, object]) -> str:
    head = (
        "# Decontamination\n\nTülu 3's rule (8-grams, more than half of a test instance), with `python -m engine decontaminate`. One "
        "process reads the training data twice: once to find overlaps, once to write a clean copy.\n"
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"{head}\n| what | value |\n|---|---|\n{rows}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=1_000_000, help="number of training prompts (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=10_000, help="number of test instances (default: %(default)s)")
    parser.add_argument("--name", default="decontaminate", help="name of the page in benchmarks/results (default: %(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Generate the data, run once and write the page. Returns 1 if a repeat is missed, another row is found or a limit is exceeded."""
    facts: dict[str, object] = dict(environment())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = generate(folder, arguments.prompts, arguments.tests)
        size = (folder / "train.jsonl").stat().st_size
        seconds, core_seconds, gib = measure(folder)
        hits = set(json.loads((folder / "report.json").read_text())["sets"][0]["rows_hitting"])
    facts |= {
        "command": f"python -m benchmarks decontaminate --prompts {arguments.prompts} --tests {arguments.tests}",
        "training prompts": f"{arguments.prompts} in {size / 2**20:.0f} MiB",
        "test instances": f"{arguments.tests} in {EVALUATIONS} evaluations",
        "seconds": f"{seconds:.1f} (limit {LIMIT_SECONDS})",
        "CPU seconds": f"{core_seconds:.1f}",
        "peak memory, GiB": f"{gib:.2f} (limit {LIMIT_GIB})",
        "prompts per second": f"{arguments.prompts / seconds:.0f}",
        "repeats found": f"{len(hits & expected)} of {len(expected)}",
        f"other rows found, including {NEAR_MISSES} near misses": len(hits - expected),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{arguments.name}.md").write_text(page(facts), encoding="utf-8")
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(page(facts))
    return 0 if hits == expected and seconds <= LIMIT_SECONDS and gib <= LIMIT_GIB else 1

"""The page of a GPU run, written from the facts of its parts. Parts may be incomplete."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.facts import Fact, read
from benchmarks.kernels import bench_times
from benchmarks.kernels.floors import SHAPES
from benchmarks.support.tables import heading, table, versions

LAST_LINES = 40  # lines of output shown of a part that did not pass


def slug(chip: str) -> str:
    """The chip's name for file names: NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", chip.lower().removeprefix("nvidia ")).strip("-")


def write(folder: Path, chip: str, parts: Sequence[str]) -> Path:
    """Write `folder`.md from the facts in `folder`."""
    path = folder.with_name(f"{folder.name}.md")
    path.write_text(page(folder, chip, parts), encoding="utf-8")
    return path


def page(folder: Path, chip: str, parts: Sequence[str]) -> str:
    """Markdown: how each part ended, then its results. For a part that did not pass, also the end of its output."""
    lines = heading(f"Trivet on {chip}", versions(), "python -m benchmarks gpu")
    notes = [note for fact in read(folder / "notes.jsonl")[-1:] for note in fact["notes"]]
    facts = {name: read(folder / f"{name}.jsonl") for name in parts}
    lines += [
        *(f"- {note}" for note in notes),
        "",
        *table(("part", "ended", "facts", "seconds"), [_ending(*each) for each in facts.items()]),
    ]
    for name, rows in facts.items():
        if rows:
            lines += ["", f"# {name.capitalize()}", "", *SECTIONS.get(name, _all_facts)(rows)]
            lines += [] if _ended(rows) == "passed" else _last_output(folder / f"{name}.log")
    return "\n".join(lines) + "\n"


def _ended(facts: Sequence[Fact]) -> str:
    return next((fact["ended"] for fact in reversed(facts) if "ended" in fact), "was interrupted" if facts else "not run")


def _ending(name: str, facts: Sequence[Fact]) -> list[str]:
    seconds = sum(fact["seconds"] for fact in facts if "ended" in fact)
    return [name, _ended(facts), str(len(facts)), f"{seconds:.0f}"]


def _smoke(facts: Sequence[Fact]) -> list[str]:
    """A line per section, then all facts."""
    rows = [fact for fact in facts if "section" in fact]
    ends = [[f["section"], "good" if f["good"] else "BAD", f"{f['seconds']:.1f}"] for f in rows if f.get("finished")]
    lines = table(("section", "outcome", "seconds"), ends)
    return [*lines, "", *(_fact(fact, "section") for fact in rows if not fact.get("finished") and not fact.get("started"))]


def _fact(fact: Fact, name: str) -> str:
    values = ", ".join(f"{key} {_number(value)}" for key, value in fact.items() if key != name)
    return f"- {fact[name]}: {values}"


def _number(value: object) -> str:
    if isinstance(value, list):
        return " / ".join(map(_number, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tests(facts: Sequence[Fact]) -> list[str]:
    last = {fact["test"]: fact for fact in facts if "test" in fact}
    counts = Counter(fact["outcome"] for fact in last.values())
    lines = [f"Tests of every kernel against float64, and of bitwise equality between runs and batch sizes: {dict(counts)}.", ""]
    return lines + [f"- {name}: {fact.get('error', '')!r}" for name, fact in last.items() if fact["outcome"] == "failed"]


def _times(facts: Sequence[Fact]) -> list[str]:
    measured = bench_times.assembled(facts)
    shapes = [SHAPES[name] for name in dict.fromkeys(row["shape"] for row in measured["rows"]) if name in SHAPES]
    return bench_times.page(measured, shapes)


def _all_facts(facts: Sequence[Fact]) -> list[str]:
    """All facts, a line each."""
    return [f"- {', '.join(f'{key} {_number(value)}' for key, value in fact.items())}" for fact in facts if "ended" not in fact]


SECTIONS = {"smoke": _smoke, "tests": _tests, "times": _times}


def _last_output(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return ["", "```", *text.rstrip().splitlines()[-LAST_LINES:], "```"]

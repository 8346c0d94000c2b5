"""The page of a GPU: written from whatever facts its parts have left, whether they ended or were stopped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.facts import Fact, read
from benchmarks.kernels import bench_times
from benchmarks.kernels.floors import SHAPES
from benchmarks.support.tables import heading, table, versions

LAST_LINES = 40  # of the output of a part that did not pass


def slug(chip: str) -> str:
    """A file name's part: NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", chip.lower().removeprefix("nvidia ")).strip("-")


def write(folder: Path, chip: str, parts: Sequence[str]) -> Path:
    """`folder`.md, from the facts in `folder`."""
    path = folder.with_name(f"{folder.name}.md")
    path.write_text(page(folder, chip, parts), encoding="utf-8")
    return path


def page(folder: Path, chip: str, parts: Sequence[str]) -> str:
    """Markdown: how each part ended, then what each one found; of one that did not pass, its last output."""
    lines = heading(f"Trivet on {chip}", versions(), "python -m benchmarks gpu")
    notes = [note for fact in read(folder / "notes.jsonl")[-1:] for note in fact["notes"]]
    facts = {name: read(folder / f"{name}.jsonl") for name in parts}
    lines += [
        *(f"- {note}" for note in notes),
        "",
        *table(("part", "ended", "facts", "seconds"), [_ending(*each) for each in facts.items()]),
    ]
    for name, found in facts.items():
        if found:
            lines += ["", f"# {name.capitalize()}", "", *SECTIONS.get(name, _said)(found)]
            lines += [] if _ended(found) == "passed" else _last_output(folder / f"{name}.log")
    return "\n".join(lines) + "\n"


def _ended(found: Sequence[Fact]) -> str:
    return next((fact["ended"] for fact in reversed(found) if "ended" in fact), "was stopped from outside" if found else "not run")


def _ending(name: str, found: Sequence[Fact]) -> list[str]:
    seconds = sum(fact["seconds"] for fact in found if "ended" in fact)
    return [name, _ended(found), str(len(found)), f"{seconds:.0f}"]


def _smoke(found: Sequence[Fact]) -> list[str]:
    """A line a section, then every fact."""
    rows = [fact for fact in found if "section" in fact]
    ends = [[f["section"], "good" if f["good"] else "BAD", f"{f['seconds']:.1f}"] for f in rows if f.get("finished")]
    lines = table(("section", "outcome", "seconds"), ends)
    return [*lines, "", *(_fact(fact, "section") for fact in rows if not fact.get("finished") and not fact.get("started"))]


def _fact(fact: Fact, name: str) -> str:
    said = ", ".join(f"{key} {_number(value)}" for key, value in fact.items() if key != name)
    return f"- {fact[name]}: {said}"


def _number(value: object) -> str:
    if isinstance(value, list):
        return " / ".join(map(_number, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tests(found: Sequence[Fact]) -> list[str]:
    last = {fact["test"]: fact for fact in found if "test" in fact}
    counts = Counter(fact["outcome"] for fact in last.values())
    lines = [f"Of every kernel against float64, bitwise from run to run and in any batch: {dict(counts)}.", ""]
    return lines + [f"- {name}: {fact.get('error', '')!r}" for name, fact in last.items() if fact["outcome"] == "failed"]


def _times(found: Sequence[Fact]) -> list[str]:
    measured = bench_times.assembled(found)
    shapes = [SHAPES[name] for name in dict.fromkeys(row["shape"] for row in measured["rows"]) if name in SHAPES]
    return bench_times.page(measured, shapes)


def _said(found: Sequence[Fact]) -> list[str]:
    """Every fact as it is."""
    return [f"- {', '.join(f'{key} {_number(value)}' for key, value in fact.items())}" for fact in found if "ended" not in fact]


SECTIONS = {"smoke": _smoke, "tests": _tests, "times": _times}


def _last_output(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return ["", "```", *text.rstrip().splitlines()[-LAST_LINES:], "```"]

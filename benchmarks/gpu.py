"""Everything that one GPU can show, in six minutes and without network: make gpu [WHEELS=folder] [PYTHON=python3]

Correctness of every kernel, times beside floors and peers, accuracy, and the engine's throughput; each part in a process of its own,
so that a fault of the device ends only its part. Writes gpu_<chip>_<date>.md and .json into $OUT, or benchmarks/results. Exit status:
0, 1 when a part failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TOTAL = 370.0  # seconds for all parts together


@dataclass(frozen=True)
class Part:
    """A command that prints its page and writes facts to the file that takes the place of FACTS; stopped after `seconds`."""

    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended, what it printed, and the facts it left."""

    name: str
    ended: str
    seconds: float
    text: str
    facts: Any

    @property
    def passed(self) -> bool:
        return self.ended == "passed"


FACTS = "FACTS"
WORKERS = ("-n", "6") if importlib.util.find_spec("xdist") else ()  # compiling takes longer than running
TESTS = ("-m", "pytest", "tests/gpu", "tests/interpreted", "-p", "no:cacheprovider", *WORKERS, f"--junitxml={FACTS}")
PARTS = (
    Part("correctness", TESTS, 110),
    Part("times", ("-m", "benchmarks", "kernels", "--seconds", "75", "--json", FACTS), 105),
    Part("accuracy", ("-m", "benchmarks", "accuracy", "--json", FACTS), 40),
    Part("throughput", ("-m", "benchmarks", "throughput", "--seconds", "5", "--json", FACTS), 60),
    Part("dry run", ("-m", "benchmarks.dryrun_measured", "--json", FACTS), 75),
)


def main(words: Sequence[str] | None = None) -> int:
    """Run all parts and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to use besides what is installed")
    arguments = parser.parse_args(words)
    chip = gpu_name()
    if chip is None:
        print("make gpu needs a CUDA GPU, and torch sees none here; make aot compiles the kernels without one")
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environment, notes = prepared(arguments.wheels, Path(folder) / "site")
        outcomes = []
        for part in PARTS:
            outcomes.append(run(part, Path(folder), environment, TOTAL - (time.monotonic() - began)))
            print(f"{part.name}: {outcomes[-1].ended}, {outcomes[-1].seconds:.0f} s", flush=True)
    text = page(chip, notes, outcomes)
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    written = write(out, f"gpu_{slug(chip)}_{date.today().isoformat()}", text, outcomes)
    print(f"{text}\nWritten to {written} and .json beside it.")
    return int(not all(outcome.passed for outcome in outcomes))


def gpu_name() -> str | None:
    """The GPU that torch would use; None where there is none, or no torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def prepared(wheels: Path | None, site: Path) -> tuple[dict[str, str], list[str]]:
    """The environment of the parts, with what is in `wheels` installed into `site`, and what there is to say about it."""
    environment, notes = dict(os.environ), []
    files = sorted(map(str, wheels.glob("*.whl"))) if wheels else []
    if files:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site), *files]
        notes.append(_said(f"{len(files)} wheels were installed", pip, environment))
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(f"import site\n\nsite.addsitedir({str(site)!r})\n")  # so that .pth files count
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), environment.get("PYTHONPATH")]))
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if missing := [name for name in ("g++", "pybind11") if not (shutil.which(name) or importlib.util.find_spec(name))]:
        notes.append(f"the C++ extension was not built: no {' and no '.join(missing)} here")
    else:
        notes.append(_said("the C++ extension was built", build, environment))
    return environment, notes


def _said(done: str, command: list[str], environment: dict[str, str]) -> str:
    try:
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not so: {done}: {error}"
    return done if found.returncode == 0 else f"not so: {done}: {_last_line(found.stderr)}"


def run(part: Part, folder: Path, environment: Mapping[str, str], left: float) -> Outcome:
    """One part, ended with all its processes when its time or what is left of everyone's is over."""
    facts, log = folder / f"{part.name}.facts", folder / f"{part.name}.log"
    command = [sys.executable, *(word.replace(FACTS, str(facts)) for word in part.command)]
    began, limit = time.monotonic(), min(part.seconds, left)
    if limit <= 0:
        return Outcome(part.name, "no time was left for it", 0.0, "", None)
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
            ended = "passed" if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"STOPPED after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    return Outcome(part.name, ended, time.monotonic() - began, text, read_facts(facts))


def read_facts(file: Path) -> Any:
    """JSON, or of pytest's XML the counts and the names of what failed; None where there is neither."""
    try:
        text = file.read_text(encoding="utf-8")
        return _tests(ElementTree.fromstring(text)) if text.startswith("<?xml") else json.loads(text)
    except (OSError, ValueError, ElementTree.ParseError):
        return None


def _tests(tree: ElementTree.Element) -> dict[str, Any]:
    cases = list(tree.iter("testcase"))
    bad = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"tests": len(cases), "skipped": sum(case.find("skipped") is not None for case in cases), "failed": bad}


def page(chip: str, notes: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Markdown: how each part ended, then each part's own page; of one that did not end well, its last words."""
    from benchmarks.tables import heading, table, versions

    lines = heading(f"Trivet on {chip}", versions(), "make gpu")
    lines += [*(f"- {note}" for note in notes), ""]
    lines += table(("part", "ended", "seconds"), [(o.name, o.ended, f"{o.seconds:.0f}") for o in outcomes])
    return "\n".join(lines + [line for outcome in outcomes for line in _section(outcome)]) + "\n"


def _section(outcome: Outcome) -> list[str]:
    start = re.search("^# ", outcome.text, re.MULTILINE)
    if outcome.name == "correctness" and outcome.facts is not None:
        facts = outcome.facts
        ran = facts["tests"] - facts["skipped"]
        lines = [f"{ran} tests of every kernel against float64, bitwise from run to run and in any batch; {len(facts['failed'])} failed."]
        lines += [f"- {name}" for name in facts["failed"]]
        return ["", "# Correctness", "", *lines, *([] if outcome.passed else _last_words(outcome.text))]
    if outcome.passed and start:
        return ["", outcome.text[start.start() :].rstrip()]
    if outcome.name == "times" and outcome.facts is not None:
        from benchmarks.floors import SHAPES
        from benchmarks.timed import page as times

        shapes = [SHAPES[name] for name in outcome.facts["products"]]
        return ["", "# Kernels on a GPU", "", *times(outcome.facts, shapes), *_last_words(outcome.text)]
    return ["", f"# {outcome.name.capitalize()}", *_last_words(outcome.text)]


def _last_words(text: str) -> list[str]:
    return ["", "```", *text.rstrip().splitlines()[-40:], "```"]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def slug(chip: str) -> str:
    """A file name's part: NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", chip.lower().removeprefix("nvidia ")).strip("-")


def write(folder: Path, name: str, text: str, outcomes: Sequence[Outcome]) -> Path:
    """`name`.md, and `name`.json with every fact."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {o.name: {"ended": o.ended, "seconds": o.seconds, "facts": o.facts} for o in outcomes}
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    page = folder / f"{name}.md"
    page.write_text(text, encoding="utf-8")
    return page


if __name__ == "__main__":
    sys.exit(main())

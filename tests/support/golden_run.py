"""Golden runs: small runs whose results must not change in a refactoring.

    python -m tests.support.golden_run --write FILE     # before: run all and save their results
    python -m tests.support.golden_run FILE             # after: run all and compare

The tiny recipes run for four steps each in a temporary folder, about a minute in total. --demo also runs the demo (seed 0). All metrics
except times and rates are compared, and the sampled responses with their rewards: bitwise on the same CPU and torch version. On others,
metrics are compared to 1e-4 and responses are not compared. Exit status: 0 if equal, 1 if different.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.support.paths import ROOT

FILE = ROOT / "tests/golden/runs.json"
TINY = [f"tiny_{name}" for name in ("sft", "reward", "dpo", "rlvr")]
CHAIN = [f"chain_{name}" for name in ("sft", "reward", "dpo", "rlvr")]
MACHINE_METRICS = re.compile(r"^(time|time/.*|.*per_second|memory_gb)$")  # depend on the machine

Record = dict[str, Any]


def record(folder: Path, *, demo: bool) -> dict[str, Record]:
    """Run everything in `folder`. Returns metrics and responses of each run."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "TRIVET_CACHE": str(folder)}

    def python(*words: str) -> None:
        done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")

    for name in TINY:
        python("engine", "run", str(ROOT / f"recipes/{name}.py"), "steps=4")
    if demo:
        (folder / "recipes").symlink_to(ROOT / "recipes")
        python("benchmarks", "demo")
    return {name: _found(folder / "runs" / name) for name in [*TINY, *(CHAIN if demo else [])]}


def _found(out: Path) -> Record:
    return {"metrics": metrics_of(out / "metrics.jsonl"), "responses": responses_of(out / "samples")}


def metrics_of(file: Path) -> list[Record]:
    """The metrics of each record, without those that depend on the machine."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not MACHINE_METRICS.match(name)} for line in lines]


def responses_of(folder: Path) -> str:
    """SHA-256 of the id, response and reward of every sample, in order."""
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]
    return hashlib.sha256(json.dumps([[line["id"], line["response"], line["reward"]] for line in lines]).encode()).hexdigest()


def to_json(runs: dict[str, Record]) -> str:
    """JSON with one line per record, for readable diffs."""
    parts = []
    for name, run in runs.items():
        lines = ",\n".join(json.dumps(line) for line in run["metrics"])
        parts.append(f'{json.dumps(name)}: {{"responses": {json.dumps(run["responses"])}, "metrics": [\n{lines}\n]}}')
    return f'{{"machine": {json.dumps(machine())},\n"runs": {{\n' + ",\n".join(parts) + "\n}}\n"


def machine() -> Record:
    """CPU and torch version, on which bits depend."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": model[1] if model else platform.processor(), "capability": capability, "torch": torch.__version__}


def differences(before: dict[str, Record], after: dict[str, Record], *, exact: bool) -> list[str]:
    """A line for each number that differs, for the first few of each run."""
    results = []
    for name, old in before.items():
        if (new := after.get(name)) is None:  # without --demo
            continue
        lines = []
        if len(old["metrics"]) != len(new["metrics"]):
            lines.append(f"{len(old['metrics'])} lines of metrics were written, and now {len(new['metrics'])}")
        for was, now in zip(old["metrics"], new["metrics"], strict=False):
            lines += _differing(was, now, exact)
        if exact and old["responses"] != new["responses"]:
            lines.append("the sampled responses or their rewards differ")
        results += [f"{name}: {line}" for line in lines[:5]]
    return results


def _differing(was: Record, now: Record, exact: bool) -> list[str]:
    where = f"{was.get('kind')} {was.get('step')}"
    pairs = [(name, value, now.get(name)) for name, value in was.items()]
    return [f"{where}: {name} was {value}, and is {new}" for name, value, new in pairs if not _same(value, new, exact)]


def _same(value: Any, new: Any, exact: bool) -> bool:
    if exact or not isinstance(value, float) or not isinstance(new, float):
        return value == new or (value != value and new != new)
    return math.isclose(value, new, rel_tol=1e-4, abs_tol=1e-6)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.golden_run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, default=FILE, help="what to compare with (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the numbers instead")
    parser.add_argument("--demo", action="store_true", help="the demo too: five minutes more")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = record(Path(folder), demo=arguments.demo)
    if arguments.write:
        arguments.write.write_text(to_json(results), encoding="utf-8")
        return 0
    kept = json.loads(arguments.file.read_text(encoding="utf-8"))
    exact = kept["machine"] == machine()
    lines = differences(kept["runs"], results, exact=exact)
    print("\n".join(lines) or f"all equal, {'bit for bit' if exact else 'to 1e-4: the file is of another machine'}")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())

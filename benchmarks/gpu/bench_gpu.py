"""python -m benchmarks gpu: what one GPU shows, without network: smoke, tests, times against targets, then training, dry run and accuracy.

Parts are ordered by worth, and each runs in a process of its own, so that a fault of the device ends only its part. Each appends facts
to FOLDER/PART.jsonl as it measures them: a part that is stopped keeps what it had, and a second run goes on where the first one stopped.
The page is written from whatever facts there are. Exit status: 0, 1 when a part failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
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

from benchmarks.gpu import gpu_page
from benchmarks.gpu.facts import Facts, read

ROOT = Path(__file__).parents[2]
FACTS, SECONDS = "FACTS", "SECONDS"  # words of a command that the file and the seconds left take the place of
RESERVE = 5.0  # seconds for a part to write its page after its last measurement


@dataclass(frozen=True)
class Part:
    """A command that appends facts to a file; `seconds` is what it takes at most, beyond which it is stopped."""

    name: str
    command: tuple[str, ...]
    seconds: float


WORKERS = ("-n", "8") if importlib.util.find_spec("xdist") else ()  # compiling takes longer than running
TESTS = ("-m", "pytest", "tests/gpu", "tests/kernels/interpreted", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_facts")
TIMED = ("-m", "benchmarks", "kernels", "--shape", "405b-tp8", "8b-tp1")
PARTS = {
    part.name: part
    for part in (
        Part("smoke", ("-m", "benchmarks", "smoke", "--seconds", SECONDS, "--facts", FACTS), 80),
        Part("tests", (*TESTS, *WORKERS, "--facts", FACTS), 100),
        Part("times", (*TIMED, "--seconds", SECONDS, "--facts", FACTS), 150),
        Part("throughput", ("-m", "benchmarks", "throughput", "--seconds", "5", "--facts", FACTS), 60),
        Part("dryrun", ("-m", "benchmarks", "dryrun_measured", "--facts", FACTS), 75),
        Part("accuracy", ("-m", "benchmarks", "accuracy", "--facts", FACTS), 40),
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for everything (default: %(default)g)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to use besides what is installed")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of the facts (default: $OUT, else benchmarks/results)")
    parser.add_argument("--again", action="store_true", help="forget the facts of these parts and measure anew")


def main(arguments: argparse.Namespace) -> int:
    """Run the parts and write the page."""
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        print(f"{unknown[0]} is not a part; use {', '.join(PARTS)}")
        return 2
    chip = gpu_name()
    if chip is None:
        print("benchmarks gpu needs a CUDA GPU, and torch sees none here; python -m benchmarks kernels compiles the kernels without one")
        return 2
    began, folder = time.monotonic(), arguments.folder or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder = folder / f"gpu_{gpu_page.slug(chip)}_{date.today().isoformat()}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        environment, notes = prepared(arguments.wheels, Path(place) / "site")
        Facts(folder / "notes.jsonl").add({"notes": notes})
        for part in (PARTS[name] for name in arguments.parts or PARTS):
            if arguments.again:
                (folder / f"{part.name}.jsonl").unlink(missing_ok=True)
            print(f"{part.name}: {run(part, folder, environment, arguments.budget - (time.monotonic() - began))}", flush=True)
            gpu_page.write(folder, chip, tuple(PARTS))  # after every part: the next one may be the last
    written = gpu_page.write(folder, chip, tuple(PARTS))
    print(f"{written.read_text(encoding='utf-8')}\nWritten to {written}, facts to {folder}")
    return int(any(failed(folder / f"{name}.jsonl") for name in arguments.parts or PARTS))


def gpu_name() -> str | None:
    """The GPU that torch would use; None where there is none, or no torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def prepared(wheels: Path | None, site: Path) -> tuple[dict[str, str], list[str]]:
    """The environment of the parts, with what is in `wheels` installed into `site`, and what there is to say about it."""
    # One GPU needs no network, and NCCL fails where it finds no interface that is up. Compiling and host work take several threads.
    environment = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", **os.environ, "OMP_NUM_THREADS": "8", "PYTHONUNBUFFERED": "1"}
    notes: list[str] = []
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
    return done if found.returncode == 0 else f"not so: {done}: {(found.stderr.strip().splitlines() or ['no reason given'])[-1]}"


def run(part: Part, folder: Path, environment: Mapping[str, str], left: float) -> str:
    """How one part ended. It is stopped with all its processes when its time or what is left of everyone's is over; it is not started
    when it has passed before, or when there is too little time for it to measure anything."""
    file, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    if any(fact.get("ended") == "passed" for fact in read(file)):
        return "passed before"
    limit = min(part.seconds, left)
    if limit < 2 * RESERVE:
        return f"left out: it may take {part.seconds:g} s, and {max(0.0, left):.0f} s are left"
    words = {FACTS: str(file), SECONDS: f"{limit - RESERVE:.0f}"}
    began = time.monotonic()
    ended = _ended([sys.executable, *(words.get(word, word) for word in part.command)], log, environment, limit)
    Facts(file).add({"ended": ended, "seconds": time.monotonic() - began})
    return ended


def _ended(command: Sequence[str], log: Path, environment: Mapping[str, str], limit: float) -> str:
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
            return "passed" if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            return f"STOPPED after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def failed(file: Path) -> bool:
    """Whether the last end of a part was a failure. A part that was stopped kept its facts, and one that was left out has none."""
    ends = [fact["ended"] for fact in read(file) if "ended" in fact]
    return bool(ends) and ends[-1].startswith("FAILED")

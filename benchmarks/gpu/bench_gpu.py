"""python -m benchmarks gpu: Run all measurements and tests on one GPU: smoke, tests, times, then throughput, dry run and accuracy.

Needs no network. Parts run in order of importance, each in its own process, so that a device fault ends only that part. A part appends each
result to FOLDER/PART.jsonl as soon as it is measured: an interrupted part keeps its results, and a second run resumes. The page is written
from all available results. Exit status: 0, 1 if a part failed, 2 without a GPU.
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
FACTS, SECONDS = "FACTS", "SECONDS"  # placeholders in a command, replaced by the file of facts and the seconds left
RESERVE = 5.0  # seconds that a part has left to finish after its last measurement


@dataclass(frozen=True)
class Part:
    """A command that appends facts to a file. It is stopped after `seconds`."""

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
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"parts to run, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="time limit of all parts (default: %(default)g)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels to use in addition to the installed packages")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="output folder (default: $OUT, else benchmarks/results)")
    parser.add_argument("--again", action="store_true", help="delete the results of these parts and measure them again")


def main(arguments: argparse.Namespace) -> int:
    """Run the parts and write the page."""
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        print(f"{unknown[0]} is not a part; use {', '.join(PARTS)}")
        return 2
    chip = gpu_name()
    if chip is None:
        print("benchmarks gpu needs a CUDA GPU, but torch finds none; without one, use python -m benchmarks kernels to compile the kernels")
        return 2
    began, folder = time.monotonic(), arguments.folder or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder = folder / f"gpu_{gpu_page.slug(chip)}_{date.today().isoformat()}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        environment, notes = prepared(arguments.wheels, Path(temporary) / "site")
        Facts(folder / "notes.jsonl").add({"notes": notes})
        for part in (PARTS[name] for name in arguments.parts or PARTS):
            if arguments.again:
                (folder / f"{part.name}.jsonl").unlink(missing_ok=True)
            print(f"{part.name}: {run(part, folder, environment, arguments.budget - (time.monotonic() - began))}", flush=True)
            gpu_page.write(folder, chip, tuple(PARTS))  # after every part, in case the next one is interrupted
    path = gpu_page.write(folder, chip, tuple(PARTS))
    print(f"{path.read_text(encoding='utf-8')}\nThe page is {path}, the results are in {folder}")
    return int(any(failed(folder / f"{name}.jsonl") for name in arguments.parts or PARTS))


def gpu_name() -> str | None:
    """The name of the GPU that torch uses. None without a GPU or without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def prepared(wheels: Path | None, site: Path) -> tuple[dict[str, str], list[str]]:
    """Installs `wheels` into `site` and builds the C++ extension. Returns the environment of the parts, and notes for the page."""
    # NCCL fails if no network interface is up, so it gets the loopback interface. Compilation and host work use 8 threads.
    environment = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", **os.environ, "OMP_NUM_THREADS": "8", "PYTHONUNBUFFERED": "1"}
    notes: list[str] = []
    files = sorted(map(str, wheels.glob("*.whl"))) if wheels else []
    if files:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site), *files]
        notes.append(_note(f"installing {len(files)} wheels", pip, environment))
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(f"import site\n\nsite.addsitedir({str(site)!r})\n")  # processes .pth files
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), environment.get("PYTHONPATH")]))
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if missing := [name for name in ("g++", "pybind11") if not (shutil.which(name) or importlib.util.find_spec(name))]:
        notes.append(f"the C++ extension was not built: {' and '.join(missing)} not found")
    else:
        notes.append(_note("building the C++ extension", build, environment))
    return environment, notes


def _note(action: str, command: list[str], environment: dict[str, str]) -> str:
    """Run a command. Returns a line that says whether it succeeded."""
    try:
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{action} failed: {error}"
    if result.returncode:
        return f"{action} failed: {(result.stderr.strip().splitlines() or [f'status {result.returncode}'])[-1]}"
    return f"{action} succeeded"


def run(part: Part, folder: Path, environment: Mapping[str, str], left: float) -> str:
    """Run one part and return how it ended. It is stopped, with all its processes, after its own time limit or when the budget is used up.
    It is not started if it has passed before, or if too little time is left to measure anything."""
    file, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    if any(fact.get("ended") == "passed" for fact in read(file)):
        return "passed before"
    limit = min(part.seconds, left)
    if limit < 2 * RESERVE:
        return f"skipped: it may take {part.seconds:g} s, and {max(0.0, left):.0f} s are left"
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
    """Whether the last run of a part failed. A part that was stopped or skipped has not failed."""
    ends = [fact["ended"] for fact in read(file) if "ended" in fact]
    return bool(ends) and ends[-1].startswith("FAILED")

"""python -m benchmarks evals: Run an evaluation suite with `python -m engine eval` and write its numbers and its time to a page.

Uses two processes with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.support.timing import RESULTS, environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m-instruct", help="model name or folder (default: %(default)s)")
    parser.add_argument("--suite", default="gsm8k", help="evaluation suite (default: %(default)s)")
    parser.add_argument("--data", required=True, help="rows of the suite: a .jsonl file, a folder, or a Hugging Face id")
    parser.add_argument("--limit", type=int, default=200, help="number of items (default: %(default)s)")
    parser.add_argument("--name", required=True, help="name of the page in benchmarks/results")


def main(arguments: argparse.Namespace) -> int:
    facts = environment()
    command = ["eval", arguments.model, "--suite", arguments.suite, "--no-chat", "--data", f"{arguments.suite}={arguments.data}"]
    command += ["--limit", str(arguments.limit)]
    with tempfile.TemporaryDirectory() as out:
        seconds = _run([*command, "--out", out])
        suite = json.loads((Path(out) / "results.json").read_text())["suites"][arguments.suite]
        lines = [json.loads(line) for line in (Path(out) / f"{arguments.suite}.jsonl").read_text().splitlines()]
    responses = [response for line in lines for response in line["responses"]]
    facts |= {
        "command": f"torchrun --nproc-per-node 2 -m engine {' '.join(command)}",
        "seconds, including model loading and verification": round(seconds, 1),
        "responses": len(responses),
        "tokens generated": sum(response["tokens"] for response in responses),
        "responses cut off by max_tokens": sum(response["finish"] == "length" for response in responses),
        "decoding": json.dumps(suite["decoding"]),
    }
    text = page(f"{arguments.model} on {len(lines)} items of {arguments.suite}", suite["metrics"], facts)
    (RESULTS / f"{arguments.name}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps({"facts": facts, "suite": suite}, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 0


def page(title: str, metrics: dict[str, Any], facts: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {100 * m['value']:.2f} | {100 * m['standard_error']:.2f} | {100 * m['interval_95'][0]:.2f} to "
        f"{100 * m['interval_95'][1]:.2f} | {m['items']} |"
        for name, m in metrics.items()
    ]
    head = ["| metric | % | ± standard error | 95 % interval (Wilson) | items |", "|---|---|---|---|---|"]
    return "\n".join([f"# {title}", "", *head, *rows, "", *(f"- {name}: {value}" for name, value in facts.items())]) + "\n"


def _run(command: list[str]) -> float:
    """Run the command on two processes. Returns its seconds."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "engine"]
    started = time.perf_counter()
    subprocess.run([*torchrun, *command], env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}, check=True)
    return time.perf_counter() - started

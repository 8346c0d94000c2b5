"""python -m benchmarks COMMAND …"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

# Each a module of this folder with add_arguments and main. Only the one that is asked for is imported: a GPU machine may lack packages
# that others need.
MODULES = (
    "accuracy",
    "batching",
    "bench_rlvr",
    "decontaminate",
    "dryrun_published",
    "dryrun_recipes",
    "dryrun_tulu",
    "evals",
    "gpu",
    "host_cost",
    "kernels",
    "programs",
    "smoke",
    "stage_changes",
    "throughput",
    "verifiers",
)
COMMANDS = {name.removeprefix("bench_"): name for name in MODULES}


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure Trivet.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, name in COMMANDS.items():
        one = commands.add_parser(command, help=(said := described(name)), description=said)
        if command in words[:1]:
            importlib.import_module(f"benchmarks.{name}").add_arguments(one)
    arguments = parser.parse_args(words)
    return importlib.import_module(f"benchmarks.{COMMANDS[arguments.command]}").main(arguments)


def described(name: str) -> str:
    """The first sentence of a module's docstring after its command, read without importing it."""
    text = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.split(": ", 1)[1].split("\n", 1)[0]


if __name__ == "__main__":
    sys.exit(main())

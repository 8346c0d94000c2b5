"""The command line of the benchmarks: python -m benchmarks COMMAND …"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

# Each module has add_arguments and main. Only the requested one is imported: a GPU machine may lack packages that others need.
COMMANDS = {
    "accuracy": "kernels.bench_accuracy",
    "batching": "batching.bench_batching",
    "curves": "learning.bench_curves",
    "decontaminate": "data.bench_decontaminate",
    "demo": "learning.bench_demo",
    "dpo": "training.bench_dpo",
    "dryrun_measured": "dryrun.bench_measured",
    "dryrun_published": "dryrun.bench_published",
    "dryrun_recipes": "dryrun.bench_recipes",
    "dryrun_tulu": "dryrun.bench_tulu",
    "evals": "learning.bench_evals",
    "gpu": "gpu.bench_gpu",
    "host_cost": "kernels.bench_host_cost",
    "kernel_changes": "kernels.bench_kernel_changes",
    "kernels": "kernels.bench_kernels",
    "lengths": "learning.bench_lengths",
    "preferences": "data.preferences",
    "programs": "verify.bench_programs",
    "rlvr": "training.bench_rlvr",
    "smoke": "gpu.bench_smoke",
    "stage_changes": "dryrun.bench_stage_changes",
    "svamp": "data.svamp",
    "throughput": "training.bench_throughput",
    "train": "training.bench_train",
    "verifiers": "verify.bench_verifiers",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of Trivet. Use COMMAND --help for its options.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, name in COMMANDS.items():
        text = summary(name)
        subparser = commands.add_parser(command, help=text, description=text)
        if command in argv[:1]:
            importlib.import_module(f"benchmarks.{name}").add_arguments(subparser)
    arguments = parser.parse_args(argv)
    try:
        return importlib.import_module(f"benchmarks.{COMMANDS[arguments.command]}").main(arguments) or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def summary(name: str) -> str:
    """The first line of a module's docstring, without the command before the colon. The module is not imported."""
    docstring = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))) or ""
    return docstring.split("\n", 1)[0].split(": ", 1)[1]


if __name__ == "__main__":
    sys.exit(main())

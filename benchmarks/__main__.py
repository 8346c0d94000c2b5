"""python -m benchmarks COMMAND …"""

from __future__ import annotations

import argparse
import sys

from benchmarks import (
    accuracy,
    batching,
    bench_rlvr,
    decontaminate,
    dryrun_published,
    dryrun_recipes,
    dryrun_tulu,
    evals,
    host_cost,
    kernel_changes,
    kernels,
    programs,
    throughput,
    verifiers,
)

# Each with add_arguments and main.
MODULES = (
    accuracy,
    batching,
    bench_rlvr,
    decontaminate,
    dryrun_published,
    dryrun_recipes,
    dryrun_tulu,
    evals,
    host_cost,
    kernel_changes,
    kernels,
    programs,
    throughput,
    verifiers,
)
COMMANDS = {module.__name__.removeprefix("benchmarks.").removeprefix("bench_"): module for module in MODULES}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure Trivet.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        described = (module.__doc__ or "").split(": ", 1)[1].split("\n", 1)[0]
        module.add_arguments(commands.add_parser(name, help=described, description=described))
    arguments = parser.parse_args()
    return COMMANDS[arguments.command].main(arguments)


if __name__ == "__main__":
    sys.exit(main())

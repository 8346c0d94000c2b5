"""python -m engine verify: verify responses from stdin."""

from __future__ import annotations

import argparse
import sys

from engine.commands.arguments import examples
from engine.verify import VERIFIERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verifier", required=True, help=f"one of {', '.join(sorted(VERIFIERS))}")
    parser.add_argument("--workers", type=int, help="worker processes (default: one per core)")
    parser.add_argument("--unsafe-code", action="store_true", help="run the programs of --verifier code without a sandbox")
    parser.epilog = examples("verify --verifier math < responses.jsonl > verdicts.jsonl", torchrun=False)


def main(arguments: argparse.Namespace) -> None:
    from engine.data.rows import bounded_lines
    from engine.verify import verifier
    from engine.verify.code import UNSAFE_CODE
    from engine.verify.pool import Pool
    from engine.verify.rows import verify_rows

    unsafe = arguments.unsafe_code and arguments.verifier == "code"
    with Pool(arguments.workers) as pool:
        tally = verify_rows(UNSAFE_CODE if unsafe else verifier(arguments.verifier), pool, bounded_lines(sys.stdin.buffer), sys.stdout)
    print(tally, file=sys.stderr)

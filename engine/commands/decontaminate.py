"""python -m engine decontaminate: find training prompts that overlap evaluations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from engine.commands.arguments import examples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = "a .jsonl file, a folder written by save_to_disk, or a Hugging Face dataset id"
    parser.add_argument("--train", nargs="+", required=True, metavar="F", help=f"training sets, each {source} (train split)")
    parser.add_argument("--eval", nargs="+", required=True, metavar="F", help=f"evaluations, each {source} (test split)")
    parser.add_argument(
        "--report", required=True, metavar="R", help="the .json file to write: every overlapping test instance and training row"
    )
    parser.add_argument(
        "--remove", choices=["instances", "sets"], help="write clean copies: without overlapping rows, or without contaminated sets"
    )
    parser.add_argument("--out", metavar="DIR", help="the folder for the clean copies")
    parser.add_argument(
        "--train-field",
        default="",
        metavar="NAME",
        help="prompt field of training sets (default: user turns, prompt, question, ...)",
    )
    parser.add_argument("--eval-field", default="", metavar="NAME", help="prompt field of evaluations")
    parser.add_argument("--ngram", type=int, default=8, help="length of a matching n-gram, in tokens (default: 8)")
    parser.add_argument(
        "--instance", type=float, default=0.5, help="a test instance overlaps if more than this share of its tokens match (default: 0.5)"
    )
    parser.add_argument(
        "--evaluation",
        type=float,
        default=0.02,
        help="a training set is contaminated if it overlaps more than this share of an evaluation (default: 0.02)",
    )
    parser.epilog = examples("decontaminate --train train.jsonl --eval test.jsonl --report report.json", torchrun=False)


def main(arguments: argparse.Namespace) -> None:
    from engine.data.decontaminate import Rule, Search, decontaminate, report, summary
    from engine.data.rows import Source

    if bool(arguments.remove) != bool(arguments.out):
        raise ValueError("--remove and --out must be given together: what to remove, and the folder for the clean copies")
    if not Path(arguments.report).absolute().parent.is_dir():
        raise ValueError(f"--report {arguments.report}: its folder does not exist; create it first")
    rule = Rule(arguments.ngram, arguments.instance, arguments.evaluation)
    search = Search([Source(path, split="test") for path in arguments.eval], rule, arguments.eval_field)
    out = Path(arguments.out) if arguments.out else None
    findings = decontaminate([Source(path) for path in arguments.train], search, arguments.train_field, arguments.remove, out)
    Path(arguments.report).write_text(json.dumps(report(findings, rule), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(summary(finding, rule) for finding in findings))

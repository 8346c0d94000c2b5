"""python -m engine eval: evaluate a model on suites."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from engine.commands.arguments import add_model, add_settings, examples
from engine.config import Model, override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "python -m engine eval MODEL --suite gsm8k")
    parser.add_argument("--suite", required=True, help="one or more of gsm8k,math,ifeval,humaneval,mmlu,popqa,nq_open, separated by commas")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SUITE=PATH",
        help="data of a suite: a .jsonl file, a folder, or a Hugging Face id (default: the suite's own)",
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N items of each suite")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the chat template, with few-shot examples as turns (default: if the model has a template)",
    )
    parser.add_argument("--out", metavar="DIR", help="the folder for results.json and SUITE.jsonl (all responses and verdicts)")
    parser.add_argument("--unsafe-code", action="store_true", help="run humaneval's programs without a sandbox")
    add_settings(parser, "samples=20 temperature=0.8 max_tokens=512 seed=1 parallel.tp=2")
    parser.epilog = examples(
        "eval runs/mine/export --suite gsm8k,ifeval --out results/mine",
        "eval smollm2-135m-instruct --suite gsm8k --data gsm8k=test.jsonl --limit 100 max_tokens=256",
    )


def main(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from engine.distributed.world import World
    from engine.evals.evaluate import evaluate
    from engine.evals.exam import EvalConfig, prepare
    from engine.evals.results import table, write

    settings = override(EvalConfig(Model(arguments.model), unsafe_code=arguments.unsafe_code), arguments.overrides)
    _check(arguments)
    data = dict(pair.split("=", 1) for pair in arguments.data)
    with closing(World.start()) as world:
        folder, exams = prepare(settings, arguments.suite.split(","), data, arguments.limit, arguments.chat, world)
        results = evaluate(settings, exams, folder, world)
        if world.rank == 0:
            Console().print(table(results))
            if arguments.out:
                write(results, settings, Path(arguments.out))


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot be used."""
    if malformed := [pair for pair in arguments.data if not all(pair.partition("="))]:
        raise ValueError(f"--data {malformed[0]} must be SUITE=PATH, such as gsm8k=test.jsonl")
    if arguments.limit < 0:
        raise ValueError(f"--limit {arguments.limit} must not be negative; 0 means all items")
    if arguments.out and (Path(arguments.out) / "results.json").exists():
        raise ValueError(f"{arguments.out}/results.json already exists; choose another folder for --out, or remove it")

"""The command line: python -m engine {run,score,export,generate,verify,eval,decontaminate,dryrun} …, alone or under torchrun."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import runpy
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from engine.config import Model, Run, override
from engine.verify import VERIFIERS, Unjudged

SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
SAMPLING = (
    ("n", int, "responses to each prompt (default: 1); under torchrun, which takes --n for its own, n=4"),
    ("temperature", float, "0 takes the likeliest token (default: 1)"),
    ("top-p", float, "only the likeliest tokens that together reach this probability (default: 1, all)"),
    ("top-k", int, "only the k likeliest tokens (default: 0, all)"),
    ("max-tokens", int, "tokens of a response at most (default: 256)"),
    ("seed", int, "equal seeds, equal responses, on any layout (default: 0)"),
)
DOES_NOT_FIT = 3  # the exit code of a dry run; argparse's own is 2
ELSEWHERE = "Under torchrun it runs on all its processes: torchrun --nproc-per-node 2 -m engine ..."


def main(words: list[str] | None = None) -> int:
    """Parse and run; a user's mistake becomes one line on stderr. Returns the exit code."""
    arguments = _parsed(words)
    warnings.filterwarnings("ignore")  # of libraries, about their own future; ours are printed
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        return arguments.command(arguments) or 0
    except (ValueError, OSError, FloatingPointError, Unjudged) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # most mistakes meet every rank: the first speaks for all, and takes the others down with it
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1


def _parsed(words: list[str] | None) -> argparse.Namespace:
    """Settings may stand anywhere; argparse by itself takes a command's positional words only in one piece."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    strays = [word for word in rest if not SETTING.match(word)]
    if strays or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine", description="Trivet: post-training of Llama-architecture models.", epilog=ELSEWHERE
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    run = _command(commands, "run", _run, "train: run a recipe, or go on with it where it stopped")
    run.add_argument("recipe", help="a Python file that defines run = Run(...), such as recipes/smollm2_sft.py")
    _overrides(run, "optim.lr=2e-6 parallel.tp=2 out=runs/mine")
    score = _command(commands, "score", _score, "write the log-probability of every token of given rows, or their rewards")
    score.add_argument("--model", required=True, help="a Hugging Face folder or id, or smollm2-135m-instruct")
    score.add_argument("--data", required=True, help='a .jsonl file; a row has "tokens", or "messages", or "prompt" and "response"')
    score.add_argument("--out", required=True, help='the .jsonl file to write: {"tokens", "logprobs", "mask"} for each row, in order')
    score.add_argument("--reward", action="store_true", help='the model is a reward model: write {"reward", "tokens"} for each row instead')
    _overrides(score, "parallel.tp=2 tokens_per_microbatch=16384")
    export = _command(commands, "export", _export, "write the newest checkpoint of a run as a Hugging Face folder")
    export.add_argument("run_dir", help="the folder of the run (its out=)")
    export.add_argument("out_dir", help="the folder to write; it must not exist yet")
    _overrides(export, "parallel.tp=2 parallel.pp=4, to spread a large model over the processes of torchrun")
    generate = _command(commands, "generate", _generate, "answer a question, or every prompt of a file")
    generate.add_argument("model", help="a Hugging Face folder or id, or smollm2-135m-instruct")
    generate.add_argument("overrides", nargs="*", metavar="question | name=value", help='"a question", and settings: parallel.pp=2')
    generate.add_argument("--prompts", help='a .jsonl file; a row has "tokens", "messages" or "prompt"')
    generate.add_argument("--out", help='the .jsonl file to write: {"tokens", "prompt_length", "logprobs", "finish_reason", "text"}')
    for name, kind, text in SAMPLING:
        generate.add_argument(f"--{name}", type=kind, help=text)
    verify = _command(commands, "verify", _verify, "judge responses: jsonl from stdin to stdout")
    verify.add_argument("--verifier", required=True, help=f"one of {', '.join(sorted(VERIFIERS))}")
    verify.add_argument("--workers", type=int, help="processes that judge (default: one for each core)")
    verify.add_argument("--unsafe-code", action="store_true", help="let verifier=code run programs without isolation from this machine")
    _decontaminate_arguments(_command(commands, "decontaminate", _decontaminate, "find training prompts that repeat evaluations"))
    _eval_arguments(_command(commands, "eval", _eval, "ask a model the questions of evaluation suites, and judge its answers"))
    _dryrun_arguments(_command(commands, "dryrun", _dryrun, "forecast a launch from this machine: memory, time, balance, mistakes"))
    return parser


def _dryrun_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"Exit code: 0 it fits, 1 it cannot start, {DOES_NOT_FIT} it can start but does not fit. Nothing is downloaded or launched."
    )
    parser.add_argument("recipe", nargs="?", help="a Python file that defines run = Run(...), such as recipes/tulu3_405b_rlvr.py")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many (default: as the torchrun line in the recipe's docstring says)")
    parser.add_argument(
        "--device", default="h100", metavar="NAME", help="h100, h200, b200, or a .toml that --calibrate wrote (default: h100)"
    )
    parser.add_argument(
        "--lengths", metavar="F", help='a .jsonl file of sequences like those to come: {"prompt": tokens, "response": tokens}'
    )
    parser.add_argument("--json", metavar="F", help="the forecast for machines")
    parser.add_argument("--png", metavar="F", help="a picture of the pipeline in one optimizer step")
    parser.add_argument("--search", action="store_true", help="find the fastest layouts that fit, instead of forecasting the recipe's own")
    parser.add_argument("--calibrate", metavar="OUT", help="measure this machine into a .toml for --device; needs no recipe")
    _overrides(parser, "parallel.vpp=2 parallel.recompute=full tokens_per_microbatch=8192")


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Hugging Face folder or id, or smollm2-135m-instruct")
    parser.add_argument("--suite", required=True, help="gsm8k,math,ifeval,humaneval,mmlu,popqa,nq_open: one or more, with commas")
    parser.add_argument(
        "--data", action="append", default=[], metavar="SUITE=PATH", help="a suite's rows: a .jsonl file, a folder, or a Hugging Face id"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N items of each suite")
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="ask by the chat template, examples as turns (default: where there is one)"
    )
    parser.add_argument("--out", metavar="DIR", help="where results.json goes, and SUITE.jsonl with every response and verdict")
    parser.add_argument("--unsafe-code", action="store_true", help="let humaneval run programs without isolation from this machine")
    _overrides(parser, "samples=20 temperature=0.8 max_tokens=512 seed=1 parallel.tp=2")


def _decontaminate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = None  # one process is fast enough
    source = "a .jsonl file, a folder written by save_to_disk, or a Hugging Face dataset id"
    parser.add_argument("--train", nargs="+", required=True, metavar="F", help=f"training sets: each {source} (its train split)")
    parser.add_argument("--eval", nargs="+", required=True, metavar="F", help=f"evaluations: each {source} (its test split)")
    parser.add_argument("--report", required=True, metavar="R", help="the .json file to write: every instance hit, and by which row")
    parser.add_argument("--remove", choices=["instances", "sets"], help="write clean copies: without rows that hit, or of clean sets only")
    parser.add_argument("--out", metavar="DIR", help="where the clean copies go")
    parser.add_argument("--train-field", default="", metavar="NAME", help="the prompt's field; default: user turns, prompt, question, ...")
    parser.add_argument("--eval-field", default="", metavar="NAME", help="the same, of evaluations")
    parser.add_argument("--ngram", type=int, default=8, help="tokens that must be the same in a row (8)")
    parser.add_argument("--instance", type=float, default=0.5, help="share of a test instance's tokens that must be exceeded (0.5)")
    parser.add_argument("--evaluation", type=float, default=0.02, help="share of an evaluation that must be exceeded (0.02)")


def _command(commands: argparse._SubParsersAction, name: str, work: Callable, text: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=ELSEWHERE)
    parser.set_defaults(command=work)
    return parser


def _overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="name=value", help=f"settings to change, by dotted name: {example}")


def load_recipe(path: str) -> Run:
    """The `run` that a recipe defines. Raises ValueError when the file is missing or defines none."""
    if not Path(path).is_file():
        raise ValueError(f"recipe {path!r} is not a file; see recipes/")
    run = runpy.run_path(path).get("run")
    if not isinstance(run, Run):
        raise ValueError(f"recipe {path!r} defines no run = Run(...)")
    return run


def _run(arguments: argparse.Namespace) -> None:
    run = override(load_recipe(arguments.recipe), arguments.overrides)
    from engine.distributed.world import World, deterministic
    from engine.train import train

    with deterministic(run.deterministic), closing(World.start()) as world:
        train(run, world)


def _score(arguments: argparse.Namespace) -> None:
    from engine.commands.score import ScoreConfig, score
    from engine.distributed.world import World

    scoring = override(ScoreConfig(Model(arguments.model)), arguments.overrides)
    with closing(World.start()) as world:
        count = score(scoring, arguments.data, Path(arguments.out), world, reward=arguments.reward)
        if world.rank == 0:
            print(f"{count} rows -> {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from engine.commands.export import ExportConfig, export
    from engine.distributed.world import World

    exporting = override(ExportConfig(), arguments.overrides)
    with closing(World.start()) as world:
        export(Path(arguments.run_dir), Path(arguments.out_dir), exporting, world)


def _generate(arguments: argparse.Namespace) -> None:
    from engine.commands.generate import GenerateConfig, answer, answer_all
    from engine.distributed.world import World

    questions = [] if arguments.prompts else [word for word in arguments.overrides if not SETTING.match(word)]
    if bool(arguments.prompts) != bool(arguments.out) or (not arguments.prompts and len(questions) != 1):
        raise ValueError('generate takes one question in quotes, or --prompts and --out; for example: generate MODEL "What is 2 + 3?"')
    asked = {name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name, *_ in SAMPLING}
    generating = GenerateConfig(Model(arguments.model), **{name: value for name, value in asked.items() if value is not None})
    generating = override(generating, [word for word in arguments.overrides if word not in questions])
    with closing(World.start()) as world:
        if arguments.prompts:
            count = answer_all(generating, arguments.prompts, Path(arguments.out), world)
            said = [f"{count} responses -> {arguments.out}"]
        else:
            said = answer(generating, questions[0], world)
        if world.rank == 0:
            print("\n\n".join(said))


def _verify(arguments: argparse.Namespace) -> None:
    from engine.verify import verifier
    from engine.verify.code import UNSAFE_CODE
    from engine.verify.pool import Pool
    from engine.verify.rows import verify_rows

    unsafe = arguments.unsafe_code and arguments.verifier == "code"
    with Pool(arguments.workers) as pool:
        tally = verify_rows(UNSAFE_CODE if unsafe else verifier(arguments.verifier), pool, sys.stdin.buffer, sys.stdout)
    print(tally, file=sys.stderr)


def _decontaminate(arguments: argparse.Namespace) -> None:
    from engine.data.decontaminate import Rule, Search, decontaminate, report, summary
    from engine.data.rows import Source

    if bool(arguments.remove) != bool(arguments.out):
        raise ValueError("--remove needs --out, and --out needs --remove: what to leave out, and the folder of the copies")
    if not Path(arguments.report).absolute().parent.is_dir():
        raise ValueError(f"--report {arguments.report}: its folder does not exist; make it first")
    rule = Rule(arguments.ngram, arguments.instance, arguments.evaluation)
    search = Search([Source(path, split="test") for path in arguments.eval], rule, arguments.eval_field)
    out = Path(arguments.out) if arguments.out else None
    found = decontaminate([Source(path) for path in arguments.train], search, arguments.train_field, arguments.remove, out)
    Path(arguments.report).write_text(json.dumps(report(found, rule), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(summary(finding, rule) for finding in found))


def _eval(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from engine.distributed.world import World
    from engine.evals.evaluate import evaluate
    from engine.evals.exam import EvalConfig, prepare
    from engine.evals.results import table, write

    settings = override(EvalConfig(Model(arguments.model), unsafe_code=arguments.unsafe_code), arguments.overrides)
    if strange := [pair for pair in arguments.data if not all(pair.partition("="))]:
        raise ValueError(f"--data {strange[0]} is not of the form SUITE=PATH, such as gsm8k=test.jsonl")
    if arguments.limit < 0:
        raise ValueError(f"--limit {arguments.limit} must not be negative; 0 means all items")
    if arguments.out and (Path(arguments.out) / "results.json").exists():
        raise ValueError(f"{arguments.out}/results.json is there already; choose another folder for --out, or remove it")
    data = dict(pair.split("=", 1) for pair in arguments.data)
    with closing(World.start()) as world:
        folder, exams = prepare(settings, arguments.suite.split(","), data, arguments.limit, arguments.chat, world)
        results = evaluate(settings, exams, folder, world)
        if world.rank == 0:
            Console().print(table(results))
            if arguments.out:
                write(results, settings, Path(arguments.out))


def _dryrun(arguments: argparse.Namespace) -> int:
    from engine.commands import dryrun

    if bool(arguments.recipe) == bool(arguments.calibrate):
        raise ValueError(
            "dryrun takes either a recipe, such as recipes/tulu3_405b_rlvr.py, or --calibrate OUT.toml, for --device afterwards"
        )
    if arguments.calibrate:
        dryrun.calibrate(Path(arguments.calibrate))
        return 0
    asked = dryrun.DryRunOptions(
        recipe=Path(arguments.recipe),
        run=override(load_recipe(arguments.recipe), arguments.overrides),
        gpus=arguments.gpus,
        device=arguments.device,
        lengths=arguments.lengths,
        json=arguments.json,
        png=arguments.png,
    )
    fits = dryrun.search(asked) if arguments.search else dryrun.forecast(asked)
    return 0 if fits else DOES_NOT_FIT


if __name__ == "__main__":
    code = main()
    if code and "WORLD_SIZE" in os.environ:
        os._exit(code)  # other ranks may wait for this one, and leaving in good order would wait for them
    sys.exit(code)

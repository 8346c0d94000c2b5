"""The command line: `python -m engine COMMAND ...` or `trivet COMMAND ...`, in one process or under torchrun.

This file parses and dispatches; each command is a module of engine/commands with add_arguments and main, imported when it is chosen.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from engine.commands.arguments import SETTING, TORCHRUN
from engine.commands.terminal import printable
from engine.verify.verdict import Unjudged

COMMANDS = {  # name -> its line in the help
    "run": "train: run a recipe, or resume it from its latest checkpoint",
    "score": "write the log-probability of every token of given rows, or their rewards",
    "export": "write the latest checkpoint of a run as a Hugging Face folder",
    "generate": "generate responses to one question, or to every prompt of a file",
    "verify": "verify responses: jsonl from stdin to stdout",
    "decontaminate": "find training prompts that overlap evaluations",
    "eval": "evaluate a model on suites such as gsm8k and ifeval",
    "dryrun": "simulate a launch on this machine: memory, time, load balance, mistakes",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A user's mistake becomes one line on stderr and exit code 1."""
    warnings.filterwarnings("ignore")  # of libraries, about their own future
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        arguments = _parsed(words)
        return importlib.import_module(f"engine.commands.{arguments.command}").main(arguments) or 0
    except (ValueError, OSError, FloatingPointError, Unjudged) as error:
        _report(printable(f"error: {' '.join(str(error).split())}"))
        return 1


def start() -> None:
    """Run the command line of this process and exit: the entry point of `trivet` and of `python -m engine`."""
    code = main()
    if code and "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # other ranks may wait for this one, and a normal exit would wait for them
    sys.exit(code)


def _parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """Accept settings at any position; argparse by itself takes a command's positional arguments only in one piece."""
    words = sys.argv[1:] if words is None else words
    parser = _parser(words)
    arguments, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if not SETTING.match(word)]
    if unknown or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the command that `words` begin with."""
    program = "trivet" if Path(sys.argv[0]).stem == "trivet" else "python -m engine"
    parser = argparse.ArgumentParser(prog=program, description="Trivet: post-training for Llama-architecture models.", epilog=TORCHRUN)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in words[:1]:
            importlib.import_module(f"engine.commands.{name}").add_arguments(command)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        nearest = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"; nearest: {nearest[0]}" if nearest else ""
        parser.error(f"unknown command {words[0]!r}{hint}; commands: {', '.join(COMMANDS)}")
    return parser


def _report(message: str) -> None:
    """Show an error once. Most mistakes occur on all ranks: rank 0 reports them, and torchrun ends the other ranks while they wait.

    Under torchrun the message goes to the file that torchrun shows as root cause at the end of its own report, not to stderr as well.
    """
    details = {"py_callstack": message, "timestamp": str(int(time.time()))}  # torchrun shows the rank that failed first
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        if not file:
            raise OSError
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}), encoding="utf-8")
    except OSError:
        print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    start()

"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import re

SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
MODEL_HELP = "a Hugging Face folder or id, or smollm2-135m-instruct"
TORCHRUN = "To run on several processes, use torchrun: torchrun --nproc-per-node 2 -m engine ..."


def add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the positional `arguments.overrides`, a list of name=value settings. `example`: settings to show in the help."""
    parser.add_argument("overrides", nargs="*", metavar="name=value", help=f"settings to change, by dotted name, such as {example}")


def add_model(parser: argparse.ArgumentParser, usage: str) -> None:
    """Add the positional `arguments.model`, and an error for the former option --model. `usage`: the command line shown in that error."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--model", action=_Removed, dest=argparse.SUPPRESS, const=usage, help=argparse.SUPPRESS)


def examples(*lines: str, torchrun: bool = True, note: str = "") -> str:
    """The epilog of a command's help: example command lines, a note, and how to use torchrun."""
    example_lines = "\n".join(["examples:", *(f"  python -m engine {line}" for line in lines)])
    return "\n\n".join(part for part in (example_lines, note, TORCHRUN if torchrun else "") if part)


class _Removed(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: object, option_string: str | None = None) -> None:
        raise ValueError(f"{option_string} is not an option: the model is the first argument; use {self.const}")

"""python -m engine run: train."""

from __future__ import annotations

import argparse
from contextlib import closing

from engine.commands.arguments import add_settings, examples
from engine.commands.recipe import load_recipe
from engine.config import override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a Python file that defines run = Run(...), such as recipes/smollm2_sft.py")
    add_settings(parser, "optim.lr=2e-6 parallel.tp=2 out=runs/mine")
    parser.epilog = examples("run recipes/tiny_sft.py", "run recipes/smollm2_sft.py optim.lr=2e-6 out=runs/mine")


def main(arguments: argparse.Namespace) -> None:
    run = override(load_recipe(arguments.recipe), arguments.overrides)
    from engine.distributed.world import World, deterministic
    from engine.train import train

    with deterministic(run.deterministic), closing(World.start()) as world:
        train(run, world)

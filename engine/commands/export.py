"""python -m engine export: write a run's latest valid checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
import os
import shutil
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.commands.arguments import add_settings, examples
from engine.config import Parallel, override, step_folder
from engine.files import read_object

if TYPE_CHECKING:
    import torch

    from engine.distributed.world import World


@dataclass(frozen=True)
class ExportConfig:
    """The settings of `export`: how to shard the model over processes during the export."""

    parallel: Parallel = field(default_factory=Parallel)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="the folder of the run (its out=)")
    parser.add_argument("out_dir", help="the folder to write; it must not exist yet")
    add_settings(parser, "parallel.tp=2 parallel.pp=4, to shard a large model over the processes of torchrun")
    parser.epilog = examples("export runs/tiny_sft runs/tiny_sft/export")


def main(arguments: argparse.Namespace) -> None:
    config = override(ExportConfig(), arguments.overrides)
    _check(Path(arguments.run_dir), Path(arguments.out_dir))
    from engine.distributed.world import World

    with closing(World.start()) as world:
        export(Path(arguments.run_dir), Path(arguments.out_dir), config, world)


def export(run_dir: Path, out_dir: Path, exporting: ExportConfig, world: World) -> None:
    """Write weights, config.json and tokenizer into `out_dir`, which is created when all files are complete. The dtype of the weights is
    that in config.json.

    Raises ValueError if `run_dir` has no valid checkpoint, or if `out_dir` exists.
    """
    from engine.megatron.policy import Policy
    from engine.models.families import read_shape

    _check(run_dir, out_dir)
    assets = run_dir / "model"
    work = out_dir.with_name(out_dir.name + ".part")
    with closing(Policy(read_shape(assets), None, exporting.parallel, world)) as policy:
        step = policy.load_latest(run_dir)
        if step == 0:
            raise ValueError(f"{run_dir} has no checkpoint yet; let the run save one first (save_every=)")
        if world.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(step_folder(run_dir, step) / "model", work)
        world.first_error(None)  # a barrier: all ranks wait for the folder
        policy.export(work, _dtype(work / "config.json") or policy.dtype)
        if world.rank == 0:
            os.replace(work, out_dir)
            print(f"step {step} of {run_dir} -> {out_dir}")


def _check(run_dir: Path, out_dir: Path) -> None:
    if out_dir.exists():
        raise ValueError(f"{out_dir} already exists; choose another folder, or remove it")
    if not (run_dir / "model").is_dir():
        raise ValueError(f"{run_dir} is not the folder of a run (it has no model/); give the out= of a run")


def _dtype(config: Path) -> torch.dtype | None:
    import torch

    named = read_object(config, "a model's config")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return dtypes.get(str(named.get("dtype") or named.get("torch_dtype")))

"""From a run's newest whole checkpoint to a folder that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config import Parallel, step_folder
from engine.distributed.world import World
from engine.megatron.policy import Policy, read_shape


@dataclass(frozen=True)
class ExportConfig:
    """How the model is spread over the processes while it is exported."""

    parallel: Parallel = field(default_factory=Parallel)


def export(run_dir: Path, out_dir: Path, exporting: ExportConfig, world: World) -> None:
    """Write weights, config.json and tokenizer into `out_dir`, which appears when all is done. Weights keep the dtype that
    config.json names.

    Raises ValueError when `run_dir` has no whole checkpoint, or when `out_dir` is there already.
    """
    if out_dir.exists():
        raise ValueError(f"{out_dir} is there already; choose another folder, or remove it")
    assets = run_dir / "model"
    if not assets.is_dir():
        raise ValueError(f"{run_dir} is not the folder of a run (it has no model/)")
    work = out_dir.with_name(out_dir.name + ".part")
    with closing(Policy(read_shape(assets), None, exporting.parallel, world)) as policy:
        step = policy.load_latest(run_dir)
        if step == 0:
            raise ValueError(f"{run_dir} has no checkpoint yet; let the run save one first (save_every=)")
        if world.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(step_folder(run_dir, step) / "model", work)
        world.first_error(None)  # all wait for the folder
        policy.export(work, _dtype(work / "config.json") or policy.dtype)
        if world.rank == 0:
            os.replace(work, out_dir)
            print(f"step {step} of {run_dir} -> {out_dir}")


def _dtype(config: Path) -> torch.dtype | None:
    named = json.loads(config.read_text())
    return getattr(torch, str(named.get("dtype") or named.get("torch_dtype")), None)

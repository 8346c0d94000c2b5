"""Experiment trackers: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from engine.config import Run, to_dict

Tracker = Callable[[dict[str, float], int], None]  # (metrics, step)


def open_trackers(run: Run, out: Path, start: int, stack: ExitStack) -> list[Tracker]:
    """The trackers that run.logging asks for, closed by `stack`. TensorBoard drops what it has from step `start` on.

    Raises ValueError if logging.wandb_project is set and wandb is not installed.
    """
    wandb = [_wandb(run, out, stack)] if run.logging.wandb_project else []
    return wandb + (_tensorboard(out, start, stack) if run.logging.tensorboard else [])


def _tensorboard(out: Path, start: int, stack: ExitStack) -> list[Tracker]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed; metrics go to metrics.jsonl alone", flush=True)
        return []
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=start)
    stack.callback(writer.close)

    def track(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return [track]


def _wandb(run: Run, out: Path, stack: ExitStack) -> Tracker:
    project = run.logging.wandb_project
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ValueError(f"logging.wandb_project={project!r} needs the package wandb; pip install wandb, or set it to ''") from None
    logger = wandb.init(project=project, name=out.name, dir=str(out), config=to_dict(run))
    stack.callback(logger.finish)
    return lambda metrics, step: logger.log(metrics, step=step)

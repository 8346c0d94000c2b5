"""The configuration of a training run: model, algorithm, optimizer, layout and output."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from engine.config.model import Model
from engine.config.parallel import Parallel


@dataclass(frozen=True)
class Optim:
    """AdamW and the learning-rate schedule. Weight decay does not apply to norms and biases."""

    lr: float
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.0  # warm-up steps / all steps
    hf_schedule: bool = False  # Hugging Face's and Tülu 3's: warm-up starts at 0, not lr / warm-up steps; RLVR's updates each have a rate
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        if not 0 <= self.lr <= 1:
            raise ValueError(f"optim.lr={self.lr} must be from 0 to 1: AdamW changes a weight by about that per step; use 1e-6, say")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"optim.warmup_ratio={self.warmup_ratio} must be at least 0 and below 1 (warm-up steps / all steps); use 0.03, say"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)} must be two numbers from 0 to below 1; use [0.9, 0.999], say")
        if not 0 < self.eps < 1:
            raise ValueError(f"optim.eps={self.eps} must be above 0 and below 1; use 1e-8, say")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optim.weight_decay={self.weight_decay} must be finite and not negative; use 0.1, or 0 for none")
        if not 0 <= self.max_grad_norm < math.inf:
            raise ValueError(f"optim.max_grad_norm={self.max_grad_norm} must be finite and not negative; use 1.0, or 0 for no clipping")

    def lr_at(self, step: int, steps: int, update: int = 0, updates: int = 1) -> float:
        """The learning rate of `update` of the `updates` of `step` (both from 0) of `steps`: linear warm-up to `lr`, then the schedule
        down to 0. It is the same for all updates of a step; with hf_schedule, it is that of transformers.get_scheduler after as many
        steps as there were updates, for int(warmup_ratio * all updates) warm-up steps.
        """
        if self.hf_schedule:
            step, steps = step * updates + update, steps * updates
        warmup = int(self.warmup_ratio * steps) if self.hf_schedule else round(self.warmup_ratio * steps)
        if step < warmup:
            return self.lr * (step + (not self.hf_schedule)) / warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - warmup) / max(1, steps - warmup)
        return self.lr * (1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Logging:
    """Metric outputs in addition to metrics.jsonl, and how often steps are printed."""

    tensorboard: bool = True
    wandb_project: str = ""  # Weights & Biases project; "": do not log there
    every: float = 10.0  # seconds between printed steps; 0: print all. The first and the last step are always printed

    def __post_init__(self) -> None:
        if not self.every >= 0:
            raise ValueError(f"logging.every={self.every} must not be negative; use 10, or 0 to print every step")


@dataclass(frozen=True)
class Run:
    """A complete training run. `algorithm` is a config from engine/algorithms; its `start(policy, run)` returns the algorithm itself."""

    model: Model
    algorithm: Any
    optim: Optim
    parallel: Parallel = field(default_factory=Parallel)
    out: str = "runs/run"
    steps: int = 0  # 0: from the algorithm's number of epochs
    tokens_per_microbatch: int = 4096
    seed: int = 0
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # checkpoints to keep
    eval_every: int = 0  # steps between evaluations on held-out data; 0: only at the start and the end
    gpus: int = 0  # number of ranks the recipe is written for, the dry run's default; 0: one replica
    deterministic: bool = False  # bitwise reproducible on the same hardware and layout, at the cost of speed
    logging: Logging = field(default_factory=Logging)

    def __post_init__(self) -> None:
        if not self.out.strip() or "\0" in self.out:
            raise ValueError(f"out={self.out!r} is not the name of a folder; use out=runs/mine, say")
        for name in ("steps", "save_every", "eval_every", "gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("tokens_per_microbatch", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def microbatch_tokens(self) -> int:
        """Token capacity of a microbatch: tokens_per_microbatch rounded down to a multiple of tp."""
        return self.tokens_per_microbatch // self.parallel.tp * self.parallel.tp

    def identity(self) -> dict[str, Any]:
        """The settings that define the result of a run: all except those of layout, checkpoints, evaluation, output and logging.

        Two runs with equal identities are the same run, so one can resume from the checkpoints of the other.
        """
        excluded = {
            "parallel",
            "tokens_per_microbatch",
            "out",
            "save_every",
            "keep_last",
            "eval_every",
            "gpus",
            "deterministic",
            "logging",
        }
        return {name: value for name, value in to_dict(self).items() if name not in excluded}


def step_folder(out: Path, step: int) -> Path:
    """The folder of a run's checkpoint of `step`."""
    return out / f"step-{step:08d}"


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to JSON values. Dataclasses become objects with their class name under "is"."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {"is": type(value).__name__} | {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)

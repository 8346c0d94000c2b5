"""The lines that a run prints when it starts: what is trained, on which layout, with which kernels, and where the output goes."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine.config import Run
from engine.megatron.attention import backend_name
from engine.megatron.policy import Policy


def header(run: Run, policy: Policy, start: int, steps: int) -> list[str]:
    """One line each for the model, the layout, the kernels and the run."""
    model, parallel, world = policy.model, run.parallel, policy.world
    name = run.model.path or "random weights"
    virtual = f" vpp{parallel.vpp}" if parallel.vpp > 1 else ""
    dtype = str(policy.dtype).removeprefix("torch.")
    kernels = "Triton" if world.on_gpu else "torch references (no GPU)"
    return [
        f"trivet {_commit()}: {type(run.algorithm).__name__} of {name}, {_count(model.parameters)} parameters, {dtype}",
        f"tp{parallel.tp} pp{parallel.pp}{virtual} dp{policy.grid.dp} on {_plural(world.size, 'rank')}, recompute={parallel.recompute}",
        f"attention: {backend_name(world.on_gpu)}; kernels: {kernels}",
        f"steps {start} to {steps}, {run.tokens_per_microbatch} tokens per microbatch; output: {run.out}",
    ]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= size:
            return f"{parameters / size:.1f}{unit}"
    return str(parameters)


def _commit() -> str:
    """The commit of a source checkout, else the installed version."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        if not (root / ".git").exists():  # git would find a repository around an installed package
            raise OSError
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        try:
            return version("trivet")
        except PackageNotFoundError:
            return "from source"

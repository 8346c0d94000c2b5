"""The chain in small, stage by stage: what each stage is made of, and how much of held-out problems the model solves after it."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.commands.generate import GenerateConfig, Generator
from engine.config import Model
from engine.data.wordproblems import LONG, tasks, write
from engine.distributed.world import World
from engine.rollout.config import RolloutConfig
from engine.verify import verifier

PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--nproc-per-node", "2", "-m"]
PAIRED, SAMPLES = 1500, 4  # prompts for pairs, and responses to each
HELD_OUT_PAIRED = 400
TEMPERATURES = {"greedy": 0.0, "T=1": 1.0}


@dataclass(frozen=True)
class Measured:
    """How a model does on held-out problems, at one temperature."""

    solved: float
    worked: float  # share of answers that show work
    right_when_worked: float
    length: float  # tokens of a response
    problems: int

    @property
    def error(self) -> float:
        """The standard error of `solved`: binomial, over problems."""
        return math.sqrt(self.solved * (1 - self.solved) / self.problems)


def run_chain(seed: int, world: World, problems: int = 1000) -> dict[str, dict[str, Measured]]:
    """SFT, pairs, reward model, DPO and RLVR from scratch, below runs/chain_*. Stage -> temperature -> what was found after it."""
    for folder in Path("runs").glob("chain_*"):
        shutil.rmtree(folder)
    found = {}
    _stage("sft", seed)
    found["SFT"] = measure(exported("sft"), problems, world)
    count = make_pairs(exported("sft"), seed, world)
    print(f"{count} pairs of what it said, right against wrong", flush=True)
    _stage("reward", seed)
    _stage("dpo", seed)
    found["DPO"] = measure(exported("dpo"), problems, world)
    _stage("rlvr", seed)
    found["RLVR"] = measure(exported("rlvr"), problems, world)
    return found


def exported(stage: str) -> Path:
    """The folder of what a stage learned, which transformers loads."""
    return Path(f"runs/chain_{stage}/export")


def _stage(name: str, seed: int) -> None:
    """Train recipes/chain_<name>.py on two processes, and export what it learned."""
    subprocess.run([*TORCHRUN, "engine", "run", f"recipes/chain_{name}.py", f"seed={seed}"], check=True)
    subprocess.run([*PYTHON, "engine", "export", f"runs/chain_{name}", exported(name)], check=True)


def answers(folder: Path, rows: list[dict[str, Any]], world: World, **how: Any) -> list[list[tuple[str, bool, int]]]:
    """(text, whether it is right and ended, tokens) of each response to each row's prompt."""
    judged_by = verifier("gsm8k")
    generating = GenerateConfig(Model(str(folder)), rollout=RolloutConfig(max_num_seqs=256, kv_cache_gb=1.0), max_tokens=48, **how)
    with closing(Generator(generating, world)) as answering:
        said = [(answering.text(r), r.stopped, len(r.tokens)) for _, r in answering([{"prompt": row["prompt"]} for row in rows])]
    n = generating.n
    return [
        [(text, stopped and judged_by.verify(text, row["truth"]).correct, size) for text, stopped, size in said[i * n : (i + 1) * n]]
        for i, row in enumerate(rows)
    ]


def measure(folder: Path, problems: int, world: World) -> dict[str, Measured]:
    """On `problems` held-out problems, the same ones always, greedily and at temperature 1."""
    rows = tasks(problems, seed=99, held_out=True, kind=LONG)
    found = {}
    for name, temperature in TEMPERATURES.items():
        said = [response for group in answers(folder, rows, world, temperature=temperature) for response in group]
        right, worked = np.array([right for _, right, _ in said]), np.array(["=" in text for text, *_ in said])
        of_worked = float(right[worked].mean()) if worked.any() else 0.0
        found[name] = Measured(float(right.mean()), float(worked.mean()), of_worked, float(np.mean([n for *_, n in said])), len(said))
    return found


def make_pairs(folder: Path, seed: int, world: World) -> int:
    """Write runs/chain_pairs/: of the model's own responses to a prompt, a right one against a wrong one. Returns how many to train on."""
    out = Path("runs/chain_pairs")
    out.mkdir(parents=True)
    counts = {}
    for name, count, held_out in (("train", PAIRED, False), ("held_out", HELD_OUT_PAIRED, True)):
        rows, draw = tasks(count, seed=1000 + seed, held_out=held_out, kind=LONG), random.Random(seed)
        pairs = []
        for row, group in zip(rows, answers(folder, rows, world, n=SAMPLES, seed=seed), strict=True):
            right, wrong = ([text for text, is_right, _ in group if is_right == wanted and text] for wanted in (True, False))
            if right and wrong:
                pairs.append({"prompt": row["prompt"], "chosen": draw.choice(right), "rejected": draw.choice(wrong)})
        write(out / f"{name}.jsonl", pairs)
        counts[name] = len(pairs)
    return counts["train"]

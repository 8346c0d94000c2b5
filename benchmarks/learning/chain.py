"""The stages of the demo: training of each, generation of preference pairs, and evaluation on held-out problems."""

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
PAIRED, SAMPLES = 1500, 4  # prompts for pairs, and responses per prompt
HELD_OUT_PAIRED = 400
TEMPERATURES = {"greedy": 0.0, "T=1": 1.0}


@dataclass(frozen=True)
class Measured:
    """The results of a model on held-out problems at one temperature."""

    solved: float  # share of problems
    worked: float  # share of responses that show work
    right_when_worked: float  # share of right ones among these
    length: float  # mean tokens of a response
    problems: int

    @property
    def error(self) -> float:
        """The binomial standard error of `solved`."""
        return math.sqrt(self.solved * (1 - self.solved) / self.problems)


def run_chain(seed: int, world: World, problems: int = 1000) -> dict[str, dict[str, Measured]]:
    """Train SFT, reward model, DPO and RLVR from scratch, in runs/chain_*. Returns results by stage and temperature."""
    for folder in Path("runs").glob("chain_*"):
        shutil.rmtree(folder)
    results = {}
    _stage("sft", seed)
    results["SFT"] = measure(exported("sft"), problems, world)
    count = make_pairs(exported("sft"), seed, world)
    print(f"{count} pairs of right and wrong responses", flush=True)
    _stage("reward", seed)
    _stage("dpo", seed)
    results["DPO"] = measure(exported("dpo"), problems, world)
    _stage("rlvr", seed)
    results["RLVR"] = measure(exported("rlvr"), problems, world)
    return results


def exported(stage: str) -> Path:
    """The folder of a stage's exported model, in Hugging Face format."""
    return Path(f"runs/chain_{stage}/export")


def _stage(name: str, seed: int) -> None:
    """Train recipes/chain_<name>.py on two processes and export the model."""
    subprocess.run([*TORCHRUN, "engine", "run", f"recipes/chain_{name}.py", f"seed={seed}"], check=True)
    subprocess.run([*PYTHON, "engine", "export", f"runs/chain_{name}", exported(name)], check=True)


def answers(folder: Path, rows: list[dict[str, Any]], world: World, **options: Any) -> list[list[tuple[str, bool, int]]]:
    """(text, whether it is right and complete, tokens) of each response to each row's prompt. `options`: fields of GenerateConfig."""
    gsm8k = verifier("gsm8k")
    config = GenerateConfig(Model(str(folder)), rollout=RolloutConfig(max_num_seqs=256, kv_cache_gb=1.0), max_tokens=48, **options)
    with closing(Generator(config, world)) as generator:
        responses = [(generator.text(r), r.stopped, len(r.tokens)) for _, r in generator([{"prompt": row["prompt"]} for row in rows])]
    n = config.n
    return [
        [(text, stopped and gsm8k.verify(text, row["truth"]).correct, size) for text, stopped, size in responses[i * n : (i + 1) * n]]
        for i, row in enumerate(rows)
    ]


def measure(folder: Path, problems: int, world: World) -> dict[str, Measured]:
    """Evaluate on `problems` held-out problems, always the same, greedily and at temperature 1."""
    rows = tasks(problems, seed=99, held_out=True, kind=LONG)
    results = {}
    for name, temperature in TEMPERATURES.items():
        responses = [response for group in answers(folder, rows, world, temperature=temperature) for response in group]
        right, worked = np.array([right for _, right, _ in responses]), np.array(["=" in text for text, *_ in responses])
        right_of_worked = float(right[worked].mean()) if worked.any() else 0.0
        results[name] = Measured(
            float(right.mean()), float(worked.mean()), right_of_worked, float(np.mean([n for *_, n in responses])), len(responses)
        )
    return results


def make_pairs(folder: Path, seed: int, world: World) -> int:
    """Write runs/chain_pairs/: pairs of a right and a wrong response of the model to one prompt. Returns the number of training pairs."""
    out = Path("runs/chain_pairs")
    out.mkdir(parents=True)
    counts = {}
    for name, count, held_out in (("train", PAIRED, False), ("held_out", HELD_OUT_PAIRED, True)):
        rows, rng = tasks(count, seed=1000 + seed, held_out=held_out, kind=LONG), random.Random(seed)
        pairs = []
        for row, group in zip(rows, answers(folder, rows, world, n=SAMPLES, seed=seed), strict=True):
            right, wrong = ([text for text, is_right, _ in group if is_right == wanted and text] for wanted in (True, False))
            if right and wrong:
                pairs.append({"prompt": row["prompt"], "chosen": rng.choice(right), "rejected": rng.choice(wrong)})
        write(out / f"{name}.jsonl", pairs)
        counts[name] = len(pairs)
    return counts["train"]

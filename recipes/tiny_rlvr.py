"""A small Llama that has learned to work word problems (recipes/tiny_sft.py, exported) is rewarded for right answers: minutes on a laptop."""

from pathlib import Path

from engine.algorithms.rlvr import RLVR, Critic
from engine.config import Model, Optim, Run
from engine.data.rows import Source
from engine.data.wordproblems import generated_tasks
from engine.rollout.sampler import Slotting

START = Model(path="cache/tiny_rlvr/start", tokenizer="bytes")

run = Run(
    model=START,
    algorithm=RLVR(
        sources=(Source(generated_tasks(Path("cache/tiny_rlvr/train.jsonl"), 2000, seed=0)),),
        verifier="gsm8k",
        critic=Critic(Model(path=START.path, tokenizer="bytes", head="scalar"), Optim(lr=1e-3)),
        prompts_per_step=64,
        epochs=2,
        max_prompt=160,
        max_response=96,
        rollout=Slotting(slots=64, cache_gb=1.0),
    ),
    optim=Optim(lr=3e-4, weight_decay=0.01),
    tokens_per_microbatch=4096,
    steps=20,
    out="runs/tiny_rlvr",
)

"""A reward model from SmolLM2-135M on right and wrong worked answers to generated word problems. On two CPU processes:
torchrun --nproc-per-node 2 -m engine run recipes/smollm2_reward.py parallel.pp=2
To start from another model, add model.path=DIR."""

from pathlib import Path

from engine.algorithms.reward import Reward
from engine.config import Model, Optim, Run
from engine.data.rows import Source
from engine.data.wordproblems import generated, pairs

run = Run(
    model=Model("smollm2-135m-instruct", head="scalar"),
    algorithm=Reward(
        sources=(Source(generated(Path("cache/smollm2_reward/train.jsonl"), 1000, seed=2, make=pairs)),),
        held_out=(Source(generated(Path("cache/smollm2_reward/held_out.jsonl"), 64, seed=3, held_out=True, make=pairs)),),
        batch_size=8,
        max_length=512,
    ),
    optim=Optim(lr=1e-4, warmup_ratio=0.05),
    tokens_per_microbatch=512,
    steps=48,
    eval_every=16,
    out="runs/smollm2_reward",
    gpus=2,
)

"""SFT of SmolLM2-135M on step-by-step answers to generated word problems. On two CPU processes:
torchrun --nproc-per-node 2 -m engine run recipes/smollm2_sft.py parallel.pp=2
Its 9 heads and 3 key-value heads are divisible by tp=3, not by tp=2."""

from pathlib import Path

from engine.algorithms.sft import SFT
from engine.config import Model, Optim, Run
from engine.data.rows import Source
from engine.data.wordproblems import generated

run = Run(
    model=Model("smollm2-135m-instruct"),
    algorithm=SFT(
        sources=(Source(generated(Path("cache/smollm2_sft/train.jsonl"), 1000, seed=0)),),
        held_out=(Source(generated(Path("cache/smollm2_sft/held_out.jsonl"), 16, seed=1, held_out=True)),),
        batch_size=16,
        max_length=512,
    ),
    optim=Optim(lr=2e-4, warmup_ratio=0.1),
    tokens_per_microbatch=1024,
    steps=16,
    eval_every=4,
    out="runs/smollm2_sft",
    gpus=2,
)

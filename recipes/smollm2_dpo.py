"""DPO of SmolLM2-135M on right and wrong worked answers to generated word problems. On two CPU processes:
torchrun --nproc-per-node 2 -m engine run recipes/smollm2_dpo.py
To start from an export of smollm2_sft, add model.path=DIR."""

from pathlib import Path

from engine.algorithms.dpo import DPO
from engine.config import Model, Optim, Run
from engine.data.rows import Source
from engine.data.wordproblems import generated, pairs

run = Run(
    model=Model("smollm2-135m-instruct"),
    algorithm=DPO(
        sources=(Source(generated(Path("cache/smollm2_dpo/train.jsonl"), 192, seed=2, make=pairs)),),
        held_out=(Source(generated(Path("cache/smollm2_dpo/held_out.jsonl"), 32, seed=3, held_out=True, make=pairs)),),
        batch_size=16,
        max_length=512,
    ),
    optim=Optim(lr=3e-5, warmup_ratio=0.1),
    tokens_per_microbatch=1024,
    steps=12,
    eval_every=6,
    out="runs/smollm2_dpo",
    gpus=2,
)

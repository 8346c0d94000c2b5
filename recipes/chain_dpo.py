"""Small chain, stage 3: length-normalised DPO on the pairs of the reward model."""

from engine.algorithms.dpo import DPO
from engine.config import Model, Optim, Run
from engine.data.rows import Source

run = Run(
    model=Model(path="runs/chain_sft/export"),
    algorithm=DPO(
        sources=(Source("runs/chain_pairs/train.jsonl"),),
        held_out=(Source("runs/chain_pairs/held_out.jsonl"),),
        batch_size=64,
        max_length=96,
    ),
    optim=Optim(lr=1e-4, warmup_ratio=0.1),
    tokens_per_microbatch=2048,
    out="runs/chain_dpo",
)

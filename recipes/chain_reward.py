"""Small chain, stage 2: a reward model on pairs of right and wrong responses of the SFT model. RLVR's critic starts from it."""

from engine.algorithms.reward import Reward
from engine.config import Model, Optim, Run
from engine.data.rows import Source

run = Run(
    model=Model(path="runs/chain_sft/export", head="scalar"),
    algorithm=Reward(
        sources=(Source("runs/chain_pairs/train.jsonl"),),
        held_out=(Source("runs/chain_pairs/held_out.jsonl"),),
        batch_size=64,
        max_length=96,
    ),
    optim=Optim(lr=3e-4),
    tokens_per_microbatch=2048,
    out="runs/chain_reward",
)

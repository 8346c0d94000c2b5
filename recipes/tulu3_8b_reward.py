"""Tülu 3 8B, reward model (arXiv 2411.15124, section 6.2), on one node of 8 GPUs:
torchrun --nproc-per-node 8 -m engine run recipes/tulu3_8b_reward.py
The critic of RLVR starts from it at every model size."""

from engine.algorithms.reward import Reward
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source

run = Run(
    model=Model("allenai/Llama-3.1-Tulu-3-8B-SFT", head="scalar"),
    algorithm=Reward(
        sources=(Source("allenai/llama-3.1-tulu-3-8b-preference-mixture"),),
        batch_size=256,
        epochs=1,
        max_length=2048,
        too_long="truncate",
        bad_rows="drop",
        chat_template="tulu",
    ),
    optim=Optim(lr=3e-6, schedule="linear", weight_decay=0.0, max_grad_norm=1.0),
    parallel=Parallel(tp=2),
    tokens_per_microbatch=8192,
    save_every=200,
    out="runs/tulu3_8b_reward",
    gpus=8,
)

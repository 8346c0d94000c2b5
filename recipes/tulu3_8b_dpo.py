"""Tülu 3 8B, length-normalised DPO (arXiv 2411.15124, section 5), on one node of 8 GPUs:
torchrun --nproc-per-node 8 -m engine run recipes/tulu3_8b_dpo.py
The reference's log-probs are computed once before training and saved in runs/tulu3_8b_dpo/reference, so no reference model stays in
memory."""

from engine.algorithms.dpo import DPO
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source

run = Run(
    model=Model("allenai/Llama-3.1-Tulu-3-8B-SFT"),
    algorithm=DPO(
        sources=(Source("allenai/llama-3.1-tulu-3-8b-preference-mixture"),),
        batch_size=128,
        beta=5.0,
        epochs=1,
        max_length=2048,
        too_long="truncate",
        bad_rows="drop",
        chat_template="tulu",
    ),
    optim=Optim(lr=5e-7, schedule="linear", warmup_ratio=0.1, weight_decay=0.0, max_grad_norm=1.0),
    parallel=Parallel(tp=2),
    tokens_per_microbatch=8192,
    save_every=500,
    out="runs/tulu3_8b_dpo",
    gpus=8,
)

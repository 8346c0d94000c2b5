"""Tülu 3 70B, length-normalised DPO (arXiv 2411.15124, section 5), on 8 nodes of 8 GPUs (docs/launch.md). On each node:
torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m engine run recipes/tulu3_70b_dpo.py
The reference's log-probs are computed once before training and saved in runs/tulu3_70b_dpo/reference, so no reference model stays in
memory."""

from engine.algorithms.dpo import DPO
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source

run = Run(
    model=Model("allenai/Llama-3.1-Tulu-3-70B-SFT"),
    algorithm=DPO(
        sources=(Source("allenai/llama-3.1-tulu-3-70b-preference-mixture"),),
        batch_size=128,
        beta=5.0,
        epochs=1,
        max_length=2048,
        too_long="truncate",
        bad_rows="drop",
        chat_template="tulu",
    ),
    optim=Optim(lr=2e-7, schedule="linear", warmup_ratio=0.1, weight_decay=0.0, max_grad_norm=1.0),
    # 2 stages x 8 virtual stages. The first and the last have one layer less: embedding and output layer cost 1.2 layers each.
    parallel=Parallel(tp=8, pp=2, vpp=8, stages=(4, 5, 5, 5, 5, 5, 5, 6, 6, 5, 5, 5, 5, 5, 5, 4)),
    tokens_per_microbatch=8192,
    save_every=500,
    out="runs/tulu3_70b_dpo",
    gpus=64,
)

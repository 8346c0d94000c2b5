"""Tülu 3 405B, length-normalised DPO (arXiv 2411.15124, section 5), on 32 nodes of 8 GPUs (docs/launch.md). On each node:
torchrun --nnodes 32 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m engine run recipes/tulu3_405b_dpo.py
The reference's log-probs are computed once before training and saved in runs/tulu3_405b_dpo/reference, so no reference model stays in
memory."""

from engine.algorithms.dpo import DPO
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source

run = Run(
    model=Model("allenai/Llama-3.1-Tulu-3-405B-SFT"),
    algorithm=DPO(
        sources=(Source("allenai/llama-3.1-tulu-3-405b-preference-mixture"),),
        batch_size=256,
        beta=5.0,
        epochs=1,
        max_length=2048,
        too_long="truncate",
        bad_rows="drop",
        chat_template="tulu",
    ),
    optim=Optim(lr=2e-7, schedule="linear", warmup_ratio=0.1, weight_decay=0.0, max_grad_norm=1.0),
    # 126 layers, the embedding and the loss make 128 units: 32 stages x 4 virtual stages. A pair has at most 4096 tokens.
    parallel=Parallel(tp=8, pp=32, vpp=4, count_embedding=True, count_loss=True, recompute="swiglu"),
    tokens_per_microbatch=4096,
    save_every=200,
    out="runs/tulu3_405b_dpo",
    gpus=256,
)

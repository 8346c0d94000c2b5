"""Tülu 3 70B, SFT (arXiv 2411.15124, Table 10), on 8 nodes of 8 GPUs (docs/launch.md). On each node:
torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m engine run recipes/tulu3_70b_sft.py"""

from engine.algorithms.sft import SFT
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source

run = Run(
    model=Model("meta-llama/Llama-3.1-70B"),
    algorithm=SFT(
        sources=(Source("allenai/tulu-3-sft-mixture"),),
        batch_size=128,
        epochs=2,
        max_length=4096,
        too_long="truncate",
        chat_template="tulu",
    ),
    optim=Optim(lr=2e-6, schedule="linear", warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0),
    # 2 stages x 8 virtual stages. The first and the last have one layer less: embedding and output layer cost 1.2 layers each.
    parallel=Parallel(tp=8, pp=2, vpp=8, stages=(4, 5, 5, 5, 5, 5, 5, 6, 6, 5, 5, 5, 5, 5, 5, 4)),
    tokens_per_microbatch=6144,
    save_every=1000,
    out="runs/tulu3_70b_sft",
    gpus=64,
)

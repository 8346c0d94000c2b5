"""Tülu 3 8B, SFT (arXiv 2411.15124, Table 10), on one node of 8 GPUs: torchrun --nproc-per-node 8 -m engine run recipes/tulu3_8b_sft.py"""

from engine.algorithms.sft import SFT
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source

run = Run(
    model=Model("meta-llama/Llama-3.1-8B"),
    algorithm=SFT(
        sources=(Source("allenai/tulu-3-sft-mixture"),),
        batch_size=128,
        epochs=2,
        max_length=4096,
        too_long="truncate",
        chat_template="tulu",
    ),
    optim=Optim(lr=5e-6, schedule="linear", warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0),
    parallel=Parallel(tp=2),
    tokens_per_microbatch=8192,
    save_every=500,
    out="runs/tulu3_8b_sft",
    gpus=8,
)

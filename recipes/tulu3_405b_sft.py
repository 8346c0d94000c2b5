"""Tülu 3 405B, SFT (arXiv 2411.15124 and the model card), on 32 nodes of 8 GPUs (docs/launch.md). On each node:
torchrun --nnodes 32 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m engine run recipes/tulu3_405b_sft.py"""

from engine.algorithms.sft import SFT
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source

run = Run(
    model=Model("meta-llama/Llama-3.1-405B"),
    algorithm=SFT(
        sources=(Source("allenai/tulu-3-sft-mixture"),),
        batch_size=256,
        epochs=2,
        max_length=4096,
        too_long="truncate",
        chat_template="tulu",
    ),
    optim=Optim(lr=2e-6, schedule="linear", warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0),
    # 126 layers, the embedding and the loss make 128 units: 32 stages x 4 virtual stages. A step is 32 microbatches of about 5,500
    # tokens; with a budget of 4096 it would be 64, all padded to the longest. Recomputing only SwiGLU's output is enough to fit 80 GB.
    parallel=Parallel(tp=8, pp=32, vpp=4, count_embedding=True, count_loss=True, recompute="swiglu"),
    tokens_per_microbatch=6400,
    save_every=500,
    out="runs/tulu3_405b_sft",
    gpus=256,
)

"""Tülu 3 70B, PPO against verifiable rewards (arXiv 2411.15124, section 6), on 8 nodes of 8 GPUs (docs/launch.md). On each node:
torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m engine run recipes/tulu3_70b_rlvr.py
The critic starts from the 8B reward model, as it does in the paper for every size. The reference model is offloaded to host memory."""

from engine.algorithms.rlvr import RLVR, Critic
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source
from engine.rollout.config import RolloutConfig

run = Run(
    model=Model("allenai/Llama-3.1-Tulu-3-70B-DPO"),
    algorithm=RLVR(
        sources=(
            Source("allenai/RLVR-GSM"),
            Source("allenai/RLVR-MATH"),
        ),
        critic=Critic(Model("allenai/Llama-3.1-Tulu-3-8B-RM"), Optim(lr=1e-7, warmup_ratio=0.1, weight_decay=0.01)),
        prompts_per_step=640,
        epochs=4,
        max_prompt_tokens=2048,
        max_response_tokens=2048,
        too_long="drop",
        kl_coef=0.07,
        loss_average="sequence",
        reference="offloaded",
        rollout=RolloutConfig(max_num_seqs=160, kv_cache_gb=16.0),
        chat_template="tulu",
    ),
    optim=Optim(lr=1e-7, schedule="linear", warmup_ratio=0.1, weight_decay=0.01, max_grad_norm=1.0),
    parallel=Parallel(tp=8, pp=2),  # pipeline stages decode in turn, so fewer stages and more replicas generate faster
    tokens_per_microbatch=6144,
    steps=625,
    save_every=50,
    out="runs/tulu3_70b_rlvr",
    gpus=64,
)

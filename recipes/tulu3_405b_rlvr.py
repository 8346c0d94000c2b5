"""Tülu 3 405B, PPO against verifiable rewards (arXiv 2411.15124, section 6), on 32 nodes of 8 GPUs (docs/launch.md). On each node:
torchrun --nnodes 32 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m engine run recipes/tulu3_405b_rlvr.py
The critic starts from the 8B reward model, as it does in the paper for every size. The reference model is offloaded to host memory."""

from engine.algorithms.rlvr import RLVR, Critic
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source
from engine.rollout.config import RolloutConfig

run = Run(
    model=Model("allenai/Llama-3.1-Tulu-3-405B-DPO"),
    algorithm=RLVR(
        sources=(Source("allenai/RLVR-MATH"),),
        critic=Critic(Model("allenai/Llama-3.1-Tulu-3-8B-RM"), Optim(lr=1e-7, warmup_ratio=0.0, weight_decay=0.01)),
        prompts_per_step=1856,
        epochs=4,
        max_prompt_tokens=2048,
        max_response_tokens=1024,
        too_long="drop",
        kl_coef=0.05,
        loss_average="sequence",
        reference="offloaded",
        rollout=RolloutConfig(max_num_seqs=896, kv_cache_gb=12.0),
        chat_template="tulu",
    ),
    optim=Optim(lr=1e-7, schedule="linear", warmup_ratio=0.0, weight_decay=0.01, max_grad_norm=1.0),
    # 126 layers, the embedding and the loss make 128 units, 8 on each of 16 stages. The critic has 32 layers, 2 on each stage.
    # Microbatches are no larger than the longest sequence, so all activations fit and nothing is recomputed.
    parallel=Parallel(tp=8, pp=16, count_embedding=True, count_loss=True),
    tokens_per_microbatch=3072,
    steps=75,
    save_every=10,
    out="runs/tulu3_405b_rlvr",
    gpus=256,
)

"""RLVR of SmolLM2-135M on SVAMP with DAPO's settings (arXiv 2503.14476): clip-higher, token-level loss, no KL term, no zero-std groups.

It starts from the model of recipes/svamp_sft.py, exported to runs/svamp_sft/export. On two CPU processes:
torchrun --nproc-per-node 2 -m engine run recipes/svamp_dapo.py
Not implemented: overlong reward shaping, and resampling until a batch is full."""

from engine.algorithms.rlvr import RLVR
from engine.config import Model, Optim, Run
from engine.data.rows import Source
from engine.rollout.config import RolloutConfig

run = Run(
    model=Model("runs/svamp_sft/export"),
    algorithm=RLVR(
        sources=(Source("cache/svamp/tasks.jsonl"),),
        held_out=(Source("cache/svamp/held_out.jsonl"),),
        verifier="gsm8k",
        advantage="group",
        kl_coef=0.0,
        clip_low=0.2,
        clip_high=0.28,
        loss_average="token",
        skip_zero_std_groups=True,
        prompts_per_step=16,
        samples_per_prompt=8,
        minibatches=2,
        epochs=1,
        max_prompt_tokens=128,
        max_response_tokens=32,
        rollout=RolloutConfig(max_num_seqs=64, kv_cache_gb=1.0),
        chat_template="chatml",
    ),
    optim=Optim(lr=2e-5, warmup_ratio=0.05),
    tokens_per_microbatch=256,
    steps=40,
    out="runs/svamp_dapo",
    gpus=2,
)

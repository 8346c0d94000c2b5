"""RLVR of SmolLM2-135M on SVAMP, after recipes/svamp_sft.py; the two use different problems.

1. python -m engine export runs/svamp_sft runs/svamp_sft/export
2. On two CPU processes: torchrun --nproc-per-node 2 -m engine run recipes/smollm2_rlvr.py parallel.pp=2 'parallel.stages=[17,13]'
3. Curves: python -m benchmarks curves runs/smollm2_rlvr"""

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
        prompts_per_step=16,
        samples_per_prompt=8,
        skip_zero_std_groups=True,
        minibatches=2,
        epochs=1,
        max_prompt_tokens=128,
        max_response_tokens=32,
        kl_coef=0.0,
        rollout=RolloutConfig(max_num_seqs=64, kv_cache_gb=1.0),
        chat_template="chatml",
    ),
    optim=Optim(lr=2e-5, warmup_ratio=0.05),
    tokens_per_microbatch=256,
    steps=40,
    eval_every=10,
    save_every=10,
    out="runs/smollm2_rlvr",
    gpus=2,
)

"""A reward model from SmolLM2-135M on right and wrong solutions of GSM8K problems; train and held-out data share no problem.

1. python -m benchmarks preferences example_model_solutions.jsonl cache/gsm8k_pairs (the file is part of openai/grade-school-math)
2. On two CPU processes: torchrun --nproc-per-node 2 -m engine run recipes/gsm8k_reward.py parallel.pp=2"""

from engine.algorithms.reward import Reward
from engine.config import Model, Optim, Run
from engine.data.rows import Source

run = Run(
    model=Model("smollm2-135m-instruct", head="scalar"),
    algorithm=Reward(
        sources=(Source("cache/gsm8k_pairs/train.jsonl"),),
        held_out=(Source("cache/gsm8k_pairs/held_out.jsonl"),),
        batch_size=8,
        max_length=512,
        too_long="drop",
    ),
    optim=Optim(lr=1e-4, warmup_ratio=0.05),
    tokens_per_microbatch=1024,
    eval_every=16,
    out="runs/gsm8k_reward",
    gpus=2,
)

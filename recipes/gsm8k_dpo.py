"""Length-normalised DPO of SmolLM2-135M on right and wrong solutions of GSM8K problems; train and held-out data share no problem.

1. python -m benchmarks preferences example_model_solutions.jsonl cache/gsm8k_pairs (the file is part of openai/grade-school-math)
2. On two CPU processes: torchrun --nproc-per-node 2 -m engine run recipes/gsm8k_dpo.py
3. Plain DPO, to compare: the same with algorithm.normalize=false algorithm.beta=0.1 out=runs/gsm8k_dpo_plain
4. Curves of both: python -m benchmarks curves runs/gsm8k_dpo runs/gsm8k_dpo_plain"""

from engine.algorithms.dpo import DPO
from engine.config import Model, Optim, Run
from engine.data.rows import Source

run = Run(
    model=Model("smollm2-135m-instruct"),
    algorithm=DPO(
        sources=(Source("cache/gsm8k_pairs/train.jsonl"),),
        held_out=(Source("cache/gsm8k_pairs/held_out.jsonl"),),
        batch_size=8,
        epochs=2,
        max_length=512,
        too_long="drop",
    ),
    optim=Optim(lr=3e-5, warmup_ratio=0.1),
    tokens_per_microbatch=1024,
    eval_every=16,
    out="runs/gsm8k_dpo",
    gpus=2,
)

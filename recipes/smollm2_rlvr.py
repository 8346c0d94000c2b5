"""SmolLM2-135M, fine-tuned on word problems, is rewarded for right answers. Two CPU processes: first recipes/smollm2_sft.py, exported to
runs/smollm2_sft/export; then torchrun --nproc-per-node 2 -m engine run recipes/smollm2_rlvr.py parallel.pp=2 'parallel.stages=[17,13]'"""

from pathlib import Path

from engine.algorithms.rlvr import RLVR, Critic
from engine.config import Model, Optim, Run
from engine.data.rows import Source
from engine.data.wordproblems import generated, tasks
from engine.rollout.sampler import Slotting

START = "runs/smollm2_sft/export"

run = Run(
    model=Model(START),
    algorithm=RLVR(
        sources=(Source(generated(Path("cache/smollm2_rlvr/tasks.jsonl"), 2000, seed=5, make=tasks)),),
        held_out=(Source(generated(Path("cache/smollm2_rlvr/held_out.jsonl"), 96, seed=6, held_out=True, make=tasks)),),
        verifier="gsm8k",
        critic=Critic(Model(START, head="scalar"), Optim(lr=1e-5)),
        prompts_per_step=32,
        epochs=2,
        max_prompt=96,
        max_response=48,
        rollout=Slotting(slots=32, cache_gb=1.0),
    ),
    optim=Optim(lr=3e-6, weight_decay=0.01),
    tokens_per_microbatch=1024,
    steps=30,
    eval_every=10,
    out="runs/smollm2_rlvr",
)

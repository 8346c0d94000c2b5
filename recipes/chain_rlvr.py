"""Small chain, stage 4: PPO with a verifier. It rewards the right final number only, not whether the response shows its work."""

from functools import partial
from pathlib import Path

from engine.algorithms.rlvr import RLVR, Critic
from engine.config import Model, Optim, Run
from engine.data.rows import Source
from engine.data.wordproblems import LONG, generated, tasks
from engine.rollout.config import RolloutConfig

run = Run(
    model=Model(path="runs/chain_dpo/export"),
    algorithm=RLVR(
        sources=(Source(generated(Path("cache/chain/problems.jsonl"), 3840, seed=3, make=partial(tasks, kind=LONG))),),
        verifier="gsm8k",
        critic=Critic(Model(path="runs/chain_reward/export"), Optim(lr=1e-3, weight_decay=0.01)),
        prompts_per_step=128,
        epochs=2,
        max_prompt_tokens=56,
        max_response_tokens=48,
        rollout=RolloutConfig(max_num_seqs=128, kv_cache_gb=1.0),
    ),
    optim=Optim(lr=5e-4, weight_decay=0.01),
    tokens_per_microbatch=2048,
    out="runs/chain_rlvr",
)

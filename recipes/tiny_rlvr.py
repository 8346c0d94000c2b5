"""PPO of a small Llama from random weights, rewarded for a response that is one digit. At first it gives none, so scores, clipping and
the critic are all exercised. Takes a minute on a laptop; use it to try settings and layouts."""

from pathlib import Path

from engine.algorithms.rlvr import RLVR, Critic
from engine.config import Model, ModelShape, Optim, Run
from engine.data.rows import Source
from engine.data.wordproblems import generated
from engine.rollout.config import RolloutConfig

SHAPE = ModelShape(layers=4, hidden=128, ffn=384, heads=8, kv_heads=4, vocab=111, max_length=128)
ROWS = [{"prompt": "How many now?", "truth": "[0-9]"}] * 64

run = Run(
    model=Model(init=SHAPE, tokenizer="words"),
    algorithm=RLVR(
        sources=(Source(generated(Path("cache/tiny_rlvr/tasks.jsonl"), 64, seed=0, make=lambda *_: ROWS)),),
        verifier="regex",
        critic=Critic(Model(init=SHAPE.with_scalar_head()), Optim(lr=2e-3)),
        prompts_per_step=64,
        epochs=4,
        max_prompt_tokens=64,
        max_response_tokens=16,
        rollout=RolloutConfig(max_num_seqs=64, kv_cache_gb=1.0),
    ),
    optim=Optim(lr=1e-3),
    tokens_per_microbatch=4096,
    steps=30,
    out="runs/tiny_rlvr",
)

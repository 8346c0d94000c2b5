"""A reward model from random weights, with a byte tokenizer. Takes a minute on a laptop; use it to try settings and layouts."""

from pathlib import Path

from engine.algorithms.reward import Reward
from engine.config import Model, ModelShape, Optim, Run
from engine.data.rows import Source
from engine.data.wordproblems import generated, pairs

shape = ModelShape(layers=4, hidden=128, ffn=384, heads=8, kv_heads=4, vocab=260, max_length=512)

run = Run(
    model=Model(init=shape, head="scalar", tokenizer="bytes"),
    algorithm=Reward(
        sources=(Source(generated(Path("cache/tiny_reward/train.jsonl"), 1000, seed=0, make=pairs)),),
        held_out=(Source(generated(Path("cache/tiny_reward/held_out.jsonl"), 64, seed=1, held_out=True, make=pairs)),),
        batch_size=16,
        max_length=256,
    ),
    optim=Optim(lr=1e-3, warmup_ratio=0.05, betas=(0.9, 0.99)),
    tokens_per_microbatch=2048,
    steps=60,
    save_every=20,
    eval_every=20,
    out="runs/tiny_reward",
)

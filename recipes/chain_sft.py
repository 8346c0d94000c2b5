"""Small chain, stage 1: SFT of a 0.4M-parameter Llama, from scratch, on word problems answered by three annotators, most without work."""

from functools import partial
from pathlib import Path

from engine.algorithms.sft import SFT
from engine.config import Model, ModelShape, Optim, Run
from engine.data.rows import Source
from engine.data.wordproblems import LONG, demonstrations, generated

SHAPE = ModelShape(layers=2, hidden=128, ffn=384, heads=8, kv_heads=4, vocab=111, max_length=128)

run = Run(
    model=Model(init=SHAPE, tokenizer="words"),
    algorithm=SFT(
        sources=(Source(generated(Path("cache/chain/demonstrations.jsonl"), 76800, seed=0, make=partial(demonstrations, kind=LONG))),),
        batch_size=32,
        max_length=96,
    ),
    optim=Optim(lr=5e-3, warmup_ratio=0.05, betas=(0.9, 0.99)),
    tokens_per_microbatch=1024,
    out="runs/chain_sft",
)

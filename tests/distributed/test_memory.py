"""Memory of a step beyond weights and optimizer states."""

from __future__ import annotations

from engine.config import Model, ModelShape, Parallel
from tests.support import jobs
from tests.support.pool import ranks

BIG = ModelShape(layers=4, hidden=256, ffn=1024, heads=8, kv_heads=4, vocab=8192)


def test_dpo_takes_no_more_than_sft() -> None:
    """On the same sequences and microbatches: without a reference model, and without a second set of logits."""
    sft, dpo = ranks(1).run(jobs.step_memory, parallel=Parallel(), model=Model(init=BIG))[0]
    assert sft > 100  # MiB: at least the activations and logits of 1024 tokens, otherwise the measurement failed
    assert dpo <= 1.05 * sft

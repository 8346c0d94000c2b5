"""The benchmark of changes to the model: undoing a change restores the previous operations, and nothing stays patched."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from benchmarks.dryrun.bench_stage_changes import GPUS, GRID, MODEL, Row, rows
from engine.config import Optim
from engine.dryrun.model_shapes import SHAPES
from engine.dryrun.stages import simulate_stages

TOKENS, LAYERS = 2048, 8


@lru_cache
def found() -> list[Row]:
    return rows("none", TOKENS)


def test_each_change_saves_the_expected_bytes() -> None:
    """By hand, on each of 8 ranks: an eighth of the tokens with 16384 bf16 numbers each; 16 query heads, one key head and one value head of
    size 128."""
    stages = [row.stage for row in found()]
    traffic = [stage.forward.traffic + stage.backward.traffic for stage in stages]
    saved = [before - after for before, after in pairwise(traffic)]
    hidden, head, angles = TOKENS // 8 * 16384 * 2, TOKENS * 128 * 2, TOKENS * 64 * 4
    matrices = stages[0].parameters - LAYERS * 2 * 16384
    # A key head and a value head, repeated 16 times forward and summed backward: read 1 and write 16, read 16 and write 1.
    assert saved[0] == LAYERS * 2 * 2 * 17 * head
    assert stages[0].held - stages[1].held == LAYERS * 2 * 15 * head
    # A bf16 gradient is read, and four bytes of the sum are read and written.
    assert saved[1] == 10 * matrices
    # Forward, a sum is only written, not read again. Backward reads its operands, and does not write and read a sum.
    assert saved[2] == (2 * LAYERS - 1) * (1 + 2) * hidden
    # Gradients of 17 rotated heads are not copied into one tensor with the values, and angles are read once.
    assert saved[3] == LAYERS * ((36 - 2) * head + 2 * 2 * angles)
    # Gathered blocks are copied first. Scattered blocks are written by their product, and read and summed by the receiver. Two products
    # gather and two scatter in a layer's forward, two gather in its backward. Autograd gets zeros instead of the four weight gradients.
    assert saved[4] == -LAYERS * ((4 * 2 + 2 * (8 + 1)) * hidden + 4 * 2)


def test_the_last_row_equals_the_unpatched_engine() -> None:
    full = simulate_stages(SHAPES[MODEL], GRID, GPUS, (TOKENS,), optim=Optim(lr=1e-5))[1]
    assert found()[-1].stage == full


def test_every_change_saves_time() -> None:
    for before, after in pairwise(found()):
        assert after.mfu(0.59, attention=False) > before.mfu(0.59, attention=False)
        assert sum(after.seconds(0.59)) < sum(before.seconds(0.59))

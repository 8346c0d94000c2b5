"""The page of changes to the model path: what it puts back is what was there, and nothing stays changed."""

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


def test_each_change_saves_what_it_says() -> None:
    """By hand, on each of 8 ranks: tokens cut in 8, each of 16384 numbers in bf16; 16 heads of queries, one of keys and one of values, of
    128 numbers each."""
    stages = [row.stage for row in found()]
    traffic = [stage.forward.traffic + stage.backward.traffic for stage in stages]
    saved = [before - after for before, after in pairwise(traffic)]
    hidden, head, angles = TOKENS // 8 * 16384 * 2, TOKENS * 128 * 2, TOKENS * 64 * 4
    matrices = stages[0].parameters - LAYERS * 2 * 16384
    # A head of keys and one of values, each repeated 16 times and in backward summed up: read 1 and write 16, read 16 and write 1.
    assert saved[0] == LAYERS * 2 * 2 * 17 * head
    assert stages[0].held - stages[1].held == LAYERS * 2 * 15 * head
    # A gradient in bf16 is read, and added to four bytes that are read and written.
    assert saved[1] == 10 * matrices
    # A sum that is written and read again is only written; backward reads what it adds, and does not write and read the sum first.
    assert saved[2] == (2 * LAYERS - 1) * (1 + 2) * hidden
    # Gradients of 17 turned heads are not written and read again to stand in one tensor with the values, and angles are read once.
    assert saved[3] == LAYERS * ((36 - 2) * head + 2 * 2 * angles)
    # Blocks that are gathered are copied first; those that are scattered are written by their product, and read and summed by who gets
    # them. In a layer's forward two are gathered and two scattered, in its backward two are gathered. In the place of each of four weights'
    # gradients autograd is given a zero.
    assert saved[4] == -LAYERS * ((4 * 2 + 2 * (8 + 1)) * hidden + 4 * 2)


def test_the_last_row_is_the_engine_as_it_is() -> None:
    whole = simulate_stages(SHAPES[MODEL], GRID, GPUS, (TOKENS,), optim=Optim(lr=1e-5))[1]
    assert found()[-1].stage == whole


def test_every_change_is_worth_it() -> None:
    for before, after in pairwise(found()):
        assert after.mfu(0.59, attention=False) > before.mfu(0.59, attention=False)
        assert sum(after.seconds(0.59)) < sum(before.seconds(0.59))

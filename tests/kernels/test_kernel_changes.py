"""docs/kernels.md matches the numbers computed from the code, and they meet their targets."""

from __future__ import annotations

import pytest

from benchmarks.kernels.bench_kernel_changes import Change, changes, page, weight_gradient_bytes
from benchmarks.kernels.floors import SHAPES
from tests.support.paths import ROOT


def ratios(what: str) -> list[float]:
    return [change.after / change.floor for change in changes() if what in change.what]


def test_the_page_equals_the_counts() -> None:
    assert (ROOT / "docs/kernels.md").read_text() == page()


@pytest.mark.parametrize(
    ("what", "most"),
    [
        ("log-probs of 5,000 rows", 1.03),
        ("log-probs and gradients of 5,000 rows", 1.01),
        ("no logits kept", 1.0),
        ("decode attention", 1.08),
        ("predicted time", 1.14),
    ],
)
def test_ratios_to_the_floor(what: str, most: float) -> None:
    results = ratios(what)
    assert results
    assert all(1 <= ratio <= most for ratio in results)


def test_no_change_increases_a_count() -> None:
    assert all(change.after < change.before for change in changes())


def test_the_weight_gradient_is_written_once_with_one_chunk() -> None:
    """8192 rows are one chunk for 405B's shard: the gradient is written once, in bfloat16. For 8B's vocabulary they are two chunks: it is
    written in fp32, added to, and rounded."""
    for name, each in (("405b-tp8", 2), ("8b-tp1", 4 + 8 + 4 + 2)):
        shape = SHAPES[name]
        assert weight_gradient_bytes(shape) == shape.vocab // shape.tp * shape.hidden * each


def test_a_row_of_the_table() -> None:
    assert Change("what", "8b", "GB", 3000.0, 2.0, 1.6).cells() == ["what, GB", "8b", "3,000.00", "2.00", "1.60", "1875.000", "1.250"]

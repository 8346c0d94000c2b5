"""The kernels of logprob and linear_logprob in the interpreter, with the checks of tests/kernels/test_logprob.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels import test_linear_logprob as linear
from tests.kernels import test_logprob as checks
from tests.kernels import test_policy_loss as policy_loss
from tests.support.layers import check_far_rows, drawn
from triton_kernels import linear_logprob
from triton_kernels.linear_logprob import Mode
from triton_kernels.logprob import write_stats
from triton_kernels.shard import Shard

# The maximum of an empty segment is the lowest float, and its difference to a logit may be -inf.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered", "ignore:divide by zero")


@pytest.mark.parametrize(("rows", "vocab"), [(17, 1000), (1, 4104), (3, 16033), (2, 3), (2, 40007)])
def test_float64(rows: int, vocab: int) -> None:
    checks.check_against_float64(rows, vocab, inv_temp=1 / 0.7)


def test_extremes() -> None:
    checks.check_extremes()


def test_padding() -> None:
    checks.check_padding()


def test_strides() -> None:
    checks.check_strides()


def test_far_rows() -> None:
    checks.check_far_rows()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    checks.check_low_precision(dtype)


def test_batch_invariance() -> None:
    checks.check_batch_invariance()


@pytest.mark.parametrize(("vocab", "sizes"), [(1000, (2, 4, 8)), (4104, (2, 4, 8)), (4100, (2, 4)), (4102, (2,))])
def test_shards(vocab: int, sizes: tuple[int, ...]) -> None:
    checks.check_shards(vocab, sizes)


@pytest.mark.parametrize("size", [3, 16])
def test_other_numbers_of_shards(size: int) -> None:
    checks.check_other_shards(size)


def test_no_rows_and_infinite_logits() -> None:
    checks.check_empty_and_infinite()


def test_invalid_targets_give_nan() -> None:
    """On a device targets are not checked before the launch; their log-prob is NaN."""
    logits, _, _ = checks.problem(3, 100)
    target = torch.tensor([5, -100, 97])
    shard = Shard(0, 100, 0, 97, 1, "")
    stats = torch.empty(5, 3)
    write_stats(stats, logits, target, shard, 1.0, True)
    assert stats[0].isnan().tolist() == [False, True, True]
    assert not stats[1:].isnan().any()


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("chunk", [5, 32])
def test_linear(mode: Mode, chunk: int) -> None:
    """Whole chunks, a padded last chunk, a single padded chunk."""
    hidden, weight, target = linear.problem(17, 1000)
    upstream = torch.randn(17, generator=torch.Generator().manual_seed(1))
    linear.check_gradients(hidden, weight, target, upstream, mode=mode, chunk=chunk)


def test_linear_without_rows() -> None:
    linear.check_gradients(*linear.problem(0, 40), torch.zeros(0), chunk=4)


def test_linear_in_low_precision() -> None:
    hidden, weight, target = linear.problem(17, 500)
    linear.check_low_precision(hidden.bfloat16(), weight.bfloat16(), target)


def test_linear_row_alone_and_in_a_batch() -> None:
    """Every product has `chunk` rows, so a row's bits do not depend on other rows."""
    hidden, weight, target = linear.problem(17, 1000)
    together, _, _ = linear_logprob(hidden, weight, target, chunk=8)
    for part in (slice(0, 1), slice(5, 8), slice(16, 17)):
        alone, _, _ = linear_logprob(hidden[part], weight, target[part], chunk=8)
        assert torch.equal(alone, together[part])


def test_linear_on_rows_beyond_2_31_elements(tmp_path: Path) -> None:
    _, weight, target = linear.problem(4, 40, width=8)
    check_far_rows(lambda hidden: linear_logprob(hidden, weight.bfloat16(), target)[0], drawn(4, 8, dtype=torch.bfloat16), tmp_path)


@pytest.mark.parametrize("loss", ["nll", "ppo", "first"])
def test_policy_loss(loss: str) -> None:
    policy_loss.check_loss(loss, kl="" if loss == "nll" else "k3")

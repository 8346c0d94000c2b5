"""Sampling: the definition, the distribution, top-k and top-p, and the same token for any sharding of the vocabulary."""

from __future__ import annotations

import pytest
import torch

from tests.support import jobs_rollout
from tests.support.check_draw import check, problem
from tests.support.pool import ranks
from triton_kernels import draw
from triton_kernels.draw import exponential


@pytest.mark.parametrize(("rows", "vocab", "valid"), [(1, 1, None), (17, 1000, None), (5, 4104, 4100), (3, 16033, 16001)])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_highest_score_is_sampled(rows: int, vocab: int, valid: int | None, temperature: float) -> None:
    check(rows, vocab, temperature, valid)


def test_no_rows() -> None:
    assert draw(torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.int32)).shape == (0,)


def test_frequencies_equal_probabilities() -> None:
    """chi-square of 100,000 samples from 32 tokens: with 31 degrees of freedom, a correct sampler exceeds 61 with probability 1/1000."""
    logits = torch.randn(32, generator=torch.Generator().manual_seed(1))
    draws = 100_000
    keys = torch.randint(-(2**31), 2**31, (draws, 2), generator=torch.Generator().manual_seed(2)).int()
    counts = draw(logits.expand(draws, -1), keys, temperature=0.8).bincount(minlength=32).double()
    expected = (logits / 0.8).double().softmax(0) * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 61


def test_adjacent_keys_and_ids_are_independent() -> None:
    keys = torch.stack([torch.arange(2000), torch.zeros(2000)], 1).int()
    uniform = (-exponential(keys, 0, 64)).exp()
    across = torch.corrcoef(torch.stack([uniform[:-1].flatten(), uniform[1:].flatten()]))[0, 1]
    along = torch.corrcoef(torch.stack([uniform[:, :-1].flatten(), uniform[:, 1:].flatten()]))[0, 1]
    assert abs(float(across)) < 0.01
    assert abs(float(along)) < 0.01
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.005)


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    keys = torch.randint(-(2**31), 2**31, (4000, 2), generator=torch.Generator().manual_seed(3)).int()
    assert set(draw(logits, keys, top_k=2).tolist()) == {0, 1}
    assert set(draw(logits, keys, top_p=0.5).tolist()) == {0}
    assert set(draw(logits, keys, top_p=0.51).tolist()) == {0, 1}
    assert set(draw(logits, keys, top_p=0.96).tolist()) == {0, 1, 2, 3}
    half = draw(logits, keys, top_k=2).bincount().double() / 4000
    assert half.tolist() == pytest.approx([0.625, 0.375], abs=0.03)


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.4}], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks_equal_one(size: int, how: dict[str, float]) -> None:
    logits, keys = problem(9, 1000)
    alone = draw(logits, keys, vocab_valid=990, **how).tolist()  # type: ignore[arg-type]
    for results in ranks(size).run(jobs_rollout.drawn, logits=logits, keys=keys, vocab_valid=990, **how):
        assert results == alone


@pytest.mark.parametrize(
    ("keys", "how", "says"),
    [
        (torch.zeros(2, 2), {}, "torch.int32"),
        (torch.zeros(3, 2, dtype=torch.int32), {}, "a key for each row"),
        (torch.zeros(2, 2, dtype=torch.int32), {"temperature": -1.0}, "temperature=-1.0"),
        (torch.zeros(2, 2, dtype=torch.int32), {"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_bad_input(keys: torch.Tensor, how: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        draw(torch.zeros(2, 8), keys, **how)  # type: ignore[arg-type]

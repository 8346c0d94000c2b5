"""Losses over packed microbatches, against their formulas computed for each pair in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batching.build import batch
from engine.data.pairs import grouped
from engine.losses import Average, dpo, nll, ppo_clip, ppo_first, ppo_terms, reward_bt, value_clip
from engine.types import Moments, Packed, Sample
from tests.support.jobs import pairs_with_reference


def reference(
    logprob: list[Tensor], halves: list[Sample], beta: float, smoothing: float, normalize: bool, nll_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Summed loss and mean metrics of the pairs (halves[2 p], halves[2 p + 1]); logprob[i] is float64 [L] of halves[i]."""
    rows, total = [], torch.zeros((), dtype=torch.float64)
    for c in range(0, len(halves), 2):
        reward, logp, length = [], [], []
        for i in (c, c + 1):
            on = torch.from_numpy(halves[i].mask.astype(bool))
            ratio = logprob[i][on] - torch.from_numpy(np.asarray(halves[i].ref_logprob, np.float64))[on]
            reward.append(beta * (ratio.mean() if normalize else ratio.sum()))
            logp.append(logprob[i][on].sum())
            length.append(int(on.sum()))
        margin = reward[0] - reward[1]
        loss = -(1 - smoothing) * torch.log(torch.sigmoid(margin)) - smoothing * torch.log(torch.sigmoid(-margin))
        loss = loss - nll_weight * logp[0] / length[0]
        total = total + loss
        rows.append([float(x) for x in (loss, margin > 0, margin, *reward, *logp, *length)])
    table = np.array(rows)
    names = ("loss", "reward/accuracy", "reward/margin", "reward/chosen", "reward/rejected", "logps/chosen", "logps/rejected")
    means: dict[str, float] = dict(zip((*names, "length/chosen", "length/rejected"), table.mean(0), strict=True))
    if nll_weight:
        means["nll"] = float(-(table[:, 5] / table[:, 7]).mean())
    return total, means | {"reward/length_bias": float(np.corrcoef(table[:, 2], table[:, 7] - table[:, 8])[0, 1])}


def cut(halves: list[Sample], packed: Packed, values_T: Tensor, values: list[Tensor]) -> None:
    bounds = packed.cu_seqlens.tolist()
    for s, index in enumerate(packed.index_S):
        if index >= 0:
            values[index] = values_T[bounds[s] : bounds[s + 1]]


SETTINGS = [(5.0, 0.0, True, 0.0), (5.0, 0.2, True, 0.3), (0.1, 0.0, False, 0.0), (0.1, 0.1, False, 1.0)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("budget", [48, 1000])
def test_dpo_loss_gradient_and_metrics(setting: tuple[float, float, bool, float], budget: int) -> None:
    beta, smoothing, normalize, nll_weight = setting
    halves = grouped(pairs_with_reference(3, count=12))
    loss = partial(dpo, beta=beta, label_smoothing=smoothing, normalize=normalize, nll_weight=nll_weight)
    logprob, grad = [torch.empty(0)] * len(halves), [torch.empty(0)] * len(halves)
    total, count, sums = 0.0, 0, dict[str, list[float]]()
    for n, packed in enumerate(batch(halves, budget, total_multiple=2)):
        noise = torch.randn(len(packed.tokens_T), generator=torch.Generator().manual_seed(n))
        logprob_T = (noise - 5.5).requires_grad_()
        results = loss(logprob_T, packed)
        results.total.backward()
        assert logprob_T.grad is not None
        assert not logprob_T.grad[~packed.mask_T].any()
        cut(halves, packed, logprob_T.detach(), logprob)
        cut(halves, packed, logprob_T.grad, grad)
        total, count = total + results.total.item(), count + results.count
        for name, parts in (results.metrics | results.correlations).items():
            sums[name] = [a + float(b) for a, b in zip(sums.get(name, [0.0] * len(parts)), parts, strict=True)]
    assert count == 12

    exact = [values.double().requires_grad_() for values in logprob]
    expected, means = reference(exact, halves, beta, smoothing, normalize, nll_weight)
    expected.backward()
    assert total == pytest.approx(float(expected), rel=1e-6)
    for actual, wanted in zip(grad, exact, strict=True):
        assert wanted.grad is not None
        torch.testing.assert_close(actual.double(), wanted.grad, rtol=2e-5, atol=1e-7)
    actual = {name: Moments(*parts).correlation() if len(parts) == 6 else parts[0] / parts[1] for name, parts in sums.items()}
    assert actual == pytest.approx(means, rel=1e-5)


def test_a_microbatch_without_a_pair() -> None:
    empty = batch(grouped(pairs_with_reference(0, count=1)), 64, rank=1, ranks=2)[0]
    logprob_T = torch.zeros(len(empty.tokens_T), requires_grad=True)
    results = dpo(logprob_T, empty, beta=5.0)
    results.total.backward()
    assert (float(results.total), results.count) == (0.0, 0)
    assert all(float(part) == 0 for parts in (results.metrics | results.correlations).values() for part in parts)


def test_a_pair_split_over_microbatches_is_an_error() -> None:
    alone = batch(grouped(pairs_with_reference(0, count=1))[:1], 64)[0]
    with pytest.raises((AssertionError, KeyError)):
        dpo(torch.zeros(len(alone.tokens_T)), alone, beta=5.0)


@pytest.mark.parametrize(("x", "y", "r"), [([1, 2, 3], [2, 4, 6], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 1], [0, 5], 0.0), ([], [], 0.0)])
def test_correlation(x: list[float], y: list[float], r: float) -> None:
    assert Moments(*map(float, Moments.of(torch.tensor(x), torch.tensor(y)))).correlation() == pytest.approx(r)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_losses_do_not_synchronize_with_the_device(average: Average) -> None:
    """Counts are known on the host; reading a value of a meta tensor would raise an error."""
    halves = [replace(half, **dict.fromkeys(("advantage", "old_logprob", "value", "returns"), half.ref_logprob)) for half in _halves()]
    (packed,) = batch(halves, 1000)
    moved = packed.to(torch.device("meta"))
    logprob_T = torch.empty(len(packed.tokens_T), device="meta", requires_grad=True)
    options = {"average": average, "clip_low": 0.2, "clip_high": 0.2, "kl": "k3", "kl_coef": 0.1}
    results = {
        "nll": nll(logprob_T, moved),
        "ppo": ppo_clip(logprob_T, moved, **options),
        "first": ppo_first(torch.stack([logprob_T, logprob_T]), moved, **options),
        "value": value_clip(logprob_T, moved, average=average, clip=0.2, coef=0.1),
        "dpo": dpo(logprob_T, moved, beta=5.0, nll_weight=0.1),
        "reward": reward_bt(logprob_T, moved),
    }
    for name, loss in results.items():
        loss.total.backward(retain_graph=True)
        expected = len(halves) // 2 if name in ("dpo", "reward") else int(packed.mask_T.sum())
        assert loss.count == (len(halves) if average == "sequence" and name in ("ppo", "first", "value") else expected), name
    assert ppo_terms(moved, average=average, clip_low=0.2, clip_high=0.2, kl="k3", kl_coef=0.1).weight_T.shape == logprob_T.shape


def _halves() -> list[Sample]:
    return grouped(pairs_with_reference(0))

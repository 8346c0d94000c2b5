"""Float64 implementations of the losses over packed tokens: direct formulas, autograd for gradients, loops for recursions.

References and kernels are both compared with these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def packed(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """cu_seqlens [S + 1] and mask [T]. About a third of the tokens are masked; a negative length means a fully masked sequence."""
    cu_seqlens = torch.tensor([0, *map(abs, lengths)]).cumsum(0).int()
    mask = torch.rand(int(cu_seqlens[-1]), generator=torch.Generator().manual_seed(seed)) > 0.3
    for s, length in enumerate(lengths):
        if length < 0:
            mask[cu_seqlens[s] : cu_seqlens[s + 1]] = False
    return cu_seqlens, mask


def normal(count: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def check_close(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """`got` differs from `expected` by at most `tolerance` of the largest expected number."""
    assert got.shape == expected.shape
    if expected.numel():
        error, largest = (got.double() - expected).abs().max(), expected.abs().max()
        assert error <= tolerance * largest, f"off by {float(error):.2e} where the largest is {float(largest):.2e}"


def sums(values: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum over each sequence's unmasked tokens [S]."""
    parts = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    return torch.stack([values[a:b][mask[a:b]].double().sum() for a, b in parts])


def dpo(
    logp: Tensor, ref_S: Tensor, mask: Tensor, cu_seqlens: Tensor, pairs: Tensor, beta: float, smoothing: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, reward of the chosen, reward of the rejected), each [P]; `ref_S` holds sums."""
    count = sums(torch.ones(len(mask)), mask, cu_seqlens).clamp(min=1) if normalize else 1.0
    chosen, rejected = (beta * (sums(logp, mask, cu_seqlens) - ref_S) / count)[pairs.long()].unbind(1)
    loss = -(1 - smoothing) * logsigmoid(chosen - rejected) - smoothing * logsigmoid(rejected - chosen)
    return loss, chosen, rejected


def gae(reward: Tensor, value: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantage, returns) [T], one token at a time."""
    advantage, returns = torch.zeros(2, len(mask), dtype=torch.float64)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        next_value = next_advantage = 0.0
        for t in reversed(range(start, end)):
            if mask[t]:
                delta = float(reward[t]) + gamma * next_value - float(value[t])
                next_value, next_advantage = float(value[t]), delta + gamma * lam * next_advantage
                advantage[t], returns[t] = next_advantage, next_advantage + next_value
    return advantage, returns


def kl(logp: Tensor, ref: Tensor, kind: str) -> Tensor:
    x = ref - logp
    return {"k1": -x, "k2": x**2 / 2, "k3": torch.expm1(x.clamp(max=20)) - x.clamp(max=20)}[kind]


def clipped_policy(logp: Tensor, old: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    ratio = (logp - old).clamp(-20, 20).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def clipped_value(value: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    return torch.maximum((value - returns) ** 2, (old + (value - old).clamp(-clip, clip) - returns) ** 2) / 2

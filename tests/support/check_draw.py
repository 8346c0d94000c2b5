"""draw against an independent implementation in numpy: the same checks for the kernel and for the torch reference."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from triton_kernels import draw


def noise(keys_R2: Tensor, count: int) -> np.ndarray:
    """E of ids 0 ... count in float64, from unsigned 32-bit integers."""
    keys = keys_R2.cpu().numpy().view(np.uint32)
    h = (np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1) + keys[:, :1]) ^ keys[:, 1:]
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return -np.log1p(-(h.astype(np.float64) + 0.5) / 2**32)


def problem(rows: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and keys. Some logits are -inf, and one row has equal logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[:, ::7] = -torch.inf
    logits[rows // 2, :] = 1.5
    return logits, torch.randint(-(2**31), 2**31, (rows, 2), generator=generator).int()


def check(rows: int, vocab: int, temperature: float, valid: int | None = None) -> None:
    """No other score in float64 exceeds that of the sampled token by more than the precision of fp32."""
    logits, keys = problem(rows, vocab)
    actual = draw(logits, keys, temperature=temperature, vocab_valid=valid)
    assert actual.dtype == torch.int64
    assert actual.shape == (rows,)
    scores = logits.double().cpu().numpy()[:, :valid]
    if temperature:
        scores = scores / temperature - np.log(noise(keys, scores.shape[1]))
    for row, token in enumerate(actual.tolist()):
        assert token < scores.shape[1]
        assert scores[row, token] >= scores[row].max() - 1e-5
        if not temperature:
            assert token == int(scores[row].argmax())

"""The arithmetic of the published Tülu 3 trainer, written from its description in float64, with one rectangle of R columns per quantity.

A response of n tokens, its stop token included, fills columns 0 ... n - 1 of R. If n < R, the column after it is the score slot: it has the
value that the critic predicts after the stop token, and it gets the score. Otherwise the last token gets it. Columns beyond are padding.
Values and returns of the slot enter the recursion and the value loss, and nothing else. Each GPU holds an equal, contiguous part of the
responses and whitens their tokens' advantages alone; its loss is the mean over the tokens of so many responses at a time, and the
gradient the mean of such means. Preference losses divide by the tokens of all assistant turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

F64 = torch.float64


@dataclass
class Response:
    """One response, as lists: of its n tokens, and values of n, or of n + 1 with a score slot."""

    score: float
    old: list[float]
    ref: list[float]
    value: list[float]
    new: list[float] = field(default_factory=list)  # log-probs and values of the weights that learn
    new_value: list[float] = field(default_factory=list)


def rectangle(rows: Sequence[Sequence[float]], limit: int) -> Tensor:
    """[B, R], padded with 0."""
    return torch.tensor([[*row, *[0.0] * (limit - len(row))] for row in rows], dtype=F64)


def columns(counts: Sequence[int], limit: int) -> Tensor:
    """bool [B, R]: whether a column is below the row's count."""
    return torch.arange(limit)[None] < torch.tensor(counts)[:, None]


def tokens(responses: Sequence[Response], limit: int) -> Tensor:
    return columns([len(r.old) for r in responses], limit)


def valued(responses: Sequence[Response], limit: int) -> Tensor:
    return columns([min(len(r.old) + 1, limit) for r in responses], limit)


def advantages(
    responses: Sequence[Response], limit: int, beta: float, kind: str, gamma: float, lam: float, gpus: int
) -> tuple[Tensor, Tensor]:
    """(advantages, whitened per GPU; returns), each [B, R]."""
    counts = [len(r.old) for r in responses]
    log_ratio = rectangle([r.old for r in responses], limit) - rectangle([r.ref for r in responses], limit)
    kl = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[kind]
    reward = -beta * kl
    for i, (response, n) in enumerate(zip(responses, counts, strict=True)):
        reward[i, n if n < limit else n - 1] += response.score
    value = rectangle([r.value for r in responses], limit)
    advantage, following = torch.zeros_like(value), torch.zeros(len(counts), dtype=F64)
    for t in reversed(range(limit)):
        next_value = value[:, t + 1] if t + 1 < limit else torch.zeros(len(counts), dtype=F64)
        following = reward[:, t] + gamma * next_value - value[:, t] + gamma * lam * following
        advantage[:, t] = following
    returns = (advantage + value) * valued(responses, limit)
    mask, share = tokens(responses, limit), len(counts) // gpus
    for rows in (slice(g * share, (g + 1) * share) for g in range(gpus)):
        own = advantage[rows][mask[rows]]
        advantage[rows] = (advantage[rows] - own.mean()) / torch.sqrt(own.var(unbiased=True) + 1e-8)
    return advantage * mask, returns


def mean_of_device_means(loss: Tensor, mask: Tensor, per_device: int) -> Tensor:
    """The mean over groups of `per_device` consecutive rows of the mean over the group's columns in `mask`."""
    starts = range(0, len(loss), per_device)
    return torch.stack([loss[i : i + per_device][mask[i : i + per_device]].mean() for i in starts]).mean()


def policy_loss(responses: Sequence[Response], advantage: Tensor, clip: tuple[float, float], per_device: int) -> tuple[float, Tensor]:
    """The loss, and its gradient in the new log-probs [B, R]."""
    limit = advantage.shape[1]
    new = rectangle([r.new for r in responses], limit).requires_grad_()
    ratio = torch.exp(new - rectangle([r.old for r in responses], limit))
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip[0], 1 + clip[1]))
    total = mean_of_device_means(loss, tokens(responses, limit), per_device)
    return float(total), torch.autograd.grad(total, new)[0]


def value_loss(responses: Sequence[Response], returns: Tensor, clip: float, per_device: int) -> tuple[float, Tensor]:
    """The loss without its coefficient, and its gradient in the new values [B, R]."""
    limit = returns.shape[1]
    new, old = rectangle([r.new_value for r in responses], limit).requires_grad_(), rectangle([r.value for r in responses], limit)
    clipped = torch.minimum(torch.maximum(new, old - clip), old + clip)
    loss = 0.5 * torch.maximum((new - returns) ** 2, (clipped - returns) ** 2)
    total = mean_of_device_means(loss, valued(responses, limit), per_device)
    return float(total), torch.autograd.grad(total, new)[0]


def learning_rates(lr: float, warmup_ratio: float, updates: int) -> list[float]:
    """Of each update: up from 0 over the warm-up, then straight down to 0."""
    warmup = int(updates * warmup_ratio)
    return [lr * (u / warmup if u < warmup else (updates - u) / (updates - warmup)) for u in range(updates)]


def labelled(conversation: Sequence[dict[str, str]], eos: str) -> list[tuple[str, bool]]:
    """The pieces of text of Tülu's template, and whether each is trained: what every assistant says, with the eos after it."""
    pieces = []
    for i, message in enumerate(conversation):
        pieces.append((f"<|{message['role']}|>\n", False))
        is_answer = message["role"] == "assistant"
        pieces.append((message["content"] + eos * is_answer, is_answer))
        pieces.append(("\n" * (not is_answer or i + 1 < len(conversation)), False))
    return pieces


def dpo_norm(chosen: tuple[list[float], list[float]], rejected: tuple[list[float], list[float]], beta: float) -> float:
    """The loss of a pair from the labelled tokens' log-probs (policy, reference) of each half."""
    rewards = [beta * (sum(policy) - sum(reference)) / len(policy) for policy, reference in (chosen, rejected)]
    return math.log1p(math.exp(rewards[1] - rewards[0]))

"""linear_logprob against float64, forward and backward, whole and over a vocabulary cut over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import jobs
from tests.pool import ranks
from triton_kernels import linear_logprob


def problem(rows: int, vocab: int, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [rows, width], weight [vocab, width] and targets [rows]."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=draw)
    return hidden, torch.randn(vocab, width, generator=draw), torch.randint(0, vocab, (rows,), generator=draw)


def reference(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, gradient of hidden, gradient of weight) in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logprob = torch.log_softmax(hidden @ weight.T, -1).gather(1, target[:, None])[:, 0]
    logprob.backward(upstream.double())
    assert hidden.grad is not None
    assert weight.grad is not None
    return logprob.detach(), hidden.grad, weight.grad


def check_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert float((got.double() - expected).abs().max() if got.numel() else 0.0) <= 3e-6 * scale


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize(("rows", "vocab", "chunk"), [(17, 1000, 4096), (17, 1000, 5), (1, 257, 4), (0, 64, 4), (64, 4104, 16)])
def test_whole_vocabulary(rows: int, vocab: int, chunk: int, mode: str) -> None:
    hidden, weight, target = problem(rows, vocab)
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    logprob, grad_hidden, grad_weight = reference(hidden, weight, target, upstream)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    got = linear_logprob(hidden, weight, target, mode=mode, chunk=chunk)  # type: ignore[arg-type]
    got.backward(upstream)
    assert hidden.grad is not None
    assert weight.grad is not None
    check_close(got.detach(), logprob)
    check_close(hidden.grad, grad_hidden)
    check_close(weight.grad, grad_weight)


def test_only_the_wanted_rows() -> None:
    hidden, weight, target = problem(12, 300)
    rows = torch.tensor([7, 2, 11])
    wanted = torch.zeros(12).index_fill(0, rows, 1.0)
    logprob, grad_hidden, grad_weight = reference(hidden, weight, target, wanted)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    got = linear_logprob(hidden, weight, target, rows_M=rows)
    got.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    check_close(got.detach(), logprob * wanted.double())
    check_close(hidden.grad, grad_hidden)
    check_close(weight.grad, grad_weight)


def test_padding_of_the_vocabulary_has_no_probability_and_no_gradient() -> None:
    hidden, weight, target = problem(9, 250)
    padded = torch.cat([weight, torch.full((6, 32), 3.0)])
    upstream = torch.ones(9)
    logprob, grad_hidden, _ = reference(hidden, weight, target, upstream)
    hidden, padded = hidden.requires_grad_(), padded.requires_grad_()
    got = linear_logprob(hidden, padded, target, vocab_valid=250)
    got.sum().backward()
    assert hidden.grad is not None
    assert padded.grad is not None
    check_close(got.detach(), logprob)
    check_close(hidden.grad, grad_hidden)
    assert not padded.grad[250:].any()


def test_logits_far_apart() -> None:
    """A target 160 nats below the maximum: exp(logit - maximum) is 0 in fp32, its log-prob is not."""
    weight = torch.tensor([[80.0], [-80.0], [0.0]])
    got = linear_logprob(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))
    assert got.tolist() == [0.0, -160.0, -80.0]


def test_bf16_keeps_logits_in_fp32() -> None:
    hidden, weight, target = problem(33, 500)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    upstream = torch.ones(33)
    logprob, grad_hidden, grad_weight = reference(hidden, weight, target, upstream)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    got = linear_logprob(hidden, weight, target, chunk=8)
    got.sum().backward()
    assert got.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    check_close(got.detach(), logprob)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=2e-2, atol=2e-2 * float(grad_hidden.abs().max()))
    torch.testing.assert_close(weight.grad.double(), grad_weight, rtol=2e-2, atol=2e-2 * float(grad_weight.abs().max()))


@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_over_ranks(size: int) -> None:
    """Cut over 2 and 4 ranks, the last shard with padding: the whole's numbers, the same bits on every rank."""
    hidden, weight, target = problem(21, 250)
    logprob, grad_hidden, grad_weight = reference(hidden, weight, target, torch.ones(21))
    found = ranks(size).run(jobs.sharded_logprob, hidden=hidden, weight=weight, target=target, valid=250, padded=256)
    for got, _, _ in found:
        assert torch.equal(got, found[0][0])
    check_close(found[0][0], logprob)
    check_close(torch.stack([part for _, part, _ in found]).sum(0), grad_hidden)
    check_close(torch.cat([part for _, _, part in found])[:250], grad_weight)

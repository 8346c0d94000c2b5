"""linear_logprob against float64, forward and backward, with the vocabulary on one rank and sharded."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.config import Model, ModelShape, Parallel
from tests.support import jobs_kernels_logprob as jobs
from tests.support.pool import ranks
from triton_kernels import linear_logprob, linear_policy_loss, logprob
from triton_kernels.linear_logprob import Mode, chunk_rows


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
    assert float((got.double() - expected).abs().max() if got.numel() else 0.0) <= 2e-6 * scale


def check_gradients(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, **options: Any) -> None:
    logprob, grad_hidden, grad_weight = reference(hidden, weight, target, upstream)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    actual, entropy, _ = linear_logprob(hidden, weight, target, **options)
    assert entropy is None
    actual.backward(upstream)
    assert hidden.grad is not None
    assert weight.grad is not None
    check_close(actual.detach(), logprob)
    check_close(hidden.grad, grad_hidden)
    check_close(weight.grad, grad_weight)


def check_low_precision(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Logits of 16-bit hidden states and weights stay in fp32; the gradients are rounded."""
    logprob, grad_hidden, grad_weight = reference(hidden, weight, target, torch.ones(len(target)))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    actual, _, _ = linear_logprob(hidden, weight, target, chunk=8)
    actual.sum().backward()
    assert actual.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    check_close(actual.detach(), logprob)
    for actual, expected in ((hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        torch.testing.assert_close(actual.double(), expected, rtol=0.0, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize(
    ("rows", "vocab", "chunk"), [(17, 1000, 4096), (17, 1000, 5), (1, 257, 4), (0, 64, 4), (64, 4104, 16), (17, 16033, 17)]
)
def test_whole_vocabulary(rows: int, vocab: int, chunk: int, mode: str) -> None:
    hidden, weight, target = problem(rows, vocab)
    check_gradients(hidden, weight, target, torch.randn(rows, generator=torch.Generator().manual_seed(1)), mode=mode, chunk=chunk)


def test_a_subset_of_rows() -> None:
    hidden, weight, target = problem(12, 300)
    rows = torch.tensor([7, 2, 11])
    expected = torch.zeros(12).index_fill(0, rows, 1.0)
    logprob, grad_hidden, grad_weight = reference(hidden, weight, target, expected)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    actual, _, _ = linear_logprob(hidden, weight, target, rows=rows)
    actual.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    check_close(actual.detach(), logprob * expected.double())
    check_close(hidden.grad, grad_hidden)
    check_close(weight.grad, grad_weight)


def test_padding_of_the_vocabulary_has_no_probability_and_no_gradient() -> None:
    hidden, weight, target = problem(9, 250)
    padded = torch.cat([weight, torch.full((6, 32), 3.0)])
    upstream = torch.ones(9)
    logprob, grad_hidden, _ = reference(hidden, weight, target, upstream)
    hidden, padded = hidden.requires_grad_(), padded.requires_grad_()
    actual, _, _ = linear_logprob(hidden, padded, target, vocab_valid=250)
    actual.sum().backward()
    assert hidden.grad is not None
    assert padded.grad is not None
    check_close(actual.detach(), logprob)
    check_close(hidden.grad, grad_hidden)
    assert not padded.grad[250:].any()


def test_logits_far_apart() -> None:
    """A target 160 nats below the maximum: exp(logit - maximum) is 0 in fp32, but its log-prob is finite."""
    weight = torch.tensor([[80.0], [-80.0], [0.0]])
    actual, _, _ = linear_logprob(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))
    assert actual.tolist() == [0.0, -160.0, -80.0]


def test_bf16_keeps_logits_in_fp32() -> None:
    hidden, weight, target = problem(33, 500)
    check_low_precision(hidden.bfloat16(), weight.bfloat16(), target)


def test_bf16_logits() -> None:
    """Half the memory, with an error of a hundredth of a nat."""
    hidden, weight, target = problem(33, 500)
    hidden, weight = hidden.bfloat16() * 0.3, weight.bfloat16()
    logprob, _, _ = reference(hidden, weight, target, torch.ones(33))
    actual, _, _ = linear_logprob(hidden, weight, target, logits_dtype=torch.bfloat16)
    assert 1e-4 < float((actual - logprob).abs().max()) < 3e-2


@pytest.mark.parametrize("rows", [None, torch.tensor([7, 2, 11])])
def test_entropy_temperature_and_lse(rows: Tensor | None) -> None:
    """All three outputs and their gradients equal those of logprob on the full logits."""
    inputs = problem(12, 300)
    upstream = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    expected = torch.arange(12) if rows is None else rows
    results = []
    for fused in (True, False):
        hidden, weight, target = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_(), inputs[2]
        if fused:
            actual = linear_logprob(hidden, weight, target, rows=rows, inv_temp=0.7, entropy=True, chunk=5)
        else:
            actual = logprob(hidden @ weight.T, target, inv_temp=0.7, entropy=True)
        assert actual[1] is not None
        values = torch.stack([actual[0], actual[1], actual[2]])
        if fused:
            assert not values.detach()[:, ~torch.zeros(12, dtype=torch.bool).index_fill(0, expected, True)].any()
        values = values[:, expected]
        (values * upstream[:, expected]).sum().backward()
        results.append((values.detach(), hidden.grad, weight.grad))
    for fused_part, whole_part in zip(*results, strict=True):
        assert fused_part is not None
        assert whole_part is not None
        check_close(fused_part, whole_part.double())


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_weight_gradient_of_microbatches_in_fp32(mode: Mode) -> None:
    """Two microbatches in flight, as in a pipeline: their gradients are summed in the caller's accumulator, and weight.grad stays None."""
    hidden, weight, target = problem(20, 300)
    _, _, expected = reference(hidden, weight.bfloat16(), target, torch.ones(20))
    weight = weight.bfloat16().requires_grad_()
    total = torch.ones(300, 32)
    losses = [
        linear_logprob(hidden[part].bfloat16(), weight, target[part], mode=mode, weight_grad=total)[0].sum()
        for part in (slice(0, 9), slice(9, 20))
    ]
    for loss in losses:
        loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(total.double() - 1, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_frozen_parts() -> None:
    hidden, weight, target = problem(6, 50)
    hidden.requires_grad_()
    linear_logprob(hidden, weight, target)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    alone = hidden.grad
    weight.requires_grad_()
    linear_logprob(hidden.detach(), weight, target)[0].sum().backward()
    assert weight.grad is not None
    _, grad_hidden, grad_weight = reference(hidden.detach(), weight.detach(), target, torch.ones(6))
    check_close(alone, grad_hidden)
    check_close(weight.grad, grad_weight)


def test_which_modes_save_logits() -> None:
    """Logits stay in memory until backward only with mode="save"."""
    hidden, weight, target = problem(6, 50)
    weight.requires_grad_()
    kept: dict[Mode, int] = {}
    for mode in get_args(Mode):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t):
            actual, _, _ = linear_logprob(hidden, weight, target, mode=mode)
        kept[mode] = sum(t.numel() for t in saved if t.shape == (6, 50))
        assert actual.requires_grad == (mode != "nograd")
    assert kept == {"save": 300, "recompute": 0, "nograd": 0}


def test_saved_logits_can_be_used_twice() -> None:
    """Backward does not modify saved logits, as autograd requires."""
    hidden, weight, target = problem(6, 50)
    total = linear_logprob(hidden, weight.requires_grad_(), target, chunk=4)[0].sum()
    first, second = (torch.autograd.grad(total, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_backward_allocates_one_chunk() -> None:
    """Backward allocates, in addition to the caller's accumulator, the gradient of a chunk's logits and the reference's temporaries."""
    hidden, weight, target = problem(64, 1000, width=512)
    total, chunk = torch.zeros_like(weight), 8 * weight[:, 0].nbytes
    peaks = {}
    modes: tuple[Mode, ...] = ("save", "recompute")
    for mode in modes:
        loss = linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), target, mode=mode, chunk=8, weight_grad=total)[0].sum()
        peaks[mode] = jobs.peak_bytes(loss.backward)
    assert peaks["save"] <= peaks["recompute"] <= 2 * chunk + hidden.nbytes < weight.nbytes / 4


def test_on_meta_tensors() -> None:
    hidden, weight, target = (each.to("meta") for each in problem(6, 50))
    actual, _, _ = linear_logprob(hidden, weight.requires_grad_(), target)
    actual.sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == (50, 32)


@pytest.mark.parametrize(("mode", "products"), [("save", 3), ("recompute", 4)])
def test_flops_are_counted(mode: Mode, products: int) -> None:
    hidden, weight, target = problem(6, 50)
    with FlopCounterMode(display=False) as counter:
        linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), target, mode=mode)[0].sum().backward()
        linear_policy_loss(hidden, weight, target, torch.ones(6))[0].backward()
    assert counter.get_total_flops() == (products + 3) * 2 * 6 * 50 * 32


@pytest.mark.parametrize(
    ("complaint", "change"),
    [
        ("hidden (6, 31) and weight (50, 32) must be", {"hidden": torch.zeros(6, 31)}),
        ("hidden is torch.bfloat16, weight is torch.float32", {"hidden": torch.zeros(6, 32, dtype=torch.bfloat16)}),
        ("logits_dtype=torch.bfloat16 must be torch.float32 or the weight's torch.float32", {"logits_dtype": torch.bfloat16}),
        ("weight_grad is torch.bfloat16 (50, 32)", {"weight_grad": torch.zeros(50, 32, dtype=torch.bfloat16)}),
        ("chunk=0 must be 1 to 1024 rows", {"chunk": 0}),
        ("mode='keep' is unknown; use save, recompute or nograd", {"mode": "keep"}),
        ("target[1]=50 is outside the vocabulary 0 ... 49", {"target": torch.tensor([0, 50, 1, 1, 1, 1])}),
        ("target is torch.int64 (3,); pass torch.int64 (6,)", {"target": torch.zeros(3, dtype=torch.int64)}),
    ],
)
def test_bad_input_is_named(complaint: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {**dict(zip(("hidden", "weight", "target"), problem(6, 50), strict=True)), **change}
    with pytest.raises(ValueError, match=re.escape(complaint)):
        linear_logprob(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_vocabulary(size: int) -> None:
    """Sharded over 2 and 4 ranks, the last shard with padding: the results of one rank, with the same bits on every rank."""
    hidden, weight, target = problem(21, 250)
    logprob, grad_hidden, grad_weight = reference(hidden, weight, target, torch.ones(21))
    results = ranks(size).run(jobs.sharded_logprob, hidden=hidden, weight=weight, target=target, valid=250, padded=256)
    for actual, _, _ in results:
        assert torch.equal(actual, results[0][0])
    check_close(results[0][0], logprob)
    check_close(torch.stack([part for _, part, _ in results]).sum(0), grad_hidden)
    check_close(torch.cat([part for _, _, part in results])[:250], grad_weight)


@pytest.mark.parametrize("size", [2, 4])
def test_policy_loss_with_a_sharded_vocabulary(size: int) -> None:
    """Negative log-likelihood with its gradient computed in forward: the results of one rank."""
    hidden, weight, target = problem(21, 250)
    token_weight = torch.rand(21, generator=torch.Generator().manual_seed(1))
    logprob, grad_hidden, grad_weight = reference(hidden, weight, target, -token_weight)
    case = {"hidden": hidden, "weight": weight, "target": target, "valid": 250, "padded": 256}
    results = ranks(size).run(jobs.sharded_policy_loss, **case, token_weight=token_weight)
    for total, _, _ in results:
        check_close(total, -(logprob * token_weight.double()).sum())
    check_close(torch.stack([part for _, part, _ in results]).sum(0), grad_hidden)
    check_close(torch.cat([part for _, _, part in results])[:250], grad_weight)


@pytest.mark.parametrize("chunk", [8, 64])
def test_no_uninitialized_memory_is_read(chunk: int) -> None:
    """One chunk, several chunks and no rows: with deterministic algorithms, new memory is filled with NaN."""
    hidden, weight, target = problem(20, 300)
    torch.use_deterministic_algorithms(True)
    try:
        for rows in (20, 0):
            leaves = hidden[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
            logp, _, _ = linear_logprob(*leaves, target[:rows], chunk=chunk)
            grads = torch.autograd.grad(logp.sum(), leaves)
            assert all(grad.isfinite().all() for grad in grads)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not grads[1].any()


@pytest.mark.parametrize(("vocab", "rows"), [(16032, 8192), (32064, 8192), (64128, 4096), (128256, 4096)])
def test_chunk_logits_take_at_most_a_gibibyte(vocab: int, rows: int) -> None:
    assert chunk_rows(vocab) == rows


def test_the_engine_accumulates_in_main_grad() -> None:
    """A last stage without an embedding: a whole step allocates less than one gradient of the output layer's size."""
    model = Model(init=ModelShape(layers=2, hidden=256, ffn=64, heads=4, kv_heads=4, head_dim=8, vocab=8192))
    first, last = ranks(2).run(jobs.output_layer, parallel=Parallel(pp=2, distributed_optimizer=False), model=model)
    assert first == ([], 0, 0)
    into_main_grad, peak, size = last
    assert into_main_grad == [True] * 3
    assert peak < size == 8192 * 256 * 4

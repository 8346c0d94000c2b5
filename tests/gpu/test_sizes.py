"""The kernels at the sizes of real models: accuracy against float64, run-to-run determinism, and batch invariance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.kernels import test_linear_logprob as linear
from tests.kernels import test_logprob as logits
from tests.support import check_decode_attention as decoding
from tests.support import layers
from triton_kernels import decode_attention, linear_logprob, linear_policy_loss, logprob, rmsnorm, rope, swiglu
from triton_kernels.linear_logprob import Mode

WIDTH, SHARD = 4096, 16032  # hidden states of Llama 8B, and an eighth of its vocabulary
GRADIENT = 1e-2  # relative error of a bfloat16 gradient


def output_layer(rows: int, vocab: int = SHARD) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 hidden states, a weight such that logits have a standard deviation of 3.5, and targets."""
    hidden, weight, target = linear.problem(rows, vocab, WIDTH)
    return hidden.bfloat16(), (weight * (3.5 / WIDTH**0.5)).bfloat16(), target


def relative(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None
    assert got.isfinite().all()
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("vocab", [128256, 16032, 16033, 128257])
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_logprob(rows: int, vocab: int) -> None:
    logits.check_against_float64(rows, vocab, inv_temp=0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logprob_of_16_bits(dtype: torch.dtype) -> None:
    given, target, upstream = logits.problem(40, 128256)
    given = given.to(dtype)
    expected, expected_grad = logits.reference(given, target, upstream)
    results, grad = logits.run(given, target, upstream)
    logits.check_close(results, expected)
    assert relative(grad, expected_grad) <= GRADIENT


def test_a_row_of_logits_has_the_same_bits_in_any_batch() -> None:
    given, target, upstream = logits.problem(5000, SHARD)
    together, grad = logits.run(given, target, upstream)
    for part in (slice(0, 1), slice(1, 18), slice(100, 4196), slice(4999, 5000)):
        alone, alone_grad = logits.run(given[part], target[part], upstream[:, part])
        assert torch.equal(alone, together[:, part])
        assert torch.equal(alone_grad, grad[part])


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_hidden_states_has_the_same_bits_in_any_batch(logits_dtype: torch.dtype) -> None:
    """The product has the same shape in any batch. So old, reference and policy log-probs are equal, and PPO's first ratio is exactly 1."""
    hidden, weight, target = output_layer(5000)
    together, _, lse = linear_logprob(hidden, weight, target, mode="nograd", logits_dtype=logits_dtype)
    for part in (slice(0, 1), slice(1, 18), slice(17, 4113), slice(4999, 5000)):
        for mode in get_args(Mode):
            alone, _, alone_lse = linear_logprob(hidden[part].requires_grad_(), weight, target[part], mode=mode, logits_dtype=logits_dtype)
            assert torch.equal(alone, together[part]), mode
            assert torch.equal(alone_lse, lse[part]), mode


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize(("rows", "vocab"), [(1, SHARD), (300, 16033), (5000, SHARD)])
def test_linear_logprob(rows: int, vocab: int, mode: Mode) -> None:
    hidden, weight, target = output_layer(rows, vocab)
    expected, *expected_grads = linear.reference(hidden, weight, target, torch.ones(rows))
    results, *grads = gradients(lambda h, w: linear_logprob(h, w, target, mode=mode)[0], hidden, weight)
    assert float((results - expected).abs().max()) <= 2e-3
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert relative(actual, wanted) <= GRADIENT


def test_policy_loss() -> None:
    hidden, weight, target = output_layer(5000)
    expected, *expected_grads = linear.reference(hidden, weight, target, torch.full((5000,), -1.0))
    results, *grads = gradients(lambda h, w: linear_policy_loss(h, w, target, torch.ones(5000))[0], hidden, weight)
    assert float(results) == pytest.approx(-float(expected.sum()), rel=1e-4)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert relative(actual, wanted) <= GRADIENT


def test_the_weight_gradient_is_added_to_the_callers() -> None:
    """For two microbatches of several chunks, in float32."""
    hidden, weight, target = output_layer(9000)
    *_, expected = linear.reference(hidden, weight, target, torch.ones(9000))
    total = torch.zeros(weight.shape)
    for part in (slice(0, 8500), slice(8500, 9000)):
        leaf = weight.detach().requires_grad_()
        linear_logprob(hidden[part], leaf, target[part], weight_grad=total)[0].sum().backward()
        assert leaf.grad is None
    assert relative(total, expected) <= GRADIENT


@pytest.mark.parametrize("how", [{"mode": "save"}, {"mode": "recompute"}, {"logits_dtype": torch.bfloat16}])
def test_two_runs_have_the_same_bits(how: dict[str, Any]) -> None:
    hidden, weight, target = output_layer(5000)
    first, second = (gradients(lambda h, w: linear_logprob(h, w, target, **how)[0], hidden, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The result of `function`, and the gradients of its sum."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    return results.detach(), *torch.autograd.grad(results.sum(), leaves)


def test_a_target_outside_the_vocabulary_gives_nan_without_a_device_fault() -> None:
    hidden, weight, target = output_layer(20)
    target[7], target[13] = -100, SHARD
    for results in (linear_logprob(hidden, weight, target)[0], logprob((hidden @ weight.T).float(), target)[0]):
        assert results.isnan().nonzero()[:, 0].tolist() == [7, 13]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_rmsnorm(dtype: torch.dtype, fused: bool) -> None:
    layers.check_rmsnorm(1025, 16384, dtype, fused)
    layers.check_rmsnorm(33, 576, dtype, fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_rope(dtype: torch.dtype) -> None:
    layers.check_swiglu(513, 14336, dtype)
    layers.check_swiglu(70000, 128, dtype)
    layers.check_rope(1025, 40, 128, dtype)
    layers.check_rope_qkv(1025, 8, 4, 128, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "group", "size"), [(8, 4, 128), (1, 16, 128), (3, 3, 64), (2, 4, 96)])
def test_decode_attention(heads: int, group: int, size: int, dtype: torch.dtype) -> None:
    decoding.check([1, 4096, 0, 257, 2048, 1000], heads, group, size, 4096, dtype=dtype, spare=1)


def test_attention_of_a_row_has_the_same_bits_in_any_batch_and_run() -> None:
    decoding.check_batch_invariance()
    given = decoding.problem([2000] * 64, 8, 4, 128, 2048, torch.bfloat16)
    assert torch.equal(decode_attention(*given), decode_attention(*given))


def test_slots_beyond_2_31_elements() -> None:
    query, keys, values, lengths = decoding.problem([5, 9, 3, 8], 2, 2, 16, 9, torch.bfloat16)
    far = torch.empty(3 * 2**30 + keys[0].numel(), dtype=torch.bfloat16).as_strided(keys.shape, (2**30, *keys.stride()[1:]))
    for kept in (keys, values):
        far.copy_(kept)
        assert torch.equal(decode_attention(query, far, far, lengths), decode_attention(query, kept, kept, lengths))


@pytest.mark.parametrize("layer", [lambda x: rmsnorm(x, torch.ones(8), 1e-5), swiglu, lambda x: rope(x[:, None], *layers.angles(4, 8))])
def test_rows_beyond_2_31_elements(layer: Callable[[Tensor], Tensor]) -> None:
    """Row 3 starts at element 3 * 2^30, an offset that does not fit in 32 bits."""
    far = torch.empty(3 * 2**30 + 8, dtype=torch.bfloat16).as_strided((4, 8), (2**30, 1))
    near = layers.drawn(4, 8, dtype=torch.bfloat16)
    far.copy_(near)
    assert torch.equal(layer(far), layer(near))

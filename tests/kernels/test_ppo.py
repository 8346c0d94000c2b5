"""ppo_loss on CPU: its torch reference, as an operator, its weights, and its errors for invalid input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.check_ppo import (  # noqa: F401 (collected here as tests)
    SETTINGS,
    TRAINED,
    problem,
    test_against_float64,
    test_bf16,
    test_both_clips,
    test_far_ratios,
    test_nothing_at_all,
    test_runs_repeat,
    test_small_divergences_keep_their_digits,
    test_tokens_without_weight_are_not_computed_with,
    test_value_alone,
)
from tests.support.float64 import sums
from triton_kernels import ppo_loss, value_loss


def test_a_way_of_averaging_is_a_weight() -> None:
    """Token mean, sequence mean and a constant denominator, for one batch and for the same batch in two microbatches."""
    ends = torch.tensor([0, 3, 13, 20])
    inputs = problem(20)
    mask = inputs.pop("weight") != 0
    ones = torch.ones(20, dtype=torch.float64)
    counts = sums(ones, mask, ends)
    logp, old, advantage = (inputs[name].double() for name in ("logp", "old_logp", "advantage"))
    term = torch.maximum(-advantage * (logp - old).exp(), -advantage * (logp - old).exp().clamp(0.8, 1.2))
    each = sums(term, mask, ends)
    ways = {
        "token": (mask / mask.sum(), each.sum() / mask.sum()),
        "sequence": (mask / (counts.repeat_interleave(ends.diff()) * 3), (each / counts).mean()),
        "constant": (mask / (10.0 * 3), each.sum() / 30),
    }
    for weight, expected in ways.values():
        policy: dict[str, Any] = {name: inputs[name] for name in ("logp", "old_logp", "advantage")} | {"weight": weight.float()}
        whole, _ = ppo_loss(**policy)
        parts = [ppo_loss(**{name: x[part] for name, x in policy.items()})[0] for part in (slice(0, 3), slice(3, 20))]
        assert float(whole) == pytest.approx(float(expected), rel=1e-5)
        assert float(sum(parts)) == pytest.approx(float(expected), rel=1e-5)


def test_operator_keeps_the_rules_of_torch() -> None:
    inputs = problem(9)
    for name in TRAINED:
        inputs[name].requires_grad_()
    order = ("weight", "logp", "old_logp", "advantage", "ref_logp", "value", "old_value", "returns", "entropy")
    everything = [inputs[name] for name in order]
    policy = [*everything[:4], *[None] * 5]
    settings = (0.3, 0.8, 0.2, 0.28, 0.05, 0.2, 0.1, 0.01, "k3")
    for given in (everything, policy):
        torch.library.opcheck(torch.ops.trivet.ppo.default, (*given, *settings))


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_gradcheck(kl: Any) -> None:
    inputs = {name: tensor.double() for name, tensor in problem(9).items()}
    trained = tuple(inputs.pop(name).requires_grad_() for name in TRAINED)

    def loss(logp: Tensor, value: Tensor, entropy: Tensor) -> Tensor:
        return ppo_loss(logp=logp, value=value, entropy=entropy, **inputs, **SETTINGS, kl=kl)[0]

    assert torch.autograd.gradcheck(loss, trained)


def test_compiles_whole() -> None:
    inputs = problem(9)
    logp = inputs.pop("logp").requires_grad_()

    def loss(x: Tensor) -> Tensor:
        total, stats = ppo_loss(x, **inputs, **SETTINGS)
        return total + stats.approx_kl

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logp), loss(logp))
    assert torch.equal(torch.autograd.grad(compiled(logp), logp)[0], torch.autograd.grad(loss(logp), logp)[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kl": "k4"}, "kl='k4' must be 'k1', 'k2' or 'k3'"),
        ({"ref_logp": None}, "kl_coef=0.05 needs ref_logp; pass it or set kl_coef=0"),
        ({"entropy": None}, "entropy_coef=0.01 needs entropy; pass it or set entropy_coef=0"),
        ({"returns": None}, "the value loss needs value, old_value and returns; pass all three or none"),
        ({"clip_low": -0.2}, "clip_low=-0.2 must not be negative"),
        ({"old_logp": torch.zeros(8)}, r"old_logp is float32 \[8\] on cpu; it must be float32 or bfloat16 \[T\] = \[9\]"),
        ({"advantage": torch.zeros(9, dtype=torch.int32)}, r"advantage is int32 \[9\]"),
        ({"weight": torch.ones(9, dtype=torch.bfloat16)}, "weight is bfloat16, .* pass float32"),
    ],
)
def test_bad_input_is_answered_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo_loss(**{**problem(9), **SETTINGS, **wrong})


def test_bad_value_clip() -> None:
    with pytest.raises(ValueError, match="clip=-1 must not be negative"):
        value_loss(*torch.zeros(4, 3).unbind(), clip=-1)

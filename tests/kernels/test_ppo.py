"""ppo_loss on CPU: its torch reference, as an operator, its weights, and its errors for invalid input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.check_ppo import (  # noqa: F401 (collected here as tests)
    SETTINGS,
    problem,
    test_against_float64,
    test_bf16,
    test_both_clips,
    test_empty_input,
    test_far_ratios,
    test_runs_repeat,
    test_small_divergences_keep_their_digits,
    test_tokens_of_weight_0_are_not_read,
    test_value_against_float64,
    test_values_of_weight_0_are_not_read,
    value_problem,
)
from tests.support.float64 import sums
from triton_kernels import ppo_loss, value_loss


def test_averages_are_expressed_as_weights() -> None:
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
        full, _ = ppo_loss(**policy)
        parts = [ppo_loss(**{name: x[part] for name, x in policy.items()})[0] for part in (slice(0, 3), slice(3, 20))]
        assert float(full) == pytest.approx(float(expected), rel=1e-5)
        assert float(sum(parts)) == pytest.approx(float(expected), rel=1e-5)


def test_operator_keeps_the_rules_of_torch() -> None:
    inputs = problem(9)
    values = value_problem(9)
    inputs["logp"].requires_grad_()
    values["value"].requires_grad_()
    policy = [inputs[name] for name in ("weight", "logp", "old_logp", "advantage", "ref_logp")]
    value = [values["weight"], None, None, None, None, *(values[name] for name in ("value", "old_value", "returns"))]
    settings = (0.3, 0.8, 0.2, 0.28, 0.05, 0.2, "k3")
    for given in ([*policy, None, None, None], [*policy[:4], *[None] * 4], value):
        torch.library.opcheck(torch.ops.trivet.ppo.default, (*given, *settings))


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_gradcheck(kl: Any) -> None:
    inputs = {name: tensor.double() for name, tensor in problem(9).items()}
    logp = inputs.pop("logp").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo_loss(logp=x, **inputs, **SETTINGS, kl=kl)[0], (logp,))


def test_gradcheck_of_the_value_loss() -> None:
    inputs = {name: tensor.double() for name, tensor in value_problem(9).items()}
    value = inputs.pop("value").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(value=x, **inputs), (value,))  # type: ignore[arg-type]


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

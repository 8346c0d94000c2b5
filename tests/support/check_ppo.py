"""Checks of ppo_loss and value_loss, which run on the reference (test_ppo.py) and on the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import float64
from tests.support.float64 import check_close, normal, packed
from triton_kernels import ppo_loss, value_loss

SETTINGS: dict[str, Any] = {
    "mean": 0.3,
    "rstd": 0.8,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "kl_coef": 0.05,
}


def problem(tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of ppo_loss. A third of the weights are 0. Log-ratios are of size 0.3, so that both clips are active."""
    logp = normal(tokens, 1) - 2
    inputs = {
        "logp": logp,
        "old_logp": logp + normal(tokens, 3, 0.3),
        "advantage": normal(tokens, 4),
        "ref_logp": logp + normal(tokens, 5, 0.5),
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items()} | {"weight": weights(tokens)}


def value_problem(tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of value_loss, with the same weights."""
    value = normal(tokens, 2)
    inputs = {"value": value, "old_value": value + normal(tokens, 6, 0.3), "returns": normal(tokens, 7)}
    return {name: tensor.to(dtype) for name, tensor in inputs.items()} | {"weight": weights(tokens)}


def weights(tokens: int) -> Tensor:
    _, mask = packed([tokens])
    return torch.where(mask, normal(tokens, 9).abs() + 0.1, 0.0) / max(1, tokens)


def exact_terms(inputs: dict[str, Tensor], kl: str) -> dict[str, Tensor]:
    """Every statistic except the loss, as a term per token [T]."""
    logp, old = inputs["logp"], inputs["old_logp"]
    advantage = (inputs["advantage"] - SETTINGS["mean"]) * SETTINGS["rstd"]
    policy = float64.clipped_policy(logp, old, advantage, SETTINGS["clip_low"], SETTINGS["clip_high"])
    return {
        "policy": policy,
        "kl": float64.kl(logp, inputs["ref_logp"], kl),
        "clip_fraction": (policy > -advantage * (logp - old).exp()).double(),
        "approx_kl": torch.expm1(logp - old) - (logp - old),
    }


def check_against_float64(tokens: int, kl: Any, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    inputs = problem(tokens, dtype)
    exact = {name: tensor.double().requires_grad_(name == "logp") for name, tensor in inputs.items()}
    terms = exact_terms(exact, kl)
    loss_T = terms["policy"] + 0.05 * terms["kl"]
    (exact["weight"] * loss_T).sum().mul(3.0).backward()

    inputs["logp"].requires_grad_()
    loss, stats = ppo_loss(**inputs, **SETTINGS, kl=kl)
    (3.0 * loss).backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, stats.loss)
    for name, term in (terms | {"loss": loss_T}).items():
        size = (exact["weight"] * term.abs()).sum()  # relative to the terms, because their signs may cancel
        assert (getattr(stats, name) - (exact["weight"] * term).sum()).abs() <= 2e-6 * size, name
    assert not any(stat.requires_grad for stat in stats)
    check_grad(inputs["logp"], exact["logp"], dtype, tolerance)


def check_grad(tensor: Tensor, exact: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    assert tensor.grad is not None
    assert exact.grad is not None
    assert tensor.grad.dtype == dtype
    check_close(tensor.grad, exact.grad, tolerance)


def check_value_against_float64(tokens: int, dtype: torch.dtype = torch.float32) -> None:
    inputs = value_problem(tokens, dtype)
    exact = {name: tensor.double().requires_grad_(name == "value") for name, tensor in inputs.items()}
    expected = (exact["weight"] * float64.clipped_value(exact["value"], exact["old_value"], exact["returns"], 0.2)).sum()
    expected.mul(3.0).backward()
    inputs["value"].requires_grad_()
    loss = value_loss(**inputs)  # type: ignore[arg-type]
    (3.0 * loss).backward()
    assert loss.dtype == torch.float32
    check_close(loss.detach(), expected.detach())
    check_grad(inputs["value"], exact["value"], dtype, 2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("tokens", "kl"), [(1, "k3"), (17, "k1"), (17, "k2"), (17, "k3"), (1024, "k2"), (2500, "k1"), (2500, "k3")])
def test_against_float64(tokens: int, kl: str) -> None:
    check_against_float64(tokens, kl)


def test_bf16() -> None:
    check_against_float64(300, "k3", torch.bfloat16)
    check_value_against_float64(300, torch.bfloat16)


def test_tokens_of_weight_0_are_not_read() -> None:
    inputs = problem(50)
    expected, _ = ppo_loss(**inputs, **SETTINGS)
    dirty = with_nan(inputs, "logp")
    loss, stats = ppo_loss(**dirty, **SETTINGS)
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert all(stat.isfinite() for stat in stats)
    check_off(dirty["logp"].grad, inputs["weight"])


def test_values_of_weight_0_are_not_read() -> None:
    inputs = value_problem(50)
    expected = value_loss(**inputs)  # type: ignore[arg-type]
    dirty = with_nan(inputs, "value")
    loss = value_loss(**dirty)  # type: ignore[arg-type]
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    check_off(dirty["value"].grad, inputs["weight"])


def with_nan(inputs: dict[str, Tensor], trained: str) -> dict[str, Tensor]:
    """NaN wherever the weight is 0; `trained` requires a gradient."""
    off = inputs["weight"] == 0
    dirty = {name: tensor if name == "weight" else torch.where(off, torch.nan, tensor) for name, tensor in inputs.items()}
    dirty[trained].requires_grad_()
    return dirty


def check_off(grad: Tensor | None, weight: Tensor) -> None:
    assert grad is not None
    assert not grad[weight == 0].any()
    assert grad.isfinite().all()


def test_both_clips() -> None:
    """Ratios 0.7 and 1.5 with advantages of both signs: clipping applies if it increases the loss, and then the gradient is 0."""
    ratio = torch.tensor([0.7, 0.7, 1.5, 1.5, 1.25])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    logp = ratio.log().requires_grad_()
    loss, stats = ppo_loss(logp, torch.zeros(5), advantage, torch.ones(5), clip_low=0.2, clip_high=0.3)
    loss.backward()
    terms = torch.tensor([-0.7, 0.8, -1.3, 1.5, -1.25])
    torch.testing.assert_close(stats.policy, terms.sum())
    assert stats.clip_fraction == 2
    torch.testing.assert_close(logp.grad, torch.tensor([-0.7, 0.0, 0.0, 1.5, -1.25]))
    assert stats.kl == 0


def test_small_divergences_keep_their_digits() -> None:
    """k3 of x = 1e-4 is 5e-9, for which exp(x) - 1 - x in float32 has no correct digit."""
    for size in (1e-4, 1e-2, 0.5, 0.99, 1.01, 5.0):
        for x in (size, -size):
            logp, other, weight = torch.zeros(1, requires_grad=True), torch.tensor([x]), torch.ones(1)
            loss, stats = ppo_loss(logp, other, torch.zeros(1), weight, ref_logp=other, kl_coef=1.0, kl="k3")
            loss.backward()
            exact = other.double()
            check_close(stats.kl, (torch.expm1(exact) - exact)[0])
            check_close(stats.approx_kl, (torch.expm1(-exact) + exact)[0])
            assert logp.grad is not None
            check_close(logp.grad, -torch.expm1(exact))


def test_far_ratios() -> None:
    """Log-ratios of 1000 nats give finite results, and beyond the cutoff no gradient from the exponential."""
    logp = torch.tensor([1000.0, -1000.0]).requires_grad_()
    loss, stats = ppo_loss(logp, torch.zeros(2), -torch.ones(2), torch.ones(2), ref_logp=torch.zeros(2), kl="k3", kl_coef=1.0)
    loss.backward()
    assert float(stats.policy) == pytest.approx(torch.tensor(20.0).exp().item() + 0.8, rel=1e-5)
    assert float(stats.kl) == pytest.approx(999.0 + torch.tensor(20.0).exp().item() - 21.0, rel=1e-5)
    assert logp.grad is not None
    assert logp.grad.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("tokens", [1, 17, 1024, 2500])
def test_value_against_float64(tokens: int) -> None:
    check_value_against_float64(tokens)


def test_runs_repeat() -> None:
    inputs = problem(2500)
    inputs["logp"].requires_grad_()
    (first, stats), (second, again) = ppo_loss(**inputs, **SETTINGS), ppo_loss(**inputs, **SETTINGS)
    assert torch.equal(torch.stack(stats), torch.stack(again))
    assert torch.equal(*(torch.autograd.grad(loss, inputs["logp"])[0] for loss in (first, second)))


def test_empty_input() -> None:
    for tokens in (0, 5):
        inputs = problem(tokens) | {"weight": torch.zeros(tokens)}
        inputs["logp"].requires_grad_()
        loss, stats = ppo_loss(**inputs, **SETTINGS)
        loss.backward()
        assert [float(stat) for stat in stats] == [0.0] * 5
        assert inputs["logp"].grad is not None
        assert inputs["logp"].grad.tolist() == [0.0] * tokens

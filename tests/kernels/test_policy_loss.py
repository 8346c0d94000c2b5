"""linear_policy_loss against the same loss computed from linear_logprob, and its errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_linear_logprob import check_close, problem
from triton_kernels import linear_logprob, linear_policy_loss

SETTINGS = (0.2, 0.2, "k3", 0.0, "", 0, None, 1.0, True, 4, torch.float32)  # arguments of the operator, from clip_low to logits_dtype


def tokens(logp: Tensor, seed: int = 0) -> dict[str, Any]:
    """Weights, some 0; old log-probs below, within and above the clip range, one extremely far; advantages of both signs."""
    draw = torch.Generator().manual_seed(seed)
    count = len(logp)
    weight = torch.rand(count, generator=draw) * (torch.rand(count, generator=draw) < 0.7)
    old = logp + 0.4 * torch.randn(count, generator=draw)
    old[3] += 50
    weight[3] = 0.5
    return {"token_weight_N": weight, "old_logp_N": old, "advantage_N": torch.randn(count, generator=draw)}


def reference_loss(
    logp: Tensor,
    token_weight_N: Tensor,
    old_logp_N: Tensor | None = None,
    advantage_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    kl: str = "k3",
    kl_coef: float = 0.0,
) -> Tensor:
    if advantage_N is None:
        return -(token_weight_N * logp).sum()
    old_logp_N = logp.detach() if old_logp_N is None else old_logp_N
    ratio = (logp - old_logp_N).clamp(-20, 20).exp()
    term = torch.maximum(-ratio * advantage_N, -ratio.clamp(0.8, 1.3) * advantage_N)
    if ref_logp_N is not None:
        x = ref_logp_N - logp
        term = term + kl_coef * {"k1": -x, "k2": x * x / 2, "k3": x.exp() - 1 - x}[kl]
    return (token_weight_N * term).sum()


def check_loss(loss: str = "ppo", kl: str = "", **options: Any) -> None:
    """Value, log-probs, entropy and gradients, scaled by the upstream gradient. `loss`: nll, ppo, or first, with a ratio of 1."""
    results = []
    for fused in (True, False):
        hidden, weight, target = problem(33, 300)
        hidden, weight = hidden.mul_(0.3).requires_grad_(), weight.requires_grad_()
        given = tokens(linear_logprob(hidden, weight, target, mode="nograd", chunk=64)[0])
        dropped = {"nll": ("old_logp_N", "advantage_N"), "first": ("old_logp_N",), "ppo": ()}[loss]
        given = {name: value for name, value in given.items() if name not in dropped}
        if kl:
            given |= {"ref_logp_N": given["token_weight_N"] - 4.0, "kl": kl, "kl_coef": 0.3}
        if fused:
            total, logp, entropy = linear_policy_loss(hidden, weight, target, clip_high=0.3, chunk=8, entropy=True, **given, **options)
        else:
            logp, entropy, _ = linear_logprob(hidden, weight, target, inv_temp=options.get("inv_temp", 1.0), chunk=64, entropy=True)
            total = reference_loss(logp, **given)
        (3 * total).backward()
        assert entropy is not None
        results.append((total.detach(), logp.detach(), entropy.detach(), hidden.grad, weight.grad))
    for fused_part, written_part in zip(*results, strict=True):
        assert fused_part is not None
        assert written_part is not None
        check_close(fused_part, written_part.double())


@pytest.mark.parametrize("inv_temp", [1.0, 0.7])
@pytest.mark.parametrize("loss", ["nll", "ppo", "first"])
def test_loss_and_gradients(loss: str, inv_temp: float) -> None:
    check_loss(loss, inv_temp=inv_temp)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_loss_with_a_kl_term(kl: str) -> None:
    check_loss("ppo", kl)
    check_loss("first", kl)


def test_a_subset_of_rows() -> None:
    hidden, weight, target = problem(12, 300)
    rows = torch.tensor([7, 2, 11])
    weights = torch.rand(12, generator=torch.Generator().manual_seed(0))
    results = []
    choices: tuple[dict[str, Any], ...] = ({"rows": rows}, {})
    for options in choices:
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        expected = weights if options else weights * torch.zeros(12).index_fill(0, rows, 1.0)
        total, logp, entropy = linear_policy_loss(hidden, weight, target, expected, entropy=True, **options)
        total.backward()
        assert entropy is not None
        results.append((total.detach(), logp[rows], entropy[rows], hidden.grad, weight.grad))
    for some, all_ in zip(*results, strict=True):
        assert some is not None
        assert all_ is not None
        check_close(some, all_.double())


def test_tokens_of_weight_0_have_no_effect() -> None:
    """Not even tokens of probability 0."""
    hidden, weight, target = torch.ones(2, 1, requires_grad=True), torch.tensor([[1.0], [-torch.inf]]), torch.tensor([0, 1])
    total, logp, _ = linear_policy_loss(hidden, weight, target, torch.tensor([1.0, 0.0]))
    assert total.item() == 0.0
    assert logp[1].item() == -torch.inf


def test_weight_gradient_into_the_accumulator() -> None:
    """Two microbatches are added in forward; autograd gets no gradient, and without requires_grad nothing is added."""
    hidden, weight, target = problem(20, 300)
    hidden.requires_grad_()
    weight.requires_grad_()
    ones, total = torch.ones(20), torch.ones(300, 32)
    expected = torch.autograd.grad(linear_policy_loss(hidden, weight, target, ones)[0], (hidden, weight))
    parts = [slice(0, 9), slice(9, 20)]
    losses = [linear_policy_loss(hidden[p], weight, target[p], ones[p], weight_grad=total)[0] for p in parts]
    check_close(total - 1, expected[1].double())
    for loss in losses:
        loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None
    check_close(hidden.grad, expected[0].double())
    before = total.clone()
    with torch.no_grad():
        linear_policy_loss(hidden, weight, target, ones, weight_grad=total)
    assert torch.equal(total, before)


def test_an_accumulated_gradient_is_not_scaled_afterwards() -> None:
    hidden, weight, target = problem(3, 50)
    total, _, _ = linear_policy_loss(hidden, weight.requires_grad_(), target, torch.ones(3), weight_grad=torch.zeros(50, 32))
    with pytest.raises(ValueError, match=r"the gradient of the total is 0\.5, .* scale token_weight"):
        (0.5 * total).backward()


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    hidden, weight, target = problem(6, 50)
    _, _, grad_hidden, grad_weight = torch.ops.trivet.linear_policy_loss(
        hidden, weight, target, torch.ones(6), None, None, None, None, *SETTINGS, False, False
    )
    assert grad_hidden.numel() == grad_weight.numel() == 0
    total, _, _ = linear_policy_loss(hidden[:0], weight.requires_grad_(), target[:0], torch.ones(0))
    total.backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_operator_passes_opcheck_and_compiles(accumulate: bool) -> None:
    hidden, weight, target = problem(6, 50)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    given = tokens(torch.zeros(6))
    weight_grad = torch.zeros(50, 32) if accumulate else None
    arguments = (*given.values(), None, weight_grad, *SETTINGS, True, True)
    torch.library.opcheck(torch.ops.trivet.linear_policy_loss.default, (hidden.detach(), weight.detach(), target, *arguments))
    total, _, _ = torch.compile(linear_policy_loss, fullgraph=True, backend="aot_eager")(hidden, weight, target, **given)
    total.backward()
    compiled, weight.grad = weight.grad, None
    linear_policy_loss(hidden, weight, target, **given)[0].backward()
    assert compiled is not None
    assert weight.grad is not None
    assert torch.equal(compiled, weight.grad)


@pytest.mark.parametrize(
    ("complaint", "change"),
    [
        ("token_weight is torch.bool (3,); pass torch.float32 (3,)", {"token_weight_N": torch.ones(3, dtype=torch.bool)}),
        ("advantage is torch.float32 (2,); pass torch.float32 (3,)", {"advantage_N": torch.ones(2), "old_logp_N": torch.ones(3)}),
        ("old_logp needs advantage: pass both", {"old_logp_N": torch.ones(3)}),
        ("kl_coef=0.1 needs ref_logp", {"advantage_N": torch.ones(3), "kl_coef": 0.1}),
        ("clip_low=-1 must not be negative", {"clip_low": -1}),
        ("chunk=0 must be 1 to 1024 rows", {"chunk": 0}),
    ],
)
def test_bad_input_is_named(complaint: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"token_weight_N": torch.ones(3), **change}
    with pytest.raises(ValueError, match=re.escape(complaint)):
        linear_policy_loss(*problem(3, 50), **arguments)

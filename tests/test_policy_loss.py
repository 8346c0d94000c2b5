"""linear_policy_loss against the same loss written out over linear_logprob, and its complaints."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_linear_logprob import check_close, problem
from triton_kernels import linear_logprob, linear_policy_loss


def tokens(logp: Tensor, seed: int = 0) -> dict[str, Any]:
    """Weights, some 0; old log-probs on all sides of the clips, one absurdly far; advantages of both signs."""
    draw = torch.Generator().manual_seed(seed)
    count = len(logp)
    weight = torch.rand(count, generator=draw) * (torch.rand(count, generator=draw) < 0.7)
    old = logp + 0.4 * torch.randn(count, generator=draw)
    old[3] += 50
    weight[3] = 0.5
    return {"token_weight_N": weight, "old_logp_N": old, "advantage_N": torch.randn(count, generator=draw)}


def written_out(logp: Tensor, token_weight_N: Tensor, old_logp_N: Tensor | None = None, advantage_N: Tensor | None = None) -> Tensor:
    if old_logp_N is None or advantage_N is None:
        return -(token_weight_N * logp).sum()
    ratio = (logp - old_logp_N).clamp(-20, 20).exp()
    return (token_weight_N * torch.maximum(-ratio * advantage_N, -ratio.clamp(0.8, 1.3) * advantage_N)).sum()


def check_loss(ppo: bool, **how: Any) -> None:
    """Value and gradients, scaled by what comes from above."""
    found = []
    for fused in (True, False):
        hidden, weight, target = problem(33, 300)
        hidden, weight = hidden.mul_(0.3).requires_grad_(), weight.requires_grad_()
        given = tokens(linear_logprob(hidden, weight, target, mode="nograd", chunk=64)[0])
        given = given if ppo else {"token_weight_N": given["token_weight_N"]}
        if fused:
            total, logp = linear_policy_loss(hidden, weight, target, clip_high=0.3, chunk=8, **given, **how)
        else:
            logp, _, _ = linear_logprob(hidden, weight, target, inv_temp=how.get("inv_temp", 1.0), chunk=64)
            total = written_out(logp, **given)
        (3 * total).backward()
        found.append((total.detach(), logp.detach(), hidden.grad, weight.grad))
    for fused_part, written_part in zip(*found, strict=True):
        assert fused_part is not None
        assert written_part is not None
        check_close(fused_part, written_part.double())


@pytest.mark.parametrize("ppo", [False, True])
def test_loss_and_gradients(ppo: bool) -> None:
    check_loss(ppo)
    check_loss(ppo, inv_temp=0.7)


def test_only_the_wanted_rows() -> None:
    hidden, weight, target = problem(12, 300)
    rows = torch.tensor([7, 2, 11])
    weights = torch.rand(12, generator=torch.Generator().manual_seed(0))
    found = []
    choices: tuple[dict[str, Any], ...] = ({"rows": rows}, {})
    for how in choices:
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        wanted = weights if how else weights * torch.zeros(12).index_fill(0, rows, 1.0)
        total, logp = linear_policy_loss(hidden, weight, target, wanted, **how)
        total.backward()
        found.append((total.detach(), logp[rows], hidden.grad, weight.grad))
    for some, all_ in zip(*found, strict=True):
        assert some is not None
        assert all_ is not None
        check_close(some, all_.double())


def test_tokens_of_weight_0_do_not_count() -> None:
    """Not even impossible ones."""
    hidden, weight, target = torch.ones(2, 1, requires_grad=True), torch.tensor([[1.0], [-torch.inf]]), torch.tensor([0, 1])
    total, logp = linear_policy_loss(hidden, weight, target, torch.tensor([1.0, 0.0]))
    assert total.item() == 0.0
    assert logp[1].item() == -torch.inf


def test_weight_gradient_into_the_accumulator() -> None:
    """With two microbatches in flight: nothing is added before backward, and autograd gets none."""
    hidden, weight, target = problem(20, 300)
    weight.requires_grad_()
    ones, total = torch.ones(20), torch.ones(300, 32)
    linear_policy_loss(hidden, weight, target, ones)[0].backward(torch.tensor(0.5))
    assert weight.grad is not None
    expected, weight.grad = weight.grad, None
    losses = [linear_policy_loss(hidden[p], weight, target[p], ones[p], weight_grad=total)[0] for p in (slice(0, 9), slice(9, 20))]
    assert torch.equal(total, torch.ones(300, 32))
    for loss in losses:
        (0.5 * loss).backward()
    assert weight.grad is None
    check_close(total - 1, expected.double())


def test_nothing_is_made_for_nobody() -> None:
    hidden, weight, target = problem(6, 50)
    _, _, grad_hidden, grad_weight = torch.ops.trivet.linear_policy_loss(
        hidden, weight, target, torch.ones(6), None, None, None, 0.2, 0.2, "", 0, None, 1.0, 4, torch.float32, False, False
    )
    assert grad_hidden.numel() == grad_weight.numel() == 0
    total, _ = linear_policy_loss(hidden[:0], weight.requires_grad_(), target[:0], torch.ones(0))
    total.backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("accumulate", [False, True])
def test_registered_well_and_compiled(accumulate: bool) -> None:
    hidden, weight, target = problem(6, 50)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    given = tokens(torch.zeros(6))
    weight_grad = torch.zeros(50, 32) if accumulate else None
    arguments = (*given.values(), weight_grad, 0.2, 0.2, "", 0, None, 1.0, 4, torch.float32, True, True)
    torch.library.opcheck(torch.ops.trivet.linear_policy_loss.default, (hidden, weight, target, *arguments))
    total, _ = torch.compile(linear_policy_loss, fullgraph=True, backend="aot_eager")(hidden, weight, target, **given)
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
        ("one of old_logp and advantage is missing", {"advantage_N": torch.ones(3)}),
        ("chunk=0 must be at least 1", {"chunk": 0}),
    ],
)
def test_complaints(complaint: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"token_weight_N": torch.ones(3), **change}
    with pytest.raises(ValueError, match=re.escape(complaint)):
        linear_policy_loss(*problem(3, 50), **arguments)

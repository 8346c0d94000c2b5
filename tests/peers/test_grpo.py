"""The policy loss beside TRL's GRPOTrainer: value and gradient from the same log-probs, in float64.

TRL's loss types are averages of the same terms per token:

    grpo      the mean over responses of each response's mean      average="sequence"
    bnpo      the mean over the tokens of a microbatch             average="token", if a step is one microbatch
    dapo      the mean over the tokens of a step                   average="token"
    dr_grpo   sum / (responses * max_completion_length)            average="token" times tokens / (responses * max_completion_length)

The last is a constant factor per step, for which this project has no setting. The KL term is k3, the only one that TRL has. By default
TRL multiplies it by the token's importance ratio (use_bias_correction_kl, arXiv 2512.02556); this project does not, and the comparison
turns that off.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine import losses
from engine.types import Packed
from tests.peers.trl_trainers import LONGEST, online_trainer
from triton_kernels import ppo_loss

pytest.importorskip("trl", reason="TRL is not installed; pip install -e '.[peers]'")

LENGTHS = [8, 1, 5, 3, 7, 2]  # tokens of the responses, the first of them as long as possible
PROMPT = 2  # tokens before each response
AVERAGES = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "token"}
CLIPS = [(0.2, 0.2), (0.2, 0.28), (0.05, 0.4)]


def inputs(seed: int) -> dict[str, Tensor]:
    """By the names of Packed's fields without _T, [responses, LONGEST]: log-probs of three policies, advantages, and a mask with holes."""
    draw = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), LONGEST)
    old = -3 * torch.rand(shape, generator=draw, dtype=torch.float64)
    logprob, ref = (old + 0.3 * torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    advantage = torch.randn(len(LENGTHS), generator=draw, dtype=torch.float64)
    mask = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    mask[0, 3] = mask[4, 1] = False  # a tool's output, for example
    return {"logprob": logprob, "old_logprob": old, "ref_logprob": ref, "advantage": advantage, "mask": mask}


def packed(given: dict[str, Tensor]) -> tuple[Tensor, Packed]:
    """logprob_T and the microbatch: prompt and response of each sequence, concatenated, then a masked sequence of padding."""

    def flat(value: Tensor) -> Tensor:
        rows = [torch.cat([value.new_zeros(PROMPT), row[:length]]) for row, length in zip(value, LENGTHS, strict=True)]
        return torch.cat([*rows, value.new_zeros(3)])

    spread = given | {"advantage": given["advantage"][:, None].expand(-1, LONGEST)}
    fields = {name: flat(value) for name, value in spread.items()}
    logprob_T, mask_T = fields.pop("logprob").requires_grad_(), fields.pop("mask")
    ends = torch.tensor([0, *(PROMPT + length for length in LENGTHS), 3]).cumsum(0, dtype=torch.int32)
    ids = torch.zeros(len(mask_T), dtype=torch.int64)
    known = {f"{name}_T": value for name, value in fields.items()}
    return logprob_T, Packed(ids, ids, ids, mask_T, ends, (*range(len(LENGTHS)), -1), **known)


def rows(value_T: Tensor) -> Tensor:
    """The responses' part of [T], padded with zeros to [responses, LONGEST]."""
    parts = value_T[:-3].split([PROMPT + length for length in LENGTHS])
    return torch.stack([torch.nn.functional.pad(part[PROMPT:], (0, LONGEST + PROMPT - len(part))) for part in parts])


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return online_trainer(
        "grpo", tmp_path_factory.mktemp("trl"), num_generations=2, per_device_train_batch_size=2, use_bias_correction_kl=False
    )


def theirs(trainer: Any, given: dict[str, Tensor], kind: str, clips: tuple[float, float], kl_coef: float) -> tuple[Tensor, Tensor]:
    """TRL's loss and its gradient in the log-probs."""
    trainer.loss_type, trainer.beta = kind, kl_coef
    trainer.epsilon_low, trainer.epsilon_high = clips
    trainer.given_logprob = given["logprob"].clone().requires_grad_()
    ids = torch.zeros_like(given["mask"], dtype=torch.int64)
    batch = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": ids[:, :PROMPT] + 1,
        "completion_ids": ids,
        "completion_mask": given["mask"].long(),
        "advantages": given["advantage"],
        "old_per_token_logps": given["old_logprob"],
        "ref_per_token_logps": given["ref_logprob"],
        "num_items_in_batch": given["mask"].sum(),
    }
    loss = trainer._compute_loss(trainer.model, batch)
    return loss.detach(), torch.autograd.grad(loss, trainer.given_logprob)[0]


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("clips", CLIPS, ids=str)
@pytest.mark.parametrize("kind", AVERAGES)
def test_loss_and_gradient_are_trls(trainer: Any, kind: str, clips: tuple[float, float], kl_coef: float) -> None:
    for seed in range(3):
        given = inputs(seed)
        expected, slope = theirs(trainer, given, kind, clips, kl_coef)
        logprob_T, microbatch = packed(given)
        average: Any = AVERAGES[kind]
        found = losses.ppo_clip(logprob_T, microbatch, average=average, clip_low=clips[0], clip_high=clips[1], kl="k3", kl_coef=kl_coef)
        count = len(LENGTHS) * LONGEST if kind == "dr_grpo" else found.count
        loss = found.total / count
        torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-6, check_dtype=False)
        torch.testing.assert_close(rows(torch.autograd.grad(loss, logprob_T)[0]), slope, rtol=0, atol=1e-6, check_dtype=False)
        clipped, tokens = found.metrics["clip_fraction"]
        assert 0 < clipped < tokens
        if average == "token":
            assert float(clipped / tokens) == pytest.approx(trainer._metrics["eval"]["clip_ratio/region_mean"][-1], abs=1e-6)


def test_kl_is_trls(trainer: Any) -> None:
    """The mean of k3 over tokens."""
    given = inputs(5)
    theirs(trainer, given, "dapo", (0.2, 0.2), 0.1)
    logprob_T, microbatch = packed(given)
    weight_T, count = microbatch.mask_T.float(), int(microbatch.mask_T.sum())
    assert microbatch.old_logprob_T is not None
    assert microbatch.advantage_T is not None
    how: dict[str, Any] = {"ref_logp": microbatch.ref_logprob_T, "kl": "k3", "kl_coef": 0.1}
    _, stats = ppo_loss(logprob_T, microbatch.old_logprob_T, microbatch.advantage_T, weight_T, **how)
    assert float(stats.kl) / count == pytest.approx(trainer._metrics["eval"]["kl"][-1], abs=1e-6)


def test_the_first_update_of_a_step_is_trls(trainer: Any) -> None:
    """Without old log-probs the ratio is 1: the loss is that of REINFORCE, and no token is clipped."""
    given = inputs(7) | {"old_logprob": inputs(7)["logprob"]}
    expected, slope = theirs(trainer, given, "dapo", (0.2, 0.2), 0.0)
    logprob_T, microbatch = packed(given)
    output_2T = torch.stack([logprob_T, torch.zeros_like(logprob_T)])
    found = losses.ppo_first(output_2T, microbatch, average="token", clip_low=0.2, clip_high=0.2, kl="k3", kl_coef=0.0)
    loss = found.total / found.count
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(rows(torch.autograd.grad(loss, logprob_T)[0]), slope, rtol=0, atol=1e-6, check_dtype=False)

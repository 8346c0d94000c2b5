"""DPO's loss functions beside TRL's DPOTrainer: value and gradient from the same log-probs, in float64.

    normalize=False                 loss_type "sigmoid"
    normalize=True                  loss_type "sigmoid_norm"
    label_smoothing                 "aot" on a batch of one pair, where its sorting does nothing; TRL's "sigmoid" has no smoothing. "robust"
                                    is another loss: (1 - 2 eps) robust + this project's loss = 2 (1 - eps) sigmoid
    nll_weight                      loss_type ["sigmoid", "sft"] with loss_weights [1, nll_weight] on a batch of one pair. With more, TRL
                                    averages "sft" over the tokens of the batch, and this project over each response, then over pairs

TRL's losses are means over pairs; this project's are sums with a count.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.training import dpo_baselines
from engine import losses
from engine.data.tokenizer import load_tokenizer
from engine.types import Packed
from tests.peers.trl_trainers import tiny_model

pytest.importorskip("trl", reason="TRL is not installed; pip install -e '.[peers]'")

LENGTHS = [6, 3, 1, 9, 4, 4, 2, 8]  # tokens of the responses; chosen and rejected of each pair in turn
PROMPT, LONGEST = 2, max(LENGTHS)
KINDS: list[tuple[str, bool, float]] = [
    ("sigmoid", False, 0.1),
    ("sigmoid", False, 2.0),
    ("sigmoid_norm", True, 5.0),
    ("sigmoid_norm", True, 0.5),
]


def microbatch(seed: int, pairs: int) -> tuple[Tensor, Packed]:
    """logprob_T, and the first `pairs` pairs: prompt and response of each sequence, concatenated. float64."""
    draw, lengths = torch.Generator().manual_seed(seed), LENGTHS[: 2 * pairs]
    ends = torch.tensor([0, *(PROMPT + length for length in lengths)]).cumsum(0, dtype=torch.int32)
    logprob_T = -3 * torch.rand(int(ends[-1]), generator=draw, dtype=torch.float64)
    ref_T = logprob_T + 0.5 * torch.randn(len(logprob_T), generator=draw, dtype=torch.float64)
    mask_T = torch.cat([torch.arange(PROMPT + length) >= PROMPT for length in lengths])
    ids = torch.zeros(len(mask_T), dtype=torch.int64)
    return logprob_T.requires_grad_(), Packed(ids, ids, ids, mask_T, ends, tuple(range(2 * pairs)), ref_logprob_T=ref_T)


def ours(logprob_T: Tensor, packed: Packed, **how: Any) -> tuple[Tensor, Tensor]:
    """The mean over pairs and its gradient [T]."""
    found = losses.dpo(logprob_T, packed, **how)
    loss = found.total / found.count
    return loss.detach(), torch.autograd.grad(loss, logprob_T)[0]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("trl")
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    made = dpo_baselines.trainer(tiny_model(folder / "model"), load_tokenizer("bytes"), [row], str(folder), gradient_checkpointing=False)
    made.model.eval()
    return made


def theirs(trainer: Any, logprob_T: Tensor, packed: Packed, weights: dict[str, float], beta: float, smoothing: float = 0.0) -> Any:
    """TRL's loss and its gradient [T], for the weighted sum of its loss types."""
    trainer.loss_types, trainer.loss_weights, trainer.beta, trainer.label_smoothing = list(weights), [*weights.values()], beta, smoothing
    rows = [row * mask for row, mask in zip(_split(logprob_T, packed), _split(packed.mask_T, packed), strict=True)]
    assert packed.ref_logprob_T is not None
    sums = [(row * mask).sum() for row, mask in zip(_split(packed.ref_logprob_T, packed), _split(packed.mask_T, packed), strict=True)]
    logprob, mask = _padded(rows), _padded(_split(packed.mask_T.long(), packed))
    nothing = torch.zeros_like(logprob)
    output = SimpleNamespace(log_probs=logprob, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    whole = torch.nn.functional.pad(mask, (1, 0))  # of tokens; a log-prob belongs to the token after it
    batch = {
        "input_ids": torch.zeros_like(whole),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
        "ref_chosen_logps": torch.stack(sums[::2]),
        "ref_rejected_logps": torch.stack(sums[1::2]),
    }

    loss = trainer._compute_loss(lambda **_: output, batch, False)
    return loss.detach(), torch.autograd.grad(loss, logprob_T)[0]


def _split(value_T: Tensor, packed: Packed) -> list[Tensor]:
    return list(value_T.split(packed.cu_seqlens.diff().tolist()))


def _padded(rows: list[Tensor]) -> Tensor:
    """[2 pairs, PROMPT + LONGEST]: all chosen sequences, then all rejected ones."""
    padded = [torch.nn.functional.pad(row, (0, PROMPT + LONGEST - len(row))) for row in rows]
    return torch.stack([*padded[::2], *padded[1::2]])


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, check_dtype=False)
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize(("kind", "normalize", "beta"), KINDS)
def test_loss_and_gradient_are_trls(trainer: Any, kind: str, normalize: bool, beta: float, pairs: int) -> None:
    for seed in range(3):
        given = microbatch(seed, pairs)
        assert_equal(ours(*given, beta=beta, normalize=normalize), theirs(trainer, *given, {kind: 1.0}, beta))


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_is_that_of_trls_aot(trainer: Any, smoothing: float) -> None:
    for seed in range(3):
        given = microbatch(seed, 1)
        found = ours(*given, beta=0.5, normalize=False, label_smoothing=smoothing)
        assert_equal(found, theirs(trainer, *given, {"aot": 1.0}, 0.5, smoothing))


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_beside_robust_dpo(trainer: Any, smoothing: float) -> None:
    given = microbatch(0, 4)
    found = ours(*given, beta=0.5, normalize=False, label_smoothing=smoothing)
    plain, robust = (theirs(trainer, *given, {kind: 1.0}, 0.5, smoothing) for kind in ("sigmoid", "robust"))
    expected = [2 * (1 - smoothing) * a - (1 - 2 * smoothing) * b for a, b in zip(plain, robust, strict=True)]
    assert_equal(found, (expected[0], expected[1]))


@pytest.mark.parametrize(("kind", "normalize", "beta"), KINDS)
def test_the_nll_term_is_that_of_trls_sft(trainer: Any, kind: str, normalize: bool, beta: float) -> None:
    for seed in range(3):
        given = microbatch(seed, 1)
        found = ours(*given, beta=beta, normalize=normalize, nll_weight=0.7)
        assert_equal(found, theirs(trainer, *given, {kind: 1.0, "sft": 0.7}, beta))


def test_the_nll_term_of_several_pairs(trainer: Any) -> None:
    """Weighted by the lengths of the chosen responses, the means over each response add up to TRL's mean over tokens."""
    logprob_T, packed = microbatch(0, 4)
    expected, _ = theirs(trainer, logprob_T, packed, {"sft": 1.0}, 0.1)
    chosen = [-(row * mask).sum() for row, mask in zip(_split(logprob_T, packed), _split(packed.mask_T, packed), strict=True)][::2]
    lengths = LENGTHS[::2]
    assert float(expected) == pytest.approx(float(sum(chosen)) / sum(lengths), abs=1e-9)
    with_nll, without = (losses.dpo(logprob_T, packed, beta=0.1, nll_weight=weight) for weight in (1.0, 0.0))
    means = sum(float(nll) / length for nll, length in zip(chosen, lengths, strict=True)) / len(lengths)
    assert float(with_nll.total - without.total) / with_nll.count == pytest.approx(means, abs=1e-6)
    assert abs(means - float(expected)) > 1e-3

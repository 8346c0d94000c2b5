"""Advantages of groups beside those of TRL's GRPOTrainer and RLOOTrainer, from the same rewards in float64.

One definition differs by a factor: `by_group` with scale="none" subtracts the mean of the whole group. RLOO's baseline is the mean of the
other G - 1 responses, so that its advantage is G / (G - 1) times as large.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.advantages import by_group
from engine.types import Sample
from tests.peers.trl_trainers import PROMPT, online_trainer

pytest.importorskip("trl", reason="TRL is not installed; pip install -e '.[peers]'")

GROUP, GROUPS = 4, 6


def rewards(seed: int) -> torch.Tensor:
    """float64 [GROUPS * GROUP]: a group of equal rewards, one of zeros, one with a tiny spread, one of 0 and 1, and random ones."""
    draw = np.random.default_rng(seed)
    drawn = draw.normal(0.0, 3.0, (GROUPS, GROUP))
    drawn[0], drawn[1], drawn[2] = 1.0, 0.0, [1.0, 1.0, 1.0, 1.0 + 1e-3]
    drawn[3] = draw.integers(0, 2, GROUP)
    return torch.from_numpy(drawn.reshape(-1))


def ours(rewards: torch.Tensor, scale: Any) -> list[float]:
    tokens, mask = np.arange(4, dtype=np.int32), np.array([0, 1, 1], np.uint8)
    samples = [Sample(tokens, mask, reward=reward) for reward in rewards.tolist()]
    advantaged = by_group(samples, [place // GROUP for place in range(len(samples))], scale)
    values = [sample.advantage for sample in advantaged if sample.advantage is not None]
    assert all(value[0] == 0.0 and value[1] == value[2] for value in values)
    return [float(value[1]) for value in values]


@pytest.fixture(scope="module", params=["group", "none", "rloo"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    size = {"num_generations": GROUP, "num_generations_eval": GROUP, "per_device_train_batch_size": GROUP}
    how: dict[str, Any] = {"beta": 0.0} if request.param == "rloo" else {"scale_rewards": request.param}
    return online_trainer("rloo" if request.param == "rloo" else "grpo", tmp_path_factory.mktemp("trl"), **size, **how)


@pytest.mark.parametrize("seed", range(3))
def test_advantages_are_trls(trainer: Any, seed: int) -> None:
    trainer.given_rewards = rewards(seed)
    expected = trainer._generate_and_score_completions([dict(PROMPT)] * (GROUPS * GROUP))["advantages"]
    scale = getattr(trainer, "scale_rewards", "none")
    factor = 1.0 if hasattr(trainer, "scale_rewards") else GROUP / (GROUP - 1)
    found = factor * np.array(ours(rewards(seed), {"group": "std", "none": "none"}[scale]))
    assert found == pytest.approx(expected.numpy(), rel=1e-6, abs=1e-6)
    assert expected.abs().max() > 0.5

"""Reward teaches: from a random model, PPO makes what the verifier asks for common. Small, but with every part of RLVR in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.commands.recipe import load_recipe
from engine.config import Logging
from engine.reporting.console import read_metrics
from tests.support import jobs_rlvr
from tests.support.pool import ranks

STEPS = 20


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    out = tmp_path_factory.mktemp("learning") / "run"
    run = replace(load_recipe("recipes/tiny_rlvr.py"), out=str(out), steps=STEPS, logging=Logging(tensorboard=False))
    ranks(2).run(jobs_rlvr.trained, run=run)
    return [record for record in read_metrics(Path(out)) if record["kind"] == "step"]


def test_what_is_rewarded_becomes_common(told: list[dict[str, float]]) -> None:
    """At 64 responses a step the standard error of a rate is at most 0.0625: five steps together, 0.028."""
    first, last = (np.mean([record["reward/solve_rate"] for record in part]) for part in (told[:1], told[-5:]))
    assert last - first > 0.5


def test_responses_learn_to_stop(told: list[dict[str, float]]) -> None:
    assert told[0]["rollout/no_stop"] > 0.5
    assert told[-1]["rollout/no_stop"] < 0.1


def test_clip_and_critic_had_work_to_do(told: list[dict[str, float]]) -> None:
    assert max(record["policy/clip_fraction"] for record in told) > 0.05
    assert told[-1]["critic/loss"] < told[0]["critic/loss"]


def test_the_sampler_is_the_trainer(told: list[dict[str, float]]) -> None:
    assert max(record["rollout/logprob_diff_max"] for record in told) < 1e-4

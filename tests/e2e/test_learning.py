"""PPO learns from rewards: starting from a random model, rewarded responses become frequent. A small run with all parts of RLVR."""

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
def metrics(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    out = tmp_path_factory.mktemp("learning") / "run"
    run = replace(load_recipe("recipes/tiny_rlvr.py"), out=str(out), steps=STEPS, logging=Logging(tensorboard=False))
    ranks(2).run(jobs_rlvr.trained, run=run)
    return [record for record in read_metrics(Path(out)) if record["kind"] == "step"]


def test_rewarded_responses_become_frequent(metrics: list[dict[str, float]]) -> None:
    """With 64 responses per step, the standard error of a rate is at most 0.0625; over five steps it is 0.028."""
    first, last = (np.mean([record["reward/solve_rate"] for record in part]) for part in (metrics[:1], metrics[-5:]))
    assert last - first > 0.5


def test_responses_learn_to_stop(metrics: list[dict[str, float]]) -> None:
    assert metrics[0]["rollout/no_stop"] > 0.5
    assert metrics[-1]["rollout/no_stop"] < 0.1


def test_clipping_and_the_critic_were_active(metrics: list[dict[str, float]]) -> None:
    assert max(record["policy/clip_fraction"] for record in metrics) > 0.05
    assert metrics[-1]["critic/loss"] < metrics[0]["critic/loss"]


def test_sampler_logprobs_equal_the_trainers(metrics: list[dict[str, float]]) -> None:
    assert max(record["rollout/logprob_diff_max"] for record in metrics) < 1e-4

"""RLVR on degenerate batches: no correct responses, zero-std groups, single tokens, missing verdicts, and rewards that are NaN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.advantages import by_critic, by_group
from engine.config import Parallel
from tests.distributed.test_rlvr import CPU, drawn
from tests.support import jobs_rlvr
from tests.support.pool import ranks

GROUPS = {"advantage": "group", "critic": None, "samples_per_prompt": 4, "prompts_per_step": 4}


def check_learns(found: list[dict[str, Any]]) -> None:
    """All numbers of all steps and samples are finite."""
    for step in found:
        assert all(map(np.isfinite, [*step["said"].values(), *step["learned"].values()]))
        for sample in step["samples"]:
            assert np.isfinite(sample["advantage"]).all()
            assert np.isfinite(sample["returns"] or 0).all()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("how", [{}, GROUPS], ids=["critic", "group"])
def test_responses_of_one_token(how: dict[str, Any], size: int, tmp_path: Path) -> None:
    results = ranks(size).run(jobs_rlvr.steps, folder=tmp_path, parallel=Parallel(), max_response_tokens=1, **how)[0]
    check_learns(results)
    assert {sum(sample["mask"]) for step in results for sample in step["samples"]} == {1}
    assert all(step["said"]["rollout/length"] == 1 and step["learned"]["policy/grad_norm"] > 0 for step in results)


@pytest.mark.parametrize("how", [{}, GROUPS], ids=["critic", "group"])
def test_without_correct_responses_groups_have_no_gradient(how: dict[str, Any], tmp_path: Path) -> None:
    """All samples of all prompts have the same score, 0, which the critic still learns."""
    source = jobs_rlvr.tasks(tmp_path / "hard.jsonl", ("(?!)",) * 8)
    same = {"sources": (source,), "no_stop_reward": 0.0, "kl_coef": 0.0}
    results = ranks(1).run(jobs_rlvr.steps, folder=tmp_path, parallel=Parallel(), **same, **how)[0]
    check_learns(results)
    for step in results:
        assert step["said"]["reward/solve_rate"] == step["said"]["reward/mean"] == 0
        assert step["said"]["reward/zero_std_frac"] == 1
        assert (step["learned"]["policy/grad_norm"] == 0) == bool(how)
        assert any(any(sample["advantage"]) for sample in step["samples"]) == (not how)


def test_whitening_of_equal_rewards_does_not_divide_by_zero() -> None:
    """A single token, and the same value for all tokens."""
    alone = [replace(s, value=np.zeros(1, np.float32)) for s in drawn() if s.length == 1 and s.mask.sum() == 1] or [drawn()[2]]
    same = [replace(s, reward=5.0, value=np.zeros(s.length, np.float32)) for s in drawn()]
    for samples in (alone, same):
        for sample in by_critic(samples, kl_coef=0.0, kl="k1", gamma=1.0, lam=1.0, whiten="batch", ranks=1, device=CPU):
            assert np.abs(np.asarray(sample.advantage)).max() < 0.05


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_nan_rewards_are_refused(reward: float) -> None:
    samples = [replace(s, reward=reward if i == 3 else 0.0) for i, s in enumerate(drawn())]
    with pytest.raises(ValueError, match=f"reward={reward} of a response is not finite"):
        by_critic(samples, kl_coef=0.1, kl="k1", gamma=1.0, lam=0.95, whiten="batch", ranks=1, device=CPU)
    with pytest.raises(ValueError, match=f"reward={reward} of a response is not finite"):
        by_group(samples, [0] * len(samples), "std")


def steps_with_missing_verdicts(folder: Path, lost: int, of: int, minibatches: int) -> Any:
    """A step of `of` responses, of which `lost` get no verdict, or the error that it raises."""
    source = jobs_rlvr.tasks(folder / "mood.jsonl", ("nobody knows",) * lost + ("",) * (of - lost))
    options = {"sources": (source,), "prompts_per_step": of, "samples_per_prompt": 1, "minibatches": minibatches, "steps": 1}
    return ranks(1).run(jobs_rlvr.steps_with_missing_verdicts, folder=folder, **options)[0]


def test_responses_without_verdict_are_dropped_and_counted(tmp_path: Path) -> None:
    """Seven of eight responses are trained on, each in its own minibatch."""
    results = steps_with_missing_verdicts(tmp_path, lost=1, of=8, minibatches=8)
    check_learns(results)
    assert results[0]["said"]["rollout/dropped"] == 1
    assert len(results[0]["samples"]) == 7
    assert {sample["reward"] for sample in results[0]["samples"]} <= {10.0, 0.0, -10.0}


@pytest.mark.parametrize(("lost", "of", "says"), [(2, 8, "2 of 8 responses could not be judged"), (1, 1, "none of 1 responses")])
def test_too_many_missing_verdicts_stop_the_run(lost: int, of: int, says: str, tmp_path: Path) -> None:
    message = steps_with_missing_verdicts(tmp_path, lost, of, minibatches=1)
    assert says in message
    assert "its verdict is nan, neither True nor False" in message

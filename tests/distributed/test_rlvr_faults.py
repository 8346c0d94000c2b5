"""RLVR on what can go wrong in a batch: nothing correct, groups that agree, single tokens, verdicts and rewards that are no numbers."""

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
    """Every number of every step and of every sample is one."""
    for step in found:
        assert all(map(np.isfinite, [*step["said"].values(), *step["learned"].values()]))
        for sample in step["samples"]:
            assert np.isfinite(sample["advantage"]).all()
            assert np.isfinite(sample["returns"] or 0).all()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("how", [{}, GROUPS], ids=["critic", "group"])
def test_responses_of_one_token(how: dict[str, Any], size: int, tmp_path: Path) -> None:
    found = ranks(size).run(jobs_rlvr.steps, folder=tmp_path, parallel=Parallel(), max_response_tokens=1, **how)[0]
    check_learns(found)
    assert {sum(sample["mask"]) for step in found for sample in step["samples"]} == {1}
    assert all(step["said"]["rollout/length"] == 1 and step["learned"]["policy/grad_norm"] > 0 for step in found)


@pytest.mark.parametrize("how", [{}, GROUPS], ids=["critic", "group"])
def test_where_nothing_is_correct_groups_learn_nothing_and_are_counted(how: dict[str, Any], tmp_path: Path) -> None:
    """All samples of all prompts have the same score; the critic still learns that it is 0."""
    source = jobs_rlvr.tasks(tmp_path / "hard.jsonl", ("(?!)",) * 8)
    same = {"sources": (source,), "no_stop_reward": 0.0, "kl_coef": 0.0}
    found = ranks(1).run(jobs_rlvr.steps, folder=tmp_path, parallel=Parallel(), **same, **how)[0]
    check_learns(found)
    for step in found:
        assert step["said"]["reward/solve_rate"] == step["said"]["reward/mean"] == 0
        assert step["said"]["reward/zero_std_frac"] == 1
        assert (step["learned"]["policy/grad_norm"] == 0) == bool(how)
        assert any(any(sample["advantage"]) for sample in step["samples"]) == (not how)


def test_rewards_that_do_not_differ_are_whitened_to_nearly_nothing() -> None:
    """Of one token alone, of one value everywhere: no division by a variance of 0."""
    alone = [replace(s, value=np.zeros(1, np.float32)) for s in drawn() if s.length == 1 and s.mask.sum() == 1] or [drawn()[2]]
    same = [replace(s, reward=5.0, value=np.zeros(s.length, np.float32)) for s in drawn()]
    for samples in (alone, same):
        for sample in by_critic(samples, kl_coef=0.0, kl="k1", gamma=1.0, lam=1.0, whiten="batch", ranks=1, device=CPU):
            assert np.abs(np.asarray(sample.advantage)).max() < 0.05


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_rewards_that_are_no_numbers_are_refused(reward: float) -> None:
    samples = [replace(s, reward=reward if i == 3 else 0.0) for i, s in enumerate(drawn())]
    with pytest.raises(ValueError, match=f"reward={reward} of a response is not finite"):
        by_critic(samples, kl_coef=0.1, kl="k1", gamma=1.0, lam=0.95, whiten="batch", ranks=1, device=CPU)
    with pytest.raises(ValueError, match=f"reward={reward} of a response is not finite"):
        by_group(samples, [0] * len(samples), "std")


def judged_by_mood(folder: Path, lost: int, of: int, minibatches: int) -> Any:
    """A step of `of` responses of which `lost` get NaN for a verdict, or what is said instead of it."""
    source = jobs_rlvr.tasks(folder / "mood.jsonl", ("nobody knows",) * lost + ("",) * (of - lost))
    how = {"sources": (source,), "prompts_per_step": of, "samples_per_prompt": 1, "minibatches": minibatches, "steps": 1}
    return ranks(1).run(jobs_rlvr.judged_by_mood, folder=folder, **how)[0]


def test_a_verdict_that_is_none_is_dropped_and_counted(tmp_path: Path) -> None:
    """Seven of eight are learned from, in as many of eight minibatches."""
    found = judged_by_mood(tmp_path, lost=1, of=8, minibatches=8)
    check_learns(found)
    assert found[0]["said"]["rollout/dropped"] == 1
    assert len(found[0]["samples"]) == 7
    assert {sample["reward"] for sample in found[0]["samples"]} <= {10.0, 0.0, -10.0}


@pytest.mark.parametrize(("lost", "of", "says"), [(2, 8, "2 of 8 responses could not be judged"), (1, 1, "none of 1 responses")])
def test_too_many_such_verdicts_stop_the_run(lost: int, of: int, says: str, tmp_path: Path) -> None:
    said = judged_by_mood(tmp_path, lost, of, minibatches=1)
    assert says in said
    assert "its verdict is nan, neither True nor False" in said

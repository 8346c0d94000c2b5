"""Disaggregated generation, one step ahead: results equal those of sequential generation on one rank, and resume is bitwise."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch

from engine.advantages import off_policy
from engine.batching.build import batch
from engine.commands.generate import GenerateConfig
from engine.config import Model, Parallel, override
from engine.losses import ppo_clip
from engine.reporting.console import read_metrics
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import GenerationResult, Response
from tests.distributed.test_rlvr import check_steps, drawn, metric_records, one_rank
from tests.support import jobs_remote, jobs_rlvr
from tests.support import ppo_definition as definition
from tests.support.pool import ranks

FOLDER = Path(mkdtemp(prefix="apart-"))
AHEAD = RolloutConfig(max_num_seqs=6, kv_cache_gb=1.0, max_prefill_tokens=24, generator_gpus=2, max_staleness=1, importance_cap=1.02)


@lru_cache
def sequential() -> list[dict[str, Any]]:
    return ranks(1).run(jobs_remote.sequential, folder=FOLDER, steps=3, rollout=AHEAD)[0]


LAYOUTS = [Parallel(), Parallel(tp=2), Parallel(pp=2)]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_disaggregated_equals_sequential(parallel: Parallel) -> None:
    first, second, *far = ranks(4).run(jobs_remote.steps, folder=FOLDER, parallel=parallel, steps=3, rollout=AHEAD)
    assert far == [[], []]
    for results in (first, second):
        check_steps(results, sequential())
        for actual, expected in zip(results, sequential(), strict=True):
            for name in ("rollout/staleness", "rollout/importance", "rollout/importance_max", "rollout/truncated"):
                assert actual["said"][name] == pytest.approx(expected["said"][name], rel=1e-5)
            assert (actual["said"]["rollout/weights_bytes"] > 0) == (actual is not results[-1])  # nothing is generated after the last step


def test_the_run_has_importance_weights_and_truncation() -> None:
    """Otherwise test_disaggregated_equals_sequential would prove little."""
    metrics = [step["said"] for step in sequential()]
    assert [s["rollout/staleness"] for s in metrics] == [0.0, 1.0, 1.0]
    assert metrics[0]["rollout/importance_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics[2]["rollout/importance"] != pytest.approx(1.0, abs=1e-4)
    assert metrics[2]["rollout/importance_max"] == 1.02
    assert 0 < metrics[2]["rollout/truncated"] < 1


def test_without_staleness_it_equals_the_synchronous_run() -> None:
    near = ranks(4).run(jobs_remote.steps, folder=FOLDER, parallel=Parallel(), rollout=replace(AHEAD, max_staleness=0))[0]
    check_steps(near, one_rank())
    assert all("rollout/weights_bytes" in step["said"] and "rollout/importance" not in step["said"] for step in near)


def test_the_next_step_is_generated_during_an_update(tmp_path: Path) -> None:
    """Each update waits for the responses of the next step; a run that generated them after the update would hang."""
    ranks(3).run(jobs_remote.learned_after_the_next_is_drawn, folder=tmp_path, rollout=replace(AHEAD, generator_gpus=1))
    rows = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "step"]
    assert [r["rollout/staleness"] for r in rows] == [0.0, 1.0, 1.0]
    for row in rows:
        assert row["time/hidden"] == pytest.approx(max(0.0, row["time/generate"] - row["time/wait"]))


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(pp=2)], ids=str)
def test_resumed_is_bitwise_uninterrupted(parallel: Parallel, tmp_path: Path) -> None:
    """The responses of the next step were generated with weights of no checkpoint, so the checkpoint contains the responses."""
    options = {"folder": tmp_path, "parallel": parallel, "steps": 3, "save_every": 1, "rollout": AHEAD}
    ranks(4).run(jobs_remote.whole_run, **options)
    full = metric_records(tmp_path)
    assert (tmp_path / "run" / "step-00000002" / "prefetched.npz").exists()
    assert not (tmp_path / "run" / "step-00000003" / "prefetched.npz").exists()
    for lost in ("step-00000003", "critic/step-00000003"):
        shutil.rmtree(tmp_path / "run" / lost)
    ranks(4).run(jobs_remote.whole_run, **options)
    assert metric_records(tmp_path) == full
    assert [step["rollout/staleness"] for step in full] == [0.0, 1.0, 1.0]
    ranks(4).run(jobs_remote.whole_run, **options)  # nothing is left to do, and all ranks return
    assert metric_records(tmp_path) == full


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(pp=2)], ids=str)
def test_weights_are_sent_to_the_same_grid_position(parallel: Parallel) -> None:
    near, far = np.split(np.array(ranks(4).run(jobs_remote.weights_travel, parallel=parallel, gpus=2), object), 2)
    for place, size, sums in far:
        source = next(row for row in near if row[0] == place)
        assert sums == source[2]
        assert size == source[1] > 1 << 14  # in more than one piece


def test_generation_results_survive_a_checkpoint(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sizes = [[3, 1], [1, 7], [2, 2]]
    responses = [[Response(draw.integers(0, 9, n, np.int32), draw.random(n, np.float32), n % 2 == 0) for n in pair] for pair in sizes]
    (tmp_path / "prefetched.npz").write_bytes(GenerationResult(responses, 4, {"time/generate": 0.1}).to_bytes())
    read = GenerationResult.read(tmp_path / "prefetched.npz")
    assert (read.version, read.metrics) == (4, {"time/generate": 0.1})
    for group, expected in zip(read.responses, responses, strict=True):
        for mine, theirs in zip(group, expected, strict=True):
            assert (mine.tokens.dtype, mine.logprobs.dtype, mine.stopped) == (np.int32, np.float32, theirs.stopped)
            assert mine.tokens.tolist() == theirs.tokens.tolist()
            assert mine.logprobs.tolist() == theirs.logprobs.tolist()


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_the_loss_is_weighted_token_by_token(average: Any) -> None:
    """Against float64: min(p / q, 1.2) times the clipped loss, and its gradient without one of the weight."""
    draw = np.random.default_rng(3)
    samples = [replace(s, advantage=(draw.normal(0, 1, s.length) * s.mask).astype(np.float32)) for s in drawn()]
    sampler = [(np.asarray(s.old_logprob) + draw.normal(0, 0.5, s.length)).astype(np.float32) for s in samples]
    new = [np.asarray(s.old_logprob) + draw.normal(0, 0.4, s.length) for s in samples]
    results, weights = off_policy(samples, [q[s.mask > 0] for q, s in zip(sampler, samples, strict=True)], 1.2)
    plain = jobs_rlvr.plain(samples)
    responses = [r | {"sampler": q, "logprob": n} for r, q, n in zip(plain, sampler, new, strict=True)]
    expected = [definition.importance(r, t, 1.2) for r in responses for t in definition.tokens(r)]
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert 0 < np.mean(weights == 1.2) < 1

    clip = {"clip_low": 0.2, "clip_high": 0.3}
    loss = partial(ppo_clip, average=average, kl="k3", kl_coef=0.0, **clip)
    (packed,) = batch(results, 1000)
    bounds = packed.cu_seqlens.tolist()
    places = {i: slice(a, b) for i, a, b in zip(packed.index_S, bounds, bounds[1:], strict=False)}
    output = torch.zeros(len(packed.tokens_T))
    for i, values in enumerate(new):
        output[places[i]] = torch.from_numpy(values)
    output.requires_grad_()
    actual = loss(output, packed)
    actual.total.backward()

    def weighted(r: definition.Response, t: int) -> float:
        return definition.importance(r, t, 1.2) * definition.policy_loss(r, t, **clip)

    assert float(actual.total) / actual.count == pytest.approx(definition.mean_over(responses, average, weighted), rel=1e-6)
    assert output.grad is not None
    sizes = [len(definition.tokens(r)) for r in responses]
    for i, (r, size) in enumerate(zip(responses, sizes, strict=True)):
        share = 1 / sum(sizes) if average == "token" else 1 / size / len(sizes)
        for t in definition.tokens(r):
            slope = definition.importance(r, t, 1.2) * definition.policy_slope(r, t, **clip) * share
            assert float(output.grad[places[i]][t]) / actual.count == pytest.approx(slope, rel=2e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_staleness": 1}, r"rollout.max_staleness=1 needs .*rollout.generator_gpus=0; set rollout.generator_gpus"),
        ({"generator_gpus": 2, "max_staleness": 2}, r"rollout.max_staleness=2 must be 0 .* or 1"),
        ({"generator_gpus": -1}, r"rollout.generator_gpus=-1 must not be negative"),
        ({"generator_gpus": 1, "max_staleness": 1, "importance_cap": 0.0}, r"rollout.importance_cap=0.0 must be positive"),
        ({"cuda_graphs": True}, r"rollout.cuda_graphs=True must be one of auto, on, off"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        RolloutConfig(**changes)


def test_engine_generate_refuses_generator_gpus() -> None:
    with pytest.raises(ValueError, match=r"rollout.generator_gpus=1 is for training runs; use 0"):
        override(GenerateConfig(Model("nowhere")), ["rollout.generator_gpus=1"])


@pytest.mark.parametrize(
    ("size", "parallel", "changes", "error"),
    [
        (4, Parallel(tp=2), {"generator_gpus": 1}, "rollout.generator_gpus=1 must be a multiple of parallel.tp=2 x parallel.pp=1 = 2"),
        (2, Parallel(), {"generator_gpus": 2}, "rollout.generator_gpus=2 leaves none of the world's 2 ranks to train"),
        (3, Parallel(), {"generator_gpus": 1, "kv_cache_gb": 1e-6}, "algorithm.rollout.kv_cache_gb=1e-06 holds 0 sequences"),
    ],
    ids=str,
)
def test_invalid_layouts_are_refused(size: int, parallel: Parallel, changes: dict[str, Any], error: str, tmp_path: Path) -> None:
    rollout = RolloutConfig(**{"max_staleness": 1, "kv_cache_gb": 1.0} | changes)
    errors = ranks(size).run(jobs_remote.whole_run, folder=tmp_path, parallel=parallel, rollout=rollout)
    assert all(error in text for text in errors)

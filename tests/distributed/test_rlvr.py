"""RLVR: results against the definition, invariance to the layout, bitwise resume, and errors for invalid settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch

from engine.advantages import by_critic, by_group, explained_variance
from engine.batching.build import batch
from engine.config import Model, Parallel
from engine.losses import ppo_clip, value_clip
from engine.reporting.console import read_metrics
from engine.rollout.config import RolloutConfig
from engine.types import Sample
from tests.support import jobs, jobs_rlvr
from tests.support import ppo_definition as definition
from tests.support.pool import ranks


def drawn(count: int = 9, seed: int = 0) -> list[Sample]:
    """Responses of different lengths, one of a single token, as from a sampler: with their prompts, and three different scores."""
    draw = np.random.default_rng(seed)
    results = []
    for i in range(count):
        prompt, size = int(draw.integers(1, 6)), 1 if i == 2 else int(draw.integers(1, 15))
        mask = np.array([0] * (prompt - 1) + [1] * size, np.uint8)
        old = (-draw.random(len(mask)) * 3 * mask).astype(np.float32)
        ref = ((old - draw.normal(0, 0.3, len(mask))) * mask).astype(np.float32)
        value = draw.normal(3, 2, len(mask)).astype(np.float32)
        tokens = draw.integers(0, 250, len(mask) + 1, dtype=np.int32)
        results.append(Sample(tokens, mask, reward=float(draw.choice([10.0, 0.0, -10.0])), old_logprob=old, ref_logprob=ref, value=value))
    return results


def as_lists(samples: list[Sample]) -> list[dict[str, Any]]:
    return jobs_rlvr.plain(samples)


CPU = torch.device("cpu")


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("whiten", "parts"), [("batch", 1), ("rank", 3), ("none", 0)])
def test_advantages_are_the_definitions(kl: Any, whiten: Any, parts: int) -> None:
    samples = drawn()
    actual = by_critic(samples, kl_coef=0.3, kl=kl, gamma=0.97, lam=0.9, whiten=whiten, ranks=3, device=CPU)
    raw = definition.advantages(as_lists(samples), 0.3, kl, 0.97, 0.9)
    expected = definition.whitened(raw, parts) if parts else raw
    for sample, of, unscaled in zip(actual, expected, raw, strict=True):
        assert sample.advantage is not None
        assert sample.returns is not None
        assert sample.value is not None
        for t in range(sample.length):
            assert sample.advantage[t] == pytest.approx(of.get(t, 0.0), rel=1e-6, abs=2e-6)
            assert sample.returns[t] == pytest.approx(unscaled[t] + sample.value[t] if t in unscaled else 0.0, rel=1e-6, abs=2e-6)


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("budget", [20, 64, 1000])
def test_losses_and_gradients_are_the_definitions(average: Any, budget: int) -> None:
    """Totals over counts, whatever the microbatches; gradients of the same quotient."""
    samples = by_critic(drawn(), kl_coef=0.1, kl="k1", gamma=1.0, lam=0.95, whiten="batch", ranks=1, device=CPU)
    draw = np.random.default_rng(1)
    new = [np.asarray(s.old_logprob) + draw.normal(0, 0.4, s.length) for s in samples]
    values = [np.asarray(s.value) + draw.normal(0, 0.4, s.length) for s in samples]
    responses = [r | {"logprob": n, "new_value": v} for r, n, v in zip(as_lists(samples), new, values, strict=True)]
    clip, value = {"clip_low": 0.2, "clip_high": 0.3}, {"clip": 0.2}
    policy_loss = partial(ppo_clip, average=average, kl="k3", kl_coef=0.0, **clip)
    critic_loss = partial(value_clip, average=average, coef=0.5, **value)
    for loss, inputs, error, slope, coef in (
        (policy_loss, new, partial(definition.policy_loss, **clip), partial(definition.policy_slope, **clip), 1.0),
        (critic_loss, values, partial(definition.value_loss, **value), partial(definition.value_slope, **value), 0.5),
    ):
        total, count, grads, sums = 0.0, 0, {}, []
        for packed in batch(samples, budget):
            output = torch.zeros(len(packed.tokens_T))
            bounds = packed.cu_seqlens.tolist()
            for index, start, end in zip(packed.index_S, bounds, bounds[1:], strict=False):
                if index >= 0:
                    output[start:end] = torch.from_numpy(inputs[index])
            output.requires_grad_()
            results = loss(output, packed)
            results.total.backward()
            total, count = total + float(results.total), count + results.count
            sums.append(results.metrics)
            assert output.grad is not None
            grads |= {i: output.grad[a:b] for i, a, b in zip(packed.index_S, bounds, bounds[1:], strict=False)}
        assert total / count == pytest.approx(coef * definition.mean_over(responses, average, error), rel=1e-6)
        sizes = [len(definition.tokens(r)) for r in responses]
        for i, (r, size) in enumerate(zip(responses, sizes, strict=True)):
            share = 1 / sum(sizes) if average == "token" else 1 / size / len(sizes)
            expected = [coef * slope(r, t) * share if t in definition.tokens(r) else 0.0 for t in range(len(r["mask"]))]
            assert (grads[i] / count).tolist() == pytest.approx(expected, rel=2e-5, abs=1e-8)
        if loss is policy_loss:
            share = sum(float(m["clip_fraction"][0]) for m in sums) / count
            assert share == pytest.approx(definition.mean_over(responses, average, partial(definition.clipped, **clip)), rel=1e-6)


def test_groups() -> None:
    """By hand: scores 10 and 0 for one prompt, 10 and 10 for another, with and without division by the standard deviation."""
    samples = [replace(s, reward=reward) for s, reward in zip(drawn(4), (10.0, 0.0, 10.0, 10.0), strict=True)]
    for scale, expected in (("std", (5 / (50**0.5 + 1e-4), -5 / (50**0.5 + 1e-4), 0.0, 0.0)), ("none", (5.0, -5.0, 0.0, 0.0))):
        for sample, advantage in zip(by_group(samples, [1, 1, 2, 2], scale), expected, strict=True):  # type: ignore[arg-type]
            assert sample.advantage is not None
            assert sample.advantage.tolist() == pytest.approx((sample.mask * advantage).tolist())


def test_explained_variance() -> None:
    samples = by_critic(drawn(), kl_coef=0.0, kl="k1", gamma=1.0, lam=0.95, whiten="none", ranks=1, device=CPU)
    perfect = [replace(s, value=s.returns) for s in samples]
    blind = [replace(s, value=np.full(s.length, 3.0, np.float32)) for s in samples]
    assert explained_variance(perfect) == pytest.approx(1.0)
    assert explained_variance(blind) == pytest.approx(0.0, abs=1e-6)


FOLDER = Path(mkdtemp(prefix="rlvr-"))


@lru_cache
def one_rank(**changes: Any) -> list[dict[str, Any]]:
    return ranks(1).run(jobs_rlvr.steps, folder=FOLDER, parallel=Parallel(), **changes)[0]


def check_same(size: int, parallel: Parallel, expected: list[dict[str, Any]], **changes: Any) -> None:
    for results in ranks(size).run(jobs_rlvr.steps, folder=FOLDER, parallel=parallel, **changes):
        check_steps(results, expected)


def check_steps(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for actual, wanted in zip(found, expected, strict=True):
        for mine, theirs in zip(actual["samples"], wanted["samples"], strict=True):
            assert mine["tokens"] == theirs["tokens"]
            assert mine["reward"] == theirs["reward"]
            for name in ("advantage", "old_logprob", "value", "returns"):
                if theirs[name] is not None:
                    assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-5)
        assert actual["learned"] == pytest.approx(wanted["learned"], rel=2e-5, abs=2e-6)


def test_the_first_update_starts_from_ratio_one() -> None:
    results = one_rank(epochs=1, minibatches=1)[0]
    assert abs(results["learned"]["policy/approx_kl"]) <= 1e-9
    assert results["learned"]["policy/clip_fraction"] == 0.0
    assert results["said"]["rollout/logprob_diff_max"] <= 1e-5
    assert results["said"]["policy/kl"] == pytest.approx(0.0, abs=1e-5)
    assert results["said"]["policy/entropy"] == pytest.approx(results["said"]["policy/neg_logprob"], rel=0.1)
    assert results["said"]["policy/entropy"] != results["said"]["policy/neg_logprob"]


ONCE = {"advantage": "group", "critic": None, "samples_per_prompt": 4, "prompts_per_step": 4, "epochs": 1, "minibatches": 1}


def test_a_single_update_uses_its_own_logprobs() -> None:
    """Two steps equal those with log-probs computed before the update, except for which metrics are reported."""
    results = one_rank(**ONCE)
    expected = ranks(1).run(jobs_rlvr.read_first, folder=FOLDER, **ONCE)[0]
    read = ("policy/entropy", "rollout/logprob_diff", "rollout/logprob_diff_max")
    for actual, theirs in zip(results, expected, strict=True):
        assert not set(read) & set(actual["said"])
        theirs["learned"] |= {name: theirs["said"][name] for name in read}
    assert results[1]["said"]["policy/kl3"] > 1e-6  # the first update moved the policy
    check_steps(results, expected)


@pytest.mark.parametrize(("size", "parallel"), [(2, Parallel()), (2, Parallel(pp=2, vpp=2)), (4, Parallel(tp=2, pp=2))], ids=str)
def test_a_single_update_in_any_layout(size: int, parallel: Parallel) -> None:
    check_same(size, parallel, one_rank(**ONCE), **ONCE)


def test_which_settings_need_logprobs_before_the_update() -> None:
    group = jobs_rlvr.make_run(FOLDER, Parallel(), **ONCE).algorithm
    assert group.single_update
    critic = jobs_rlvr.make_run(FOLDER, Parallel(), epochs=1, minibatches=1).algorithm
    assert not critic.single_update  # KL in the reward
    assert replace(critic, kl_coef=0.0).single_update
    for changes in ({"epochs": 2}, {"minibatches": 2}, {"rollout": RolloutConfig(generator_gpus=1, max_staleness=1)}):
        assert not replace(group, **changes).single_update


def test_the_run_exercises_scores_and_clipping() -> None:
    """All three scores, active clipping, and different samples: otherwise the invariance tests below would prove little."""
    results = one_rank()
    assert {s["reward"] for step in results for s in step["samples"]} == {10.0, 0.0, -10.0}
    assert max(step["learned"]["policy/clip_fraction"] for step in results) > 0.02
    assert results[1]["said"]["policy/kl"] != 0.0


LAYOUTS = [
    (2, Parallel()),
    (2, Parallel(tp=2)),
    (2, Parallel(pp=2)),
    (2, Parallel(pp=2, vpp=2)),
    (4, Parallel(tp=2, pp=2)),
    (8, Parallel(tp=2, pp=2)),
]


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
def test_grid(size: int, parallel: Parallel) -> None:
    check_same(size, parallel, one_rank())


@pytest.mark.parametrize("budget", [40, 1000])
def test_microbatches(budget: int) -> None:
    check_same(1, Parallel(), one_rank(), tokens_per_microbatch=budget)


def test_offloaded_reference_is_the_resident_one() -> None:
    for size, parallel in ((1, Parallel()), (2, Parallel()), (2, Parallel(pp=2))):
        results = ranks(size).run(jobs_rlvr.steps, folder=FOLDER, parallel=parallel, reference="offloaded")[0]
        assert results == ranks(size).run(jobs_rlvr.steps, folder=FOLDER, parallel=parallel)[0]


def test_groups_need_no_critic() -> None:
    options = {"advantage": "group", "critic": None, "samples_per_prompt": 4, "prompts_per_step": 4}
    results = one_rank(**options)
    assert results[0]["samples"][0]["value"] is None
    assert any(any(s["advantage"]) for s in results[0]["samples"])
    assert results[0]["said"]["reward/zero_std_frac"] > 0
    check_same(2, Parallel(pp=2), results, **options)


def test_zero_std_groups_can_be_skipped() -> None:
    """Their gradient is zero, so without them the sum of gradients is the same, over fewer tokens."""
    options = {"advantage": "group", "critic": None, "samples_per_prompt": 4, "kl_coef": 0.0, "epochs": 1, "minibatches": 1, "steps": 1}
    full, part = one_rank(**options)[0], one_rank(**options, skip_zero_std_groups=True)[0]
    assert part["samples"] == full["samples"]
    trained = [sum(sample["mask"]) for sample in full["samples"]]
    taught = [count for count, sample in zip(trained, full["samples"], strict=True) if any(sample["advantage"])]
    assert 0 < sum(taught) < sum(trained)
    gradient, expected = part["learned"]["policy/grad_norm"] * sum(taught), full["learned"]["policy/grad_norm"] * sum(trained)
    assert gradient == pytest.approx(expected, rel=1e-5)


def test_trained_tokens_are_the_sampled_ids(tmp_path: Path) -> None:
    """Invalid UTF-8 does not survive decoding and encoding, so training must use the sampled ids."""
    (step,) = ranks(1).run(jobs_rlvr.steps, folder=tmp_path, parallel=Parallel(), steps=1)[0]
    rows = [json.loads(line) for line in (tmp_path / "run-1-0" / "samples" / "step-00000000.jsonl").read_text().splitlines()]
    assert any("\ufffd" in row["response"] for row in rows)
    for row, sample in zip(rows, step["samples"], strict=True):
        assert row["tokens"] == sum(sample["mask"])
        assert row["reward"] == sample["reward"]
        assert {"prompt", "truth", "correct", "reason", "finish_reason", "id"} <= row.keys()


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel()), (2, Parallel(pp=2))], ids=str)
def test_resumed_is_bitwise_uninterrupted(size: int, parallel: Parallel, tmp_path: Path) -> None:
    options = {"folder": tmp_path, "parallel": parallel, "steps": 3, "save_every": 1}
    ranks(size).run(jobs_rlvr.whole_run, **options)
    full = metric_records(tmp_path)
    for lost in ("step-00000003", "critic/step-00000003"):
        shutil.rmtree(tmp_path / "run" / lost)
    ranks(size).run(jobs_rlvr.whole_run, **options)
    again = metric_records(tmp_path)
    assert again[-1] == full[-1]
    assert len(full) == 3


def metric_records(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each step without times and memory. If a step is recorded twice, the later record."""
    rows = {r["step"]: r for r in read_metrics(folder / "run") if r["kind"] == "step"}
    ignored = ("second", "time", "memory")
    return [{k: v for k, v in rows[step].items() if not any(word in k for word in ignored)} for step in sorted(rows)]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"verifier": "nonesuch"}, "verifier='nonesuch' is unknown"),
        ({"max_prompt_tokens": 4}, "more than max_prompt_tokens=4"),
        ({"max_prompt_tokens": 120, "tokens_per_microbatch": 256}, "exceeds the model's context"),
        ({"stop": ("no such token",)}, "stop='no such token' is not a token"),
        (
            {"critic": replace(jobs_rlvr.make_run(FOLDER, Parallel()).algorithm.critic, model=Model(init=jobs.TINY))},
            "a reward model is needed",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_layouts_are_refused(changes: dict[str, Any], error: str, tmp_path: Path) -> None:
    assert error in ranks(1).run(jobs_rlvr.refused, folder=tmp_path, **changes)[0]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"critic": None}, "set algorithm.advantage=group"),
        ({"advantage": "group", "critic": None, "samples_per_prompt": 1}, "samples_per_prompt=1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"minibatches": 17}, "minibatches=17"),
        ({"correct_reward": float("nan")}, "algorithm.correct_reward=nan must be finite"),
        ({"no_stop_reward": float("-inf")}, "algorithm.no_stop_reward=-inf must be finite"),
        ({"kl_coef": float("nan")}, "algorithm.kl_coef=nan"),
        ({"skip_zero_std_groups": True}, "skip_zero_std_groups=True needs"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        jobs_rlvr.make_run(FOLDER, Parallel(), **changes)


def test_long_prompts_may_be_dropped_and_are_counted(tmp_path: Path) -> None:
    algorithm = ranks(1).run(jobs_rlvr.refused, folder=tmp_path, max_prompt_tokens=5, too_long="drop", steps=1)[0]
    assert algorithm == ""

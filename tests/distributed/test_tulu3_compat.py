"""tulu3_compat: the published trainer's score slot, whitening, averages, labels and schedule, against tests/support/tulu3_definition.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.advantages import by_critic
from engine.algorithms.dpo import DPO
from engine.algorithms.rlvr.step import RLVRTrainer
from engine.batching.build import batch
from engine.config import Logging, Model, Optim, Parallel, Run
from engine.config.checks import problems
from engine.data.rows import Source
from engine.dryrun.model_shapes import shape_of
from engine.losses import ppo_clip, ppo_first, ppo_terms, value_clip
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import Response
from engine.rollout.verification import Rollout
from engine.types import LossFunction, Prompt, Sample
from engine.verify.verdict import Verdict
from tests.distributed.test_rlvr import FOLDER, check_same, metric_records, one_rank
from tests.support import jobs_rlvr
from tests.support import tulu3_definition as definition
from tests.support.pool import ranks

CPU = torch.device("cpu")
LIMIT = 9  # tokens of a response
SIZES = [4, 1, LIMIT, LIMIT, 8, 2, 6, 1, 7, LIMIT, 3, 5]  # of LIMIT: stopped by the limit, or with the last token; without a slot


def drawn(seed: int = 0) -> list[Sample]:
    """Ragged prompts and responses as RLVR lays them out: a masked position follows a response that is shorter than the limit."""
    draw = np.random.default_rng(seed)
    found = []
    for size in SIZES:
        prompt = int(draw.integers(1, 6))
        mask = np.array([0] * (prompt - 1) + [1] * size + [0] * (size < LIMIT), np.uint8)
        old = (-draw.random(len(mask)) * 3 * mask).astype(np.float32)
        ref = ((old - draw.normal(0, 0.3, len(mask))) * mask).astype(np.float32)
        value = draw.normal(3, 2, len(mask)).astype(np.float32)
        tokens = draw.integers(0, 250, len(mask) + 1, dtype=np.int32)
        score = float(draw.choice([10.0, 0.0] if size < LIMIT else [10.0, -10.0]))
        found.append(Sample(tokens, mask, reward=score, old_logprob=old, ref_logprob=ref, value=value))
    return found


def first(sample: Sample) -> int:
    """The position that predicts the response's first token."""
    return int(np.argmax(sample.mask))


def described(samples: list[Sample], new: list[Any] | None = None, new_value: list[Any] | None = None) -> list[definition.Response]:
    """The samples as the definition has them: what belongs to the response, without its prompt."""
    found = []
    for i, sample in enumerate(samples):
        start, size = first(sample), int(sample.mask.sum())
        assert sample.old_logprob is not None
        assert sample.ref_logprob is not None
        assert sample.value is not None
        token, valued = slice(start, start + size), slice(start, None)
        response = definition.Response(
            float(sample.reward or 0.0),
            sample.old_logprob[token].tolist(),
            sample.ref_logprob[token].tolist(),
            sample.value[valued].tolist(),
        )
        if new is not None and new_value is not None:
            response.new, response.new_value = new[i][token].tolist(), new_value[i][valued].tolist()
        found.append(response)
    return found


def row(sample: Sample, values: Tensor) -> list[float]:
    """A row of one of the definition's rectangles, at the positions of the sample: 0 before the response."""
    start = first(sample)
    return [0.0] * start + values[: sample.length - start].tolist()


GAE = {"kl_coef": 0.3, "gamma": 0.97, "lam": 0.9}


def with_advantages(samples: list[Sample], gpus: int, kl: Any = "k1") -> list[Sample]:
    return by_critic(samples, kl=kl, whiten="rank", ranks=gpus, device=CPU, score_slot=True, **GAE)  # type: ignore[arg-type]


def check_advantages(samples: list[Sample], wanted: tuple[Tensor, Tensor], tolerance: float = 2e-6) -> None:
    for i, sample in enumerate(samples):
        for got, rectangle in zip((sample.advantage, sample.returns), wanted, strict=True):
            assert got is not None
            assert got.tolist() == pytest.approx(row(sample, rectangle[i]), rel=1e-6, abs=tolerance)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gpus", [1, 3, 6])
def test_advantages_and_returns(kl: str, gpus: int) -> None:
    samples = drawn()
    wanted = definition.advantages(described(samples), LIMIT, GAE["kl_coef"], kl, GAE["gamma"], GAE["lam"], gpus)
    check_advantages(with_advantages(samples, gpus, kl), wanted)


def test_only_a_slot_moves_the_score() -> None:
    """Without one, both definitions are the same; with one, they differ in every advantage."""
    how: dict[str, Any] = {"kl": "k1", "whiten": "none", "ranks": 1, "device": CPU, **GAE}
    for ours, theirs in zip(by_critic(drawn(), **how), by_critic(drawn(), score_slot=True, **how), strict=True):
        assert ours.advantage is not None
        assert theirs.advantage is not None
        assert theirs.returns is not None
        assert ours.returns is not None
        if ours.mask[-1]:
            assert ours.advantage.tolist() == theirs.advantage.tolist()
        else:
            assert np.all(ours.advantage[ours.mask > 0] != theirs.advantage[ours.mask > 0])
            assert (theirs.returns[-1], theirs.advantage[-1], ours.returns[-1]) == (theirs.reward, 0.0, 0.0)


def in_order(samples: list[Sample], per_device: int) -> list[Sample]:
    return [replace(s, group=i // per_device if per_device > 1 else -1) for i, s in enumerate(samples)]


def totals(
    loss: LossFunction, samples: list[Sample], inputs: list[np.ndarray], **cut: Any
) -> tuple[float, list[list[float]], dict[str, float]]:
    """Total over count, its gradients by sample, and the metrics, over all microbatches of all ranks."""
    total, count, gradients, sums = 0.0, 0, {}, dict[str, float]()
    for rank in range(cut.get("ranks", 1)):
        for packed in batch(samples, **cut, rank=rank):
            output = torch.full((len(packed.tokens_T),), 7.0)
            bounds = list(zip(packed.index_S, *(cut.tolist() for cut in (packed.cu_seqlens[:-1], packed.cu_seqlens[1:])), strict=True))
            for i, a, b in bounds:
                if i >= 0:
                    output[a:b] = torch.from_numpy(inputs[i])
            output.requires_grad_()
            found = loss(output, packed)
            found.total.backward()
            total, count = total + float(found.total), count + found.count
            for name, (value, _) in found.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            assert output.grad is not None
            gradients |= {i: output.grad[a:b].tolist() for i, a, b in bounds}
    by_sample = [[g / count for g in gradients[i]] for i in range(len(samples))]
    return total / count, by_sample, {name: value / count for name, value in sums.items()}


CUTS: list[dict[str, Any]] = [
    {"token_budget": 48},
    {"token_budget": 1000},
    {"token_budget": 64, "ranks": 2, "total_multiple": 8},
    {"token_budget": 48, "ranks": 3, "microbatch_multiple": 2},
]


@pytest.mark.parametrize("per_device", [1, 2, 3, 5])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_losses_and_gradients(per_device: int, cut: dict[str, Any]) -> None:
    """Equal however the step is cut into microbatches and ranks, the last group of a step being smaller for 5."""
    cut = cut | {"token_budget": cut["token_budget"] * max(1, per_device // 2)}
    samples = in_order(with_advantages(drawn(), 3), per_device)
    draw = np.random.default_rng(1)
    new, new_value = ([(np.asarray(x) + draw.normal(0, 0.4, len(x))).astype(np.float32) for x in xs] for xs in columns(samples))
    responses = described(samples, new, new_value)
    advantage, returns = definition.advantages(described(samples), LIMIT, GAE["kl_coef"], "k1", GAE["gamma"], GAE["lam"], 3)
    policy = partial(ppo_clip, average=per_device, clip_low=0.2, clip_high=0.3, kl="k3", kl_coef=0.0)
    critic = partial(value_clip, average=per_device, clip=0.2, coef=0.1, score_slot=True)
    for loss, inputs, (value, slope), coef in (
        (policy, new, definition.policy_loss(responses, advantage, (0.2, 0.3), per_device), 1.0),
        (critic, new_value, definition.value_loss(responses, returns, 0.2, per_device), 0.1),
    ):
        total, gradients, metrics = totals(loss, samples, inputs, **cut)
        assert total == pytest.approx(coef * value, rel=2e-6)
        assert metrics["loss"] == pytest.approx(value, rel=2e-6)
        for i, sample in enumerate(samples):
            assert gradients[i] == pytest.approx([coef * g for g in row(sample, slope[i])], rel=2e-5, abs=1e-8)


def columns(samples: list[Sample]) -> tuple[list[Any], list[Any]]:
    return [s.old_logprob for s in samples], [s.value for s in samples]


def test_what_the_output_layer_computes_is_the_same_average() -> None:
    """TokenTerms, which the fused loss reads, have the weights of ppo_clip; ppo_first, of a single update, as well."""
    samples = in_order(with_advantages(drawn(), 1), 2)
    how: dict[str, Any] = {"average": 2, "clip_low": 0.2, "clip_high": 0.2, "kl": "k1", "kl_coef": 0.0}
    for packed in batch(samples, 64):
        terms, loss = ppo_terms(packed, **how), ppo_clip(torch.zeros(len(packed.tokens_T)), packed, **how)
        assert float(terms.weight_T.sum()) == pytest.approx(loss.count)
        assert bool((terms.weight_T > 0).eq(packed.mask_T).all())
        assert ppo_first(torch.zeros(2, len(packed.tokens_T)), packed, **how).count == loss.count


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(
    ("size", "stopped", "score", "slots"), [(1, True, 10.0, 1), (23, True, 10.0, 1), (24, True, 10.0, 0), (24, False, -10.0, 0)]
)
def test_a_response_gets_a_slot_where_there_is_room(compat: bool, size: int, stopped: bool, score: float, slots: int) -> None:
    """Also one whose stop token is the last that fits gets its score there."""
    trainer: Any = SimpleNamespace(config=jobs_rlvr.make_run(FOLDER, Parallel(), tulu3_compat=compat).algorithm)
    trainer._score = partial(RLVRTrainer._score, trainer)
    logprobs = -np.arange(1, size + 1, dtype=np.float32)
    response = Response(np.arange(50, 50 + size, dtype=np.int32), logprobs, stopped)
    rollout = Rollout(Prompt(np.array([1, 2, 3], np.int32)), response, "", Verdict(True, ""))
    sample, extra = RLVRTrainer._sample(trainer, rollout, 5), slots * compat
    assert sample.old_logprob is not None
    assert sample.tokens.tolist() == [1, 2, 3, *response.tokens.tolist(), *[49 + size] * extra]
    assert sample.mask.tolist() == [0, 0, *[1] * size, *[0] * extra]
    assert sample.old_logprob.tolist() == [0, 0, *logprobs.tolist(), *[0] * extra]
    assert (sample.tokens.dtype, sample.reward, sample.version) == (np.int32, score, 5)


def shares(step: int = 3, count: int = 24, **changes: Any) -> list[list[Sample]]:
    """The minibatches of a step whose samples are numbered by their reward."""
    run = jobs_rlvr.make_run(FOLDER, Parallel(), prompts_per_step=count // 2, minibatches=2, **changes)
    trainer: Any = SimpleNamespace(config=run.algorithm, run=run)
    samples = [Sample(np.zeros(2, np.int32), np.ones(1, np.uint8), reward=float(i)) for i in range(count)]
    return list(RLVRTrainer.minibatches(trainer, step, samples))


def test_a_minibatch_has_as_many_responses_of_each_gpu_and_averages_each_gpus_own() -> None:
    epochs = shares(tulu3_compat=True, tulu3_ranks=3, tulu3_per_device_batch=2)
    assert [len(part) for part in epochs] == [12] * 4
    for part in epochs:
        numbers = [int(s.reward or 0) for s in part]
        assert np.bincount([n // 8 for n in numbers]).tolist() == [4, 4, 4]
        assert [s.group for s in part] == [i // 2 for i in range(12)]
        assert all(a // 8 == b // 8 for a, b in zip(numbers[::2], numbers[1::2], strict=True))
    for once in (epochs[:2], epochs[2:]):
        assert sorted(int(s.reward or 0) for part in once for s in part) == list(range(24))
    assert [s.reward for s in epochs[0]] != [s.reward for s in epochs[2]]
    assert [[s.reward for s in part] for part in shares(tulu3_compat=True)] == [[s.reward for s in part] for part in shares()]


def test_stale_responses_are_not_reweighted() -> None:
    rollout = RolloutConfig(generator_gpus=1, max_staleness=1)
    samples = [replace(s, version=1) for s in with_advantages(drawn(), 1)]
    rollouts: Any = [SimpleNamespace(response=SimpleNamespace(logprobs=np.zeros(int(s.mask.sum())))) for s in samples]
    for compat in (False, True):
        trainer: Any = SimpleNamespace(config=jobs_rlvr.make_run(FOLDER, Parallel(), rollout=rollout, tulu3_compat=compat).algorithm)
        found, metrics = RLVRTrainer._importance_weighted(trainer, 2, samples, rollouts)
        assert metrics["rollout/staleness"] == 1.0
        assert (found is samples, "rollout/importance" in metrics) == (compat, not compat)


COMPAT: dict[str, Any] = {"tulu3_compat": True, "tulu3_ranks": 4, "tulu3_per_device_batch": 2}
RESPONSE = 24  # max_response_tokens of jobs_rlvr.make_run


def as_sample(found: dict[str, Any]) -> Sample:
    arrays: dict[str, Any] = {
        name: np.array(found[name], np.float32) for name in ("advantage", "old_logprob", "ref_logprob", "value", "returns")
    }
    return Sample(np.array(found["tokens"], np.int32), np.array(found["mask"], np.uint8), reward=found["reward"], **arrays)


def test_a_run_has_the_definitions_numbers() -> None:
    """Of what the trainer made of its own responses: layout, rewards, returns, advantages; and of the losses of a single update."""
    step = one_rank(**COMPAT | {"tulu3_per_device_batch": 1, "epochs": 1, "minibatches": 1})[0]
    samples = [as_sample(found) for found in step["samples"]]
    plain = one_rank(epochs=1, minibatches=1)[0]["samples"]
    sizes = [int(sample.mask.sum()) for sample in samples]
    assert {size < RESPONSE for size in sizes} == {True, False}
    for sample, size, found in zip(samples, sizes, plain, strict=True):
        slot = [found["tokens"][-1]] * (size < RESPONSE)
        assert sample.tokens.tolist() == found["tokens"] + slot
        assert sample.mask.tolist() == found["mask"] + [0] * len(slot)
        assert (size < RESPONSE) == (sample.reward != -10.0)
    run = jobs_rlvr.make_run(FOLDER, Parallel()).algorithm
    responses = described(samples)
    how = (RESPONSE, run.kl_coef, run.kl_estimator, run.gamma, run.gae_lambda, COMPAT["tulu3_ranks"])
    advantage, returns = definition.advantages(responses, *how)
    check_advantages(samples, (advantage, returns), tolerance=2e-5)
    for response in responses:
        response.new, response.new_value = response.old, response.value
    losses = definition.policy_loss(responses, advantage, (0.2, 0.2), 1)[0], definition.value_loss(responses, returns, 0.2, 1)[0]
    assert (step["learned"]["policy/loss"], step["learned"]["critic/loss"]) == pytest.approx(losses, rel=2e-5, abs=2e-6)


def test_the_slots_value_is_the_one_after_the_stop_token() -> None:
    """Whatever follows the stop token, the critic's value there is the slot's."""
    samples = [as_sample(found) for found in one_rank(**COMPAT, epochs=1, minibatches=1)[0]["samples"]]
    slotted = [sample for sample in samples if not sample.mask[-1]]
    longer = [np.concatenate([s.tokens[:-1], [7, 8, 9]]).tolist() for s in slotted]
    found = ranks(1).run(jobs_rlvr.critic_values, folder=FOLDER, tokens=longer)[0]
    for sample, values in zip(slotted, found, strict=True):
        assert sample.value is not None
        assert sample.value.tolist() == pytest.approx(values[: sample.length], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("size", "parallel"), [(2, Parallel()), (2, Parallel(pp=2, vpp=2)), (4, Parallel(tp=2, pp=2))], ids=str)
def test_any_layout(size: int, parallel: Parallel) -> None:
    check_same(size, parallel, one_rank(**COMPAT), **COMPAT)


@pytest.mark.parametrize("budget", [80, 1000])
def test_any_microbatches(budget: int) -> None:
    check_same(1, Parallel(), one_rank(**COMPAT), tokens_per_microbatch=budget, **COMPAT)


def test_resumed_is_bitwise_uninterrupted(tmp_path: Path) -> None:
    how = {"folder": tmp_path, "parallel": Parallel(), "steps": 2, "save_every": 1} | COMPAT
    ranks(2).run(jobs_rlvr.whole_run, **how)
    whole = metric_records(tmp_path)
    for lost in ("step-00000002", "critic/step-00000002"):
        shutil.rmtree(tmp_path / "run" / lost)
    ranks(2).run(jobs_rlvr.whole_run, **how)
    assert metric_records(tmp_path) == whole


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tulu3_ranks": 2}, "tulu3_ranks=2 and tulu3_per_device_batch=1 have no effect without tulu3_compat"),
    ({"tulu3_per_device_batch": 2}, "set algorithm.tulu3_compat=true"),
    ({**COMPAT, "tulu3_ranks": 0}, "algorithm.tulu3_ranks=0 must be at least 1"),
    ({**COMPAT, "tulu3_ranks": 6}, "tulu3_ranks=6 must divide prompts_per_step=8: each GPU has as many prompts; use 2"),
    ({**COMPAT, "tulu3_per_device_batch": 3}, "tulu3_per_device_batch=3 times minibatches=2 must divide the 4 responses"),
    ({**COMPAT, "minibatches": 3}, "use tulu3_per_device_batch=1 and minibatches=1"),
    ({**COMPAT, "advantage": "group", "critic": None}, "tulu3_compat=True is PPO with a critic, and algorithm.advantage='group'"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_settings_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        jobs_rlvr.make_run(FOLDER, Parallel(), **changes)
    assert says in str(error.value)


def test_responses_that_are_averaged_together_must_fit_a_microbatch() -> None:
    run = jobs_rlvr.make_run(FOLDER, Parallel(), tokens_per_microbatch=77, **COMPAT)
    (found,) = problems(run, shape_of, 1)
    assert "can have 78 tokens, over tokens_per_microbatch=77; use tokens_per_microbatch=78" in found
    assert problems(replace(run, tokens_per_microbatch=78), shape_of, 1) == []


def test_preferences_of_many_turns(tmp_path: Path) -> None:
    """A run that trains all assistant turns: how many tokens its metrics count, against one that trains the last."""
    said = [("user", "Hi"), ("assistant", "Hello there"), ("user", "2+2?")]
    before = [{"role": role, "content": content} for role, content in said]
    halves = {name: [*before, {"role": "assistant", "content": answer}] for name, answer in (("chosen", "4"), ("rejected", "five"))}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(halves) + "\n")
    counts = {}
    for compat in (False, True):
        algorithm = DPO((Source(str(tmp_path / "pairs.jsonl")),), batch_size=1, chat_template="tulu", tulu3_compat=compat)
        run = Run(
            Model(init=jobs_rlvr.SHAPE, tokenizer="bytes"), replace(algorithm, max_length=128), Optim(1e-3), out=str(tmp_path / f"{compat}")
        )
        ranks(1).run(jobs_rlvr.trained, run=replace(run, steps=1, logging=Logging(tensorboard=False)))
        lines = [json.loads(line) for line in (tmp_path / f"{compat}" / "metrics.jsonl").read_text().splitlines()]
        (counts[compat],) = [(line["length/chosen"], line["length/rejected"]) for line in lines if line["kind"] == "step"]
    assert counts[False] == (len("4") + 1, len("five") + 1)
    assert counts[True] == (len("Hello there4") + 2, len("Hello therefive") + 2)

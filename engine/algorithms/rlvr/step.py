"""Reinforcement learning with verifiable rewards: PPO against 10 or 0 (arXiv 2411.15124, section 6).

A step generates responses with the policy and verifies them. It recomputes their log-probs with the trainer and computes the reference's
log-probs, the critic's values and the advantages. K epochs of clipped updates of policy and critic follow. With a single update per step,
the update itself computes the log-probs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.advantages import by_critic, by_group, off_policy
from engine.algorithms.rlvr.config import RLVR
from engine.config import Run, step_folder
from engine.data.mixture import Mixture
from engine.data.prepare import open_chat
from engine.data.stops import stop_tokens
from engine.data.tasks import Tasks, read_tasks
from engine.data.template import ChatTemplate
from engine.distributed.timer import PhaseTimer
from engine.losses import ppo, value_clip
from engine.megatron.policy import Learner, Policy
from engine.rollout.engine import GenerationRequest, GenerationResult, RolloutEngine, SamplingParams, start_engine
from engine.rollout.metrics import rollout_metrics
from engine.rollout.reference import Offloaded, Reference, Resident
from engine.rollout.token_values import token_values
from engine.rollout.verification import Rollout, verify_responses
from engine.types import Prompt, Sample
from engine.verify import verifier
from engine.verify.pool import Pool


@dataclass(frozen=True)
class RLVRTrainer:
    """A started RLVR run; see `Algorithm` in engine/train.py."""

    config: RLVR
    run: Run
    policy: Policy
    critic: Policy | None
    reference: Reference | None
    engine: RolloutEngine
    pool: Pool
    mixture: Mixture[Prompt]
    tasks: list[Prompt]  # held out
    chat: ChatTemplate
    stop: tuple[int, ...]
    steps: int
    notes: list[str]
    data: list[tuple[str, str]]  # path of every source, and the digest of its prompts
    resources: ExitStack

    def close(self) -> None:
        """Release the critic, the reference and the verifiers."""
        self.resources.close()

    @property
    def learners(self) -> list[Learner]:
        """The policy, and the critic if there is one."""
        c = self.config
        kl_coef = c.kl_coef if c.advantage == "group" else 0.0
        average = c.tulu3_per_device_batch if c.tulu3_compat else c.loss_average
        how = {"average": average, "clip_low": c.clip_low, "clip_high": c.clip_high, "kl": c.kl_estimator, "kl_coef": kl_coef}
        learners = [Learner("policy", self.policy, ppo(c.single_update, **how), c.temperature, entropy=c.single_update)]
        if self.critic is not None and c.critic is not None:
            clip, coef = c.critic.value_clip, c.critic.loss_coef
            loss = partial(value_clip, average=average, clip=clip, coef=coef, score_slot=c.tulu3_compat)
            learners.append(Learner("critic", self.critic, loss))
        return learners

    @property
    def headline(self) -> Sequence[str]:
        """The metrics of the printed step line."""
        return "reward/mean", "reward/solve_rate", "rollout/length", "policy/kl", "policy/grad_norm"

    def collect(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """The samples of `step`, ready for training, and their metrics; equal on every rank."""
        clock = PhaseTimer()
        request = self._request_for(step)
        result = self._generate(step, request)
        clock.lap("generate")
        rollouts, dropped = verify_responses(request.prompts, result.responses, self.chat.tokenizer, self.pool, self.policy.world)
        self._log_samples(step, rollouts)
        clock.lap("verify")
        samples = self._with_logprobs([self._sample(rollout, result.version) for rollout in rollouts])
        clock.lap("logprobs")
        learnable, stale = self._importance_weighted(step, self._advantages(samples, rollouts), rollouts)
        metrics = rollout_metrics(rollouts, learnable) | {"rollout/dropped": float(dropped)} | stale | clock.laps | result.metrics
        tokens = sum(len(rollout.response.tokens) for rollout in rollouts)
        return learnable, metrics | {"rollout/tokens_per_second": tokens / metrics["time/generate"]}

    def _request_for(self, step: int) -> GenerationRequest:
        c = self.config
        return self._request(self.mixture.batch(step, c.prompts_per_step), c.temperature, c.samples_per_prompt, step)

    def _request(self, prompts: Sequence[Prompt], temperature: float, samples: int, step: int) -> GenerationRequest:
        return GenerationRequest(
            prompts, SamplingParams(self.config.max_response_tokens, self.stop, temperature), samples, (self.run.seed, step)
        )

    def _generate(self, step: int, request: GenerationRequest) -> GenerationResult:
        is_last = step + 1 >= (self.run.steps or self.steps)
        next_request = None if is_last else self._request_for(step + 1)
        return self.engine.generate(step, request, next_request, step_folder(Path(self.run.out), step))

    def extra_state(self) -> dict[str, bytes]:
        """What the rollout engine keeps in a checkpoint."""
        return self.engine.extra_state()

    def _sample(self, rollout: Rollout, version: int) -> Sample:
        """With tulu3_compat, a stopped response shorter than the limit gets a masked position after its stop token: the score slot."""
        prompt, response = rollout.prompt.tokens, rollout.response.tokens
        slots = int(self.config.tulu3_compat and rollout.response.stopped and len(response) < self.config.max_response_tokens)
        tokens = np.concatenate([prompt, response, response[len(response) - slots :]])
        answer = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        mask = np.zeros(len(tokens) - 1, np.uint8)
        logprob = np.zeros(len(mask), np.float32)
        mask[answer], logprob[answer] = 1, rollout.response.logprobs
        return Sample(tokens, mask, reward=self._score(rollout), old_logprob=logprob, version=version)

    def _score(self, rollout: Rollout) -> float:
        if not rollout.response.stopped:
            return self.config.no_stop_reward
        return self.config.correct_reward if rollout.verdict.correct else 0.0

    def _with_logprobs(self, samples: list[Sample]) -> list[Sample]:
        """With the log-probs of policy (but for `single_update`: its sampler's stay) and reference, at the sampling temperature, and the
        critic's values."""
        budget, temperature = self.run.tokens_per_microbatch, self.config.temperature

        def logprobs(policy: Policy, entropy: bool = False) -> list[np.ndarray]:
            return token_values(policy, samples, budget, partial(policy.logprobs, temperature=temperature, masked=True, entropy=entropy))

        if not self.config.single_update:
            computed = logprobs(self.policy, entropy=True)
            samples = [replace(s, old_logprob=x, entropy=h) for s, (x, h) in zip(samples, computed, strict=True)]
        if self.reference is not None:
            with self.reference.activated() as reference:
                samples = [replace(s, ref_logprob=x) for s, x in zip(samples, logprobs(reference), strict=True)]
        if self.critic is not None:
            values = token_values(self.critic, samples, budget, self.critic.values)
            samples = [replace(s, value=x) for s, x in zip(samples, values, strict=True)]
        return samples

    def _advantages(self, samples: list[Sample], rollouts: list[Rollout]) -> list[Sample]:
        c = self.config
        if c.advantage == "group":
            return by_group(samples, [rollout.prompt.id for rollout in rollouts], c.group_scale)
        return by_critic(
            samples,
            kl_coef=c.kl_coef,
            kl=c.kl_estimator,
            gamma=c.gamma,
            lam=c.gae_lambda,
            whiten="rank" if c.tulu3_compat else c.whiten_advantages,
            ranks=c.tulu3_ranks if c.tulu3_compat else self.policy.grid.dp,
            device=self.policy.world.device,
            score_slot=c.tulu3_compat,
        )

    def _importance_weighted(self, step: int, samples: list[Sample], rollouts: list[Rollout]) -> tuple[list[Sample], dict[str, float]]:
        """The samples with advantages corrected for generation by older weights, and metrics:

        rollout/staleness     mean over responses of the optimizer steps between the weights that generated them and the current ones
        rollout/importance    mean of the tokens' truncated importance weights, and rollout/importance_max
        rollout/truncated     share of tokens whose weight was truncated to rollout.importance_cap

        With tulu3_compat, advantages stay as they are, and only the staleness is reported.
        """
        rollout = self.config.rollout
        if not rollout.max_staleness:
            return samples, {}
        metrics = {"staleness": np.mean([step - sample.version for sample in samples])}
        if not self.config.tulu3_compat:
            samples, weights = off_policy(samples, [r.response.logprobs for r in rollouts], rollout.importance_cap)
            truncated = np.mean(weights == rollout.importance_cap)
            metrics |= {"importance": weights.mean(), "importance_max": weights.max(), "truncated": truncated}
        return samples, {f"rollout/{name}": float(value) for name, value in metrics.items()}

    def minibatches(self, step: int, samples: list[Sample]) -> Iterator[list[Sample]]:
        """Each epoch's optimizer steps: all samples once, shuffled by (seed, step, epoch) and cut in equal parts.

        With skip_zero_std_groups, only samples with an advantage, if there are enough of them for every part. With tulu3_compat, each of
        tulu3_ranks shares is shuffled and cut by itself, and samples that are averaged together have the same group.
        """
        c, averaged = self.config, self.config.tulu3_per_device_batch
        taught = [sample for sample in samples if np.any(sample.advantage)] if c.skip_zero_std_groups else samples
        samples = taught if len(taught) >= c.minibatches else samples
        for epoch in range(c.epochs):
            generator = np.random.default_rng((self.run.seed, step, epoch))
            shares = [generator.permutation(share) for share in np.array_split(np.arange(len(samples)), c.tulu3_ranks)]
            count = min(c.minibatches, max(1, *map(len, shares)))  # fewer where responses were dropped
            for parts in zip(*(np.array_split(share, count) for share in shares), strict=True):
                part = np.concatenate(parts)
                yield [replace(samples[i], group=n // averaged if averaged > 1 else -1) for n, i in enumerate(part)]

    def evaluate(self) -> dict[str, float]:
        """The share of held-out tasks that are solved, at the sampling temperature and greedily, with its standard error."""
        metrics: dict[str, float] = {}
        for name, temperature in (("", self.config.temperature), ("_greedy", 0.0)) if self.tasks else ():
            responses = self.engine.respond(self._request(self.tasks, temperature, 1, 0))
            rollouts, _ = verify_responses(self.tasks, responses, self.chat.tokenizer, self.pool, self.policy.world)
            solved = float(np.mean([self._score(rollout) == self.config.correct_reward for rollout in rollouts]))
            metrics |= {f"reward/solve_rate{name}": solved, f"reward/solve_rate_se{name}": math.sqrt(solved * (1 - solved) / len(rollouts))}
            metrics[f"rollout/length{name}"] = float(np.mean([len(rollout.response.tokens) for rollout in rollouts]))
        return metrics

    def _log_samples(self, step: int, rollouts: list[Rollout]) -> None:
        """Write each response with its verdict, one line each."""
        if self.policy.world.rank == 0:
            path = Path(self.run.out) / "samples" / f"step-{step:08d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.writelines(json.dumps(self._sample_record(rollout), ensure_ascii=False) + "\n" for rollout in rollouts)

    def _sample_record(self, rollout: Rollout) -> dict[str, Any]:
        prompt, response, verdict = rollout.prompt, rollout.response, rollout.verdict
        asked = {"id": prompt.id, "prompt": self.chat.tokenizer.decode(prompt.tokens.tolist()), "response": rollout.text}
        judged = {"truth": prompt.truth, "correct": verdict.correct, "reason": verdict.reason, "reward": self._score(rollout)}
        return asked | judged | {"finish_reason": "stop" if response.stopped else "length", "tokens": len(response.tokens)}


def start(config: RLVR, policy: Policy, run: Run) -> RLVRTrainer:
    """Read the prompts, and build critic and reference. Raises ValueError for data that cannot be read or does not fit."""
    chat = open_chat(run.model, policy.folder, policy.model.vocab, config.chat_template)
    tasks = _tasks(config, chat)
    trained, held_out = tasks[: len(config.sources)], tasks[len(config.sources) :]
    mixture = Mixture(trained, [source.weight for source in config.sources], run.seed)
    resources = ExitStack()
    return RLVRTrainer(
        config=config,
        run=run,
        policy=policy,
        critic=_critic(config, policy, run, resources),
        reference=_reference(config, policy, run, resources),
        engine=resources.enter_context(closing(start_engine(policy, config.rollout))),
        pool=resources.enter_context(Pool()),
        mixture=mixture,
        tasks=[prompt for task in held_out for prompt in task.prompts],
        chat=chat,
        stop=stop_tokens(chat, policy.folder, config.stop),
        steps=math.ceil(len(mixture) / config.prompts_per_step),
        notes=[*chat.warnings, *(task.note for task in tasks)],
        data=[(task.path, task.digest) for task in tasks],
        resources=resources,
    )


def _tasks(config: RLVR, chat: ChatTemplate) -> list[Tasks]:
    if config.verifier:
        verifier(config.verifier)
    tasks: list[Tasks] = []
    for source in (*config.sources, *config.held_out):
        first = sum(map(len, tasks))
        tasks.append(
            read_tasks(source, chat, name=config.verifier, max_length=config.max_prompt_tokens, too_long=config.too_long, first=first)
        )
    return tasks


def _critic(config: RLVR, policy: Policy, run: Run, resources: ExitStack) -> Policy | None:
    if config.critic is None:
        return None
    critic = Policy(config.critic.model, config.critic.optim, run.parallel.with_even_stages(), policy.world, seed=run.seed)
    resources.callback(critic.close)
    return critic


def _reference(config: RLVR, policy: Policy, run: Run, resources: ExitStack) -> Reference | None:
    if not config.kl_coef:
        return None
    if config.reference == "offloaded":
        return Offloaded(policy)
    resident = Policy(run.model, None, run.parallel, policy.world, seed=run.seed)
    resources.callback(resident.close)
    return Resident(resident)

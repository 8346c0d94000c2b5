"""Reinforcement learning with verifiable rewards: PPO against 10 or 0 (arXiv 2411.15124, section 6).

A step draws responses from the policy, has them verified, recomputes their log-probs with the trainer, takes those of the reference and
the critic's values, and turns all that into advantages. K epochs of clipped updates of policy and critic follow. Where there is but one
update, it computes the log-probs itself.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from engine.advantages import Kl, Whiten, by_critic, by_group, off_policy
from engine.config import Model, Optim, Run, step_folder
from engine.config.checks import Asked, Demands, Launch, critic_problems
from engine.data.mixture import Mixture
from engine.data.prepare import open_chat
from engine.data.rows import Source
from engine.data.tasks import Tasks, read_tasks
from engine.data.template import ChatTemplate
from engine.distributed.world import World
from engine.losses import Average, ppo, value_clip
from engine.megatron.policy import Learner, Policy
from engine.rollout import remote
from engine.rollout.checks import generation_problems, slot_warnings
from engine.rollout.metrics import described
from engine.rollout.reference import Offloaded, Reference, Resident
from engine.rollout.remote import KEPT, Apart, Ask, Drawn
from engine.rollout.sampler import Sampling, Slotting, stop_tokens
from engine.rollout.token_values import per_token
from engine.rollout.verification import Rollout, judge
from engine.types import Prompt, Sample
from engine.verify import verifier
from engine.verify.pool import Pool


@dataclass(frozen=True)
class Critic:
    """The model that says what reward to expect: of its own size, on the policy's grid, with an optimizer of its own."""

    model: Model  # a reward model, or a language model with head="scalar"
    optim: Optim
    clip: float = 0.2  # of a value, around what it was when the batch was drawn
    coef: float = 0.1


@dataclass(frozen=True)
class RLVR:
    """PPO against verifiers. One step: `prompts_per_step` prompts, `samples_per_prompt` responses to each, over all ranks."""

    token_loss: ClassVar[bool] = True

    sources: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()  # never trained on; the share solved is reported
    verifier: str = ""  # of all rows; "": each row names its own
    critic: Critic | None = None  # for advantage="critic"
    advantage: Literal["critic", "group"] = "critic"  # group: against the prompt's other samples (GRPO, RLOO); no critic
    group_scale: Literal["std", "none"] = "std"
    skip_agreeing: bool = False  # leave out of the update what has no gradient: groups whose samples all have the same score
    prompts_per_step: int = 224
    samples_per_prompt: int = 1
    minibatches: int = 1  # optimizer steps an epoch
    epochs: int = 4  # passes over the responses of a step: K
    max_prompt: int = 2048  # tokens
    max_response: int = 2048
    too_long: Literal["error", "drop"] = "error"  # what to do with a longer prompt
    temperature: float = 1.0
    stop: tuple[str, ...] = ()  # tokens that end a response, besides the tokenizer's eos
    correct: float = 10.0  # the score of a verified response; any other's is 0
    no_stop: float = -10.0  # the score of a response without a stop token, whatever it says
    kl: Kl = "k1"
    kl_coef: float = 0.05  # times KL(policy, reference) off the reward of each token; with advantage="group" in the loss; 0: no reference
    reference: Literal["resident", "offloaded"] = "resident"  # offloaded: its weights wait in host memory and take the policy's place
    gamma: float = 1.0
    lam: float = 0.95
    whiten: Whiten = "batch"  # rank: each replica's share for itself, as Tülu 3's trainer
    clip_low: float = 0.2
    clip_high: float = 0.2
    loss_average: Average = "token"  # sequence: Tülu 3's
    rollout: Slotting = field(default_factory=Slotting)
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("algorithm.sources is empty; give at least one Source")
        for name in ("prompts_per_step", "samples_per_prompt", "minibatches", "epochs", "max_prompt", "max_response"):
            if getattr(self, name) < 1:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be at least 1")
        if self.temperature <= 0:
            raise ValueError(
                f"algorithm.temperature={self.temperature} must be positive: a policy that does not vary cannot learn; use 1.0"
            )
        for name in ("correct", "no_stop"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be finite: it is a score")
        if not self.kl_coef >= 0:
            raise ValueError(f"algorithm.kl_coef={self.kl_coef} must not be negative")
        if (self.advantage == "critic") != (self.critic is not None):
            has = "none" if self.critic is None else "one"
            raise ValueError(f"algorithm.advantage={self.advantage!r} and algorithm.critic is {has}; 'critic' needs one, 'group' none")
        if self.advantage == "group" and self.samples_per_prompt < 2:
            raise ValueError(f"algorithm.samples_per_prompt={self.samples_per_prompt} must be at least 2 for advantage='group'")
        if self.skip_agreeing and (self.advantage != "group" or self.kl_coef):
            raise ValueError(
                f"algorithm.skip_agreeing needs advantage='group' and kl_coef=0, else such groups have a gradient;"
                f" these are {self.advantage!r} and {self.kl_coef}"
            )
        if self.minibatches > self.prompts_per_step * self.samples_per_prompt:
            raise ValueError(
                f"algorithm.minibatches={self.minibatches} is more than the responses of a step; use {self._responses} or fewer"
            )

    @property
    def _responses(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def learns_once(self) -> bool:
        """Whether a step's responses are learned from by the weights that drew them and never again: then the update itself is the first
        to need their log-probs, and they are not computed before."""
        in_reward = self.kl_coef and self.advantage == "critic"
        return self.epochs * self.minibatches == 1 and not self.rollout.lag and not in_reward

    def demands(self, launch: Launch) -> Demands:
        """What engine/config/checks.py looks at before a run starts."""
        whole = self.max_prompt + self.max_response
        critic = critic_problems(launch, self.critic.model) if self.critic else ()
        return Demands(
            head="lm",
            longest=Asked(whole - 1, f"algorithm.max_prompt={self.max_prompt} with max_response={self.max_response}", self._shorter),
            update=Asked(self._responses // self.minibatches, self._update, self._larger),
            context=whole,
            problems=[*generation_problems(launch, self.rollout, whole), *critic],
            warnings=slot_warnings(launch, self.rollout, self._responses),
        )

    @property
    def _update(self) -> str:
        parts = {"prompts_per_step": self.prompts_per_step, "samples_per_prompt": self.samples_per_prompt, "minibatches": self.minibatches}
        first, *others = (f"algorithm.{name}={value}" for name, value in parts.items() if value > 1 or name == "prompts_per_step")
        return " with ".join([first, *others])

    def _larger(self, sequences: int) -> str:
        """Settings for optimizer steps of at least `sequences`: fewer of them, else more prompts."""
        if self._responses >= sequences:
            return f"algorithm.minibatches={self._responses // sequences}"
        return f"algorithm.prompts_per_step={math.ceil(sequences * self.minibatches / self.samples_per_prompt)}"

    def _shorter(self, longest: int) -> str:
        response = longest + 1 - self.max_prompt
        return f"algorithm.max_response={response}" if response > 0 else f"algorithm.max_prompt={longest} with algorithm.max_response=1"

    def trainers(self, run: Run, world_size: int) -> int:
        """How many ranks train; see remote.trainers."""
        return remote.trainers(run.parallel, world_size, self.rollout.gpus)

    def part(self, run: Run, world: World) -> World | None:
        """The ranks that train; see remote.part."""
        return remote.part(run, world, self.rollout)

    def start(self, policy: Policy, run: Run) -> Started:
        """Read the prompts, and build critic and reference. Raises ValueError for data that cannot be read or does not fit."""
        chat = open_chat(run.model, policy.folder, self.chat_template)
        tasks = self._tasks(chat)
        trained, held_out = tasks[: len(self.sources)], tasks[len(self.sources) :]
        mixture = Mixture(trained, [source.weight for source in self.sources], run.seed)
        resources = ExitStack()
        return Started(
            config=self,
            run=run,
            policy=policy,
            critic=self._critic(policy, run, resources),
            reference=self._reference(policy, run, resources),
            apart=resources.enter_context(closing(Apart(policy))) if policy.world.bridge else None,
            pool=resources.enter_context(Pool()),
            mixture=mixture,
            tasks=[prompt for task in held_out for prompt in task.prompts],
            tokenizer=chat.tokenizer,
            stop=stop_tokens(chat.tokenizer, self.stop),
            steps=math.ceil(len(mixture) / self.prompts_per_step),
            notes=[task.note for task in tasks],
            resources=resources,
        )

    def _tasks(self, chat: ChatTemplate) -> list[Tasks]:
        if self.verifier:
            verifier(self.verifier)
        tasks: list[Tasks] = []
        for source in (*self.sources, *self.held_out):
            first = sum(map(len, tasks))
            tasks.append(read_tasks(source, chat, name=self.verifier, max_length=self.max_prompt, too_long=self.too_long, first=first))
        return tasks

    def _critic(self, policy: Policy, run: Run, resources: ExitStack) -> Policy | None:
        if self.critic is None:
            return None
        critic = Policy(self.critic.model, self.critic.optim, run.parallel.evenly(), policy.world, seed=run.seed)
        resources.callback(critic.close)
        return critic

    def _reference(self, policy: Policy, run: Run, resources: ExitStack) -> Reference | None:
        if not self.kl_coef:
            return None
        if self.reference == "offloaded":
            return Offloaded(policy)
        resident = Policy(run.model, None, run.parallel, policy.world, seed=run.seed)
        resources.callback(resident.close)
        return Resident(resident)


@dataclass(frozen=True)
class Started:
    """RLVR under way."""

    config: RLVR
    run: Run
    policy: Policy
    critic: Policy | None
    reference: Reference | None
    apart: Apart | None  # where generation has ranks of its own
    pool: Pool
    mixture: Mixture[Prompt]
    tasks: list[Prompt]  # held out
    tokenizer: PreTrainedTokenizerFast
    stop: tuple[int, ...]
    steps: int
    notes: list[str]
    resources: ExitStack

    def close(self) -> None:
        """Let go of critic, reference and verifiers."""
        self.resources.close()

    @property
    def learners(self) -> list[Learner]:
        """The policy, and the critic where there is one."""
        c = self.config
        kl_coef = c.kl_coef if c.advantage == "group" else 0.0
        how = {"average": c.loss_average, "clip_low": c.clip_low, "clip_high": c.clip_high, "kl": c.kl, "kl_coef": kl_coef}
        learners = [Learner("", self.policy, ppo(c.learns_once, **how), c.temperature, entropy=c.learns_once)]
        if self.critic is not None and c.critic is not None:
            learners.append(
                Learner("critic", self.critic, partial(value_clip, average=c.loss_average, clip=c.critic.clip, coef=c.critic.coef))
            )
        return learners

    def collect(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """The responses of `step`, ready to be learned from, and what there is to say of them; equal on every rank."""
        clock = Clock()
        ask = self._ask_of(step)
        drawn = self._draw(step, ask)
        clock.lap("generate")
        rollouts, dropped = judge(ask.prompts, drawn.responses, self.tokenizer, self.pool, self.policy.world)
        self._keep(step, rollouts)
        clock.lap("verify")
        samples = self._read([self._sample(rollout, drawn.version) for rollout in rollouts])
        clock.lap("read")
        learnable, stale = self._corrected(step, self._advantages(samples, rollouts), rollouts)
        found = described(rollouts, learnable) | {"dropped": float(dropped)} | stale | clock.laps | drawn.said
        tokens = sum(len(rollout.response.tokens) for rollout in rollouts)
        return learnable, found | {"generated_tokens_per_second": tokens / found["seconds_generate"]}

    def _ask_of(self, step: int) -> Ask:
        c = self.config
        return self._ask(self.mixture.batch(step, c.prompts_per_step), c.temperature, c.samples_per_prompt, step)

    def _ask(self, prompts: Sequence[Prompt], temperature: float, samples: int, step: int) -> Ask:
        return Ask(prompts, Sampling(self.config.max_response, self.stop, temperature), samples, (self.run.seed, step))

    def _draw(self, step: int, ask: Ask) -> Drawn:
        """The step's responses: drawn here and now, or elsewhere, and then with lag=1 while the step before was learned."""
        rollout = self.config.rollout
        if self.apart is None:
            return Drawn(ask.answered(self.policy, rollout), step)
        is_last = step + 1 >= (self.run.steps or self.steps)
        ahead = self._ask_of(step + 1) if rollout.lag and not is_last else None
        return self.apart.draw(step, ask, ahead, step_folder(Path(self.run.out), step))

    def kept(self) -> dict[str, bytes]:
        """The next step's responses, where they are drawn ahead: by weights that will be gone."""
        drawn = self.apart.arrived() if self.apart else None
        return {KEPT: drawn.to_bytes()} if drawn else {}

    def _sample(self, rollout: Rollout, version: int) -> Sample:
        prompt, response = rollout.prompt.tokens, rollout.response.tokens
        mask = np.zeros(len(prompt) + len(response) - 1, np.uint8)
        logprob = np.zeros(len(mask), np.float32)
        mask[len(prompt) - 1 :], logprob[len(prompt) - 1 :] = 1, rollout.response.logprobs
        tokens = np.concatenate([prompt, response])
        return Sample(tokens, mask, reward=self._score(rollout), old_logprob=logprob, version=version)

    def _score(self, rollout: Rollout) -> float:
        if not rollout.response.stopped:
            return self.config.no_stop
        return self.config.correct if rollout.verdict.correct else 0.0

    def _read(self, samples: list[Sample]) -> list[Sample]:
        """With the log-probs of policy (but for `learns_once`: its sampler's stay) and reference, at the sampling temperature, and the
        critic's values."""
        budget, temperature = self.run.tokens_per_microbatch, self.config.temperature

        def logprobs(policy: Policy, entropy: bool = False) -> list[np.ndarray]:
            return per_token(policy, samples, budget, partial(policy.logprobs, temperature=temperature, masked=True, entropy=entropy))

        if not self.config.learns_once:
            found = logprobs(self.policy, entropy=True)
            samples = [replace(s, old_logprob=x, entropy=h) for s, (x, h) in zip(samples, found, strict=True)]
        if self.reference is not None:
            with self.reference.speaking() as speaker:
                samples = [replace(s, ref_logprob=x) for s, x in zip(samples, logprobs(speaker), strict=True)]
        if self.critic is not None:
            values = per_token(self.critic, samples, budget, self.critic.values)
            samples = [replace(s, value=x) for s, x in zip(samples, values, strict=True)]
        return samples

    def _advantages(self, samples: list[Sample], rollouts: list[Rollout]) -> list[Sample]:
        c = self.config
        if c.advantage == "group":
            return by_group(samples, [rollout.prompt.id for rollout in rollouts], c.group_scale)
        device, ranks = self.policy.world.device, self.policy.grid.dp
        return by_critic(samples, kl_coef=c.kl_coef, kl=c.kl, gamma=c.gamma, lam=c.lam, whiten=c.whiten, ranks=ranks, device=device)

    def _corrected(self, step: int, samples: list[Sample], rollouts: list[Rollout]) -> tuple[list[Sample], dict[str, float]]:
        """With advantages that make up for weights that drew the samples a step ago, and what there is to say of it:

        staleness             mean over responses of the steps between the weights that drew them and those that learn from them
        importance, .._max    of the tokens' truncated importance weights; truncated: the share that was cut to rollout.max_weight
        """
        rollout = self.config.rollout
        if not rollout.lag:
            return samples, {}
        samples, weights = off_policy(samples, [r.response.logprobs for r in rollouts], rollout.max_weight)
        truncated, staleness = np.mean(weights == rollout.max_weight), np.mean([step - sample.version for sample in samples])
        said = {"staleness": staleness, "importance": weights.mean(), "importance_max": weights.max(), "truncated": truncated}
        return samples, {name: float(value) for name, value in said.items()}

    def minibatches(self, step: int, samples: list[Sample]) -> Iterator[list[Sample]]:
        """Each epoch's optimizer steps: all samples once, shuffled by (seed, step, epoch) and cut in equal parts.

        With skip_agreeing, those that have an advantage, while there are enough of them for every part.
        """
        taught = [sample for sample in samples if np.any(sample.advantage)] if self.config.skip_agreeing else samples
        samples = taught if len(taught) >= self.config.minibatches else samples
        for epoch in range(self.config.epochs):
            order = np.random.default_rng((self.run.seed, step, epoch)).permutation(len(samples))
            for part in np.array_split(order, min(self.config.minibatches, len(samples))):  # fewer where responses were dropped
                yield [samples[i] for i in part]

    def evaluate(self) -> dict[str, float]:
        """The share of held-out tasks that are solved, at the sampling temperature and greedily, with its standard error."""
        found: dict[str, float] = {}
        for name, temperature in (("", self.config.temperature), ("_greedy", 0.0)) if self.tasks else ():
            responses = self._ask(self.tasks, temperature, 1, 0).answered(self.policy, self.config.rollout)
            rollouts, _ = judge(self.tasks, responses, self.tokenizer, self.pool, self.policy.world)
            solved = float(np.mean([self._score(rollout) == self.config.correct for rollout in rollouts]))
            found |= {f"solve_rate{name}": solved, f"solve_rate_se{name}": math.sqrt(solved * (1 - solved) / len(rollouts))}
            found[f"length{name}"] = float(np.mean([len(rollout.response.tokens) for rollout in rollouts]))
        return found

    def _keep(self, step: int, rollouts: list[Rollout]) -> None:
        """Write what was said and how it was judged, one line a response."""
        if self.policy.world.rank == 0:
            path = Path(self.run.out) / "samples" / f"step-{step:08d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.writelines(json.dumps(self._line(rollout), ensure_ascii=False) + "\n" for rollout in rollouts)

    def _line(self, rollout: Rollout) -> dict[str, Any]:
        prompt, response, verdict = rollout.prompt, rollout.response, rollout.verdict
        asked = {"id": prompt.id, "prompt": self.tokenizer.decode(prompt.tokens.tolist()), "response": rollout.text}
        judged = {"truth": prompt.truth, "correct": verdict.correct, "reason": verdict.reason, "reward": self._score(rollout)}
        return asked | judged | {"finish_reason": "stop" if response.stopped else "length", "tokens": len(response.tokens)}


class Clock:
    """Seconds of each phase of a step, on this rank."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.since = time.perf_counter()

    def lap(self, name: str) -> None:
        """What has passed since the last lap was `name`."""
        now = time.perf_counter()
        self.laps[f"seconds_{name}"] = now - self.since
        self.since = now

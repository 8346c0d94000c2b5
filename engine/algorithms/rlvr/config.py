"""Settings of reinforcement learning with verifiable rewards: PPO with a reward of 10 or 0 (arXiv 2411.15124, section 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from engine.algorithms.workload import Generation, Workload
from engine.config import Model, Optim, Run
from engine.config.checks import Launch, Limit, Requirements, critic_problems
from engine.config.choices import Average, Kl, Whiten
from engine.data.rows import Source
from engine.rollout.checks import batch_size_warnings, generation_problems, training_ranks
from engine.rollout.config import RolloutConfig

if TYPE_CHECKING:
    from engine.algorithms.rlvr.step import RLVRTrainer
    from engine.distributed.world import World
    from engine.megatron.policy import Policy


_COUNTS = (
    "prompts_per_step",
    "samples_per_prompt",
    "minibatches",
    "epochs",
    "max_prompt_tokens",
    "max_response_tokens",
    "tulu3_ranks",
    "tulu3_per_device_batch",
)


@dataclass(frozen=True)
class Critic:
    """Settings of the value model. It may differ from the policy in size, shares its parallel layout, and has its own optimizer."""

    model: Model  # a reward model, or a language model with head="scalar"
    optim: Optim
    value_clip: float = 0.2  # clip range of a value around its value before the step's updates
    loss_coef: float = 0.1  # coefficient of the value loss


@dataclass(frozen=True)
class RLVR:
    """Settings of RLVR. One step generates `samples_per_prompt` responses to each of `prompts_per_step` prompts, over all ranks."""

    sources: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()  # never trained on; their solve rate is reported
    verifier: str = ""  # for all rows, a name in engine.verify; "": each row names its own
    critic: Critic | None = None  # required by advantage="critic"
    advantage: Literal["critic", "group"] = (
        "critic"  # critic: GAE; group: relative to the prompt's other samples (GRPO, RLOO), without a critic
    )
    group_scale: Literal["std", "none"] = "std"  # std: divide by the group's standard deviation (GRPO)
    skip_zero_std_groups: bool = False  # exclude groups of equal scores, which have no gradient, from the update
    prompts_per_step: int = 224  # over all ranks
    samples_per_prompt: int = 1  # G; at least 2 with advantage="group"
    minibatches: int = 1  # optimizer steps per epoch
    epochs: int = 4  # passes over the responses of a step (PPO epochs)
    max_prompt_tokens: int = 2048  # tokens, chat template included
    max_response_tokens: int = 2048  # tokens, stop token included
    too_long: Literal["error", "drop"] = "error"  # for prompts over max_prompt_tokens
    temperature: float = 1.0  # of sampling; above 0
    stop: tuple[str, ...] = ()  # tokens that end a response, in addition to those of engine/data/stops.py
    correct_reward: float = 10.0  # score of a response that the verifier accepts; others get 0
    no_stop_reward: float = -10.0  # score of a response without a stop token, instead of the verifier's
    kl_estimator: Kl = "k1"  # k1, k2 or k3 (Schulman 2020)
    kl_coef: float = 0.05  # of KL(policy, reference): in the token rewards, or in the loss with advantage="group"; 0: no reference model
    reference: Literal["resident", "offloaded"] = "resident"  # offloaded: reference weights are kept in host memory between uses
    gamma: float = 1.0  # discount of GAE
    gae_lambda: float = 0.95
    whiten_advantages: Whiten = "batch"  # normalize over the batch, over the part of each of this run's replicas ("rank"), or "none"
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    loss_average: Average = "token"  # token: mean over tokens; sequence: mean over responses of their token means
    tulu3_compat: bool = False  # Tülu 3's trainer exactly: score slot, whitening, averages (docs/rlvr.md); needs advantage="critic"
    tulu3_ranks: int = 1  # with tulu3_compat: GPUs of the run to reproduce; each whitens and shuffles its share of the responses
    tulu3_per_device_batch: int = 1  # with tulu3_compat: responses whose tokens are averaged together, before the mean over such groups
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    chat_template: str = ""  # "tulu", "chatml" or Jinja source; "": the tokenizer's own

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("algorithm.sources is empty; give at least one Source")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be at least 1")
        if self.temperature <= 0:
            raise ValueError(
                f"algorithm.temperature={self.temperature} must be positive: without sampling there is no exploration; use 1.0"
            )
        for name in ("correct_reward", "no_stop_reward"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be finite; use 10.0 or another number")
        if not self.kl_coef >= 0:
            raise ValueError(f"algorithm.kl_coef={self.kl_coef} must be at least 0; use 0 to train without a reference model")
        if self.advantage == "critic" and self.critic is None:
            raise ValueError(
                "algorithm.advantage='critic' needs a critic, and algorithm.critic is none; "
                "set algorithm.advantage=group, or give the recipe a critic=Critic(...)"
            )
        if self.advantage == "group" and self.critic is not None:
            raise ValueError("algorithm.advantage='group' uses no critic, and the recipe has one; set algorithm.critic=none as well")
        if self.advantage == "group" and self.samples_per_prompt < 2:
            raise ValueError(f"algorithm.samples_per_prompt={self.samples_per_prompt} must be at least 2 with advantage='group'; use 8")
        if self.skip_zero_std_groups and (self.advantage != "group" or self.kl_coef):
            raise ValueError(
                "algorithm.skip_zero_std_groups=True needs advantage='group' and kl_coef=0, because such groups have a gradient otherwise;"
                f" got {self.advantage!r} and {self.kl_coef}"
            )
        if self.minibatches > self.prompts_per_step * self.samples_per_prompt:
            raise ValueError(f"algorithm.minibatches={self.minibatches} exceeds the responses of a step; use {self._responses} or fewer")
        self._check_compat()

    def _check_compat(self) -> None:
        ranks, group = self.tulu3_ranks, self.tulu3_per_device_batch
        if not self.tulu3_compat:
            if (ranks, group) != (1, 1):
                raise ValueError(
                    f"algorithm.tulu3_ranks={ranks} and tulu3_per_device_batch={group} have no effect without tulu3_compat; "
                    "set algorithm.tulu3_compat=true, or both to 1"
                )
            return
        if self.advantage != "critic":
            raise ValueError(f"algorithm.tulu3_compat=True is PPO with a critic, and algorithm.advantage={self.advantage!r}; use 'critic'")
        if self.prompts_per_step % ranks:
            raise ValueError(
                f"algorithm.tulu3_ranks={ranks} must divide prompts_per_step={self.prompts_per_step}: each GPU has as many prompts; "
                f"use {math.gcd(ranks, self.prompts_per_step)}"
            )
        update = self._responses // ranks // self.minibatches
        if self._responses != update * ranks * self.minibatches or update % group:
            raise ValueError(
                f"algorithm.tulu3_per_device_batch={group} times minibatches={self.minibatches} must divide the "
                f"{self._responses // ranks} responses of each of tulu3_ranks={ranks}; use tulu3_per_device_batch=1 and minibatches=1"
            )

    @property
    def _responses(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def single_update(self) -> bool:
        """Whether each step makes one update, with the weights that sampled its responses.

        Then the update computes the old log-probs itself, and a separate forward pass is not needed.
        """
        in_reward = self.kl_coef and self.advantage == "critic"
        return self.epochs * self.minibatches == 1 and not self.rollout.max_staleness and not in_reward

    def requirements(self, launch: Launch) -> Requirements:
        """Limits, problems and warnings for the launch checks (engine/config/checks.py)."""
        whole = self.max_prompt_tokens + self.max_response_tokens
        critic = critic_problems(launch, self.critic.model) if self.critic else ()
        return Requirements(
            head="lm",
            longest_sequence=Limit(
                whole - 1,
                f"algorithm.max_prompt_tokens={self.max_prompt_tokens} with max_response_tokens={self.max_response_tokens}",
                self._shorter,
            ),
            sequences_per_update=Limit(self._responses // self.minibatches, self._update, self._larger),
            context=whole,
            problems=[*generation_problems(launch, self.rollout, whole), *critic, *self._group_problems(launch)],
            warnings=batch_size_warnings(launch, self.rollout, self._responses),
        )

    def _group_problems(self, launch: Launch) -> Iterator[str]:
        """Whether responses that are averaged together fit a microbatch."""
        group, budget, tp = self.tulu3_per_device_batch, launch.run.microbatch_tokens, launch.run.parallel.tp
        need = group * (self.max_prompt_tokens + self.max_response_tokens - 1)
        if group > 1 and need > budget:
            yield (
                f"algorithm.tulu3_per_device_batch={group} responses share a microbatch and can have {need} tokens, over "
                f"tokens_per_microbatch={budget}; use tokens_per_microbatch={-(-need // tp) * tp}"
            )

    @property
    def _update(self) -> str:
        parts = {"prompts_per_step": self.prompts_per_step, "samples_per_prompt": self.samples_per_prompt, "minibatches": self.minibatches}
        first, *others = (f"algorithm.{name}={value}" for name, value in parts.items() if value > 1 or name == "prompts_per_step")
        return " with ".join([first, *others])

    def _larger(self, sequences: int) -> str:
        """The setting that gives optimizer steps of at least `sequences`: fewer minibatches, else more prompts."""
        if self._responses >= sequences:
            return f"algorithm.minibatches={self._responses // sequences}"
        return f"algorithm.prompts_per_step={math.ceil(sequences * self.minibatches / self.samples_per_prompt)}"

    def _shorter(self, longest: int) -> str:
        response = longest + 1 - self.max_prompt_tokens
        return (
            f"algorithm.max_response_tokens={response}"
            if response > 0
            else f"algorithm.max_prompt_tokens={longest} with algorithm.max_response_tokens=1"
        )

    def workload(self) -> Workload:
        """The computation of one step, for the dry run."""
        return Workload(
            lengths="rollout",
            sequences=self._responses,
            max_length=self.max_prompt_tokens + self.max_response_tokens - 1,
            samples=self.prompts_per_step,
            token_loss=True,
            token_values=5,  # advantage, old and reference log-prob, value, return
            epochs=self.epochs,
            minibatches=self.minibatches,
            generation=Generation(
                self.rollout, self.samples_per_prompt, self.max_prompt_tokens, self.max_response_tokens, evaluates=bool(self.held_out)
            ),
            critic=(self.critic.model, self.critic.optim) if self.critic else None,
            policy_logprobs=not self.single_update,
            reference=self.reference if self.kl_coef else "none",
        )

    def trainers(self, run: Run, world_size: int) -> int:
        """Number of training ranks; see rollout.checks.training_ranks."""
        return training_ranks(run.parallel, world_size, self.rollout.generator_gpus)

    def split_world(self, run: Run, world: World) -> World | None:
        """The world of the training ranks; see rollout.remote.split_world."""
        from engine.rollout import remote

        return remote.split_world(run, world, self.rollout)

    def start(self, policy: Policy, run: Run) -> RLVRTrainer:
        """Read the prompts, and build critic and reference. Raises ValueError if data cannot be read or exceeds a limit."""
        from engine.algorithms.rlvr import step

        return step.start(self, policy, run)

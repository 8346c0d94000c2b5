"""The settings of reinforcement learning with verifiable rewards: PPO against 10 or 0 (arXiv 2411.15124, section 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

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


@dataclass(frozen=True)
class Critic:
    """The model that says what reward to expect: of its own size, on the policy's grid, with an optimizer of its own."""

    model: Model  # a reward model, or a language model with head="scalar"
    optim: Optim
    value_clip: float = 0.2  # of a value, around what it was when the batch was drawn
    loss_coef: float = 0.1


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
    skip_zero_std_groups: bool = False  # leave out of the update what has no gradient: groups whose samples all have the same score
    prompts_per_step: int = 224
    samples_per_prompt: int = 1
    minibatches: int = 1  # optimizer steps an epoch
    epochs: int = 4  # passes over the responses of a step: K
    max_prompt_tokens: int = 2048  # tokens
    max_response_tokens: int = 2048
    too_long: Literal["error", "drop"] = "error"  # what to do with a longer prompt
    temperature: float = 1.0
    stop: tuple[str, ...] = ()  # tokens that end a response, besides the tokenizer's eos
    correct_reward: float = 10.0  # the score of a verified response; any other's is 0
    no_stop_reward: float = -10.0  # the score of a response without a stop token, whatever it says
    kl_estimator: Kl = "k1"
    kl_coef: float = 0.05  # times KL(policy, reference) off the reward of each token; with advantage="group" in the loss; 0: no reference
    reference: Literal["resident", "offloaded"] = "resident"  # offloaded: its weights wait in host memory and take the policy's place
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: Whiten = "batch"  # rank: each replica's share for itself, as Tülu 3's trainer
    clip_low: float = 0.2
    clip_high: float = 0.2
    loss_average: Average = "token"  # sequence: Tülu 3's
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("algorithm.sources is empty; give at least one Source")
        for name in ("prompts_per_step", "samples_per_prompt", "minibatches", "epochs", "max_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be at least 1")
        if self.temperature <= 0:
            raise ValueError(
                f"algorithm.temperature={self.temperature} must be positive: a policy that does not vary cannot learn; use 1.0"
            )
        for name in ("correct_reward", "no_stop_reward"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be finite: it is a score")
        if not self.kl_coef >= 0:
            raise ValueError(f"algorithm.kl_coef={self.kl_coef} must not be negative")
        if self.advantage == "critic" and self.critic is None:
            raise ValueError(
                "algorithm.advantage='critic' needs a critic, and algorithm.critic is none; "
                "set algorithm.advantage=group, or give the recipe a critic=Critic(...)"
            )
        if self.advantage == "group" and self.critic is not None:
            raise ValueError("algorithm.advantage='group' uses no critic, and the recipe has one; set algorithm.critic=none as well")
        if self.advantage == "group" and self.samples_per_prompt < 2:
            raise ValueError(f"algorithm.samples_per_prompt={self.samples_per_prompt} must be at least 2 for advantage='group'")
        if self.skip_zero_std_groups and (self.advantage != "group" or self.kl_coef):
            raise ValueError(
                f"algorithm.skip_zero_std_groups needs advantage='group' and kl_coef=0, else such groups have a gradient;"
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
    def single_update(self) -> bool:
        """Whether a step's responses are learned from by the weights that drew them and never again: then the update itself is the first
        to need their log-probs, and they are not computed before."""
        in_reward = self.kl_coef and self.advantage == "critic"
        return self.epochs * self.minibatches == 1 and not self.rollout.max_staleness and not in_reward

    def requirements(self, launch: Launch) -> Requirements:
        """What engine/config/checks.py looks at before a run starts."""
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
            problems=[*generation_problems(launch, self.rollout, whole), *critic],
            warnings=batch_size_warnings(launch, self.rollout, self._responses),
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
        response = longest + 1 - self.max_prompt_tokens
        return (
            f"algorithm.max_response_tokens={response}"
            if response > 0
            else f"algorithm.max_prompt_tokens={longest} with algorithm.max_response_tokens=1"
        )

    def workload(self) -> Workload:
        """For the dry run."""
        return Workload(
            lengths="rollout",
            sequences=self._responses,
            max_length=self.max_prompt_tokens + self.max_response_tokens - 1,
            samples=self.prompts_per_step,
            token_loss=self.token_loss,
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
        """How many ranks train; see remote.trainers."""
        return training_ranks(run.parallel, world_size, self.rollout.generator_gpus)

    def split_world(self, run: Run, world: World) -> World | None:
        """The ranks that train; see remote.part."""
        from engine.rollout import remote

        return remote.split_world(run, world, self.rollout)

    def start(self, policy: Policy, run: Run) -> RLVRTrainer:
        """Read the prompts, and build critic and reference. Raises ValueError for data that cannot be read or does not fit."""
        from engine.algorithms.rlvr import step

        return step.start(self, policy, run)

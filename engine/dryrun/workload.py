"""A launch set up for its rehearsal: the models on their grid, how each one's batch is cut, and the stages of a full microbatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.algorithms.rlvr import RLVR
from engine.config import Llama, Optim, Parallel, Run
from engine.config.checks import Launch, problems
from engine.dryrun import model_shapes
from engine.dryrun.clock import Clock, Update, by_rank
from engine.dryrun.hardware import Hardware
from engine.dryrun.lengths import Sequences, draw
from engine.dryrun.microbatches import Cut, cost
from engine.dryrun.types import Stage

Rehearse = Callable[..., list[Stage]]  # stages.rehearse, or what composes the same from parts


@dataclass(frozen=True)
class Trained:
    """A model that learns, rehearsed."""

    name: str
    model: Llama
    clock: Clock
    lengths: tuple[int, ...]  # of the microbatch that was rehearsed
    stages: list[Stage]
    step: Cut  # one optimizer step
    reading: Cut  # one pass over all sequences

    @property
    def parallel(self) -> Parallel:
        return self.clock.parallel

    @cached_property
    def ranks(self) -> list[list[Stage]]:
        """[pipeline rank][chunk]."""
        return by_rank(self.stages)

    @cached_property
    def update(self) -> Update:
        """One optimizer step of full microbatches; see `share`."""
        return self.clock.update(self.stages, self.step.microbatches, self._message)

    @property
    def pipeline_seconds(self) -> float:
        """Of one optimizer step, as its microbatches really are."""
        return self.scaled(self.update.timeline.seconds)

    @property
    def update_seconds(self) -> float:
        return self.pipeline_seconds + self.update.reduction + self.update.optimizer

    @cached_property
    def reading_seconds(self) -> float:
        """Of a forward over all sequences."""
        forward = self.clock.forward(self.stages, self.reading.microbatches, self._message)
        return forward.seconds * self._share(self.reading)

    def scaled(self, seconds: float) -> float:
        """Of an optimizer step's microbatches as they really are, what `seconds` are of full ones."""
        return seconds * self._share(self.step)

    @property
    def _message(self) -> float:
        return sum(self.lengths) / self.parallel.tp * self.model.hidden * self.clock.hardware.width

    def _share(self, cut: Cut) -> float:
        """A mean microbatch of the costliest rank, in units of the one that was rehearsed."""
        return cut.cost / cost(self.lengths, self.model)


@dataclass(frozen=True)
class Scene:
    """A run on `gpus` of `hardware`."""

    run: Run
    gpus: int
    hardware: Hardware
    sequences: Sequences
    policy: Trained
    critic: Trained | None
    generator: Clock | None  # of ranks that only generate, on the policy's tp and pp; None: those that train generate too

    @property
    def replicas(self) -> int:
        """That train."""
        return self.policy.clock.dp

    @property
    def draws(self) -> Clock:
        """Of the ranks that generate."""
        return self.generator or self.policy.clock

    @property
    def trained(self) -> list[Trained]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    @staticmethod
    def of(run: Run, gpus: int, hardware: Hardware, rehearse: Rehearse, given: Sequence[tuple[int, int]] = ()) -> Scene:
        """Rehearse `run`. Raises ValueError where it cannot start."""
        if gpus < 1:
            raise ValueError(f"gpus={gpus} must be at least 1")
        trainers = run.algorithm.trainers(run, gpus) if isinstance(run.algorithm, RLVR) else gpus
        if found := problems(run, model_shapes.shape, trainers, on_gpu=hardware.width == 2):
            raise ValueError("; also: ".join(found))
        sequences = draw(run.algorithm, run.seed, given)

        def trained(name: str, model: Llama, optim: Optim, parallel: Parallel) -> Trained:
            return _trained(name, model, optim, Clock(hardware, parallel, trainers), run, sequences, rehearse)

        policy = trained("policy", run.model.headed(model_shapes.shape(run.model)), run.optim, run.parallel)
        critic = None
        if isinstance(run.algorithm, RLVR) and (asked := run.algorithm.critic) is not None:
            critic = trained("critic", asked.model.headed(model_shapes.shape(asked.model)), asked.optim, run.parallel.evenly())
        generator = Clock(hardware, run.parallel, gpus - trainers) if trainers < gpus else None
        return Scene(run, gpus, hardware, sequences, policy, critic, generator)


def _trained(name: str, model: Llama, optim: Optim, clock: Clock, run: Run, sequences: Sequences, rehearse: Rehearse) -> Trained:
    def cut(count: int) -> Cut:
        lengths_N, group_N = sequences.lengths_N[:count], sequences.group_N[:count]
        return Cut.of(lengths_N, group_N, model, clock.parallel, clock.dp, run.tokens_per_microbatch)

    count = len(sequences.lengths_N)
    minibatches = run.algorithm.minibatches if isinstance(run.algorithm, RLVR) else 1
    reading = cut(count)
    step = reading if minibatches == 1 else cut(-(-count // minibatches))
    lengths = step.full(sequences.lengths_N, clock.parallel, run.tokens_per_microbatch)
    wanted = round(sum(lengths) * sequences.answered)
    single = Launch(run, clock.world_size, model_shapes.shape, on_gpu=clock.hardware.width == 2).itemsize == 4
    token_loss = run.algorithm.token_loss and model.head == "lm"
    options = {"optim": optim, "rows": wanted, "token_loss": token_loss, "dtype": "fp32" if single else "bf16"}
    stages = rehearse(model, clock.parallel, clock.world_size, lengths, **options)
    return Trained(name, model, clock, lengths, stages, step, reading)

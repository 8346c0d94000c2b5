"""Set up the simulation of a launch: its models and their grids, microbatches, and the stages of a full microbatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.algorithms.workload import Workload
from engine.config import ModelShape, Optim, Parallel, Run
from engine.config.checks import Launch, problems
from engine.dryrun import model_shapes
from engine.dryrun.clock import CostModel, Update, by_rank
from engine.dryrun.hardware import Hardware
from engine.dryrun.lengths import Sequences, sample_lengths
from engine.dryrun.microbatches import MicrobatchPlan, attention_cost
from engine.dryrun.types import Stage
from engine.rollout.checks import training_ranks

StageBuilder = Callable[..., list[Stage]]  # stages.simulate_stages, or compose.composer's function


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, simulated."""

    name: str
    model: ModelShape
    clock: CostModel
    lengths: tuple[int, ...]  # of the full microbatch that was simulated
    stages: list[Stage]
    update_batch: MicrobatchPlan  # one optimizer step
    forward_pass: MicrobatchPlan  # one pass over all sequences

    @property
    def parallel(self) -> Parallel:
        return self.clock.parallel

    @cached_property
    def ranks(self) -> list[list[Stage]]:
        """[pipeline rank][chunk]."""
        return by_rank(self.stages)

    @cached_property
    def update(self) -> Update:
        """One optimizer step of full microbatches; `scaled` converts its seconds to the actual microbatches."""
        return self.clock.update(self.stages, self.update_batch.microbatches, self._message)

    @property
    def pipeline_seconds(self) -> float:
        """Seconds of the pipeline in one optimizer step, of the actual microbatches."""
        return self.scaled(self.update.timeline.seconds)

    @property
    def update_seconds(self) -> float:
        return self.pipeline_seconds + self.update.reduction + self.update.optimizer

    @cached_property
    def forward_seconds(self) -> float:
        """Seconds of a forward over all sequences."""
        forward = self.clock.forward(self.stages, self.forward_pass.microbatches, self._message)
        return forward.seconds * self._share(self.forward_pass)

    def scaled(self, seconds: float) -> float:
        """Convert `seconds` of full microbatches to the actual microbatches of an optimizer step."""
        return seconds * self._share(self.update_batch)

    @property
    def _message(self) -> float:
        return sum(self.lengths) / self.parallel.tp * self.model.hidden * self.clock.hardware.width

    def _share(self, cut: MicrobatchPlan) -> float:
        """Mean cost of a microbatch on the rank with the highest cost, divided by that of the simulated microbatch."""
        return cut.cost / attention_cost(self.lengths, self.model)


@dataclass(frozen=True)
class Simulation:
    """A run simulated on `gpus` devices of `hardware`."""

    run: Run
    workload: Workload
    gpus: int
    hardware: Hardware
    sequences: Sequences
    policy: TrainedModel
    critic: TrainedModel | None
    generator: CostModel | None  # of ranks that only generate, with the policy's tp and pp; None: the training ranks generate

    @property
    def dp(self) -> int:
        """Number of training replicas."""
        return self.policy.clock.dp

    @property
    def generation_clock(self) -> CostModel:
        """Cost model of the ranks that generate."""
        return self.generator or self.policy.clock

    @property
    def models(self) -> list[TrainedModel]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    @staticmethod
    def of(run: Run, gpus: int, hardware: Hardware, rehearse: StageBuilder, given: Sequence[tuple[int, int]] = ()) -> Simulation:
        """Simulate `run`. Raises ValueError if it cannot start; the message lists all problems."""
        if gpus < 1:
            raise ValueError(f"gpus={gpus} must be at least 1")
        workload: Workload = run.algorithm.workload()
        generators = workload.generation.rollout.generator_gpus if workload.generation else 0
        trainers = training_ranks(run.parallel, gpus, generators)
        if messages := problems(run, model_shapes.shape_of, trainers, on_gpu=hardware.width == 2):
            raise ValueError("; also: ".join(messages))
        sequences = sample_lengths(workload, run.seed, given)

        def trained(name: str, model: ModelShape, optim: Optim, parallel: Parallel) -> TrainedModel:
            return _trained(name, model, optim, CostModel(hardware, parallel, trainers), run, sequences, rehearse)

        policy = trained("policy", run.model.with_head(model_shapes.shape_of(run.model)), run.optim, run.parallel)
        critic = None
        if workload.critic is not None:
            model, optim = workload.critic
            critic = trained("critic", model.with_head(model_shapes.shape_of(model)), optim, run.parallel.with_even_stages())
        generator = CostModel(hardware, run.parallel, gpus - trainers) if trainers < gpus else None
        return Simulation(run, workload, gpus, hardware, sequences, policy, critic, generator)


def _trained(
    name: str, model: ModelShape, optim: Optim, clock: CostModel, run: Run, sequences: Sequences, rehearse: StageBuilder
) -> TrainedModel:
    def cut(count: int) -> MicrobatchPlan:
        lengths_N, group_N = sequences.lengths_N[:count], sequences.group_N[:count]
        return MicrobatchPlan.of(lengths_N, group_N, model, clock.parallel, clock.dp, run.tokens_per_microbatch)

    count = len(sequences.lengths_N)
    workload: Workload = run.algorithm.workload()
    minibatches = workload.minibatches
    forward_pass = cut(count)
    update_batch = forward_pass if minibatches == 1 else cut(-(-count // minibatches))
    lengths = update_batch.full(sequences.lengths_N, clock.parallel, run.tokens_per_microbatch)
    trained_tokens = round(sum(lengths) * sequences.answered)
    fp32 = Launch(run, clock.world_size, model_shapes.shape_of, on_gpu=clock.hardware.width == 2).itemsize == 4
    token_loss = workload.token_loss and model.head == "lm"
    options = {"optim": optim, "rows": trained_tokens, "token_loss": token_loss, "dtype": "fp32" if fp32 else "bf16"}
    stages = rehearse(model, clock.parallel, clock.world_size, lengths, **options)
    return TrainedModel(name, model, clock, lengths, stages, update_batch, forward_pass)

"""The training loop, the same for all algorithms."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from engine.batching.build import batch
from engine.batching.ragged import Arena
from engine.config import Run, to_dict
from engine.config.checks import problems
from engine.data.prepare import tokenizer_of
from engine.data.template import ChatTemplate
from engine.data.tokenizer import vocabulary_size
from engine.distributed.timer import PhaseTimer
from engine.distributed.world import World
from engine.dryrun.hardware import Hardware
from engine.files import read_object
from engine.megatron.policy import Learner, Policy, locate_weights
from engine.models.assets import write_assets
from engine.reporting.console import Chips, Report, StepCost
from engine.reporting.header import header
from engine.types import Sample


class Algorithm(Protocol):
    """A started algorithm, as the loop uses it."""

    @property
    def steps(self) -> int: ...
    @property
    def chat(self) -> ChatTemplate: ...
    @property
    def stop(self) -> tuple[int, ...]: ...  # ids that end a response of the trained model
    @property
    def notes(self) -> list[str]: ...
    @property
    def data(self) -> list[tuple[str, str]]: ...  # path of every source, and a digest of what is read from it
    @property
    def learners(self) -> Sequence[Learner]: ...  # the run's policy first
    @property
    def headline(self) -> Sequence[str]: ...  # metrics of the printed step line, in order
    def collect(self, step: int) -> tuple[list[Sample], dict[str, float]]: ...
    def minibatches(self, step: int, samples: list[Sample]) -> Iterable[list[Sample]]: ...
    def evaluate(self) -> dict[str, float]: ...
    def extra_state(self) -> dict[str, bytes]: ...  # files that go into a checkpoint beside the weights
    def close(self) -> None: ...


@runtime_checkable
class DisaggregatedAlgorithm(Protocol):
    """The config of an algorithm with ranks that do not train, such as dedicated generators."""

    def trainers(self, run: Run, world_size: int) -> int:
        """The number of training ranks of a launch of `world_size` ranks. Raises ValueError if it cannot be split so."""
        ...

    def split_world(self, run: Run, world: World) -> World | None:
        """The world of the training ranks. On the others, serves those until they are done and returns None."""
        ...


def train(run: Run, world: World) -> None:
    """Run `run` to its end, from its latest checkpoint if there is one.

    Raises ValueError before anything is written if a setting, the data or the model does not fit, or if `run.out` holds another run.
    """
    check_folder(Path(run.out), run)
    parting = run.algorithm if isinstance(run.algorithm, DisaggregatedAlgorithm) else None
    check_launch(run, world, parting.trainers(run, world.size) if parting else world.size)
    trainers = parting.split_world(run, world) if parting else world
    if trainers is not None:
        _train(run, trainers, devices=world.size)


def _train(run: Run, world: World, devices: int) -> None:
    out = Path(run.out)
    with ExitStack() as stack:
        policy = stack.enter_context(closing(Policy(run.model, run.optim, run.parallel, world, seed=run.seed)))
        algorithm: Algorithm = stack.enter_context(closing(run.algorithm.start(policy, run)))
        world.rank0_first(lambda: claim_data(out, algorithm.data))
        start, steps = load(algorithm.learners, out), run.steps or algorithm.steps
        arena = Arena(pinned=world.on_gpu)
        world.rank0_first(lambda: claim_folder(out, run, policy, algorithm))
        hardware, passes = Hardware.of_gpu(world.gpu_name), run.algorithm.workload().collect_passes
        chips = Chips(devices, hardware.peak if hardware else None)
        with Report(run, out, chips, algorithm.headline, is_writer=world.rank == 0, start=start) as report:
            for line in header(run, policy, start, steps) if world.rank == 0 else ():
                report.note(line)
            for note in algorithm.notes:
                report.note(note)
            if start:
                report.note(f"resumed from step {start}")
            for step in range(start, steps):
                if is_due(step, run.eval_every) or step == 0:
                    evaluate(algorithm, report, step)
                clock = PhaseTimer()
                samples, metrics = algorithm.collect(step)
                clock.lap("collect")
                learned, flops = learn(algorithm, step, steps, samples, run.tokens_per_microbatch, arena)
                clock.lap("update")
                flops += sum(passes[learner.name] * forward_flops(learner, samples) for learner in algorithm.learners)
                cost = StepCost(sum(sample.length for sample in samples), sum(clock.laps.values()), flops, world.peak_memory_gb())
                report.step(step, steps, metrics | learned | clock.laps, cost)
                if is_due(step + 1, run.save_every) or step + 1 == steps:
                    save(algorithm, out, step + 1, run.keep_last)
            evaluate(algorithm, report, steps)


def check_launch(run: Run, world: World, trainers: int) -> None:
    """Raise ValueError, before a weight is read, for all that settings, shapes and the tokenizer show to be wrong on `trainers` ranks."""
    folder, _ = locate_weights(run.model, world)
    tokens = vocabulary_size(tokenizer_of(run.model, folder))
    if found := problems(run, lambda model: locate_weights(model, world)[1], trainers, on_gpu=world.on_gpu, tokens=tokens):
        raise ValueError("; also: ".join(found))


def learn(algorithm: Algorithm, step: int, steps: int, samples: list[Sample], budget: int, arena: Arena) -> tuple[dict[str, float], float]:
    """Update every learner on every minibatch; returns the means of the updates' metrics, and the floating-point operations of all."""
    values: dict[str, list[float]] = {}
    flops = 0.0
    minibatches = list(algorithm.minibatches(step, samples))
    for update, minibatch in enumerate(minibatches):
        for learner in algorithm.learners:
            _, policy, loss, temperature, entropy = learner
            assert policy.optim is not None
            lr = policy.optim.lr_at(step, steps, update, len(minibatches))
            packed = batch(minibatch, budget, **policy.batch_options, out=arena)
            metrics = policy.update(packed, loss, lr, temperature, entropy=entropy) | {"lr": lr}
            flops += 3 * forward_flops(learner, minibatch)
            for name, value in learner.grouped(metrics).items():
                values.setdefault(name, []).append(value)
    return {name: sum(many) / len(many) for name, many in values.items()}, flops


def forward_flops(learner: Learner, samples: Sequence[Sample]) -> float:
    """Floating-point operations of a forward pass over `samples`, without padding and recomputation."""
    return learner.policy.model.forward_flops(np.array([sample.length for sample in samples]))


def load(learners: Sequence[Learner], out: Path) -> int:
    """Load the latest complete checkpoint of the run's policy, and those of the same step of the others; returns the step."""
    run, *others = learners
    start = run.policy.load_latest(out)
    for learner in others if start else ():
        learner.policy.load_latest(out / learner.name, start)
    return start


def save(algorithm: Algorithm, out: Path, step: int, keep_last: int) -> None:
    """Save all learners, the run's policy last: with its checkpoint the step is complete."""
    run, *others = algorithm.learners
    for learner in others:
        learner.policy.save(out / learner.name, step, None, keep_last)
    run.policy.save(out, step, out / "model", keep_last, algorithm.extra_state())


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens at `step`."""
    return every > 0 and step > 0 and step % every == 0


def evaluate(algorithm: Algorithm, report: Report, step: int) -> None:
    """Report the metrics of held-out data, if there is any."""
    if metrics := algorithm.evaluate():
        report.evaluation(step, metrics)


def check_folder(out: Path, run: Run) -> None:
    """Raise ValueError if `out` holds another run than `run`, naming the settings that differ."""
    if not (out / "run.json").exists():
        return
    there = read_object(out / "run.json", "the record of a run").get("identity")
    if not isinstance(there, dict):
        raise ValueError(f"{out / 'run.json'} has no identity of a run; choose another out=")
    here = json.loads(json.dumps(run.identity()))
    if differing := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        raise ValueError(
            f"{out} already holds another run (its {', '.join(differing)} differ); choose another out=, or the same settings to resume it"
        )


def claim_data(out: Path, data: list[tuple[str, str]]) -> None:
    """Record the sources that the run reads. Raises ValueError, naming the source, if a started run would now read other samples."""
    path = out / "data.json"
    there = read_object(path, "the record of a run's data").get("sources") if path.exists() else None
    if there == [list(source) for source in data]:  # also on the ranks that come after rank 0
        return
    if (out / "run.json").exists() and there is not None:
        changed = [name for (name, digest), before in zip(data, there, strict=False) if before[-1:] != [digest]]
        if changed:
            raise ValueError(
                f"{changed[0]} gives other samples than when {out} was started; restore the file and the tokenizer, or choose another out="
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps({"sources": data}, indent=1) + "\n")
    os.replace(part, path)


def claim_folder(out: Path, run: Run, policy: Policy, algorithm: Algorithm) -> None:
    """Write run.json, which identifies the run, and all of an exported model but its weights."""
    if (out / "run.json").exists():
        return
    shutil.rmtree(out / "model", ignore_errors=True)
    write_assets(out / "model", policy.model, policy.folder, algorithm.chat, algorithm.stop)
    # Last: a folder with run.json is complete.
    (out / "run.json").write_text(json.dumps({"identity": run.identity(), "run": to_dict(run)}, indent=1) + "\n")

"""The loop, the only one."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerFast

from engine.batching.build import batch
from engine.batching.ragged import Arena
from engine.config import Run, to_dict
from engine.config.checks import problems
from engine.data.prepare import tokenizer_of
from engine.data.tokenizer import vocabulary_size
from engine.distributed.world import World
from engine.files import read_object
from engine.megatron.policy import Learner, Policy, locate_weights
from engine.models.families import head_to_hf, to_hf
from engine.reporting.console import Report
from engine.reporting.header import header
from engine.types import Sample


class Algorithm(Protocol):
    """What the loop knows of an algorithm that has started."""

    @property
    def steps(self) -> int: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def data(self) -> list[tuple[str, str]]: ...  # path of every source, and a digest of what is read from it
    @property
    def learners(self) -> Sequence[Learner]: ...  # the run's policy first
    def collect(self, step: int) -> tuple[list[Sample], dict[str, float]]: ...
    def minibatches(self, step: int, samples: list[Sample]) -> Iterable[list[Sample]]: ...
    def evaluate(self) -> dict[str, float]: ...
    def extra_state(self) -> dict[str, bytes]: ...  # files that go into a checkpoint beside the weights
    def close(self) -> None: ...


@runtime_checkable
class DisaggregatedAlgorithm(Protocol):
    """The config of an algorithm that keeps ranks for itself, beside those that train."""

    def trainers(self, run: Run, world_size: int) -> int:
        """How many of so many ranks train. Raises ValueError when it cannot be done."""
        ...

    def split_world(self, run: Run, world: World) -> World | None:
        """The world of the ranks that train; None on the others, which serve those until they are done."""
        ...


def train(run: Run, world: World) -> None:
    """Run `run` to its end, from its newest checkpoint where there is one.

    Raises ValueError before anything is written when a setting, the data or the model does not fit, or when `run.out` holds another run.
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
        world.rank0_first(lambda: claim_folder(out, run, policy, algorithm.tokenizer))
        with Report(run, out, is_writer=world.rank == 0, devices=devices, start=start) as report:
            for line in header(run, policy, start, steps) if world.rank == 0 else ():
                report.note(line)
            for note in algorithm.notes:
                report.note(note)
            if start:
                report.note(f"resumed from step {start}")
            for step in range(start, steps):
                if is_due(step, run.eval_every) or step == 0:
                    evaluate(algorithm, report, step)
                began = time.perf_counter()
                samples, found = algorithm.collect(step)
                metrics = found | learn(algorithm, step, steps, samples, run.tokens_per_microbatch, arena)
                tokens, seconds = sum(s.length for s in samples), time.perf_counter() - began
                report.step(step, steps, metrics, tokens=tokens, seconds=seconds, memory_gb=world.peak_memory_gb())
                if is_due(step + 1, run.save_every) or step + 1 == steps:
                    save(algorithm, out, step + 1, run.keep_last)
            evaluate(algorithm, report, steps)


def check_launch(run: Run, world: World, trainers: int) -> None:
    """Raise ValueError for what settings, shapes and the tokenizer show to be wrong on so many ranks, before a weight is read."""
    folder, _ = locate_weights(run.model, world)
    tokens = vocabulary_size(tokenizer_of(run.model, folder))
    if found := problems(run, lambda model: locate_weights(model, world)[1], trainers, on_gpu=world.on_gpu, tokens=tokens):
        raise ValueError("; also: ".join(found))


def learn(algorithm: Algorithm, step: int, steps: int, samples: list[Sample], budget: int, arena: Arena) -> dict[str, float]:
    """Every learner's updates on every minibatch; the mean over them of what each said."""
    said: dict[str, list[float]] = {}
    for minibatch in algorithm.minibatches(step, samples):
        for name, policy, loss, temperature, entropy in algorithm.learners:
            assert policy.optim is not None
            lr = policy.optim.lr_at(step, steps)
            packed = batch(minibatch, budget, **policy.batch_options, out=arena)
            metrics = policy.update(packed, loss, lr, temperature, entropy=entropy) | {"lr": lr}
            for key, value in metrics.items():
                said.setdefault(f"{name}/{key}" if name else key, []).append(value)
    return {key: sum(values) / len(values) for key, values in said.items()}


def load(learners: Sequence[Learner], out: Path) -> int:
    """Take up the newest whole checkpoint of the run's policy, and that of the same step of the others; returns the step."""
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
    """Report how the model does on held-out data, where there is any."""
    if found := algorithm.evaluate():
        report.evaluation(step, found)


def check_folder(out: Path, run: Run) -> None:
    """Raise ValueError when `out` holds another run than `run`, naming what differs."""
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
    """Write down what the run reads, or raise ValueError, naming the source, when a run that has started would now read something else."""
    path = out / "data.json"
    if (out / "run.json").exists() and path.exists():
        there = read_object(path, "the record of a run's data").get("sources")
        for (name, digest), before in zip(data, there if isinstance(there, list) else [], strict=False):
            if before[-1:] != [digest]:
                raise ValueError(
                    f"{name} gives other samples than when {out} was started; restore the file (and the tokenizer), or choose another out="
                )
        return
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps({"sources": data}, indent=1) + "\n")
    os.replace(part, path)


def claim_folder(out: Path, run: Run, policy: Policy, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write down whose folder this is, and what belongs to the model besides its weights: config.json and the tokenizer."""
    if (out / "run.json").exists():
        return
    assets = out / "model"
    shutil.rmtree(assets, ignore_errors=True)
    tokenizer.save_pretrained(assets)
    config = to_hf(policy.model) if policy.folder is None else json.loads((policy.folder / "config.json").read_text())
    if policy.model.head == "scalar":  # transformers scores the last token that is not padding
        config |= head_to_hf(policy.model) | {"pad_token_id": tokenizer.pad_token_id}
    (assets / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    # Last: with it the claim is complete.
    (out / "run.json").write_text(json.dumps({"identity": run.identity(), "run": to_dict(run)}, indent=1) + "\n")

"""The loop, the only one."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerFast

from engine.batching import batch
from engine.config import Run, to_dict
from engine.megatron.policy import Policy
from engine.ragged import Arena
from engine.report import Report
from engine.types import LossFunction, Sample
from engine.world import World


class Algorithm(Protocol):
    """What the loop knows of an algorithm that has started."""

    @property
    def steps(self) -> int: ...
    @property
    def held_out(self) -> list[Sample]: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def loss(self) -> LossFunction: ...
    def collect(self, step: int) -> list[Sample]: ...


def train(run: Run, world: World) -> None:
    """Run `run` to its end, from its newest checkpoint where there is one.

    Raises ValueError before anything is written when a setting, the data or the model does not fit, or when `run.out` holds another run.
    """
    out = Path(run.out)
    check_folder(out, run)
    with closing(Policy(run.model, run.optim, run.parallel, world, seed=run.seed)) as policy:
        algorithm: Algorithm = run.algorithm.start(policy, run)
        start, steps = policy.load_latest(out), run.steps or algorithm.steps
        arena = Arena(pinned=world.on_gpu)
        world.first(lambda: claim_folder(out, run, policy, algorithm.tokenizer))
        with Report(run, out, is_writer=world.rank == 0, devices=world.size, start=start) as report:
            for note in algorithm.notes:
                report.note(note)
            if start:
                report.note(f"resumed from step {start}")
            for step in range(start, steps):
                if due(step, run.eval_every) or step == 0:
                    evaluate(policy, algorithm, run, report, step)
                began = time.perf_counter()
                samples = algorithm.collect(step)
                lr = run.optim.lr_at(step, steps)
                metrics = policy.update(batch(samples, run.tokens_per_microbatch, **policy.cut, out=arena), algorithm.loss, lr)
                tokens, seconds = sum(s.length for s in samples), time.perf_counter() - began
                report.step(step, steps, metrics | {"lr": lr}, tokens=tokens, seconds=seconds, memory_gb=world.peak_memory_gb())
                if due(step + 1, run.save_every) or step + 1 == steps:
                    policy.save(out, step + 1, out / "model", run.keep_last)
            evaluate(policy, algorithm, run, report, steps)


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens at `step`."""
    return every > 0 and step > 0 and step % every == 0


def evaluate(policy: Policy, algorithm: Algorithm, run: Run, report: Report, step: int) -> None:
    """Report the loss on held-out data, where there is any."""
    if algorithm.held_out:
        report.evaluation(step, policy.evaluate(batch(algorithm.held_out, run.tokens_per_microbatch, **policy.cut), algorithm.loss))


def check_folder(out: Path, run: Run) -> None:
    """Raise ValueError when `out` holds another run than `run`, naming what differs."""
    try:
        there = json.loads((out / "run.json").read_text())["identity"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError) as error:
        raise ValueError(f"{out / 'run.json'} cannot be read ({error}); choose another out=") from None
    here = json.loads(json.dumps(run.identity()))
    if differing := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        raise ValueError(
            f"{out} already holds another run (its {', '.join(differing)} differ); choose another out=, or the same settings to resume it"
        )


def claim_folder(out: Path, run: Run, policy: Policy, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write down whose folder this is, and what belongs to the model besides its weights: config.json and the tokenizer."""
    if (out / "run.json").exists():
        return
    assets = out / "model"
    shutil.rmtree(assets, ignore_errors=True)
    tokenizer.save_pretrained(assets)
    config = assets / "config.json"
    if policy.folder is None:
        config.write_text(json.dumps(policy.model.to_hf(), indent=1) + "\n")
    else:
        shutil.copy(policy.folder / "config.json", config)
    # Last: with it the claim is complete.
    (out / "run.json").write_text(json.dumps({"identity": run.identity(), "run": to_dict(run)}, indent=1) + "\n")

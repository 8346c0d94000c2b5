"""The contenders of `python -m benchmarks rlvr`: one RLVR step, generation and update. Each runs in its own processes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.support.timing import report
from benchmarks.training.train_baselines import now, rows, since
from engine.advantages import by_group
from engine.algorithms.rlvr import RLVR
from engine.algorithms.rlvr.step import RLVRTrainer
from engine.batching.ragged import Arena
from engine.config import Model, Optim, Parallel, Run
from engine.data.rows import Source
from engine.data.wordproblems import write
from engine.distributed.world import World
from engine.megatron.policy import Policy
from engine.models.hub import SMOLLM2, resolve
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import GenerationRequest, GenerationResult
from engine.train import learn
from engine.types import Sample

WORK = Path("runs/bench_rlvr")
LAYOUTS = {"ours-dp2": (Parallel(), 1024), "ours-pp2": (Parallel(pp=2, stages=(17, 13)), 512)}  # layout, tokens per microbatch
WARM = 2  # prompts of the warm-up

Row = dict[str, Any]


class Stopwatch:
    """(wall-clock seconds, CPU seconds) of generation and of the whole step."""

    def __init__(self) -> None:
        self.generation, self.step = np.zeros(2), np.zeros(2)

    @contextmanager
    def generating(self) -> Iterator[None]:
        began = now()
        yield
        self.generation = np.array(since(began))


def main() -> None:
    """Run one contender in one round."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.rlvr_baselines")
    parser.add_argument("contender", choices=[*LAYOUTS, "trl-1x2", "trl-2x1"])
    for name in ("prompts", "samples", "length", "round"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    first = arguments.round * arguments.prompts
    tasks = [{"messages": row["messages"][:1], "truth": row["messages"][1]["content"]} for row in rows(first + arguments.prompts)[first:]]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if arguments.contender in LAYOUTS:
        ours(tasks, arguments.samples, arguments.length, *LAYOUTS[arguments.contender])
    else:
        trl(tasks, arguments.samples, arguments.length)


def ours(tasks: list[Row], samples: int, length: int, parallel: Parallel, budget: int) -> None:
    """A step as in engine.train, but responses have no stop token and every second one is rewarded."""
    world, path, watch = World.start("cpu"), WORK / "prompts.jsonl", Stopwatch()
    world.rank0_first(lambda: _put(path, tasks))
    algorithm = RLVR(
        sources=(Source(str(path)),),
        verifier="gsm8k",
        advantage="group",
        prompts_per_step=len(tasks),
        samples_per_prompt=samples,
        epochs=1,
        max_prompt_tokens=budget - length,
        max_response_tokens=length,
        kl_coef=0.0,
        rollout=RolloutConfig(max_num_seqs=len(tasks) * samples),
    )
    run = Run(Model(SMOLLM2), algorithm, Optim(lr=0.0), parallel, str(WORK), tokens_per_microbatch=budget)
    with closing(Policy(run.model, run.optim, parallel, world)) as policy, closing(algorithm.start(policy, run)) as started:
        timed = _timed(replace(started, stop=()), watch)
        _step(replace(timed, config=replace(algorithm, prompts_per_step=WARM)), budget)
        began = now()
        learned = _step(timed, budget)
        watch.step = np.array(since(began))
        counted = learned if world.rank == 0 else []  # all ranks have the same samples
        generated = sum(int(s.mask.sum()) for s in counted)
        _report(watch, len(counted), sum(len(s.tokens) for s in counted) - generated, generated)
    world.close()


def _put(path: Path, given: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, given)


def _timed(started: RLVRTrainer, watch: Stopwatch) -> RLVRTrainer:
    class Timed(RLVRTrainer):
        def _generate(self, step: int, request: GenerationRequest) -> GenerationResult:
            with watch.generating():
                return super()._generate(step, request)

    return Timed(**{field.name: getattr(started, field.name) for field in fields(started)})


def _step(started: RLVRTrainer, budget: int) -> list[Sample]:
    samples, _ = started.collect(0)
    per_prompt = started.config.samples_per_prompt
    rewarded = [replace(sample, reward=float(i % 2)) for i, sample in enumerate(samples)]
    learnable = by_group(rewarded, [i // per_prompt for i in range(len(samples))], started.config.group_scale)
    learn(started, 0, 1, learnable, budget, Arena())
    return learnable


def trl(tasks: list[Row], samples: int, length: int) -> None:
    """A step of GRPOTrainer: generation with transformers and its KV cache; default loss and advantages."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    from engine.data.tokenizer import load_tokenizer

    watch, work = Stopwatch(), {"samples": 0, "prompt_tokens": 0, "response_tokens": 0}
    ranks, folder = int(os.environ.get("WORLD_SIZE", 1)), resolve(SMOLLM2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(str(folder))

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **options: Any) -> Any:
            with watch.generating():
                result = super()._generate_single_turn(prompt_ids, *arguments, **options)
            work.update(samples=len(result[0]), prompt_tokens=sum(map(len, prompt_ids)), response_tokens=sum(map(len, result[0])))
            return result

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # creates AdamW's state before the timing starts
            optimizer.zero_grad()
            self.began = now()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            watch.step = np.array(since(self.began))

    def rewarded(completions: list[Any], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    for part in (tasks[:WARM], tasks):
        micro = min(8, len(part) * samples // ranks)
        config = GRPOConfig(
            str(WORK / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=len(part) * samples // ranks // micro,
            num_generations=samples,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            learning_rate=0.0,
            max_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = Dataset.from_list([{"prompt": row["messages"]} for row in part])
        Timed(model, rewarded, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()]).train()
    _report(watch, work["samples"], work["prompt_tokens"], work["response_tokens"])


def _report(watch: Stopwatch, samples: int, prompt_tokens: int, response_tokens: int) -> None:
    """Report this process's share. Numbers are added over processes, so only rank 0 reports the seconds of generation."""
    seconds, core_seconds = (float(value) for value in watch.generation)
    first = os.environ.get("RANK", "0") == "0"
    generation = {"generation_seconds": seconds if first else 0.0, "generation_core_seconds": core_seconds}
    tokens = {"prompt_tokens": float(prompt_tokens), "response_tokens": float(response_tokens)}
    report(samples, float(watch.step[0]), float(watch.step[1]), generation | tokens)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

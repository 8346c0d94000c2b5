"""python -m benchmarks dryrun_measured: Compare the dry run's predictions of optimizer steps with measurements on this machine.

    torchrun --nproc-per-node 4 -m benchmarks dryrun_measured      on CPU: tiny models; calibrate with all ranks at once, predict, measure
    python -m benchmarks dryrun_measured                           on one GPU: 8B and a TP8 shard of 405B; time and peak memory

A measured step is Policy.update: forward and backward over microbatches, gradient norm, AdamW. Writes a page into $OUT, by default
benchmarks/results. The exit status is 1 if a prediction is off by more than its limit.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.facts import Facts
from benchmarks.support.tables import as_file, heading, table, versions
from engine.batching.build import batch
from engine.config import ModelShape, Optim, Parallel
from engine.distributed.world import World
from engine.dryrun.calibrate import calibrate
from engine.dryrun.clock import CostModel
from engine.dryrun.hardware import Hardware
from engine.dryrun.stages import simulate_stages
from engine.losses import SFT_LOSS
from engine.megatron.policy import Policy
from engine.types import Sample

OPTIM = Optim(lr=1e-5)
TIME_CPU, TIME_GPU, MEMORY_GPU = 0.25, 0.15, 0.05  # largest accepted relative errors
ROUNDS, STEPS = 2, 3  # on CPU, all cases are measured in each round; a warm-up step before the 3 steps is not counted


@dataclass(frozen=True)
class Case:
    """A model, its parallel layout, and `microbatches` per replica, each with one sequence of `length` tokens."""

    name: str
    model: ModelShape
    parallel: Parallel
    microbatches: int
    length: int


TINY = ModelShape(layers=4, hidden=256, ffn=768, heads=8, kv_heads=4, vocab=1000)
ON_CPU = (
    Case("dp4", TINY, Parallel(), 4, 256),
    Case("tp4", TINY, Parallel(tp=4), 4, 256),
    Case("tp2 dp2", TINY, Parallel(tp=2), 4, 256),
    Case("pp2 dp2", TINY, Parallel(pp=2), 8, 256),
)
# One TP8 shard of 405B, without communication, and 8B with as many layers as fit: all 32 would need 145 GB, at 18 bytes per weight.
SHARD_405B = ModelShape(layers=8, hidden=16384, ffn=6656, heads=16, kv_heads=1, vocab=16064, head_dim=128)
MOST_OF_8B = ModelShape(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256)
LENGTHS = (2048, 4096)
ON_GPU = (("8B", MOST_OF_8B), ("405B, TP8 shard", SHARD_405B))
FILLED = 0.85  # share of a GPU's memory to fill; the rest is for CUDA, NCCL and fragmentation


def on_gpu(memory: int) -> list[Case]:
    """Each model with as many layers as fit a GPU of `memory` bytes according to the dry run."""
    cases = []
    for length in LENGTHS:
        for name, model in ON_GPU:
            two, four = (bytes_of(replace(model, layers=layers), length) for layers in (2, 4))
            layers = min(model.layers, 2 + int((FILLED * memory - two) / ((four - two) / 2)))
            if layers >= 1:
                cases.append(Case(f"{name} of {layers} layers, {length} tokens", replace(model, layers=layers), Parallel(), 4, length))
    return cases


def bytes_of(model: ModelShape, length: int) -> int:
    """The dry run's peak memory of a step on one GPU, in bytes."""
    (stage,) = simulate_stages(model, Parallel(), 1, (length,), optim=OPTIM, token_loss=True)
    return stage.weights + stage.gradients + stage.optimizer + stage.peak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="hardware name or file for the prediction (default: calibrated here on CPU, the data sheet's on a GPU)"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="also write all results to this JSON file")
    parser.add_argument("--facts", type=Path, metavar="F", help="append the results of each case to this file as soon as they are known")


def main(arguments: argparse.Namespace) -> int:
    # Done before this process initializes torch.distributed, because a dry run has to leave the process group it is in.
    cases = on_gpu(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else ON_CPU
    world = World.start()
    hardware = Hardware.load(arguments.device or _gpu_name(world)) if arguments.device or world.on_gpu else calibrate(world)
    log = Facts(arguments.facts if world.rank == 0 else None)
    cases, measured = measure(world, cases, log)
    after = hardware if arguments.device or world.on_gpu else calibrate(world)
    machine = platform.machine() if not world.on_gpu else torch.cuda.get_device_name()
    world.close()
    if world.rank:
        return 0
    facts = [fact_of(case, times, peak, (hardware, after), world) for case, (times, peak) in zip(cases, measured, strict=True)]
    as_file(arguments.json, {"versions": versions(), "hardware": [asdict(hardware), asdict(after)], "cases": facts})
    for fact in facts:
        log.add(fact)
    markdown = page(facts, hardware, world)
    (out := Path(os.environ.get("OUT") or Path(__file__).parents[1] / "results")).mkdir(parents=True, exist_ok=True)
    name = "cpu2" if not world.on_gpu else machine.split()[-1].lower()
    (out / f"dryrun_measured_{name}_{date.today().isoformat()}.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    return int(any(not fact["good"] for fact in facts))


def _gpu_name(world: World) -> str:
    name = torch.cuda.get_device_name(world.device)
    return next((supported for supported in ("h200", "h100", "b200", "a100") if supported.upper() in name), "h100")


def measure(world: World, cases: Sequence[Case], log: Facts) -> tuple[list[Case], list[tuple[list[float], int]]]:
    """The cases that could be measured, and of each (seconds of each step, peak bytes allocated on this GPU).

    Cases are measured alternately, so that other processes on this machine affect all of them alike. A case that runs out of memory is
    logged with its error, and the others continue."""
    results: dict[str, tuple[list[float], int]] = {}
    failed: set[str] = set()
    for _ in range(1 if world.on_gpu else ROUNDS):
        for case in (case for case in cases if case.name not in failed):
            try:
                seconds, peak = _visit(world, case)
            except torch.OutOfMemoryError as error:
                failed.add(case.name)
                log.add({"case": case.name, "error": str(error).splitlines()[0]})
                continue
            times, highest = results.get(case.name, ([], 0))
            results[case.name] = times + seconds, max(highest, peak)
            log.add({"case": case.name, "measured": seconds, "bytes_measured": peak})
    measured = [case for case in cases if case.name in results and case.name not in failed]
    return measured, [results[case.name] for case in measured]


def _visit(world: World, case: Case) -> tuple[list[float], int]:
    rng = np.random.default_rng(0)
    replicas = world.size // case.parallel.model_ranks
    tokens = rng.integers(0, case.model.vocab, (case.microbatches * replicas, case.length + 1), dtype=np.int32)
    samples = [Sample(row, np.ones(case.length, np.uint8)) for row in tokens]
    times = []
    if world.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
    with closing(Policy(case.model, OPTIM, case.parallel, world)) as policy:
        _fill(policy)
        step = batch(samples, case.length, **policy.batch_options)
        assert len(step) == case.microbatches
        for _ in range(1 + STEPS):
            if world.on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            torch.distributed.barrier()
            began = time.perf_counter()
            policy.update(step, SFT_LOSS, 1e-5)
            if world.on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() if world.on_gpu else 0
    return times[1:], peak


def _fill(policy: Policy) -> None:
    """Random weights, generated on the device: the engine's initialization on the host takes minutes for billions of weights."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    policy.optimizer.reload_model_params()


def fact_of(case: Case, times: Sequence[float], peak: int, hardware: Sequence[Hardware], world: World) -> dict[str, Any]:
    """The prediction, as the mean of the calibrations before and after the measurement, and the measurement."""
    dtype = "bf16" if world.on_gpu else "fp32"
    stages = simulate_stages(case.model, case.parallel, world.size, (case.length,), optim=OPTIM, token_loss=True, dtype=dtype)
    width = 2 if world.on_gpu else 4
    message_bytes = width * case.length / case.parallel.tp * case.model.hidden
    clocks = [CostModel(each, case.parallel, world.size) for each in hardware]
    updates = [clock.update(stages, case.microbatches, message_bytes) for clock in clocks]
    predicted = sum(update.seconds for update in updates) / len(updates)
    on_rank = [s for s in stages if s.pp == 0]
    static = sum(s.weights + s.gradients + s.optimizer for s in on_rank)
    bytes_predicted = static + updates[0].timeline.most_held(0, [s.held for s in on_rank], [s.peak for s in on_rank])
    error, memory = predicted / median(times) - 1, bytes_predicted / peak - 1 if peak else None
    good = abs(error) <= (TIME_GPU if world.on_gpu else TIME_CPU) and (memory is None or abs(memory) <= MEMORY_GPU)
    return {
        "case": case.name,
        "microbatches": case.microbatches,
        "length": case.length,
        "predicted": predicted,
        "before_and_after": [update.seconds for update in updates],
        "bubble": updates[0].timeline.bubble,
        "measured": list(times),
        "error": error,
        "bytes_predicted": bytes_predicted,
        "bytes_measured": peak,
        "memory_error": memory,
        "good": good,
    }


def page(facts: Sequence[dict[str, Any]], hardware: Hardware, world: World) -> str:
    command = (
        "python -m benchmarks dryrun_measured"
        if world.size == 1
        else f"torchrun --nproc-per-node {world.size} -m benchmarks dryrun_measured"
    )
    lines = heading("Optimizer steps, predicted by the dry run and measured", versions(), command)
    header = ["case", "microbatches", "predicted s", "by calibration before, after", "measured s: median (min..max)", "error", "bubble"]
    rows = [_row(fact) for fact in facts]
    if world.on_gpu:
        header += ["predicted GB", "max_memory_allocated GB", "error"]
        rows = [[*row, *_memory(fact)] for row, fact in zip(rows, facts, strict=True)]
    lines += table(header, rows)
    limit = TIME_GPU if world.on_gpu else TIME_CPU
    inside = sum(abs(fact["error"]) <= limit for fact in facts)
    basis = (
        f"The device is {hardware.name}."
        if world.on_gpu
        else "Calibrated with all ranks at once, before and after; the prediction is the mean of both."
    )
    lines += ["", f"{inside} of {len(facts)} times within {limit:.0%}. {basis}"]
    if not world.on_gpu:
        lines += ["", _load()]
    return "\n".join(lines) + "\n"


def _load() -> str:
    """The load of the machine, which affects the times."""
    return f"{os.cpu_count()} cores; load average over the last minute {os.getloadavg()[0]:.1f}, of which at most 4 are these ranks."


def _row(fact: dict[str, Any]) -> list[str]:
    times = fact["measured"]
    both = ", ".join(f"{seconds:.3g}" for seconds in fact["before_and_after"])
    spread = f"{median(times):.3g} ({min(times):.3g}..{max(times):.3g})"
    return [
        fact["case"],
        str(fact["microbatches"]),
        f"{fact['predicted']:.3g}",
        both,
        spread,
        f"{fact['error']:+.1%}",
        f"{fact['bubble']:.2f}",
    ]


def _memory(fact: dict[str, Any]) -> list[str]:
    return [f"{fact['bytes_predicted'] / 1e9:.2f}", f"{fact['bytes_measured'] / 1e9:.2f}", f"{fact['memory_error']:+.1%}"]

"""python -m benchmarks dryrun_measured: optimizer steps predicted by the dry run, beside the same steps measured here.

    torchrun --nproc-per-node 4 -m benchmarks dryrun_measured      tiny grids on CPU: calibrate with all ranks at once, predict, measure
    python -m benchmarks dryrun_measured                           on one GPU: 8B, and a TP8 shard of 405B; time and peak memory

Measured steps are the engine's own: microbatches of whole sequences, forward, backward, gradient norm, AdamW. Writes a page into $OUT, or
benchmarks/results; exit status 1 where a prediction is off by more than the issue allows.
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
TIME_CPU, TIME_GPU, MEMORY_GPU = 0.25, 0.15, 0.05  # that a prediction may be off
ROUNDS, STEPS = 2, 3  # every case measured so often, in turn; the first step of a visit is not counted


@dataclass(frozen=True)
class Case:
    """A model, its grid, and `microbatches` of one sequence of `length` tokens a replica."""

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
# An eighth of 405B, as tensor parallelism cuts it, without the messages; of 8B as many layers as fit, for 18 bytes a weight of all 32
# are 145 GB.
SHARD_405B = ModelShape(layers=8, hidden=16384, ffn=6656, heads=16, kv_heads=1, vocab=16064, head_dim=128)
MOST_OF_8B = ModelShape(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256)
LENGTHS = (2048, 4096)
ON_GPU = (("8B", MOST_OF_8B), ("405B, TP8 shard", SHARD_405B))
FILLED = 0.85  # of a GPU's memory, which also holds CUDA, NCCL and what the allocator cannot use


def on_gpu(memory: int) -> list[Case]:
    """Each model with as many of its layers as a GPU of `memory` bytes holds by the dry run's own account."""
    cases = []
    for length in LENGTHS:
        for name, model in ON_GPU:
            two, four = (bytes_of(replace(model, layers=layers), length) for layers in (2, 4))
            layers = min(model.layers, 2 + int((FILLED * memory - two) / ((four - two) / 2)))
            if layers >= 1:
                cases.append(Case(f"{name} of {layers} layers, {length} tokens", replace(model, layers=layers), Parallel(), 4, length))
    return cases


def bytes_of(model: ModelShape, length: int) -> int:
    """Most bytes of a step on one GPU, by the dry run."""
    (stage,) = simulate_stages(model, Parallel(), 1, (length,), optim=OPTIM, token_loss=True)
    return stage.weights + stage.gradients + stage.optimizer + stage.peak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="a name or a file for the clock; default: on CPU what is calibrated here, on a GPU its data sheet's"
    )
    parser.add_argument("--json", type=Path, help="also write the facts to this file")
    parser.add_argument("--facts", type=Path, help="append the facts of each case to this file as they come")


def main(arguments: argparse.Namespace) -> int:
    # Before this process joins a world: to price a case it has to leave the one that it is in.
    cases = on_gpu(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else ON_CPU
    world = World.start()
    hardware = Hardware.load(arguments.device or _gpu_name(world)) if arguments.device or world.on_gpu else calibrate(world)
    log = Facts(arguments.facts if world.rank == 0 else None)
    cases, measured = measure(world, cases, log)
    again = hardware if arguments.device or world.on_gpu else calibrate(world)
    here = platform.machine() if not world.on_gpu else torch.cuda.get_device_name()
    world.close()
    if world.rank:
        return 0
    facts = [fact_of(case, times, peak, (hardware, again), world) for case, (times, peak) in zip(cases, measured, strict=True)]
    as_file(arguments.json, {"versions": versions(), "hardware": [asdict(hardware), asdict(again)], "cases": facts})
    for fact in facts:
        log.add(fact)
    text = page(facts, hardware, world)
    (out := Path(os.environ.get("OUT") or Path(__file__).parents[1] / "results")).mkdir(parents=True, exist_ok=True)
    name = "cpu2" if not world.on_gpu else here.split()[-1].lower()
    (out / f"dryrun_measured_{name}_{date.today().isoformat()}.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(not fact["good"] for fact in facts))


def _gpu_name(world: World) -> str:
    name = torch.cuda.get_device_name(world.device)
    return next((known for known in ("h200", "h100", "b200", "a100") if known.upper() in name), "h100")


def measure(world: World, cases: Sequence[Case], log: Facts) -> tuple[list[Case], list[tuple[list[float], int]]]:
    """The cases that could be measured, and of each (seconds of each step, most bytes allocated on this GPU), in turn so that what else
    runs here meets all alike. One that fails is a fact with the reason, and the others go on."""
    found: dict[str, tuple[list[float], int]] = {}
    lost: set[str] = set()
    for _ in range(1 if world.on_gpu else ROUNDS):
        for case in (case for case in cases if case.name not in lost):
            try:
                taken, peak = _visit(world, case)
            except torch.OutOfMemoryError as error:
                lost.add(case.name)
                log.add({"case": case.name, "error": str(error).splitlines()[0]})
                continue
            times, most = found.get(case.name, ([], 0))
            found[case.name] = times + taken, max(most, peak)
            log.add({"case": case.name, "measured": taken, "bytes_measured": peak})
    kept = [case for case in cases if case.name in found and case.name not in lost]
    return kept, [found[case.name] for case in kept]


def _visit(world: World, case: Case) -> tuple[list[float], int]:
    draw = np.random.default_rng(0)
    replicas = world.size // case.parallel.model_ranks
    tokens = draw.integers(0, case.model.vocab, (case.microbatches * replicas, case.length + 1), dtype=np.int32)
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
    """Random weights, drawn where they lie: the engine's own come from the host, which for billions takes minutes."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    policy.optimizer.reload_model_params()


def fact_of(case: Case, times: Sequence[float], peak: int, hardware: Sequence[Hardware], world: World) -> dict[str, Any]:
    """What was predicted, by the mean of the calibrations before and after, and what was measured."""
    dtype = "bf16" if world.on_gpu else "fp32"
    stages = simulate_stages(case.model, case.parallel, world.size, (case.length,), optim=OPTIM, token_loss=True, dtype=dtype)
    width = 2 if world.on_gpu else 4
    message = width * case.length / case.parallel.tp * case.model.hidden
    clocks = [CostModel(each, case.parallel, world.size) for each in hardware]
    updates = [clock.update(stages, case.microbatches, message) for clock in clocks]
    told = sum(update.seconds for update in updates) / len(updates)
    on_rank = [s for s in stages if s.pp == 0]
    lasting = sum(s.weights + s.gradients + s.optimizer for s in on_rank)
    bytes_told = lasting + updates[0].timeline.most_held(0, [s.held for s in on_rank], [s.peak for s in on_rank])
    error, memory = told / median(times) - 1, bytes_told / peak - 1 if peak else None
    good = abs(error) <= (TIME_GPU if world.on_gpu else TIME_CPU) and (memory is None or abs(memory) <= MEMORY_GPU)
    return {
        "case": case.name,
        "microbatches": case.microbatches,
        "length": case.length,
        "predicted": told,
        "before_and_after": [update.seconds for update in updates],
        "bubble": updates[0].timeline.bubble,
        "measured": list(times),
        "error": error,
        "bytes_predicted": bytes_told,
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
    lines = heading("Optimizer steps: the dry run's, and measured", versions(), command)
    header = ["case", "microbatches", "predicted s", "by calibration before, after", "measured s: median (min..max)", "error", "bubble"]
    rows = [_row(fact) for fact in facts]
    if world.on_gpu:
        header += ["predicted GB", "max_memory_allocated GB", "error"]
        rows = [[*row, *_memory(fact)] for row, fact in zip(rows, facts, strict=True)]
    lines += table(header, rows)
    limit = TIME_GPU if world.on_gpu else TIME_CPU
    inside = sum(abs(fact["error"]) <= limit for fact in facts)
    where = (
        f"the device is {hardware.name}"
        if world.on_gpu
        else "calibrated with all ranks at once, before and after; the prediction is their mean"
    )
    lines += ["", f"{inside} of {len(facts)} within {limit:.0%} in time; {where}."]
    if not world.on_gpu:
        lines += ["", _load()]
    return "\n".join(lines) + "\n"


def _load() -> str:
    """What else ran here, without which these numbers cannot be read."""
    return f"{os.cpu_count()} cores; load average over the last minute {os.getloadavg()[0]:.1f}, of which these ranks are 4 at most."


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

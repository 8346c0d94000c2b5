"""python -m benchmarks throughput: SFT steps of the engine on one GPU with random weights: tokens a second, memory, share of the peak rate;
and the same model drawing responses, its launches issued one by one or replayed from CUDA graphs.

A step is the engine's own: random ragged sequences packed, forward, backward, gradient norm, AdamW. Only reading data is left out.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.facts import Facts
from benchmarks.kernels.kernels_baselines import why
from benchmarks.support.tables import heading, table, versions
from benchmarks.support.timing import Spread
from engine.config import Model, ModelShape, Optim, Parallel
from engine.dryrun.hardware import Hardware

WARM_UP, FEWEST, MOST = 2, 3, 20  # steps
ROWS, PROMPT, RESPONSE, ROUNDS = 64, 16, 128, 3  # responses at once, tokens, and how often they are drawn


@dataclass(frozen=True)
class Case:
    """A model, and a batch of `sequences` of up to `longest` tokens, the shortest an eighth as long."""

    name: str
    model: ModelShape
    sequences: int
    longest: int
    tokens_per_microbatch: int


CASES = (
    Case("SmolLM2-135M's shape", ModelShape(30, 576, 1536, 9, 3, 49152, tied=True), 64, 2048, 16384),
    Case("2 layers of Llama 8B, an eighth of its vocabulary", ModelShape(2, 4096, 14336, 32, 8, 16032, rope_theta=5e5), 32, 4096, 16384),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=10.0, help="of steps for each model (default: %(default)s)")
    parser.add_argument("--facts", type=Path, metavar="F", help="append each row to this file as it comes")


def main(arguments: argparse.Namespace) -> int:
    """Prints the page as Markdown. What keeps the engine from running is a line of it."""
    facts, rows = Facts(arguments.facts), []
    for case in CASES if torch.cuda.is_available() else ():
        try:
            rows.append({"case": case.name} | train(case, arguments.seconds))
        except Exception as error:
            rows.append({"case": case.name, "error": why(error)})
        facts.add(rows[-1])
    print("\n".join(page(rows)))
    return 0


def train(case: Case, seconds: float) -> dict[str, Any]:
    """Steps of `case` for about `seconds`, in a world of one."""
    from engine.batching.build import batch  # here, because they need packages that a bare GPU machine may lack
    from engine.distributed.world import World
    from engine.losses import SFT_LOSS
    from engine.megatron.policy import Policy
    from engine.types import Sample

    draw = np.random.default_rng(0)
    lengths = draw.integers(case.longest // 8, case.longest, case.sequences, endpoint=True)
    samples = [Sample(draw.integers(0, case.model.vocab, n + 1, dtype=np.int32), np.ones(n, np.uint8)) for n in lengths]
    world = World.start()
    try:
        with closing(Policy(Model(init=case.model), Optim(lr=1e-5), Parallel(), world)) as policy:

            def step() -> float:
                began = time.perf_counter()
                policy.update(batch(samples, case.tokens_per_microbatch, **policy.batch_options), SFT_LOSS, 1e-5)
                if world.on_gpu:
                    torch.cuda.synchronize()
                return time.perf_counter() - began

            once = [step() for _ in range(WARM_UP)][-1]
            times = [step() for _ in range(max(FEWEST, min(MOST, int(seconds / once))))]
            tokens, peak_gb = int(lengths.sum()), world.peak_memory_gb()
            drawn = decode(policy)
    finally:
        world.close()
    rate = [tokens / taken for taken in times]
    return {
        "tokens": tokens,
        "steps": len(times),
        "tokens_per_s": rate,
        "peak_gb": peak_gb,
        "flops_per_s": 3 * case.model.forward_flops(lengths) / min(times),
        "decode": drawn,
    }


def decode(policy: Any, rows: int = ROWS, response: int = RESPONSE) -> dict[str, Any]:
    """Tokens a second of `rows` responses drawn at once, prompts and captures included: without CUDA graphs and with them in turn, after a
    round that is not counted. Where that fails, why."""
    from engine.rollout.config import RolloutConfig
    from engine.rollout.engine import SamplingParams
    from engine.rollout.sampler import generate
    from engine.types import Prompt

    prompts = [Prompt(np.full(PROMPT, i, np.int32), id=i) for i in range(rows)]
    how = SamplingParams(response, stop=(policy.model.vocab,))  # which no row draws: all go on to the end
    rates: dict[str, list[float]] = {"launched": [], "replayed": []}
    try:
        for _ in range(1 + ROUNDS):
            for name, found in rates.items():
                began = time.perf_counter()
                generate(policy, prompts, how, RolloutConfig(rows, cuda_graphs="on" if name == "replayed" else "off"))
                found.append(rows * response / (time.perf_counter() - began))
    except Exception as error:
        return {"error": why(error)}
    return {name: found[1:] for name, found in rates.items()}


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The measurements as Markdown."""
    made_by = versions()
    hardware = Hardware.of_gpu(made_by.get("gpu", ""))
    peak = hardware.peak if hardware else None
    lines = heading("SFT steps of the engine on one GPU", made_by, "python -m benchmarks throughput")
    lines += [
        "Random weights, ragged packed sequences, bfloat16 with float32 master weights; a step ends with AdamW. Median (min..max).",
        "",
    ]
    measured = [_cells(row, peak) for row in rows if "error" not in row]
    lines += table(("model", "tokens a step", "tokens/s", "TFLOP/s", "of the data sheet's peak", "peak GiB"), measured) if measured else []
    lines += [f"- {row['case']}: not measured: {row['error']}" for row in rows if "error" in row]
    return [*lines, *_decoding(rows)] if rows else [*lines, "There is no GPU here."]


def _decoding(rows: list[dict[str, Any]]) -> list[str]:
    """The table of responses drawn, and what kept the others from it."""
    asked = [(row["case"], row["decode"]) for row in rows if "decode" in row]
    cells = []
    for name, drawn in asked:
        if "error" not in drawn:
            launched, replayed = drawn["launched"], drawn["replayed"]
            cells.append([name, Spread.of(launched).text(0), Spread.of(replayed).text(0), f"{max(replayed) / max(launched):.2f}x"])
    said = f"{ROWS} responses of {RESPONSE} tokens at once to prompts of {PROMPT}, tokens a second, prompts and captures included."
    lines = ["", said, "", *table(("model", "launch by launch", "in CUDA graphs", "best to best"), cells)] if cells else []
    return lines + [f"- {name}, decoding: not measured: {drawn['error']}" for name, drawn in asked if "error" in drawn]


def _cells(row: dict[str, Any], peak: float | None) -> list[str]:
    share = f"{row['flops_per_s'] / peak:.0%}" if peak else "unknown"
    rate, tflops = Spread.of(row["tokens_per_s"]).text(0), f"{row['flops_per_s'] / 1e12:.0f}"
    return [row["case"], str(row["tokens"]), rate, tflops, share, f"{row['peak_gb']:.1f}"]

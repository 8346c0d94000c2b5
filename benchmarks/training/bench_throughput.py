"""python -m benchmarks throughput: Measure SFT steps and generation on one GPU: tokens per second, peak memory, share of the peak rate.

Weights and data are random. An SFT step is Policy.update: packing, forward, backward, gradient norm, AdamW; reading data is not included.
Generation is measured without and with CUDA graphs.
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
ROWS, PROMPT, RESPONSE, ROUNDS = 64, 16, 128, 3  # concurrent responses, tokens of prompt and response, repetitions


@dataclass(frozen=True)
class Case:
    """A model, and a batch of `sequences` with `longest` / 8 to `longest` tokens."""

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
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time per model (default: %(default)s)")
    parser.add_argument("--facts", type=Path, metavar="F", help="append each result to this file as soon as it is measured")


def main(arguments: argparse.Namespace) -> int:
    """Print the page as Markdown. Errors become lines of the page."""
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
    """Run steps of `case` for about `seconds` in one process."""
    from engine.batching.build import batch  # imported here, because a GPU machine may lack packages that they need
    from engine.distributed.world import World
    from engine.losses import SFT_LOSS
    from engine.megatron.policy import Policy
    from engine.types import Sample

    rng = np.random.default_rng(0)
    lengths = rng.integers(case.longest // 8, case.longest, case.sequences, endpoint=True)
    samples = [Sample(rng.integers(0, case.model.vocab, n + 1, dtype=np.int32), np.ones(n, np.uint8)) for n in lengths]
    world = World.start()
    try:
        with closing(Policy(Model(init=case.model), Optim(lr=1e-5), Parallel(), world)) as policy:

            def step() -> float:
                began = time.perf_counter()
                policy.update(batch(samples, case.tokens_per_microbatch, **policy.batch_options), SFT_LOSS, 1e-5)
                if world.on_gpu:
                    torch.cuda.synchronize()
                return time.perf_counter() - began

            warm_up_seconds = [step() for _ in range(WARM_UP)][-1]
            times = [step() for _ in range(max(FEWEST, min(MOST, int(seconds / warm_up_seconds))))]
            tokens, peak_gb = int(lengths.sum()), world.peak_memory_gb()
            decode_rates = decode(policy)
    finally:
        world.close()
    rate = [tokens / elapsed for elapsed in times]
    return {
        "tokens": tokens,
        "steps": len(times),
        "tokens_per_s": rate,
        "peak_gb": peak_gb,
        "flops_per_s": 3 * case.model.forward_flops(lengths) / min(times),
        "decode": decode_rates,
    }


def decode(policy: Any, rows: int = ROWS, response: int = RESPONSE) -> dict[str, Any]:
    """Tokens per second of `rows` concurrent responses, including prefill and graph capture, alternately without and with CUDA graphs. The
    first round is not counted. Returns {"error": ...} if it fails."""
    from engine.rollout.config import RolloutConfig
    from engine.rollout.engine import SamplingParams
    from engine.rollout.sampler import generate
    from engine.types import Prompt

    prompts = [Prompt(np.full(PROMPT, i, np.int32), id=i) for i in range(rows)]
    params = SamplingParams(response, stop=(policy.model.vocab,))  # a stop token outside the vocabulary, so that no response stops early
    rates: dict[str, list[float]] = {"launched": [], "replayed": []}
    try:
        for _ in range(1 + ROUNDS):
            for name, measured in rates.items():
                began = time.perf_counter()
                generate(policy, prompts, params, RolloutConfig(rows, cuda_graphs="on" if name == "replayed" else "off"))
                measured.append(rows * response / (time.perf_counter() - began))
    except Exception as error:
        return {"error": why(error)}
    return {name: measured[1:] for name, measured in rates.items()}


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The measurements as Markdown."""
    made_by = versions()
    hardware = Hardware.of_gpu(made_by.get("gpu", ""))
    peak = hardware.peak if hardware else None
    lines = heading("SFT steps and generation on one GPU", made_by, "python -m benchmarks throughput")
    lines += [
        "Random weights, packed sequences of different lengths, bfloat16 with float32 master weights; AdamW included. Median (min..max).",
        "",
    ]
    measured = [_cells(row, peak) for row in rows if "error" not in row]
    lines += (
        table(("model", "tokens per step", "tokens/s", "TFLOP/s", "of the data sheet's peak", "peak GiB"), measured) if measured else []
    )
    lines += [f"- {row['case']}: not measured: {row['error']}" for row in rows if "error" in row]
    return [*lines, *_decoding(rows)] if rows else [*lines, "No GPU was found."]


def _decoding(rows: list[dict[str, Any]]) -> list[str]:
    """The table of generation rates, and errors."""
    cases = [(row["case"], row["decode"]) for row in rows if "decode" in row]
    cells = []
    for name, rates in cases:
        if "error" not in rates:
            launched, replayed = rates["launched"], rates["replayed"]
            cells.append([name, Spread.of(launched).text(0), Spread.of(replayed).text(0), f"{max(replayed) / max(launched):.2f}x"])
    note = (
        f"Generation of {ROWS} concurrent responses of {RESPONSE} tokens to prompts of {PROMPT}: tokens/s, including prefill and capture."
    )
    lines = ["", note, "", *table(("model", "without CUDA graphs", "with CUDA graphs", "ratio of the best"), cells)] if cells else []
    return lines + [f"- {name}, decoding: not measured: {rates['error']}" for name, rates in cases if "error" in rates]


def _cells(row: dict[str, Any], peak: float | None) -> list[str]:
    share = f"{row['flops_per_s'] / peak:.0%}" if peak else "unknown"
    rate, tflops = Spread.of(row["tokens_per_s"]).text(0), f"{row['flops_per_s'] / 1e12:.0f}"
    return [row["case"], str(row["tokens"]), rate, tflops, share, f"{row['peak_gb']:.1f}"]

"""python -m benchmarks rlvr: Measure an RLVR step on two CPU cores and compare with TRL's GRPOTrainer.

All contenders have the same prompts, samples per prompt and response lengths: responses cannot stop early.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import replace
from datetime import date

from benchmarks.support.timing import (
    RESULTS,
    Contender,
    Reading,
    Readings,
    Target,
    core_ratio,
    environment,
    measure,
    page,
    rate,
    ratio,
    read_processes,
    strongest,
    write,
)

WHAT = {
    "ours-dp2": "this engine, 2 processes x 1 thread, data parallel, packed to 1024 tokens",
    "ours-pp2": "this engine, 2 processes x 1 thread, pipeline of 17 + 13 layers, packed to 512 tokens",
    "trl-1x2": "TRL GRPOTrainer, fp32, no gradient checkpointing, micro-batches of 8, 1 process x 2 threads",
    "trl-2x1": "the same, 2 processes x 1 thread, data parallel",
}
PEERS = ("trl-1x2", "trl-2x1")
TARGETS = (Target("ours-dp2", PEERS, 2.0), Target("ours-pp2", PEERS, 2.0))
PHASES = ("generation", "update")  # of a step; the update is everything after generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step, different in each round (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="samples per prompt (default: %(default)s)")
    parser.add_argument("--length", type=int, default=48, help="tokens per response (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of rounds; each contender does one step in each (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=WHAT, default=list(WHAT), help="contenders to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="a quick check: 4 prompts, 2 samples, 8 tokens, 1 round; writes no page")


def main(arguments: argparse.Namespace) -> int:
    """Measure, check that all contenders did the same work, and write and print the page."""
    if arguments.quick:
        arguments.prompts, arguments.samples, arguments.length, arguments.rounds = 4, 2, 8, 1
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("prompts", "samples", "length")]
    only = [] if arguments.only == list(WHAT) else ["--only", *arguments.only]
    command = " ".join(["python -m benchmarks rlvr", *sizes, f"--rounds={arguments.rounds}", *only])
    facts = environment() | {"date": date.today().isoformat(), "command": command}
    contenders = [_contender(name) for name in arguments.only if name not in PEERS or importlib.util.find_spec("trl")]

    def read(contender: Contender, round_: int) -> Reading:
        return read_processes(contender, *sizes, f"--round={round_}")

    readings = measure(contenders, arguments.rounds, read)
    _agree(readings)
    notes = [*_notes(arguments, readings), "", *_phases(readings), ""]
    text = page("RLVR on CPU: samples per second", notes, contenders, readings, TARGETS, facts, unit="samples", digits=2)
    print(text)
    if not arguments.quick:
        write(RESULTS, f"rlvr_trl_cpu{facts['cores']}_{facts['date']}", text, readings, facts)
    return 0


def _contender(name: str) -> Contender:
    ranks = 1 if name == "trl-1x2" else 2
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") if ranks == 2 else ()
    command = (sys.executable, *launcher, "-m", "benchmarks.training.rlvr_baselines", name)
    threads = {"OMP_NUM_THREADS": str(2 // ranks), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    return Contender(name, WHAT[name], command, threads)


def _agree(readings: Readings) -> None:
    """Raises RuntimeError unless all contenders had equally many prompt and response tokens in each round."""
    for round_, round_readings in enumerate(zip(*readings.values(), strict=True)):
        work = {
            name: (r.amount, r.checks["prompt_tokens"], r.checks["response_tokens"])
            for name, r in zip(readings, round_readings, strict=True)
        }
        if len(set(work.values())) > 1:
            raise RuntimeError(f"round {round_}: contenders did different work (samples, tokens of prompts and responses): {work}")


def _notes(arguments: argparse.Namespace, readings: Readings) -> list[str]:
    first = next(iter(readings.values()))[0]
    mean = first.checks["prompt_tokens"] / first.amount
    return [
        f"SmolLM2-135M-Instruct, fp32. A step has {arguments.prompts} prompts (GSM8K questions, {mean:.0f} tokens on average in the first",
        f"round), {arguments.samples} samples per prompt at temperature 1, {arguments.length} tokens per response (ours has no stop token;",
        "TRL suppresses the end of turn), and one update on all of them, with group advantages and without a KL term. AdamW has a learning",
        "rate of 0, so that all contenders sample from the same weights. Every second response is rewarded. Processes are new and have",
        "done a small step, which creates the optimizer's state. Ours also decodes and verifies the texts. With one update per step, both",
        "use the log-probs of the update's forward as old log-probs. On CPU, this engine computes fp32 matrix products with oneDNN, TRL",
        "with torch's default, MKL. On AMD processors this is much of the ratio.",
    ]


def _phases(readings: Readings) -> list[str]:
    """A table with the rate of each phase, and its ratio to the faster of TRL's contenders."""
    rows = ["| phase | contender | samples/s | ratio to TRL | per core second |", "|---|---|---|---|---|"]
    for phase in PHASES:
        phase_readings = {name: [_alone(reading, phase) for reading in rounds] for name, rounds in readings.items()}
        peers = [name for name in PEERS if name in phase_readings]
        fastest = strongest(phase_readings, peers) if peers else ""
        for name in phase_readings:
            ratios = (
                [ratio(phase_readings, name, fastest).text(2), core_ratio(phase_readings, name, fastest).text(2)] if fastest else ["-", "-"]
            )
            rows.append(f"| {phase} | {name} | {rate(phase_readings[name]).text(2)} | {' | '.join(ratios)} |")
    return rows


def _alone(reading: Reading, phase: str) -> Reading:
    seconds, core_seconds = reading.checks["generation_seconds"], reading.checks["generation_core_seconds"]
    if phase == "update":
        seconds, core_seconds = reading.seconds - seconds, reading.core_seconds - core_seconds
    return replace(reading, seconds=seconds, core_seconds=core_seconds)

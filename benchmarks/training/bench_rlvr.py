"""python -m benchmarks rlvr: a step of RLVR on two CPU cores, ours beside TRL's GRPOTrainer.

Prompts, samples a prompt and response lengths are the same for all: no response may stop before its last token.
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
PHASES = ("generation", "update")  # a step is both; the update is all that follows generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step; every round has its own (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="of each prompt (default: %(default)s)")
    parser.add_argument("--length", type=int, default=48, help="tokens of every response (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="one step of each contender (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=WHAT, default=list(WHAT), help="of the contenders, where memory is short of all")
    parser.add_argument("--quick", action="store_true", help="4 prompts, 2 samples, 8 tokens, 1 round, and no page: does it run?")


def main(arguments: argparse.Namespace) -> int:
    """Measure, check that all did the same work, write the page and print it."""
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
    """RuntimeError unless every contender read as many prompt tokens and drew as many response tokens, round by round."""
    for round_, found in enumerate(zip(*readings.values(), strict=True)):
        work = {name: (r.amount, r.checks["prompt_tokens"], r.checks["response_tokens"]) for name, r in zip(readings, found, strict=True)}
        if len(set(work.values())) > 1:
            raise RuntimeError(f"round {round_}: contenders did different work (samples, tokens of prompts and responses): {work}")


def _notes(arguments: argparse.Namespace, readings: Readings) -> list[str]:
    first = next(iter(readings.values()))[0]
    mean = first.checks["prompt_tokens"] / first.amount
    return [
        f"SmolLM2-135M-Instruct, fp32. A step is {arguments.prompts} prompts (GSM8K's questions, {mean:.0f} tokens in the mean of",
        f"the first round), {arguments.samples} samples of each at temperature 1, {arguments.length} tokens in every response (no token",
        "ends one of ours; TRL suppresses the end of turn), and one update on all of them: group advantages, no KL term, and AdamW with",
        "a learning rate of 0, so that all sample from the same weights. Every second response is rewarded. Processes are fresh, have",
        "taken a small step before and made the optimizer's state. Ours also decodes and judges the texts. There is one update a step:",
        "both take the log-probs of the policy that drew from its own forward. On CPU this engine computes fp32 products in oneDNN, TRL in",
        "torch's default, MKL; on AMD's processors much of the ratio is that.",
    ]


def _phases(readings: Readings) -> list[str]:
    """A table of each phase for itself, and its ratio to the strongest TRL."""
    rows = ["| phase | contender | samples/s | ratio to TRL | per core second |", "|---|---|---|---|---|"]
    for phase in PHASES:
        alone = {name: [_alone(reading, phase) for reading in found] for name, found in readings.items()}
        peers = [name for name in PEERS if name in alone]
        peer = strongest(alone, peers) if peers else ""
        for name in alone:
            ratios = [ratio(alone, name, peer).text(2), core_ratio(alone, name, peer).text(2)] if peer else ["-", "-"]
            rows.append(f"| {phase} | {name} | {rate(alone[name]).text(2)} | {' | '.join(ratios)} |")
    return rows


def _alone(reading: Reading, phase: str) -> Reading:
    seconds, core_seconds = reading.checks["generation_seconds"], reading.checks["generation_core_seconds"]
    if phase == "update":
        seconds, core_seconds = reading.seconds - seconds, reading.core_seconds - core_seconds
    return replace(reading, seconds=seconds, core_seconds=core_seconds)

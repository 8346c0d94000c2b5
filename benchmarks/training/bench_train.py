"""python -m benchmarks train: Measure SFT on two CPU cores and compare with transformers and TRL.

Only predicted tokens are counted, not padding. Rows are distributed over the rounds, so that each is measured once.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from datetime import date

from benchmarks.support.timing import RESULTS, Contender, Reading, Readings, Target, environment, measure, page, read_processes, write

WHAT = {
    "ours-dp2": "this engine, 2 processes x 1 thread, data parallel, packed to 1024 tokens; includes gradient reduction and the AdamW step",
    "ours-pp2": "this engine, 2 processes x 1 thread, pipeline of 17 + 13 layers, packed to 512 tokens; the same included",
    "ours-1x2": "this engine, 1 process x 2 threads; the same included",
    "plain-1x2": "transformers forward and backward, row by row, 1 process x 2 threads",
    "plain-2x1": "the same, 2 processes x 1 thread, each half of the tokens, gradients not reduced",
    "trimmed-2x1": "the same, logits from the first trained token on only (logits_to_keep)",
    "padded-1x2": "transformers forward and backward, batches of 8 padded to their longest row, 1 process x 2 threads",
    "padded-2x1": "the same, 2 processes x 1 thread, each half of the tokens, gradients not reduced",
    "trl": "TRL SFTTrainer at its defaults (batch 8, gradient checkpointing, AdamW step), fp32, 1 process x 2 threads",
}
TARGETS = (
    Target("ours-dp2", ("plain-1x2", "plain-2x1"), 1.0),
    Target("ours-dp2", ("trimmed-2x1",), 1.0),
    Target("ours-dp2", ("padded-1x2", "padded-2x1"), 1.5),
    Target("ours-dp2", ("trl",), 2.0),
)
AGREEMENT = 1e-4  # largest accepted relative difference of losses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=32, help="number of GSM8K rows in total (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds that share the rows (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a quick check with 2 rows and 1 round; writes no page")
    parser.add_argument("--contender", choices=WHAT, help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)


def main(arguments: argparse.Namespace) -> None:
    """Check that losses agree, measure, and write and print the page."""
    if arguments.quick:
        arguments.rows, arguments.rounds = 2, 1
    if not 1 <= arguments.rounds <= arguments.rows:
        raise ValueError(f"--rounds {arguments.rounds} must be from 1 to --rows {arguments.rows}")
    if arguments.contender:
        _run_contender(arguments.contender, arguments.rows, arguments.rounds, arguments.round)
    else:
        _compare(arguments.rows, arguments.rounds, keep=not arguments.quick)


def _run_contender(name: str, rows: int, rounds: int, round_: int) -> None:
    from benchmarks.training import train_baselines  # imports torch, which the parent process does not need

    train_baselines.PASSES[name](train_baselines.rows(rows)[round_::rounds])


def _compare(rows: int, rounds: int, keep: bool) -> None:
    facts = environment() | {
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks train --rows {rows} --rounds {rounds}",
    }
    contenders = [contender(name) for name in WHAT if name != "trl" or importlib.util.find_spec("trl")]
    by_name = {c.name: c for c in contenders}
    check = {name: [_read(by_name[name], 2, 1, 0)] for name in ("ours-1x2", "plain-1x2")}
    _agree(check)
    readings = measure(contenders, rounds, lambda c, round_: _read(c, rows, rounds, round_))
    tokens, worst = sum(reading.amount for reading in readings["ours-1x2"]), _agree(readings)
    notes = [
        "SmolLM2-135M-Instruct, fp32, rows of GSM8K in its chat template, loss on the assistant's tokens. Only predicted tokens are",
        f"counted, not padding. {rows} rows ({tokens:.0f} tokens) in {rounds} rounds, each row in one round. A pass is timed in new",
        "processes after a warm-up on two rows, with model and tokens in memory, from batching to the last gradient; for ours and TRL to",
        "the end of the optimizer step. Idle threads sleep in all contenders (OMP_WAIT_POLICY=PASSIVE). On CPU, this engine computes fp32",
        "matrix products with oneDNN, the others with torch's default, MKL. On AMD processors this is much of the ratio.",
        f"Largest relative difference of a loss from that of ours-1x2, without TRL: {worst:.1e}; above {AGREEMENT:g} no page is written.",
    ]
    if "trl" not in by_name:
        notes.append("TRL is not installed and was not measured.")
    text = page("SFT on CPU: tokens per second", notes, contenders, readings, TARGETS, facts)
    print(text)
    if keep:
        write(RESULTS, f"train_cpu{facts['cores']}_{facts['date']}", text, readings, facts)


def contender(name: str) -> Contender:
    """The contender `name`: two processes with one thread each under torchrun, or one process with two threads."""
    single = name == "trl" or name.endswith("1x2")
    launcher = () if single else ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (sys.executable, *launcher, "-m", "benchmarks", "train", "--contender", name)
    return Contender(
        name,
        WHAT[name],
        command,
        {
            "OMP_NUM_THREADS": "2" if single else "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONWARNINGS": "ignore",
            "TOKENIZERS_PARALLELISM": "false",
        },
    )


def _read(contender: Contender, rows: int, rounds: int, round_: int) -> Reading:
    return read_processes(contender, "--rows", str(rows), "--rounds", str(rounds), "--round", str(round_))


def _agree(readings: Readings) -> float:
    """The largest relative difference of mean losses from ours-1x2. Raises ValueError if it is over AGREEMENT."""
    worst = 0.0
    for name, rounds in readings.items():
        for reading, reference in zip(rounds, readings["ours-1x2"], strict=True):
            if reading.checks:
                loss, expected = (r.checks["loss_sum"] / r.checks["trained"] for r in (reading, reference))
                worst = max(worst, abs(loss / expected - 1) if math.isfinite(loss) else math.inf)
                if worst > AGREEMENT:
                    raise ValueError(
                        f"{name}: loss {loss:.7f} is not ours-1x2's {expected:.7f}; what computes other numbers is not compared"
                    )
    return worst

"""python -m benchmarks dpo: Measure DPO on two CPU cores and compare with TRL's DPOTrainer.

SOLUTIONS.jsonl is the file of GSM8K's graded model solutions (example_model_solutions.jsonl of openai/grade-school-math). Pairs are
distributed over the rounds, so that each is measured once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from contextlib import closing
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.timing import RESULTS, Contender, Reading, Target, environment, measure, page, read_processes, report, write

WHAT = {
    "ours-dp2": "this engine, 2 processes x 1 thread, data parallel, packed to 1024 tokens; training only, reference log-probs precomputed",
    "ours-dp2-whole": "the same, including the computation of the reference log-probs, which are saved to disk",
    "ours-sft-dp2": "this engine's SFT on the same sequences and microbatches, to compare the memory of DPO with",
    "trl": "TRL DPOTrainer with its defaults (batch 8, gradient checkpointing), fp32, 1 process x 2 threads; training only",
    "trl-whole": "the same, including the computation of the reference log-probs (precompute_ref_log_probs)",
}
TARGETS = (Target("ours-dp2", ("trl",), 2.0), Target("ours-dp2-whole", ("trl-whole",), 2.0))
PAIRS_PER_STEP = 8  # TRL's default
WORK = Path("runs/bench_dpo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("solutions", help="example_model_solutions.jsonl of openai/grade-school-math")
    parser.add_argument("--pairs", type=int, default=64, help="number of pairs in total (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds that share the pairs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a quick check with 4 pairs and 1 round; writes no page")
    parser.add_argument("--contender", choices=WHAT, help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)


def main(arguments: argparse.Namespace) -> None:
    """Measure, and write and print the page."""
    if arguments.quick:
        arguments.pairs, arguments.rounds = 4, 1
    if not 1 <= arguments.rounds <= arguments.pairs:
        raise ValueError(f"--rounds {arguments.rounds} must be from 1 to --pairs {arguments.pairs}")
    rows = _rows(arguments.solutions, arguments.pairs)[arguments.round :: arguments.rounds]
    if not arguments.contender:
        _compare(arguments.solutions, arguments.pairs, arguments.rounds, keep=not arguments.quick)
    elif arguments.contender.startswith("trl"):
        _trl(rows, whole=arguments.contender.endswith("whole"))
    else:
        _ours(rows, whole=arguments.contender.endswith("whole"), sft="sft" in arguments.contender)


def _rows(solutions: str, count: int) -> list[dict[str, Any]]:
    from benchmarks.data import preferences
    from engine.data.rows import Source, read_rows

    rows = preferences.pairs(row for _, row in read_rows(Source(solutions)))
    return [row for row in rows if max(len(row["chosen"]), len(row["rejected"])) < 800][:count]  # without degenerate, repetitive solutions


def _compare(solutions: str, pairs: int, rounds: int, keep: bool) -> None:
    command = f"python -m benchmarks dpo SOLUTIONS.jsonl --pairs {pairs} --rounds {rounds}"
    facts = environment() | {"date": date.today().isoformat(), "command": command}
    contenders = [_contender(name) for name in WHAT if not name.startswith("trl") or importlib.util.find_spec("trl")]
    settings = ("--pairs", str(pairs), "--rounds", str(rounds))

    def read(contender: Contender, round_: int) -> Reading:
        return read_processes(contender, solutions, *settings, "--round", str(round_))

    readings = measure(contenders, rounds, read)
    # Peak memory of one process, because contenders with more processes hold more copies of the model.
    peaks = {name: max(max(r.peak_mb) for r in row_readings) for name, row_readings in readings.items()}
    lengths = readings["ours-dp2"][0].checks
    notes = [
        "SmolLM2-135M-Instruct, fp32, length-normalised DPO (beta 5) on right and wrong solutions of GSM8K problems. The unit of work is a",
        f"pair: {pairs} pairs in {rounds} rounds, each pair in one round, {lengths['tokens']:.0f} tokens in the first. All contenders use",
        f"{PAIRS_PER_STEP} pairs per optimizer step. Times are those of new processes after a warm-up, with model and tokens in memory,",
        "to the end of the last step. Losses and gradients of both are equal (tests/peers/test_dpo.py). TRL has no padding-free DPO. On",
        "CPU, this engine computes fp32 matrix products with oneDNN, TRL with torch's default, MKL. On AMD processors this is much of the",
        "ratio.",
        f"Peak memory of a process: DPO {peaks['ours-dp2'] / peaks['ours-sft-dp2']:.3f}x that of SFT on the same sequences (target 1.05x).",
    ]
    text = page("DPO on CPU: pairs per second", notes, contenders, readings, TARGETS, facts, unit="pairs", digits=2)
    print(text)
    if keep:
        write(RESULTS, f"dpo_cpu{facts['cores']}_{facts['date']}", text, readings, facts)


def _contender(name: str) -> Contender:
    ours = not name.startswith("trl")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") if ours else ()
    command = (sys.executable, *launcher, "-m", "benchmarks", "dpo", "--contender", name)
    threads = {
        "OMP_NUM_THREADS": "1" if ours else "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    return Contender(name, WHAT[name], command, threads)


def _ours(rows: list[dict[str, Any]], whole: bool, sft: bool) -> None:
    from benchmarks.training.train_baselines import now, since
    from engine.batching.build import batch
    from engine.config import Model, Optim, Parallel
    from engine.data.pairs import Pairs, grouped
    from engine.distributed.world import World
    from engine.losses import SFT_LOSS, dpo
    from engine.megatron.policy import Policy
    from engine.models.hub import SMOLLM2
    from engine.rollout.scoring import cached_logprobs

    world = World.start("cpu")
    corpus = world.rank0_first(lambda: _prepared(rows)).corpus
    loss = SFT_LOSS if sft else partial(dpo, beta=5.0)
    with closing(Policy(Model(SMOLLM2), Optim(lr=0.0), Parallel(), world)) as policy:

        def score() -> Pairs:
            return Pairs(corpus, cached_logprobs(WORK / "reference", policy, [corpus], 1024)[0])

        def train(pairs: Pairs, last: int) -> None:
            for first in range(0, last, PAIRS_PER_STEP):
                samples = grouped([pairs[i] for i in range(first, min(first + PAIRS_PER_STEP, last))])
                policy.update(batch(samples, 1024, **policy.batch_options), loss, lr=0.0)

        pairs = score()
        train(pairs, 2)
        if whole:
            world.rank0_first(lambda: shutil.rmtree(WORK / "reference", ignore_errors=True))
        began = now()
        train(score() if whole else pairs, len(pairs))
        spent = since(began)
    report(len(rows) if world.rank == 0 else 0, *spent, {"tokens": float(corpus.lengths.sum()) if world.rank == 0 else 0.0})
    world.close()


def _prepared(rows: list[dict[str, Any]]) -> Any:
    """Prepares the pairs in a new folder. Called on rank 0 first; the other ranks open its files."""
    from engine.data.pairs import prepare_pairs
    from engine.data.rows import Source
    from engine.data.template import ChatTemplate
    from engine.data.tokenizer import load_tokenizer
    from engine.data.wordproblems import write as write_rows
    from engine.models.hub import SMOLLM2, resolve

    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(WORK, ignore_errors=True)
        WORK.mkdir(parents=True)
        write_rows(WORK / "pairs.jsonl", rows)
    chat = ChatTemplate(load_tokenizer(str(resolve(SMOLLM2))))
    return prepare_pairs(Source(str(WORK / "pairs.jsonl")), chat, max_length=1024, cache=WORK / "corpora")


def _trl(given: list[dict[str, Any]], whole: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.training import dpo_baselines
    from benchmarks.training.train_baselines import now, since
    from engine.data.tokenizer import load_tokenizer
    from engine.models.hub import SMOLLM2, resolve

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folder, pairs = resolve(SMOLLM2), _prepared(given)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(str(resolve(SMOLLM2)))
    rows = dpo_baselines.rows([pairs[i] for i in range(len(pairs))])
    settings = {"loss_type": ["sigmoid_norm"], "beta": 5.0, "learning_rate": 0.0, "num_train_epochs": 1}

    def trainer(rows: list[dict[str, Any]]) -> Any:
        return dpo_baselines.trainer(model, tokenizer, rows, str(WORK / "trl"), **settings)

    trainer(rows[:2]).train()
    began = now()
    prepared = trainer(rows)
    scored = now()
    prepared.train()
    clock, cores = since(began)
    before = np.subtract(scored, began) * (not whole)
    report(len(given), clock - float(before[0]), cores - float(before[1]), {})

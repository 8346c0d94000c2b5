"""python -m benchmarks accuracy: Measure errors of log-probs and gradients against float64, for our kernels and their peers.

The vocabulary has 128256 tokens. Hidden states and weights are bfloat16, and logits have a standard deviation of 3.5. Targets are sampled
from the softmax, so their logits are around 12, as in a trained model. Without a GPU, the torch references are measured, and the kernels in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.facts import Facts
from benchmarks.kernels.kernels_baselines import COMPILED, EAGER, PEERS, why
from benchmarks.kernels.operations import OPERATIONS, Contender, Tensors, plain, timed
from benchmarks.support.tables import as_file, heading, table, versions
from triton_kernels.launch import interpreted

VOCAB = 128256
SCALE = 3.5  # standard deviation of the logits
INTERPRETED_TOKENS = 8  # the interpreter takes seconds for these rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Level:
    """The input of a computation, hidden states or logits: the operations for log-probs and for gradients, and additional contenders."""

    forward: str
    both: str
    extra: Mapping[str, Contender]


def _eager_fp32(t: Tensors) -> Tensor:
    return F.cross_entropy(F.linear(t["hidden"].float(), t["weight"].float()), t["target"], reduction="none")


HIDDEN = Level(
    "linear_logprob forward", "linear_logprob forward and backward", {f"{EAGER}, weights converted to float32": plain(_eager_fp32)}
)
LOGITS = Level("logprob forward", "logprob forward and backward", {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=1024 if on_gpu else 64, help="rows (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 512, help="width of the hidden states (default: %(default)s)")
    parser.add_argument("--facts", type=Path, metavar="F", help="append each result to this file as soon as it is measured")
    parser.add_argument("--json", type=Path, metavar="F", help="also write all results to this JSON file")


def main(arguments: argparse.Namespace) -> int:
    """Print the tables as Markdown."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(device, arguments.tokens, arguments.hidden, save=Facts(arguments.facts).add)
    if device.type == "cpu" and not interpreted():
        rows += _in_the_interpreter(arguments.hidden)
    results = {"versions": versions(), "device": device.type, "tokens": arguments.tokens, "hidden": arguments.hidden, "rows": rows}
    as_file(arguments.json, results)
    print("\n".join(page(results)))
    return 0


def measure(device: torch.device, tokens: int, hidden: int, vocab: int = VOCAB, save: Callable[[Row], None] = lambda _: None) -> list[Row]:
    """The errors of every contender, from hidden states and from float32 and bfloat16 logits. `save` is called with each row at once."""
    inputs = _inputs(device, tokens, hidden, vocab)
    rows = _compare("hidden states", HIDDEN, inputs, from_hidden, save)
    logits = F.linear(inputs["hidden"].double(), inputs["weight"].double())
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {"logits": logits.to(dtype), "target": inputs["target"]}
        rows += _compare(f"{str(dtype).removeprefix('torch.')} logits", LOGITS, tensors, from_logits, save)
    return rows


def _inputs(device: torch.device, tokens: int, hidden: int, vocab: int) -> Tensors:
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    weight = (torch.randn(vocab, hidden, device=device) * (SCALE / hidden**0.5)).bfloat16()
    p = torch.softmax(F.linear(x.double(), weight.double()), -1)
    return {"hidden": x, "weight": weight, "target": torch.multinomial(p, 1)[:, 0]}


Exact = tuple[Tensor, tuple[Tensor, ...]]  # log-probs, and the gradients of their sum


def from_hidden(t: Tensors) -> Exact:
    """Log-probs and the gradients of hidden states and weight, in float64."""
    hidden, weight = t["hidden"].double(), t["weight"].double()
    logp, (slopes,) = from_logits({"logits": F.linear(hidden, weight), "target": t["target"]})
    return logp, (slopes @ weight, slopes.T @ hidden)


def from_logits(t: Tensors) -> Exact:
    """Log-probs and the gradient of logits, in float64."""
    log_p = torch.log_softmax(t["logits"].double(), -1)
    slopes = log_p.exp().neg_().scatter_add_(1, t["target"][:, None], torch.ones_like(log_p[:, :1]))
    return log_p.gather(1, t["target"][:, None])[:, 0], (slopes,)


def _compare(source: str, level: Level, tensors: Tensors, exact: Callable[[Tensors], Exact], save: Callable[[Row], None]) -> list[Row]:
    expected = exact(tensors)
    rows = []
    for who, forward, both in _contenders(level):
        row: Row = {"from": source, "contender": who, "tokens": len(tensors["target"])}
        try:
            row |= _errors(level, forward, both, tensors, expected)
        except Exception as error:
            row |= {"error": why(error)}
        rows.append(row)
        save(row)
    return rows


def _contenders(level: Level) -> Iterator[tuple[str, Contender, Contender]]:
    """(name, contender for log-probs, contender for gradients)."""
    first, second = (dict(OPERATIONS[name].ours) for name in (level.forward, level.both))
    if not interpreted():
        first |= {**PEERS[level.forward], **level.extra}
        second |= {**PEERS[level.both], **level.extra}
    for who, contender in second.items():
        if who != COMPILED:  # same formula as torch eager
            yield who, first.get(who, contender), contender


def _errors(level: Level, forward: Contender, both: Contender, tensors: Tensors, expected: Exact) -> Row:
    logp, gradients = expected
    fresh = {name: tensor.clone() for name, tensor in tensors.items()}
    result = timed(OPERATIONS[level.forward], forward, fresh)()
    fresh = {name: tensor.clone() for name, tensor in tensors.items()}
    operation = OPERATIONS[level.both]
    (total, *_), slopes = _once(both, fresh, operation.trained)
    sign = -1.0 if float(total.detach().sum()) > 0 else 1.0  # a positive result is a loss, the negative of log-probs
    row: Row = {"gradient": [_relative(sign * slope.double(), exact) for slope, exact in zip(slopes, gradients, strict=True)]}
    if result.shape == logp.shape:
        error = (-result.double().abs() - logp).abs()
        row |= {"logp_max": float(error.max()), "logp_mean": float(error.mean())}
    return row


def _once(contender: Contender, tensors: Tensors, trained: Sequence[str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    leaves = [tensors[name].requires_grad_() for name in trained]
    outputs = contender(tensors)()
    return (outputs,), torch.autograd.grad(outputs, leaves, torch.ones_like(outputs))


def _relative(result: Tensor, exact: Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


def _in_the_interpreter(hidden: int) -> list[Row]:
    """The errors of our kernels, in a process that runs them in Triton's interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks", "accuracy", "--tokens", str(INTERPRETED_TOKENS), "--hidden", str(hidden)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run(
            [*command, "--json", str(file)], env=environment, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
        )
        rows = json.loads(file.read_text())["rows"]
    return [row | {"contender": f"{row['contender']}: kernels, interpreted, {INTERPRETED_TOKENS} rows"} for row in rows]


HEADER = ("from", "contender", "log-prob, largest error", "mean error", "gradient, relative error")


def page(results: Mapping[str, Any]) -> list[str]:
    """The errors as Markdown."""
    sizes = f"{results['tokens']} rows, hidden states of {results['hidden']}, a vocabulary of {VOCAB}, seed 0"
    rows = [row for row in results["rows"] if "error" not in row]
    failed = [f"- {row['contender']}, from {row['from']}: {row['error']}" for row in results["rows"] if "error" in row]
    notes = [
        f"On {results['versions'].get('gpu', 'CPU')}: {sizes}. Errors of log-probs are in nats, against float64 on",
        "the same inputs. Errors of gradients are ||error|| / ||exact||, of hidden states / weight or of logits. A gradient has the dtype",
        "of its input; rounding to bfloat16 alone adds an error of about 1e-3. From hidden states, each contender computes its own logits,",
        "in float32 or rounded to bfloat16.",
    ]
    if results["device"] == "cpu":
        notes.append(
            "On CPU, *ours* are the torch references. The interpreter truncates bfloat16, where a GPU rounds: gradient errors are doubled."
        )
    return [
        *heading("Log-probs and gradients against float64", results["versions"], "python -m benchmarks accuracy"),
        *notes,
        "",
        *table(HEADER, map(_cells, rows)),
        *(["", "Not measured:", "", *failed] if failed else []),
    ]


def _cells(row: Row) -> list[str]:
    errors = [f"{row[name]:.1e}" if name in row else "only sums" for name in ("logp_max", "logp_mean")]
    return [row["from"], row["contender"], *errors, " / ".join(f"{error:.1e}" for error in row["gradient"])]

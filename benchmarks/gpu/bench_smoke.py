"""python -m benchmarks smoke: Check on a GPU every assumption of the kernels and the engine about the hardware, in about a minute.

Sections are independent, the most important first, and write their facts to the file immediately. An error in one is recorded, and the
others continue. Sections that are finished in the file are skipped, so an interrupted run resumes. The exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import nvml
from benchmarks.gpu.clock import Clock, CudaClock, copy_rate
from benchmarks.gpu.facts import Fact, Facts, read
from benchmarks.kernels.floors import LAUNCH, SHAPES, Shape
from benchmarks.kernels.floors import OPERATIONS as WORK
from benchmarks.kernels.kernels_baselines import why
from benchmarks.kernels.operations import OPERATIONS, OURS, timed
from triton_kernels import ppo_loss
from triton_kernels.linear_logprob import PRODUCT_ROWS, multiply

CHUNKS = (512, 1024, 2048, 4096)  # rows of a product; linear_logprob uses 1024
DEEP = ((1, 53248, 16384), (8, 53248, 2048), (16, 16384, 16032), (64, 28672, 8192))  # m, k, n of products in decoding


@dataclass(frozen=True)
class Setup:
    """A device, its clock, and a divisor of all sizes: 1 on a GPU, larger to run the sections on a CPU."""

    device: torch.device
    clock: Clock
    scale: int = 1

    def normal(self, *size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, device=self.device) * std).bfloat16()

    def sized(self, *size: int) -> tuple[int, ...]:
        return tuple(max(1, n // self.scale) for n in size)

    def seconds(self, call: Callable[[], Any]) -> float:
        return self.clock(call).seconds.median


Section = Callable[[Setup], Iterator[Fact]]


def world_of_one(setup: Setup) -> Iterator[Fact]:
    """The process group of a single GPU, and one collective."""
    from engine.distributed.world import World

    began = time.monotonic()
    with closing(World.start()) as world:
        ones = torch.ones(4, device=world.device)
        torch.distributed.all_reduce(ones)
        torch.distributed.barrier()
        yield {"seconds": time.monotonic() - began, "good": float(ones.sum()) == 4.0}


def mixed_products(setup: Setup) -> Iterator[Fact]:
    """Matrix products of bf16 inputs with fp32 results against float64: with and without accumulation, and with few rows as in decoding."""
    m, k, n = setup.sized(512, 1024, 2048)
    x, weight = setup.normal(m, k), setup.normal(n, k, std=0.03)
    out = torch.empty(m, n, device=setup.device)
    multiply(out, x, weight.T)
    total = torch.ones_like(out)
    multiply(total, x, weight.T, add=True)
    exact = x.double() @ weight.double().T
    errors = {"product": _relative(out, exact), "added": _relative(total - 1, exact)}
    yield {**errors, "good": max(errors.values()) < 1e-5}
    for rows, depth, width in DEEP:
        m, k, n = rows, *setup.sized(depth, width)
        x, weight = setup.normal(m, k), setup.normal(n, k, std=0.03)
        exact = x.double() @ weight.double().T
        error = max(_relative(x @ weight.T, exact), _relative(torch.addmm(torch.zeros_like(exact).bfloat16(), x, weight.T), exact))
        yield {"rows": m, "depth": k, "width": n, "error": error, "good": error < 1e-2}


def row_bits(setup: Setup) -> Iterator[Fact]:
    """Whether a row of a product is bitwise equal in every run, at every row index, and with a different number of rows."""
    k, n = setup.sized(4096, 16032)
    weight = setup.normal(n, k, std=0.03)
    full = setup.normal(*setup.sized(max(CHUNKS)), k)
    largest = _product(full, weight)
    for chunk in (setup.sized(rows)[0] for rows in CHUNKS):
        x, out = full[:chunk], _product(full[:chunk], weight)
        permutation = torch.randperm(chunk, device=setup.device)
        equal = {
            "run_to_run": torch.equal(out, _product(x, weight)),
            "any_place": torch.equal(out[permutation], _product(x[permutation], weight)),
            "as_in_the_largest": torch.equal(out, largest[:chunk]),
        }
        yield {"chunk": chunk, **equal, "good": equal["run_to_run"] and equal["any_place"]}


def attention(setup: Setup) -> Iterator[Fact]:
    """Packed causal attention with 16 query heads per key head against float64, forward and backward. Run twice to compare bits."""
    from engine.megatron.attention import PackedForward, attend_for

    lengths = setup.sized(3000, 5192)
    total = sum(lengths)
    cu = torch.tensor([0, lengths[0], total], dtype=torch.int32, device=setup.device)
    packed_forward: Any = PackedForward(cu_seqlens_q=cu, max_seqlen_q=max(lengths), lengths=lengths)  # type: ignore[arg-type]
    query, key, value = (setup.normal(total, heads, 128).requires_grad_() for heads in (16, 1, 1))
    upstream = setup.normal(total, 16, 128)
    attend = attend_for(setup.device.type == "cuda")

    def run() -> tuple[Tensor, ...]:
        out = attend(query, key, value, packed_forward)
        return (out, *torch.autograd.grad(out, (query, key, value), upstream))

    exact = _attention_in_float64(query, key, value, upstream, lengths)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            first, second = run(), run()
            errors = [_relative(got, wanted) for got, wanted in zip(first, exact, strict=True)]
            same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
            seconds = setup.seconds(run)
        finally:
            torch.use_deterministic_algorithms(False)
        good = max(errors) < 2e-2 and (all(same) or not deterministic)
        yield {"deterministic": deterministic, "errors": errors, "same_bits_twice": same, "seconds": seconds, "good": good}


def last_block(setup: Setup) -> Iterator[Fact]:
    """Sums that the last finished block adds up. They must be bitwise equal in many launches."""
    tokens, launches = (setup.sized(2_000_003)[0], 500) if setup.scale == 1 else (3000, 3)
    logp, old, advantage = (torch.randn(tokens, device=setup.device) * 0.1 for _ in range(3))
    weight = torch.rand(tokens, device=setup.device) / tokens
    first = torch.stack(list(ppo_loss(logp, old, advantage, weight)[1]))
    different = sum(not torch.equal(torch.stack(list(ppo_loss(logp, old, advantage, weight)[1])), first) for _ in range(launches))
    yield {"launches": launches, "different": different, "good": different == 0}


def graphs(setup: Setup) -> Iterator[Fact]:
    """Responses decoded without and with CUDA graphs. `graphs_match`: they are equal, as the engine assumes."""
    import numpy as np

    from engine.config import Model, ModelShape, Parallel
    from engine.distributed.world import World
    from engine.megatron.policy import Policy
    from engine.rollout.config import RolloutConfig
    from engine.rollout.engine import SamplingParams
    from engine.rollout.sampler import generate
    from engine.types import Prompt

    model = ModelShape(layers=2, hidden=256, ffn=512, heads=8, kv_heads=2, vocab=512)
    prompts = [Prompt(np.full(24, i, np.int32), id=i) for i in range(8)]
    params = SamplingParams(40 // min(setup.scale, 10), stop=(model.vocab,), temperature=0.0)
    with closing(World.start()) as world, closing(Policy(Model(init=model), None, Parallel(), world)) as policy:
        eager, replayed = (
            [
                response.tokens.tolist()
                for (response,) in generate(policy, prompts, params, RolloutConfig(8, kv_cache_gb=0.5, cuda_graphs=cuda_graphs))
            ]
            for cuda_graphs in ("off", "on")
        )
    yield {"graphs_match": eager == replayed, "good": eager == replayed}


def kernels(setup: Setup) -> Iterator[Fact]:
    """The time of every kernel except the output layer, relative to copying as many bytes."""
    size = min(2 << 30, torch.cuda.get_device_properties(setup.device).total_memory // 8) if setup.scale == 1 else 1 << 16
    rate = copy_rate(setup.device, setup.clock, size)
    yield {"copy_bytes_per_s": rate, **nvml.state(), "good": True}
    for shape in (_scaled(SHAPES[name], setup.scale) for name in ("405b-tp8", "8b-tp1")):
        for name, operation in OPERATIONS.items():
            if "linear" in name:
                continue
            torch.manual_seed(0)
            seconds = setup.seconds(timed(operation, operation.ours[OURS], operation.draw(shape, setup.device)))
            floor = max(LAUNCH, WORK[name](shape).bytes / rate)
            yield {"shape": shape.name, "operation": name, "seconds": seconds, "of_copy_floor": seconds / floor, "good": True}


def products(setup: Setup) -> Iterator[Fact]:
    """The output layer's products with bf16 and with fp32 results, and the operations around them."""
    for size in ((8192, 16384, 16032), (4096, 4096, 128256)):
        tokens, hidden, vocab = setup.sized(*size)
        for name, call in _product_calls(setup, tokens, hidden, vocab).items():
            seconds = setup.seconds(call)
            tflops = {} if name in ("zero", "convert") else {"tflops": 2 * tokens * hidden * vocab / seconds / 1e12}
            yield {
                "tokens": tokens,
                "hidden": hidden,
                "vocab": vocab,
                "call": name,
                "seconds": seconds,
                **tflops,
                **nvml.state(),
                "good": True,
            }


def _product_calls(setup: Setup, tokens: int, hidden: int, vocab: int) -> dict[str, Callable[[], Any]]:
    x, weight, slopes = setup.normal(tokens, hidden), setup.normal(vocab, hidden, std=0.03), setup.normal(tokens, vocab, std=0.01)
    logits, logits_32 = (torch.empty(tokens, vocab, dtype=dtype, device=setup.device) for dtype in (torch.bfloat16, torch.float32))
    grad, grad_32 = (torch.zeros(vocab, hidden, dtype=dtype, device=setup.device) for dtype in (torch.bfloat16, torch.float32))

    def in_blocks() -> None:
        for start in range(0, tokens, PRODUCT_ROWS):
            multiply(logits_32[start : start + PRODUCT_ROWS], x[start : start + PRODUCT_ROWS], weight.T)

    return {
        "logits bf16": lambda: multiply(logits, x, weight.T),
        "logits fp32": lambda: multiply(logits_32, x, weight.T),
        f"logits fp32, {PRODUCT_ROWS} rows at a time": in_blocks,
        "hidden gradient": lambda: slopes @ weight,
        "weight gradient bf16": lambda: multiply(grad, slopes.T, x),
        "weight gradient fp32": lambda: multiply(grad_32, slopes.T, x),
        "weight gradient fp32, added": lambda: multiply(grad_32, slopes.T, x, add=True),
        "zero": lambda: grad_32.zero_(),
        "convert": lambda: grad.copy_(grad_32),
    }


def symmetric_memory(setup: Setup) -> Iterator[Fact]:
    """PyTorch's symmetric-memory products, which parallel.tp_comm_overlap uses, in a group of one GPU."""
    from engine.distributed.world import World
    from engine.megatron.overlap import check

    with closing(World.start()) as world:
        group = torch.distributed.group.WORLD
        assert group is not None
        try:
            check(group, world.device, torch.bfloat16)
        except ValueError as refusal:
            yield {"why": str(refusal), "good": False}
        else:
            yield {"good": True}


SECTIONS: dict[str, tuple[Section, float]] = {  # with the expected seconds, compilation included
    "world_of_one": (world_of_one, 6),
    "mixed_products": (mixed_products, 5),
    "row_bits": (row_bits, 3),
    "last_block": (last_block, 5),
    "attention": (attention, 8),
    "graphs": (graphs, 14),
    "kernels": (kernels, 20),
    "products": (products, 12),
    "symmetric_memory": (symmetric_memory, 5),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"sections to run, of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--facts", type=Path, metavar="F", help="append results to this file, and skip the sections that are in it")
    parser.add_argument("--seconds", type=float, default=80.0, help="start no section that would end later (default: %(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Print each fact as a line of JSON."""
    if not torch.cuda.is_available():
        print("benchmarks smoke needs a CUDA GPU, but torch finds none")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    setup = Setup(device, CudaClock(device, seconds=0.05))
    return run(setup, arguments.sections or list(SECTIONS), arguments.facts, arguments.seconds)


def run(setup: Setup, names: Sequence[str], file: Path | None, seconds: float) -> int:
    """Run every section that is not finished in `file`, while there is time. Returns 1 if one failed, now or before."""
    facts, began = Facts(file), time.monotonic()
    previous = read(file)
    finished, started = ({fact["section"] for fact in previous if fact.get(mark)} for mark in ("finished", "started"))
    bad = any(fact["section"] in names and not fact["good"] for fact in previous if fact.get("finished"))
    # A section that was started but not finished may have crashed the process, so it runs after the others.
    for name in sorted((name for name in names if name not in finished), key=lambda name: name in started):
        section, estimate = SECTIONS[name]
        if time.monotonic() - began + estimate > seconds:
            _record(facts, {"section": name, "left_out": f"it may take {estimate:g} s, and less time is left"})
            continue
        bad |= not _section(setup, name, section, facts)
    return int(bad)


def _section(setup: Setup, name: str, section: Section, facts: Facts) -> bool:
    """Run one section. Returns whether all its facts are good. A missing package is not a failure."""
    began, good = time.monotonic(), True
    _record(facts, {"section": name, "started": True})
    try:
        for fact in section(setup):
            good &= fact["good"]
            _record(facts, {"section": name, **fact})
    except ImportError as error:
        _record(facts, {"section": name, "left_out": f"not installed: {error.name}"})
        return True
    except Exception as error:
        good = False
        _record(facts, {"section": name, "error": why(error), "good": False})
    _record(facts, {"section": name, "finished": True, "good": good, "seconds": time.monotonic() - began})
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    return good


def _record(facts: Facts, fact: Fact) -> None:
    facts.add(fact)
    print(json.dumps(fact, default=str), flush=True)


def _scaled(shape: Shape, scale: int) -> Shape:
    """A smaller shape, to run a section on a CPU."""
    return shape if scale == 1 else Shape(shape.name, 64, 96, 4, 1, 2, 16, 1000, 64)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty(len(x), len(weight), device=x.device)
    multiply(out, x, weight.T)
    return out


def _relative(result: Tensor, exact: Tensor) -> float:
    return float((result.detach().double() - exact).norm() / exact.norm())


def _attention_in_float64(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Output and gradients, computed for one sequence and one query head at a time."""
    outs, grads = torch.empty_like(query, dtype=torch.float64), [torch.zeros_like(x, dtype=torch.float64) for x in (query, key, value)]
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        for head in range(query.shape[1]):
            q, k, v = (x[rows, h].detach().double().requires_grad_() for x, h in ((query, head), (key, 0), (value, 0)))
            masked = (q @ k.T * 128**-0.5).masked_fill(torch.ones(length, length, device=q.device).triu(1).bool(), -torch.inf)
            out = masked.softmax(-1) @ v
            outs[rows, head] = out.detach()
            for total, h, grad in zip(grads, (head, 0, 0), torch.autograd.grad(out, (q, k, v), upstream[rows, head].double()), strict=True):
                total[rows, h] += grad
        start += length
    return [outs, *grads]

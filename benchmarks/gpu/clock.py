"""Time and peak memory of operations on a GPU.

Before every run, 256 MB are read. This evicts the inputs from the L2 cache and leaves no dirty lines that would be written back during the
run. Then the device sleeps for about a millisecond while the host launches the run, so that the time between two events on the device does
not include host work. `issued` is the time per call of consecutive calls, including host work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.gpu import nvml
from benchmarks.support.timing import Spread

READ = 1 << 28  # bytes read before every run, more than any L2 cache holds
SLEPT = 2_000_000  # device cycles of the sleep, about a millisecond
FEWEST, MOST = 5, 100  # runs
WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of one run on the device; the number of runs; peak bytes allocated in addition to the inputs; seconds per call of consecutive
    calls; clock, power and temperature of the GPU right after the runs."""

    seconds: Spread
    runs: int
    peak_bytes: int
    issued: float
    gpu: dict[str, Any] = field(default_factory=dict)


class Clock(Protocol):
    """Times a call, and counts the kernels, copies and fills that it launches (None if they cannot be counted)."""

    def __call__(self, call: Callable[[], Any]) -> Timing: ...

    def launches(self, call: Callable[[], Any]) -> int | None: ...


class CudaClock:
    """Times a call with CUDA events for about `seconds`, with 5 to 100 runs."""

    def __init__(self, device: torch.device, seconds: float = 0.25):
        self.device, self.seconds = device, seconds
        self.unrelated = torch.zeros(READ // 4, dtype=torch.int32, device=device)

    def __call__(self, call: Callable[[], Any]) -> Timing:
        for _ in range(WARM_UP):
            call()
        peak = self._peak(call)
        once = self._run(call)
        runs = max(FEWEST, min(MOST, int(self.seconds / max(once, 1e-6))))
        spread = Spread.of([self._run(call) for _ in range(runs)])
        state = nvml.state(self.device.index or 0)
        return Timing(spread, runs, peak, self._issued(call, min(runs, 20)), state)

    def _run(self, call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.unrelated.max()
        torch.cuda._sleep(SLEPT)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _issued(self, call: Callable[[], Any], runs: int) -> float:
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        for _ in range(runs):
            call()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - began) / runs

    def launches(self, call: Callable[[], Any]) -> int | None:
        """Counted with the profiler. It stays attached to the device, so do this after all timings."""
        kinds = torch.profiler.ProfilerActivity
        try:
            with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
                call()
                torch.cuda.synchronize(self.device)
            return sum(event.device_type.name == "CUDA" for event in profiler.events() or ()) or None
        except (RuntimeError, AssertionError):  # profiling may be forbidden on a machine
            return None

    def _peak(self, call: Callable[[], Any]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def copy_rate(device: torch.device, clock: Clock, size: int) -> float:
    """Bytes/s of a copy of `size` bytes within device memory, counting reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    source.random_()
    target = torch.empty_like(source)
    return 2 * size / clock(lambda: target.copy_(source)).seconds.median


def product_seconds(device: torch.device, clock: Clock, tokens: int, hidden: int, vocab: int) -> tuple[float, float, float]:
    """Seconds of the three matrix products of the output layer with torch.matmul in bfloat16, without softmax: logits, gradient of hidden
    states, gradient of the weight."""
    x, weight, logits = (torch.randn(n, m, device=device).bfloat16() for n, m in ((tokens, hidden), (vocab, hidden), (tokens, vocab)))
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    forward = clock(lambda: torch.matmul(x, weight.T, out=logits)).seconds.median
    to_hidden = clock(lambda: torch.matmul(logits, weight, out=grad_x)).seconds.median
    to_weight = clock(lambda: torch.matmul(logits.T, x, out=grad_weight)).seconds.median
    return forward, to_hidden, to_weight

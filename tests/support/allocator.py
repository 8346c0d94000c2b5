"""Memory from the records of torch's CPU allocator. Resident memory is less exact, because malloc's heap keeps freed memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

HELD = "what is held is read here"


def allocated(compute: Callable[[], Any]) -> tuple[int, int]:
    """(bytes at the mark HELD, peak bytes) in addition to earlier allocations, from the records of torch's CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        compute()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == HELD:
            held = live
        elif event.name() == "[memory]":
            live += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, live)
    return held, peak

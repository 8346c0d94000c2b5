"""What torch's CPU allocator recorded. Resident memory says less: it moves with malloc's heap, which keeps what tensors gave back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

HELD = "what is held is read here"


def allocated(compute: Callable[[], Any]) -> tuple[int, int]:
    """(bytes at the mark HELD, at the worst moment) above what was there before, as torch's CPU allocator recorded them."""
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

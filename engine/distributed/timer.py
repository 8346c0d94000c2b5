"""Wall-clock time of the phases of a step."""

from __future__ import annotations

import time


class PhaseTimer:
    """Seconds of consecutive phases on this rank, as metrics: after `lap("generate")`, laps["time/generate"]."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End `phase`, which began with the end of the one before."""
        now = time.perf_counter()
        self.laps[f"time/{phase}"] = now - self._since
        self._since = now

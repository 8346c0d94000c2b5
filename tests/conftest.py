"""Hooks for all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Imported modules and collected tests live to the end of the run: keep them out of garbage collections."""
    gc.collect()
    gc.freeze()

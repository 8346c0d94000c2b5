"""What holds for all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Imported modules and collected tests stay to the end: no collection of garbage need look through them again."""
    gc.collect()
    gc.freeze()

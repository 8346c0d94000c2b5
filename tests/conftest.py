"""Markers by folder, and hooks for all tests.

fast         one process, well under a second per test; `make test-fast` runs these
slow         one process, seconds per test
distributed  several ranks on one machine (tests/support/pool.py)
gpu          needs a GPU: `make gpu`
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOMS = {"distributed": "distributed", "dryrun": "slow", "e2e": "slow", "gpu": "gpu", "peers": "slow"}  # tests of other folders are fast
# Files that differ from their folder: they take seconds or start ranks.
SLOW_FILES = {
    "kernels/test_aot.py": "slow",
    "kernels/test_draw.py": "distributed",
    "kernels/test_linear_logprob.py": "distributed",
    "kernels/test_logprob.py": "distributed",
    "peers/test_dpo.py": "distributed",
    "peers/test_transformers.py": "distributed",
    "unit/test_gpu_run.py": "slow",
    "verify/test_code.py": "slow",
    "verify/test_hostile.py": "slow",
    "verify/test_forgeries.py": "slow",
    "verify/test_idioms.py": "slow",
    "verify/test_sandbox.py": "slow",
    "verify/test_verify_pool.py": "slow",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with one of the markers above."""
    for item in items:
        path = item.path.relative_to(TESTS)
        item.add_marker(SLOW_FILES.get(str(path), ROOMS.get(path.parts[0], "fast")))


def pytest_collection_finish() -> None:
    """Excludes imported modules and collected tests, which live to the end of the run, from garbage collection."""
    gc.collect()
    gc.freeze()

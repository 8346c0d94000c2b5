"""Where tests find files: the repository, its golden files, and real data that may lie next to the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
SHARED = ROOT.parent / "shared/data"  # tests that need a file of it are skipped where it is missing

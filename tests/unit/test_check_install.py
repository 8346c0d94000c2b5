"""If another distribution's triton_kernels is imported instead of ours, the error names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the other distribution installed."""
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").write_text("raise RuntimeError('imported')")
    installed = tmp_path / "triton_kernels-1.0.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-kernels\nVersion: 1.0.0\n")
    (installed / "RECORD").write_text("triton_kernels/__init__.py,,\ntriton_kernels-1.0.0.dist-info/METADATA,,\n")
    return tmp_path


def complaint(code: str, *path: Path) -> str:
    """The last line on stderr of a new Python process with `path` first in its import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=path[0], env=environment, capture_output=True, text=True)
    return done.stderr.rstrip().rpartition("\n")[2]


def test_found_before_ours(site: Path) -> None:
    assert complaint("import engine.config", site, ROOT) == (
        f"ImportError: triton_kernels at {site / 'triton_kernels'} is not the package of trivet but that of triton-kernels; "
        f"put {ROOT} before it on PYTHONPATH, or uninstall the other one"
    )


def test_imported_before_ours(site: Path) -> None:
    """For example by a library that has its own copy and registers it under this name."""
    (site / "triton_kernels" / "__init__.py").write_text("")
    assert "is not the package of trivet" in complaint(
        f"import triton_kernels, sys; sys.path.insert(0, {str(ROOT)!r}); import engine", site, ROOT
    )


def test_found_after_ours(site: Path) -> None:
    assert complaint("import engine, triton_kernels; triton_kernels.linear_policy_loss", ROOT, site) == ""


@pytest.mark.parametrize("removed", [False, True])
def test_installed_over_ours(site: Path, removed: bool) -> None:
    """And uninstalled afterwards, which also removed our __init__.py."""
    (site / "engine").symlink_to(ROOT / "engine")
    if removed:
        (site / "triton_kernels" / "__init__.py").unlink()
    message = complaint("import engine", site)
    assert message.startswith(f"ImportError: triton_kernels at {site / 'triton_kernels'} is not the package of trivet but that of")
    assert message.endswith("it was installed over trivet's: uninstall the other one, then install trivet again")

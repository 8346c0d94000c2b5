"""The page of preference runs is made of their records alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import curves

RECORD = dict.fromkeys(curves.TOLD, 0.5)


def run_folder(folder: Path, lr: float) -> Path:
    folder.mkdir()
    records = [{"kind": kind, "step": step, "time": 60.0 * step, **RECORD, "accuracy": 0.5 + step / 10} for kind, step in
               (("evaluation", 0), ("step", 0), ("evaluation", 2))]  # fmt: skip
    records[0]["length_bias"] = None  # what was not finite
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = {"optim": {"lr": lr}, "algorithm": {"is": "DPO", "normalize": lr < 1e-3, "sources": []}}
    (folder / "run.json").write_text(json.dumps({"run": run}))
    return folder


def test_page_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["curves", str(run_folder(tmp_path / "one", 1e-5)), str(run_folder(tmp_path / "two", 1e-2))])
    curves.main()
    (page,) = (tmp_path / "results").glob("*.md")
    text = page.read_text()
    assert "## one\n\nlr=1e-05, is=DPO, normalize=True. 2.0 minutes" in text
    assert "| 2 | 0.7000 |" in text
    assert "normalize=False" in text
    assert page.with_suffix(".png").stat().st_size > 10_000

"""The pages of learning curves are written from metrics.jsonl and run.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.learning import bench_curves

RECORD = dict.fromkeys(bench_curves.PREFERENCES.listed, 0.5)


def run_folder(folder: Path, lr: float) -> Path:
    folder.mkdir()
    records = [{"kind": kind, "step": step, "time": 60.0 * step, **RECORD, "reward/accuracy": 0.5 + step / 10} for kind, step in
               (("evaluation", 0), ("step", 0), ("evaluation", 2))]  # fmt: skip
    records[0]["reward/length_bias"] = None  # a non-finite value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = {"optim": {"lr": lr}, "algorithm": {"is": "DPO", "normalize": lr < 1e-3, "sources": []}}
    (folder / "run.json").write_text(json.dumps({"run": run}))
    return folder


def test_page_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_curves, "RESULTS", tmp_path / "results")
    assert main(["curves", str(run_folder(tmp_path / "one", 1e-5)), str(run_folder(tmp_path / "two", 1e-2))]) == 0
    (page,) = (tmp_path / "results").glob("*.md")
    text = page.read_text()
    assert "## one\n\nlr=1e-05, is=DPO, normalize=True. 2.0 minutes" in text
    assert "| 2 | 0.7000 |" in text
    assert "normalize=False" in text
    assert page.with_suffix(".png").stat().st_size > 10_000


def test_rlvr_runs_are_shown_with_standard_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 +- 0.03 and 0.5 +- 0.04 are 8 standard errors apart, because hypot(0.03, 0.04) is 0.05."""
    monkeypatch.setattr(bench_curves, "RESULTS", tmp_path / "results")
    folder = tmp_path / "rewarded"
    folder.mkdir()
    tasks = {"reward/solve_rate_greedy": 0.5, "reward/solve_rate_se_greedy": 0.05, "rollout/length": 9.0, "rollout/length_greedy": 9.0}
    records = [
        {"kind": "evaluation", "step": 0, "time": 0.0, "reward/solve_rate": 0.1, "reward/solve_rate_se": 0.03, **tasks},
        *({"kind": "step", "step": step, "time": 30.0 * step, "reward/solve_rate": step / 10, "time/step": 30.0} for step in range(4)),
        {"kind": "evaluation", "step": 4, "time": 120.0, "reward/solve_rate": 0.5, "reward/solve_rate_se": 0.04, **tasks},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "run.json").write_text(json.dumps({"run": {"optim": {"lr": 1e-5}, "algorithm": {"is": "RLVR"}}}))
    assert main(["curves", str(folder)]) == 0
    (page,) = (tmp_path / "results").glob("rlvr_curves_*.md")
    text = page.read_text()
    assert "| 4 | 0.5000 ± 0.0400 | 0.5000 ± 0.0500 |" in text
    assert "reward/solve_rate: 0.100 -> 0.500, a change of +0.400 ± 0.050, 8.0 standard errors." in text
    assert "| training steps up to | reward/solve_rate |" in text
    assert "| 4 | 0.1500 | - |" in text
    assert page.with_suffix(".png").stat().st_size > 10_000


def test_runs_of_different_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_curves, "RESULTS", tmp_path / "results")
    one, two = run_folder(tmp_path / "one", 1e-5), run_folder(tmp_path / "two", 1e-5)
    (two / "run.json").write_text(json.dumps({"run": {"optim": {"lr": 1e-5}, "algorithm": {"is": "RLVR"}}}))
    assert main(["curves", str(one), str(two)]) == 2
    assert "of several kinds" in capsys.readouterr().err

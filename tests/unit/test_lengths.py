"""The page of response lengths is written from the outputs of `engine generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.learning import bench_lengths


def answers(path: Path, tokens: list[int]) -> str:
    rows = [{"logprobs": [-1.0] * n, "finish_reason": "length" if n == 8 else "stop"} for n in tokens]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{path.stem}={path}"


def test_differences_are_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_lengths, "RESULTS", tmp_path / "results")
    given = [answers(tmp_path / "start.jsonl", [2, 4, 6, 8]), answers(tmp_path / "plain.jsonl", [4, 6, 8, 8])]
    assert main(["lengths", *given]) == 0
    (page,) = (tmp_path / "results").glob("lengths_*.md")
    assert "| start | 4 | 5.0 ± 1.3 |  | 25 % |" in page.read_text()
    assert "| plain | 4 | 6.5 ± 1.0 | 1.5 ± 0.5 (+30 %) | 50 % |" in page.read_text()


def test_different_numbers_of_answers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lengths", answers(tmp_path / "a.jsonl", [1, 2]), answers(tmp_path / "b.jsonl", [1])]) == 2
    assert "have [2, 1] answers" in capsys.readouterr().err

"""The report of the verifiers' benchmark: counts, missed targets, and missing results."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.support.timing import Spread
from benchmarks.verify import bench_verifiers
from benchmarks.verify.bench_verifiers import Agreement, Rate, page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two problems of each kind; one grader disagrees with ours."""
    gsm8k = [{"answer": f"1 + {i}\n#### {i + 1}"} for i in range(2)]
    models = [
        {"ground_truth": "… A: 2", "small": {"solution": "A: 2", "is_correct": True}, "large": {"solution": "A: 3", "is_correct": True}}
    ]
    math = [{"solution": rf"So $\boxed{{{i}}}$."} for i in (r"\frac{1}{2}", "x+1")]
    rules = [{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "prompt": "…"}]
    files = {"gsm8k_train": gsm8k, "gsm8k_test": gsm8k, "gsm8k_model_solutions": models, "math": math, "ifeval": rules}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_what_is_compared_on_the_shared_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_verifiers, "ALIKE", 2)
    found = {one.what: (one.agreed, one.total) for one in bench_verifiers.agreements(folder)}
    assert found.pop("GSM8K: models' solutions are judged as their graders did") == (1, 2)
    assert found.pop("GSM8K: solutions meet their own answers") == (4, 4)
    assert found.pop("IFEval: truths accepted") == (1, 1)
    assert set(found.values()) == {(2, 2)}
    assert len(found) == 3


def test_neighbours_are_other_problems_answers(folder: Path) -> None:
    assert [(case.response, case.truth) for case in bench_verifiers.math_neighbours(folder)] == [
        (r"So $\boxed{\frac{1}{2}}$.", "x+1"),
        (r"So $\boxed{x+1}$.", r"\frac{1}{2}"),
    ]


def test_a_missed_target_and_a_share_are_on_the_page() -> None:
    rates = [Rate(name, "…", 100, 5, Spread(rate, rate - 1, rate + 1), 1, 2, 3, None) for name, rate in (("fast", 101), ("slow", 99))]
    text = page(rates, [Agreement("solutions", 3, 4)], ["code: rows.jsonl is not there"], {"cpu": "one"})
    assert "| fast | 5 | 101 (100..102) | 100: met |" in text
    assert "| slow | 5 | 99 (98..100) | 100: MISSED |" in text
    assert "| solutions | 3 | 4 | 75.00% |" in text
    assert "- not measured: code: rows.jsonl is not there" in text


def test_data_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_verifiers.main(Namespace(data=tmp_path, json=tmp_path / "facts.json")) == 0
    assert "- not measured: math: math.jsonl is not there" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "facts.json").read_text())["absent"]) == len(bench_verifiers.WORKLOADS)

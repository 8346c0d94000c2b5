"""Log-probs of SmolLM2-135M on real text equal those of transformers with any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import Model, Parallel
from engine.data.wordproblems import problems
from engine.models.hub import SMOLLM2, resolve
from tests.support import jobs
from tests.support.paths import SHARED
from tests.support.pool import ranks

GSM8K = SHARED / "gsm8k_test.jsonl"
ROWS = 6  # 64 rows take minutes per layout, and agree too


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short and long rows of GSM8K if the file exists, else generated problems."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    if GSM8K.exists():
        real = [json.loads(line) for line in GSM8K.read_text().splitlines()[:100]]
        real.sort(key=lambda row: len(row["question"]))
        chosen = [{"prompt": row["question"], "response": row["answer"]} for row in (*real[: ROWS - 1], real[-1])]
    else:
        chosen = problems(ROWS, 0)
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return path


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, ...], list[float]]:
    """Cached log-probs of transformers, by tokens."""
    return {}


@pytest.mark.parametrize(("size", "layout"), [(1, "tp=1"), (2, "pp=2"), (2, "tp=1"), (3, "tp=3")])
def test_score_equals_transformers(
    size: int, layout: str, rows: Path, expected: dict[tuple[int, ...], list[float]], tmp_path: Path
) -> None:
    out = tmp_path / "scores.jsonl"
    words = ["score", SMOLLM2, "--data", str(rows), "--out", str(out), f"parallel.{layout}"]
    assert all(code == 0 for code, _, _ in ranks(size).run(jobs.command, words=words))
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(scores) == ROWS
    if not expected:
        model = AutoModelForCausalLM.from_pretrained(resolve(SMOLLM2), dtype=torch.float32)
        for score in scores:
            tokens = torch.tensor([score["tokens"]])
            with torch.no_grad():
                logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            expected[tuple(score["tokens"])] = logprobs.tolist()
    for score in scores:
        assert score["logprobs"] == pytest.approx(expected[tuple(score["tokens"])], abs=2e-4)


def test_tp2_is_refused_with_a_suggestion(rows: Path, tmp_path: Path) -> None:
    words = ["score", SMOLLM2, "--data", str(rows), "--out", str(tmp_path / "o"), "parallel.tp=2"]
    results = ranks(2).run(jobs.command, words=words)
    for code, _, stderr in results:
        assert code == 1
        assert "parallel.tp=2 must divide model.heads=9, model.kv_heads=3 and model.ffn=1536; use parallel.tp=1" in stderr


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel(pp=2)), (3, Parallel(tp=3))], ids=str)
def test_loading_holds_less_than_twice_a_ranks_shard(size: int, parallel: Parallel) -> None:
    for ratio in ranks(size).run(jobs.load_memory, parallel=parallel, model=Model(SMOLLM2)):
        assert 0.9 < ratio < 2

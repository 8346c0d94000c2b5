"""engine generate: greedy responses equal transformers', rows are independent of the layout, and errors take one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import Model, ModelShape, Parallel
from engine.data.tokenizer import load_tokenizer
from engine.data.wordproblems import tasks, words, write
from engine.models.families import to_hf
from tests.support import jobs
from tests.support.pool import ranks

SHAPE = ModelShape(layers=2, hidden=64, ffn=128, heads=8, kv_heads=4, vocab=111, max_length=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a random model, with weights large enough that greedy tokens are not nearly tied."""
    path = tmp_path_factory.mktemp("model")
    ranks(1).run(jobs.export, parallel=Parallel(), model=Model(init=SHAPE), folder=path)
    (path / "config.json").write_text(json.dumps(to_hf(SHAPE)))
    load_tokenizer("words").save_pretrained(path)
    return path


def rows(size: int, *given: object) -> tuple[int, str]:
    """Exit code and stderr of `engine generate` on `size` ranks."""
    code, _, stderr = ranks(size).run(jobs.command, words=["generate", *map(str, given)])[0]
    return code, stderr


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    asked: list[dict[str, Any]] = tasks(3, 0)
    write(path, [*asked, {"tokens": [5, 6, 7]}, {"messages": [{"role": "user", "content": "How many now?"}]}])
    return path


def test_greedy_answers_are_transformers(folder: Path, prompts: Path, tmp_path: Path) -> None:
    code, stderr = rows(1, folder, "--prompts", prompts, "--out", tmp_path / "o.jsonl", "--temperature", 0, "--max-tokens", 12)
    assert code == 0, stderr
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results = read(tmp_path / "o.jsonl")
    assert len(results) == 5
    assert results[3]["tokens"][:3] == [5, 6, 7]
    for row in results:
        prompt, answer = row["tokens"][: row["prompt_length"]], row["tokens"][row["prompt_length"] :]
        logits = model(torch.tensor([row["tokens"]])).logits[0].log_softmax(-1)
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        expected = [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert row["finish_reason"] == ("stop" if answer[-1] == load_tokenizer("words").eos_token_id else "length")
        assert len(answer) == 12 or row["finish_reason"] == "stop"


@pytest.mark.parametrize(("size", "setting"), [(2, "parallel.pp=2"), (2, "parallel.tp=2"), (2, "rollout.max_num_seqs=3")])
def test_the_same_rows_on_any_layout(folder: Path, prompts: Path, tmp_path: Path, size: int, setting: str) -> None:
    options = ["--n", 3, "--temperature", 0.9, "--top-p", 0.95, "--max-tokens", 8, "--seed", 5]
    assert rows(1, folder, "--prompts", prompts, "--out", tmp_path / "one.jsonl", *options)[0] == 0
    assert rows(size, folder, "--prompts", prompts, "--out", tmp_path / "many.jsonl", *options, setting)[0] == 0
    one, many = read(tmp_path / "one.jsonl"), read(tmp_path / "many.jsonl")
    assert len(one) == 15
    assert [row["tokens"] for row in one] == [row["tokens"] for row in many]
    assert len({tuple(row["tokens"]) for row in one}) > 5
    assert rows(1, folder, "--prompts", prompts, "--out", tmp_path / "other.jsonl", *options[:-1], 6)[0] == 0
    assert [row["tokens"] for row in one] != [row["tokens"] for row in read(tmp_path / "other.jsonl")]


def test_one_question(folder: Path) -> None:
    code, out, stderr = ranks(1).run(jobs.command, words=["generate", str(folder), "How many now?", "--max-tokens", "5"])[0]
    assert code == 0, stderr
    assert out.strip()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "now " * 90}, "leaves room for 84"),
        ({"question": "?"}, "a row needs tokens, messages or prompt"),
        ({"messages": "hi"}, "messages must be a list of at least one message, not 'hi'"),
        ({"messages": ["hi"]}, "messages[0] must be an object with role and content, not 'hi'"),
        ({"messages": 7}, "messages must be a list"),
        ({"messages": [None]}, "messages[0] must be an object"),
        ({"messages": {"role": "user", "content": "hi"}}, "messages must be a list"),
        ({"prompt": ["hi"]}, "prompt must be text, not list"),
        ({"tokens": [111]}, "111"),
    ],
)
def test_bad_prompts(folder: Path, tmp_path: Path, row: dict[str, Any], says: str) -> None:
    write(tmp_path / "p.jsonl", [row])
    code, stderr = rows(1, folder, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl", "--max-tokens", 12)
    assert code == 1
    assert says in stderr
    assert "p.jsonl:1" in stderr
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "takes one question"),
        (["one", "two"], "takes one question"),
        (["one", "--temperature", "-1"], "temperature=-1.0"),
        (["one", "--n", "0"], "n=0"),
        (["one", "--prompts", "x.jsonl"], "--prompts and --out"),
    ],
    ids=str,
)
def test_bad_settings(folder: Path, given: list[str], says: str) -> None:
    code, stderr = rows(1, folder, *given)
    assert code == 1
    assert says in stderr


def test_the_words_tokenizer_round_trips() -> None:
    """Every problem consists of known words, and decoding inverts encoding."""
    tokenizer = load_tokenizer("words")
    assert len(tokenizer) == 111
    for row in tasks(200, 3):
        ids = tokenizer.encode(row["prompt"], add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == row["prompt"]
    assert tokenizer.decode(tokenizer.encode("17 + 3 = 20. Answer: 20", add_special_tokens=False)) == "17 + 3 = 20. Answer: 20"
    assert len(words()) == len(set(words()))

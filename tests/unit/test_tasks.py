"""Prompts with verifiable answers: rows that cannot be read are refused with their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.rows import Source
from engine.data.tasks import Tasks, read_tasks
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer

CHAT = ChatTemplate(load_tokenizer("bytes"))
GOOD = {"prompt": "2 + 3?", "truth": "5"}


def read(folder: Path, *rows: Any, name: str = "gsm8k") -> Tasks:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_tasks(Source(str(folder / "rows.jsonl")), CHAT, name=name, max_length=64, too_long="error", first=0)


def test_rows_become_prompts(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "ignored"}]
    tasks = read(tmp_path, GOOD, {"messages": messages, "ground_truth": "5"}, {"tokens": [5, 6], "answer": "5"})
    assert [prompt.id for prompt in tasks.prompts] == [0, 1, 2]
    assert tasks[0].tokens.tolist() == tasks[1].tokens.tolist() == CHAT.prompt(messages[:1]).tolist()
    assert tasks[2].tokens.tolist() == [5, 6]


@pytest.mark.parametrize(("row", "complaint"), [
    ({"messages": "2 + 3?", "truth": "5"}, "messages must be a list of at least one message"),
    ({"messages": ["2 + 3?"], "truth": "5"}, "messages[0] must be an object with role and content"),
    ({"messages": [None], "truth": "5"}, "messages[0] must be an object"),
    ({"messages": 7, "truth": "5"}, "messages must be a list"),
    ({"messages": [], "truth": "5"}, "messages must be a list of at least one message"),
    ({"messages": [{"role": "user", "content": 5}], "truth": "5"}, "messages[0].content must be text, not int"),
    ({"prompt": {"text": "2"}, "truth": "5"}, "prompt must be text, not dict"),
    ({"tokens": ["2"], "truth": "5"}, "tokens must be a list of integers"),
    ({"prompt": "2 + 3?"}, "a row needs truth, ground_truth or answer; this one has prompt"),
    ({"prompt": "2 + 3?", "truth": 5}, "truth=5 must be a string"),
    ({"prompt": "2 + 3?", "truth": ["5"]}, "truth=['5'] must be a string"),
    ({"truth": "5"}, "a row needs tokens, messages or prompt; this one has truth"),
])  # fmt: skip
def test_a_bad_row_is_refused_with_its_line(row: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:2: ") as error:
        read(tmp_path, GOOD, row)
    assert complaint in str(error.value)

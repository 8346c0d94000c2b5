"""Prompts with a verifiable answer: rows in, Prompts out, every truth accepted by its verifier before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.data.rows import Source, read_rows
from engine.data.template import ChatTemplate
from engine.types import Prompt
from engine.verify import verifier


@dataclass(frozen=True)
class Tasks:
    """The prompts of a source, in its order."""

    path: str
    prompts: list[Prompt]
    dropped: int  # rows whose prompt is too long

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> Prompt:
        return self.prompts[i]

    @property
    def note(self) -> str:
        """All of it in a line."""
        longest = max(len(prompt.tokens) for prompt in self.prompts)
        return f"{self.path}: {len(self)} prompts, {self.dropped} too long and dropped; the longest has {longest} tokens"


def read_tasks(source: Source, chat: ChatTemplate, *, name: str, max_length: int, too_long: Literal["error", "drop"], first: int) -> Tasks:
    """Rows {"messages" | "prompt", "truth" | "ground_truth" | "answer", "verifier"?} as Prompts, numbered from `first`.

    `name` is the verifier of all rows; "": each row names its own, as `verifier` or, as in Tülu 3's data, as `dataset`. `messages` end with
    the user's; an assistant's turn behind it is left out. `max_length` bounds the prompt's tokens. Raises ValueError, naming the line:
    for a row without a prompt, with an unknown verifier or with a truth that its verifier cannot use, and for a prompt that is too long
    unless it is to be dropped.
    """
    prompts, dropped = [], 0
    for where, row in read_rows(source):
        try:
            prompt = _prompt(row, chat, name, first + len(prompts))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if len(prompt.tokens) <= max_length:
            prompts.append(prompt)
        elif too_long == "drop":
            dropped += 1
        else:
            raise ValueError(
                f"{where}: the prompt has {len(prompt.tokens)} tokens, over max_prompt_tokens={max_length}; raise it, or set too_long=drop"
            )
    if not prompts:
        raise ValueError(f"{source.path}: all {dropped} prompts are over {max_length} tokens; raise max_prompt")
    return Tasks(source.path, prompts, dropped)


def _prompt(row: Mapping[str, Any], chat: ChatTemplate, name: str, number: int) -> Prompt:
    judged_by = verifier(name or str(row.get("verifier") or row.get("dataset") or "").lower())
    truth = _truth(row)
    judged_by.check(truth)
    return Prompt(chat.prompt_row(row), truth, judged_by.name, number)


def _truth(row: Mapping[str, Any]) -> Any:
    for key in ("truth", "ground_truth", "answer"):
        if row.get(key) is not None:
            return row[key]
    raise ValueError(f"a task needs a truth (or ground_truth, or answer); this row has {', '.join(sorted(row)) or 'nothing'}")

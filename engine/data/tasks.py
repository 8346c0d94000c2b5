"""Read prompts with verifiable answers. Verifiers check every ground truth before the run starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.data.rows import Source, read_rows
from engine.data.template import ChatTemplate
from engine.types import Prompt
from engine.verify import verifier


@dataclass(frozen=True)
class Tasks:
    """The prompts of a source, in the order of its rows."""

    path: str
    prompts: list[Prompt]
    dropped: int  # rows whose prompt is too long

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> Prompt:
        return self.prompts[i]

    @property
    def digest(self) -> str:
        """Identifies the prompts and their truths, wherever the source is and whenever it was written."""
        content = hashlib.sha256()
        for prompt in self.prompts:
            content.update(json.dumps([prompt.tokens.tolist(), prompt.verifier, prompt.truth], sort_keys=True, default=str).encode())
        return content.hexdigest()

    @property
    def note(self) -> str:
        """One line for the log."""
        longest = max(len(prompt.tokens) for prompt in self.prompts)
        return f"{self.path}: {len(self)} prompts, {self.dropped} too long and dropped; the longest has {longest} tokens"


def read_tasks(source: Source, chat: ChatTemplate, *, name: str, max_length: int, too_long: Literal["error", "drop"], first: int) -> Tasks:
    """Read rows {"messages" | "prompt", "truth" | "ground_truth" | "answer", "verifier"?} as Prompts, with ids from `first` on.

    `name` is the verifier of all rows; "" means that each row names its own, as `verifier` or, like Tülu 3's data, as `dataset`. A final
    assistant turn of `messages` is ignored. `max_length` limits the prompt's tokens. Raises ValueError, which names the line, for a row
    without a prompt, with an unknown verifier or with a truth that its verifier cannot use, and for a prompt that is too long unless
    too_long="drop".
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
                f"{where}: prompt of {len(prompt.tokens)} tokens, more than max_prompt_tokens={max_length}; raise it, or set too_long=drop"
            )
    if not prompts:
        raise ValueError(f"{source.path}: all {dropped} prompts have more than {max_length} tokens; raise max_prompt_tokens")
    return Tasks(source.path, prompts, dropped)


def _prompt(row: Mapping[str, Any], chat: ChatTemplate, name: str, number: int) -> Prompt:
    prompt_verifier = verifier(name or str(row.get("verifier") or row.get("dataset") or "").lower())
    truth = _truth(row)
    prompt_verifier.check(truth)
    return Prompt(chat.prompt_row(row), truth, prompt_verifier.name, number)


def _truth(row: Mapping[str, Any]) -> Any:
    for key in ("truth", "ground_truth", "answer"):
        if row.get(key) is not None:
            return row[key]
    raise ValueError(f"a row needs truth, ground_truth or answer; this one has {', '.join(sorted(row)) or 'nothing'}")

"""Checks the values of a row: messages, text, token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Message = Mapping[str, Any]
Messages = Sequence[Message]

SYSTEM_ROLES, TOOL_ROLES = ("system", "developer"), ("tool", "ipython")
ROLES = (*SYSTEM_ROLES, "user", "assistant", *TOOL_ROLES)
# Keys with text that a model must see or learn. A template that does not mention them would drop it.
TEXT_KEYS = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
TURN_KEYS = ("role", "content", "name", "tool_call_id", *TEXT_KEYS)  # what makes two messages different


@dataclass(frozen=True)
class Conversation:
    """Messages and tool definitions, with `mark` before each text in them that equals a control token: a character that occurs nowhere."""

    turns: list[dict[str, Any]]
    tools: list[Any] | None
    mark: str

    @property
    def answers(self) -> list[int]:
        """The assistant turns that follow another turn."""
        return [i for i, turn in enumerate(self.turns) if i and turn["role"] == "assistant"]

    def protected(self, control: re.Pattern[str]) -> Conversation:
        """With marks before every match of `control`."""
        turns = [{key: value if key == "role" else marked(value, control, self.mark) for key, value in turn.items()} for turn in self.turns]
        return replace(self, turns=turns, tools=marked(self.tools, control, self.mark))

    def unmarked(self, text: str) -> str:
        """`text` without marks."""
        return text.replace(self.mark, "")


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """The turns of a conversation: `role`, `content` and all other keys that are not null. Raises ValueError for anything else."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a list of at least one message, not {messages!r:.40}")
    return [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _turn(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        raise ValueError(f"{name} must be an object with role and content, not {message!r:.60}")
    if message["role"] not in ROLES:
        raise ValueError(f"{name}.role={message['role']!r} is unknown; use {', '.join(ROLES)}")
    turn = {key: checked(value, f"{name}.{key}") for key, value in message.items() if value is not None}
    if "content" in turn or not turn.get("tool_calls"):
        turn["content"] = text(turn.get("content"), f"{name}.content")
    if (weight := turn.get("weight", 1)) not in (0, 1):
        raise ValueError(f"{name}.weight={weight!r} must be 0 (do not train this turn) or 1")
    return turn


def read_tools(tools: Any) -> list[Any] | None:
    """The tool definitions of a row: a list of objects, or that as JSON text. None if there are none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools is not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools must be a list of objects, not {tools!r:.60}")
    return [checked(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def text(value: Any, name: str) -> str:
    """`value`, which must be text that can be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a lone surrogate, {value[error.start]!r}, at character {error.start}; remove it") from None
    return value


def checked(value: Any, name: str, depth: int = 32) -> Any:
    """`value`, whose texts can be encoded, as plain lists and dicts at most `depth` deep."""
    if isinstance(value, str):
        return text(value, name)
    if depth == 0:
        raise ValueError(f"{name} is nested too deeply")
    if isinstance(value, Mapping):
        return {text(key, f"a key of {name}"): checked(each, f"{name}.{key}", depth - 1) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [checked(each, f"{name}[{i}]", depth - 1) for i, each in enumerate(value)]
    return value


def texts(value: Any) -> Iterable[str]:
    """Every text in `value`, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from (key, *texts(each))
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


def unused_character(value: Any) -> str:
    """A character of a private-use plane that occurs in no text of `value`."""
    used = set().union(*texts(value))
    return next(chr(point) for point in range(0xF0000, 0xFFFFE) if chr(point) not in used)


def marked(value: Any, control: re.Pattern[str], mark: str) -> Any:
    """`value` with `mark` before each match of `control` in its texts."""
    if isinstance(value, str):
        return control.sub(lambda match: mark + match[0], value)
    if isinstance(value, Mapping):
        return {marked(key, control, mark): marked(each, control, mark) for key, each in value.items()}
    if isinstance(value, list):
        return [marked(each, control, mark) for each in value]
    return value


def given(tokens: Any, mask: Any, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, int32 [L + 1], and mask, uint8 [L] (None: all ones), of a row. Raises ValueError for ids outside [0, vocab)."""
    ids = _integers(tokens, "tokens", vocab)
    trained = np.ones(max(len(ids) - 1, 0), np.uint8) if mask is None else _integers(mask, "mask", 2).astype(np.uint8)
    if len(trained) != len(ids) - 1:
        raise ValueError(
            f"mask has {len(trained)} values for {len(ids)} tokens; it needs one value less than tokens, mask[t] for tokens[t + 1]"
        )
    return ids.astype(np.int32), trained


def read_whole(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sequence with one more token, so that its last token is part of the model's input; the prediction after it is masked."""
    return np.append(tokens, tokens[-1]), np.append(mask, np.uint8(0))


def some_trained(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arguments. Raises ValueError if the mask has no 1."""
    if not mask.any():
        raise ValueError("no token would be trained: the mask has no 1 (mask[t] belongs to tokens[t + 1]); remove the row")
    return tokens, mask


def _integers(values: Any, name: str, below: int) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)  # ragged
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= below:
        raise ValueError(f"{name} must be a list of integers from 0 to {below - 1}, not {values!r:.60}")
    return array

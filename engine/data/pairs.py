"""Preference pairs: rows of a prompt with a chosen and a rejected response, in the common formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.choices import BadRows, TooLong
from engine.data.corpus import Corpus, Counts, Reader, Sequences, prepare
from engine.data.messages import TURN_KEYS, read_whole
from engine.data.rows import Source
from engine.data.template import ChatTemplate
from engine.types import Sample

Pair = tuple[Sample, Sample]  # (chosen, rejected)


class Pairs:
    """The pairs of a prepared source, in the order of its rows. Pair i is samples 2 i (chosen) and 2 i + 1 (rejected) of its corpus."""

    def __init__(self, corpus: Corpus, ref_logprob: np.ndarray | None = None) -> None:
        """ref_logprob: reference log-probs of all predicted tokens of the corpus, float32 [sum of L]. Samples get slices of it."""
        self.corpus, self._ref_logprob = corpus, ref_logprob

    def __len__(self) -> int:
        return len(self.corpus) // 2

    def __getitem__(self, i: int) -> Pair:
        return self._sample(2 * i), self._sample(2 * i + 1)

    def _sample(self, i: int) -> Sample:
        sample = self.corpus[i]
        return sample if self._ref_logprob is None else replace(sample, ref_logprob=self._ref_logprob[self.corpus.predicted(i)])

    @property
    def counts(self) -> Counts:
        """Counts of the source's rows and tokens: `kept` counts pairs, `tokens` those of chosen and rejected."""
        return self.corpus.counts

    @property
    def lengths(self) -> np.ndarray:
        """L of chosen and rejected of every pair, int64 [len(self), 2]."""
        return self.corpus.lengths.reshape(-1, 2)

    def check_fit(self, path: str, budget: int) -> None:
        """Raise ValueError if a pair exceeds `budget`, the tokens of a microbatch: both of its samples must be in one microbatch."""
        both = self.lengths.sum(1)
        if over := int((both > budget).sum()):
            raise ValueError(
                f"{path}: {over} of {len(self)} pairs do not fit a microbatch; chosen and rejected have up to {both.max()} tokens, "
                f"more than tokens_per_microbatch={budget}; raise it, or lower algorithm.max_length with too_long=truncate or drop"
            )


def prepare_pairs(
    source: Source,
    chat: ChatTemplate,
    *,
    max_length: int,
    too_long: TooLong = "error",
    bad_rows: BadRows = "error",
    whole: bool = False,
    all_turns: bool = False,
    cache: Path,
) -> Pairs:
    """Tokenize the pairs of `source`, or open the cached ones of an equal call. Arguments and errors are those of corpus.prepare.

    `max_length` limits chosen and rejected each, prompt included. Both are truncated, or the pair is dropped. `whole` includes the last
    token in the model's input, which a reward model needs and a language model does not. `all_turns`: as in encode_pair.
    """
    assert not (whole and all_turns), "a reward model reads the last token only"
    reader = WHOLE_PAIR if whole else ALL_TURNS_PAIR if all_turns else PAIR
    return Pairs(prepare(source, chat, max_length=max_length, too_long=too_long, bad_rows=bad_rows, cache=cache, reader=reader))


def grouped(pairs: Sequence[Pair]) -> list[Sample]:
    """The pairs as one batch: chosen is sample 2 p, rejected 2 p + 1. Both have group p, so that they share a microbatch."""
    return [replace(half, group=p) for p, pair in enumerate(pairs) for half in pair]


def encode_pair(chat: ChatTemplate, row: Mapping[str, Any], all_turns: bool = False) -> Sequences:
    """Tokens int32 [L + 1] and mask uint8 [L] of the chosen and of the rejected conversation of a row, in this order.

    Two formats are accepted:
    - chosen and rejected are responses: text, or messages that start with an assistant turn. `prompt` is the question (text) or the
      preceding conversation; `messages` is another name for the latter. If a row has both, prompt (such as a system turn) comes first.
    - chosen and rejected are full conversations with a common beginning, as in the Tülu mixtures. prompt and messages are ignored.
    The mask is 1 for the assistant turns that the two do not share; with `all_turns`, for every assistant turn after the first message.

    Raises ValueError for any other format, an empty response, equal responses, and conversations that differ before an assistant turn.
    """
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise ValueError(f"a row needs chosen and rejected; this one has no {' and no '.join(missing)}")
    if not chat.text:
        return _plain(chat, row)
    halves = [_messages(row[name], name) for name in ("chosen", "rejected")]
    conversations = [half[0].get("role") != "assistant" for half in halves]
    if conversations[0] != conversations[1]:
        raise ValueError("one of chosen and rejected is a full conversation, the other only a response; use the same format for both")
    if not conversations[0]:
        before = _before(row)
        halves = [[*before, *half] for half in halves]
    shared = _shared(*halves)
    first = 1 if all_turns else shared
    return _distinct([chat.encode(half, given=first, tools=row.get("tools")) for half in halves])


def _plain(chat: ChatTemplate, row: Mapping[str, Any]) -> Sequences:
    for name in ("chosen", "rejected"):
        _answered(row[name], name)
    if row.get("prompt") is None:
        raise ValueError("a tokenizer without a chat template needs prompt, chosen and rejected as text; this row has no prompt")
    return _distinct([chat.encode_row({"prompt": row["prompt"], "response": row[name]}) for name in ("chosen", "rejected")])


def _messages(value: Any, name: str) -> list[Mapping[str, Any]]:
    """A response or conversation as messages. The last one must be an assistant turn with content."""
    turns = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    if isinstance(turns, Mapping) or not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"{name} must be text or a list of messages, not {value!r:.40}")
    if turns[-1].get("role") != "assistant":
        raise ValueError(f"{name} must end in an assistant's message, not in one with role={turns[-1].get('role')!r}")
    _answered(turns[-1].get("content"), name)
    return list(turns)


def _answered(content: Any, name: str) -> None:
    if not isinstance(content, str):
        raise ValueError(f"{name} must be text, not {type(content).__name__}")
    if not content.strip():
        raise ValueError(f"{name} is empty; a pair needs two responses")


def _before(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages before the responses chosen and rejected."""
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt is None and messages is None:
        raise ValueError("chosen and rejected are only responses, so the row also needs prompt or messages")
    turns: list[Mapping[str, Any]] = []
    for name, value in (("prompt", prompt), ("messages", messages)):
        if isinstance(value, str):
            turns.append({"role": "user", "content": value})
        elif isinstance(value, Sequence):
            turns += value
        elif value is not None:
            raise ValueError(f"{name} must be text or a list of messages, not {value!r:.40}")
    return turns


def _shared(chosen: list[Mapping[str, Any]], rejected: list[Mapping[str, Any]]) -> int:
    """Number of messages that both conversations share at the beginning."""
    same = 0
    for chosen_turn, rejected_turn in zip(chosen, rejected, strict=False):
        if any(chosen_turn.get(name) != rejected_turn.get(name) for name in TURN_KEYS):
            break
        same += 1
    if same == len(chosen) == len(rejected):
        raise ValueError("chosen and rejected are equal; a pair needs two different responses")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if same == len(turns):
            raise ValueError(f"{name} is the beginning of the other conversation; the two must differ at an assistant's message")
        if turns[same].get("role") != "assistant":
            raise ValueError(
                f"chosen and rejected differ at message {same}, where {name} has role={turns[same].get('role')!r}; "
                "they must be equal up to an assistant's message"
            )
    return same


def _distinct(sequences: Sequences) -> Sequences:
    (chosen, _), (rejected, _) = sequences
    if np.array_equal(chosen, rejected):
        raise ValueError("chosen and rejected are equal as tokens; a pair needs two different responses")
    return sequences


PAIR = Reader("pair", 2, encode_pair)
ALL_TURNS_PAIR = Reader("pair, all turns", 2, partial(encode_pair, all_turns=True))
WHOLE_PAIR = Reader("whole pair", 2, lambda chat, row: [read_whole(*half) for half in encode_pair(chat, row)])

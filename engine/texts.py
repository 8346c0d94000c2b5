"""What every run on text does first: open its tokenizer, see that lengths fit, and tokenise its sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from engine.config import Run
from engine.data.rows import Source
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.hub import cache_folder
from engine.megatron.policy import Policy

Prepared = TypeVar("Prepared")  # a Corpus, or Pairs


def microbatch_tokens(policy: Policy, run: Run) -> int:
    """How many real tokens a microbatch can hold: every rank of a tensor-parallel group holds equally many."""
    return run.tokens_per_microbatch // policy.parallel.tp * policy.parallel.tp


def open_chat(policy: Policy, run: Run, chat_template: str, max_length: int) -> ChatTemplate:
    """The run's tokenizer, with its own template or `chat_template`. Raises ValueError when it is of another model, or when a sequence of
    `max_length` tokens has no place in a microbatch or in the model's context."""
    longest = microbatch_tokens(policy, run)
    if max_length > longest:
        raise ValueError(f"algorithm.max_length={max_length} is over tokens_per_microbatch={longest}; raise the latter or lower the former")
    if max_length > policy.model.max_length:
        raise ValueError(f"algorithm.max_length={max_length} is over the model's context of {policy.model.max_length} tokens; lower it")
    tokenizer = load_tokenizer(run.model.tokenizer or str(policy.folder))
    if len(tokenizer) > policy.model.vocab:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {policy.model.vocab}; choose a tokenizer of this model"
        )
    return ChatTemplate(tokenizer, chat_template or None)


def prepare_all(policy: Policy, sources: Sequence[Source], prepare: Callable[[Source, Path], Prepared]) -> list[Prepared]:
    """prepare(source, cache folder) of each source: done by rank 0, opened by the others."""
    cache = cache_folder() / "corpora"
    return [policy.world.first(partial(prepare, source, cache)) for source in sources]

"""What every run on text does first: open its tokenizer, and tokenise its sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from engine.config import Model
from engine.data.rows import Source
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.distributed.world import World
from engine.models.hub import cache_folder

Prepared = TypeVar("Prepared")  # a Corpus, or Pairs


def tokenizer_of(model: Model, folder: Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer that `model` names, or the one in the folder of its weights."""
    return load_tokenizer(model.tokenizer or str(folder))


def open_chat(model: Model, folder: Path | None, chat_template: str) -> ChatTemplate:
    """The tokenizer of `model`, with its own chat template or with `chat_template`."""
    return ChatTemplate(tokenizer_of(model, folder), chat_template or None)


def prepare_all(world: World, sources: Sequence[Source], prepare: Callable[[Source, Path], Prepared]) -> list[Prepared]:
    """prepare(source, cache folder) of each source: done by rank 0, opened by the others."""
    cache = cache_folder() / "corpora"
    return [world.rank0_first(partial(prepare, source, cache)) for source in sources]

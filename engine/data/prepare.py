"""Open the tokenizer of a run and tokenize its sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from engine.config import Model
from engine.config.checks import tokenizer_problem
from engine.data.corpus import Corpus
from engine.data.pairs import Pairs
from engine.data.rows import Source
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer, vocabulary_size
from engine.distributed.world import World
from engine.models.hub import cache_folder

Prepared = TypeVar("Prepared", Corpus, Pairs)


def tokenizer_of(model: Model, folder: Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer named by model.tokenizer, or the one in the folder of the weights."""
    return load_tokenizer(model.tokenizer or str(folder))


def fitting_tokenizer(model: Model, folder: Path | None, vocab: int) -> PreTrainedTokenizerFast:
    """The tokenizer of `model`, whose embedding has `vocab` rows. Raises ValueError if it has an id beyond them."""
    tokenizer = tokenizer_of(model, folder)
    if problem := tokenizer_problem(model, vocab, vocabulary_size(tokenizer)):
        raise ValueError(problem)
    return tokenizer


def open_chat(model: Model, folder: Path | None, vocab: int, chat_template: str) -> ChatTemplate:
    """The tokenizer of `model` with `chat_template`; "" means the tokenizer's own template. Raises ValueError like fitting_tokenizer."""
    return ChatTemplate(fitting_tokenizer(model, folder, vocab), chat_template or None)


def prepare_all(world: World, sources: Sequence[Source], prepare: Callable[[Source, Path], Prepared]) -> list[Prepared]:
    """prepare(source, cache folder) for each source, on rank 0 first; the other ranks then open its result. All ranks must call it.

    Raises ValueError on all ranks for a damaged file: each reads a share of every file and compares it with the digests written with it.
    """
    cache = cache_folder() / "corpora"
    prepared = [world.rank0_first(partial(prepare, source, cache)) for source in sources]
    corpora = (each if isinstance(each, Corpus) else each.corpus for each in prepared)
    damages = (corpus.damage(world.rank, world.size) for corpus in corpora)
    if problem := world.first_error(next(filter(None, damages), None)):
        raise ValueError(problem)
    return prepared

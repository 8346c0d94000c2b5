"""The tokens that end a response: one decision for training, generation, evaluation and export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.template import ChatTemplate
from engine.files import read_object

GENERATION_CONFIG = "generation_config.json"


def known_stops(chat: ChatTemplate, folder: Path | None) -> tuple[int, ...]:
    """The tokenizer's eos, the tokens that close an assistant turn of the chat template, and every eos_token_id of the model folder's
    generation_config.json and config.json. Raises ValueError for ids in the files that are not token ids.
    """
    ids: list[Any] = [] if chat.tokenizer.eos_token_id is None else [chat.tokenizer.eos_token_id]
    ids += chat.closing
    for path in (folder / GENERATION_CONFIG, folder / "config.json") if folder else ():
        ids += _eos_ids(path, len(chat.tokenizer))
    return tuple(dict.fromkeys(ids))


def stop_tokens(chat: ChatTemplate, folder: Path | None, more: Sequence[str] = ()) -> tuple[int, ...]:
    """The ids that end a response: `known_stops`, and the tokens named by `more`.

    Raises ValueError if there is none, and for a name in `more` that is not a token.
    """
    tokenizer, ids = chat.tokenizer, [*known_stops(chat, folder)]
    for token in more:
        id = tokenizer.convert_tokens_to_ids(token)
        if not isinstance(id, int) or id == tokenizer.unk_token_id:
            raise ValueError(f"stop={token!r} is not a token of the tokenizer; name single tokens, such as <|im_end|>")
        ids.append(id)
    if not ids:
        raise ValueError("no token ends a response: the tokenizer has no eos token, and the template closes no turn; name some in stop")
    return tuple(dict.fromkeys(ids))


def special_ids(chat: ChatTemplate) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id of the tokenizer, as far as it has them."""
    ids = {name: getattr(chat.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: id for name, id in ids.items() if id is not None}


def _eos_ids(path: Path, tokens: int) -> list[int]:
    ids = read_object(path).get("eos_token_id") if path.exists() else None
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    for id in ids:
        if not isinstance(id, int) or isinstance(id, bool) or id < 0:
            raise ValueError(f"{path}: eos_token_id={id!r} is not a token id")
    return [id for id in ids if id < tokens]  # some folders name an id that their tokenizer lacks

"""What belongs to an exported model besides its weights: configs, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import ModelShape
from engine.data.stops import GENERATION_CONFIG, special_ids
from engine.data.template import ChatTemplate
from engine.files import read_object
from engine.models.families import head_to_hf, to_hf


def write_assets(folder: Path, model: ModelShape, origin: Path | None, chat: ChatTemplate, stop: Sequence[int]) -> None:
    """Write tokenizer, chat template, config.json and, for a language model, generation_config.json into `folder`.

    origin: the folder that the weights came from, whose configs are kept but for what training changed; None: random weights. stop: the
    ids that end a response, by which transformers and vLLM stop too.
    """
    chat.tokenizer.save_pretrained(folder)
    config = special_ids(chat) | to_hf(model) if origin is None else read_object(origin / "config.json")
    if model.head == "scalar":  # transformers scores the last token that is not padding
        config |= head_to_hf(model) | {"pad_token_id": chat.tokenizer.pad_token_id}
    elif stop:
        own = read_object(origin / GENERATION_CONFIG) if origin and (origin / GENERATION_CONFIG).exists() else {}
        _write(folder / GENERATION_CONFIG, own | special_ids(chat) | {"eos_token_id": stop[0] if len(stop) == 1 else list(stop)})
    _write(folder / "config.json", config)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

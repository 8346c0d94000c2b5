"""Chat formats of public models: tokens, loss mask, stop tokens and export of each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from engine.config import ModelShape
from engine.data.stops import known_stops, stop_tokens
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.models.assets import write_assets
from tests.support.chat_templates import FORMATS, Format

TRAINABLE = {name: each for name, each in FORMATS.items() if each.turns}
CONVERSATION = [
    {"role": "user", "content": "What is 2 + 3?\nSay it in one word, naïve 你好."},
    {"role": "assistant", "content": "Five.\n\nOr 5"},
    {"role": "user", "content": "And 3 + 4?"},
    {"role": "assistant", "content": "Seven"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAPE = ModelShape(layers=1, hidden=16, ffn=16, heads=2, kv_heads=2, vocab=320)


def conversations(of: Format) -> list[list[dict[str, str]]]:
    turns = CONVERSATION[: 2 * of.turns]
    return [turns, [SYSTEM, *turns]] if of.system else [turns]


def test_there_are_enough_formats() -> None:
    assert len(FORMATS) >= 34


@pytest.mark.parametrize("of", TRAINABLE.values(), ids=TRAINABLE)
def test_tokens_are_those_of_apply_chat_template(of: Format) -> None:
    chat = ChatTemplate(of.tokenizer())
    for messages in conversations(of):
        assert chat.encode(messages)[0].tolist() == of.tokenizer().apply_chat_template(messages, return_dict=False)
        prompt = of.tokenizer().apply_chat_template(messages[:-1], return_dict=False, add_generation_prompt=True)
        assert chat.prompt(messages[:-1]).tolist() == prompt


@pytest.mark.parametrize("of", TRAINABLE.values(), ids=TRAINABLE)
def test_the_mask_covers_what_sampling_would_produce(of: Format) -> None:
    """Continued from the prompt of each turn until a stop token, the trained tokens are those of the conversation, and no others."""
    chat = ChatTemplate(of.tokenizer())
    stops = known_stops(chat, None)
    for messages in conversations(of):
        tokens, mask = (part.tolist() for part in chat.encode(messages))
        expected = [0] * len(mask)
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            start = len(chat.prompt(messages[:i]))
            assert tokens[:start] == chat.prompt(messages[:i]).tolist()
            upto = len(of.tokenizer().apply_chat_template(messages[: i + 1], return_dict=False))
            end = next((at + 1 for at in range(start, upto) if tokens[at] in stops), upto)
            assert messages[i]["content"] in chat.tokenizer.decode(tokens[start:end])
            assert bool(of.closing) == (tokens[end - 1] in stops)
            expected[start - 1 : end - 1] = [1] * (end - start)
        assert mask == expected


@pytest.mark.parametrize("of", TRAINABLE.values(), ids=TRAINABLE)
def test_the_closing_token_ends_a_response_before_and_after_export(of: Format, tmp_path: Path) -> None:
    chat = ChatTemplate(of.tokenizer())
    closing: list[Any] = [chat.tokenizer.convert_tokens_to_ids(of.closing)] if of.closing else []
    eos: Any = chat.tokenizer.eos_token_id
    assert list(chat.closing) == closing
    assert bool(chat.warnings) == (not of.closing)
    assert set(stop_tokens(chat, None)) == {eos, *closing}
    write_assets(tmp_path, SHAPE, None, chat, stop_tokens(chat, None))
    exported = ChatTemplate(load_tokenizer(str(tmp_path)))
    assert exported.text == of.template
    assert set(stop_tokens(exported, tmp_path)) == set(stop_tokens(chat, None))
    ids = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert set(ids if isinstance(ids, list) else [ids]) == set(stop_tokens(chat, None))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == chat.tokenizer.eos_token_id
    assert config["pad_token_id"] == chat.tokenizer.pad_token_id


@pytest.mark.parametrize("of", [each for each in TRAINABLE.values() if each.turns == 1], ids=lambda of: of.closing)
def test_a_format_that_rewrites_earlier_turns_is_refused_for_several(of: Format) -> None:
    with pytest.raises(ValueError, match=r"renders messages\[1\] or an earlier one differently as the conversation grows"):
        ChatTemplate(of.tokenizer()).encode(CONVERSATION)


@pytest.mark.parametrize("of", [each for each in FORMATS.values() if not each.turns], ids=lambda of: of.eos)
def test_a_format_that_cannot_be_trained_is_refused_with_its_reason(of: Format) -> None:
    with pytest.raises(ValueError, match=of.refused):
        ChatTemplate(of.tokenizer())


@pytest.mark.parametrize("of", [each for each in TRAINABLE.values() if not each.system], ids=lambda of: of.template[-40:])
def test_a_format_without_system_messages_says_so(of: Format) -> None:
    with pytest.raises(ValueError, match="cannot render the conversation: no system"):
        ChatTemplate(of.tokenizer()).encode([SYSTEM, *CONVERSATION[:2]])


@pytest.mark.parametrize(("generation", "config", "ids"), [
    ([3, 5], 5, (3, 5)), (None, 5, (5,)), (7, None, (7,)), (None, None, ()), ([3, 10**6], [4], (3, 4)),
], ids=str)  # fmt: skip
def test_ids_of_the_folders_configs_end_a_response(generation: Any, config: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    chat = ChatTemplate(load_tokenizer("bytes"))
    assert stop_tokens(chat, tmp_path) == (chat.tokenizer.eos_token_id, *ids)
    assert stop_tokens(chat, tmp_path, ["<|user|>"]) == (chat.tokenizer.eos_token_id, *ids, 257)


@pytest.mark.parametrize(("text", "complaint"), [
    ('{"eos_token_id": "</s>"}', "eos_token_id='</s>' is not a token id"), ('{"eos_token_id": [true]}', "eos_token_id=True is not"),
    ('{"eos_token_id": -1}', "eos_token_id=-1 is not"), ('{"eos_token_id": [[1]]}', "is not a token id"),
    ("[1]", "not a JSON object, but a JSON list"),
    ("{", "not a JSON object"), ("[" * 10**5, "nested too deep"),
], ids=lambda text: text[:20])  # fmt: skip
def test_what_is_no_id_is_refused_with_its_file(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(complaint)) as error:
        stop_tokens(ChatTemplate(load_tokenizer("bytes")), tmp_path)
    assert "generation_config.json" in str(error.value)


def test_without_any_stop_token_generation_is_refused() -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.eos_token, tokenizer.chat_template = None, FORMATS["alpaca"].template
    chat = ChatTemplate(tokenizer)
    assert known_stops(chat, None) == ()
    with pytest.raises(ValueError, match=r"no token ends a response: .* name some in stop"):
        stop_tokens(chat, None)
    with pytest.raises(ValueError, match="stop='nothing' is not a token of the tokenizer"):
        stop_tokens(chat, None, ["nothing"])
    assert stop_tokens(chat, None, ["<|user|>"]) == (257,)

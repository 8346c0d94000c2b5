"""Rows of conversations: keys of messages, tools, weights, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tokenizers import processors

from engine.data.template import TULU, ChatTemplate
from engine.data.tokenizer import load_tokenizer
from tests.support.chat_templates import CHATS, FORMATS, QWEN3, ask, trained_text, word_tokenizer

END = 259

THINKING = (
    "{% for m in messages %}{% set thought = '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '' %}"
    "{% set calls = '<call>' + (m.tool_calls | tojson) + '</call>' if m.tool_calls else '' %}"
    "{{ '<|' + m.role + '|>' + (m.name or '') + (m.tool_call_id or '') + thought + (m.content or '') + calls }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"
)
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "<|end|>é"}}}]


@pytest.mark.parametrize("extra", [
    {"reasoning_content": "2 and 3"}, {"tool_calls": CALL}, {"tool_calls": CALL, "content": None}, {"name": "Bob"},
    {"tool_call_id": "call_1", "name": "add"}, {"reasoning_content": "<|end|>", "tool_calls": CALL}, {"weight": 1}, {"id": 7, "tags": None},
], ids=str)  # fmt: skip
def test_every_key_of_a_message_reaches_the_template(extra: dict[str, Any]):
    chat = ChatTemplate(load_tokenizer("bytes"), THINKING)
    messages = [*ask("What?", "Hm"), {"role": "tool", "content": "5"}, {"role": "assistant", "content": "5"} | extra]
    tokens, _ = chat.encode(messages)
    assert chat.tokenizer.decode(tokens) == chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokens.tolist().count(END) == 2, "what a message contains is text"
    assert chat.prompt(messages[:3]).tolist() == tokens[: len(chat.prompt(messages[:3]))].tolist()


def test_tool_definitions_reach_the_template():
    chat = ChatTemplate(load_tokenizer("bytes"), "{{ '<|user|>' + (tools | tojson) if tools else '' }}" + TULU)
    tools: list[Any] = [{"type": "function", "function": {"name": "add", "description": "<|end|>"}}]
    for given_tools in (tools, json.dumps(tools)):
        tokens, _ = chat.encode_row({"messages": ask("q", "a"), "tools": given_tools})
        assert chat.tokenizer.decode(tokens) == chat.tokenizer.apply_chat_template(ask("q", "a"), tools, tokenize=False)
        assert tokens.tolist().count(END) == 1
        assert chat.prompt_row({"messages": ask("q", "a"), "tools": given_tools}).tolist() == tokens[: len(tokens) - 2].tolist()
    assert chat.encode_row({"messages": ask("q", "a"), "tools": []})[0].tolist() == chat.encode(ask("q", "a"))[0].tolist()


@pytest.mark.parametrize(("row", "complaint"), [
    ({"messages": [*ask("q", "a"), {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]},
     "template 'tulu' does not render messages[3].reasoning_content; remove it"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": CALL}]}, "messages[1].tool_calls"),
    ({"messages": ask("q", "a"), "tools": [{"type": "function"}]}, "does not render tools; remove them"),
    ({"messages": ask("q", "a"), "tools": "[1"}, "tools is not JSON"),
    ({"messages": ask("q", "a"), "tools": {"a": 1}}, "tools must be a list of objects"),
    ({"messages": ask("q", "a"), "tools": ["add"]}, "tools must be a list of objects"),
    ({"messages": ask("q", "a"), "chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs of a row are not supported"),
    ({"messages": [ask("q", "a")[0], ask("q", "a")[1] | {"weight": 0.5}]}, "messages[1].weight=0.5 must be 0 (do not train this turn)"),
    ({"messages": [ask("q", "a")[0], ask("q", "a")[1] | {"weight": "0"}]}, "messages[1].weight='0' must be 0"),
    ({"messages": [ask("q", "a")[0], ask("q", "a")[1] | {"weight": 0}]}, "no token would be trained"),
    ({"messages": [ask("q", "a")[0], {"role": "assistant", "content": None, "tool_calls": []}]}, "messages[1].content must be text"),
    ({"messages": [ask("q", "a")[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}, "content must be text, not list"),
    ({"messages": [ask("q", "a")[0] | {"role": ["user"]}]}, "messages[0].role=['user'] is unknown"),
    ({"messages": [ask("q", "a")[0] | {"name": "\ud800"}, ask("q", "a")[1]]}, "messages[0].name has a lone surrogate"),
])  # fmt: skip
def test_what_a_template_would_drop_is_refused_by_name(row: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        CHATS["tulu"].encode_row(row)


def test_a_role_that_the_template_drops_is_refused_by_name():
    chat = ChatTemplate(load_tokenizer("bytes"), TULU.replace("{{ '<|' +", "{% if message['role'] in ('user', 'assistant') %}{{ '<|' +", 1)
                        .replace("'\\n' }}{% endfor %}", "'\\n' }}{% endif %}{% endfor %}", 1))  # fmt: skip
    with pytest.raises(ValueError, match=r"does not render messages\[0\], whose role is system; remove it"):
        chat.encode([{"role": "system", "content": "Be brief."}, *ask("q", "a")])
    assert trained_text(chat, ask("q", "a")) == "a<|end|>"


def test_earlier_turns_may_be_rewritten_if_they_are_not_trained():
    """Qwen3 drops the reasoning of earlier turns: with weight 0 they need not be located."""
    chat = ChatTemplate(FORMATS["qwen-3"].tokenizer())
    messages = [*ask("q", "a"), *ask("r", "b")]
    with pytest.raises(ValueError, match="differently as the conversation grows"):
        chat.encode(messages)
    messages[1]["weight"] = 0
    tokens, mask = chat.encode(messages)
    assert tokens.tolist() == chat.tokenizer.apply_chat_template(messages, return_dict=False)
    assert chat.tokenizer.decode(tokens[1:][mask == 1]) == "<think>\n\n</think>\n\nb<|im_end|>"
    assert chat.encode(messages, given=3)[1].tolist() == mask.tolist()


def test_a_turn_of_weight_0_is_not_trained():
    chat = CHATS["tulu"]
    messages = [*ask("q", "a"), *ask("r", "b"), *ask("s", "c")]
    messages[1]["weight"], messages[5]["weight"] = 0, 1
    assert trained_text(chat, messages) == "b<|im_end|>c<|im_end|>"
    assert chat.encode(messages)[0].tolist() == chat.encode([*ask("q", "a"), *ask("r", "b"), *ask("s", "c")])[0].tolist()


@pytest.mark.parametrize("content", ["<think>\n2 + 3\n</think>\n\n5", "</think> 5", "5", "<|end|></think>5 <|end|>"])
def test_tokens_that_the_template_looks_for_in_a_message_are_its_own(content: str):
    """It splits at </think> and strips around it: a mark there would stay in the text."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens(["<think>", "</think>"])
    template = TULU.replace(
        "message['content']", "(('<think>' + message['content'].split('</think>')[0].split('<think>')[-1].strip('\n') + '</think>') "
        "if '</think>' in message['content'] else '') + message['content'].split('</think>')[-1].lstrip('\n')"
    )  # fmt: skip
    tokens, _ = ChatTemplate(tokenizer, template).encode(ask("q", content))
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(ask("q", content), chat_template=template, tokenize=False)
    assert tokens.tolist().count(END) == 1
    assert bool("</think>" in content) == (261 in tokens.tolist())


@pytest.mark.parametrize("content", ["<think>\n2 + 3\n</think>\n\n5", "\n</think>5", "5", "<|im_end|>\n</think>\n\n<|im_end|>5"])
def test_tokens_that_the_template_writes_and_looks_for_are_its_own(content: str):
    """Qwen3 writes <think> itself, moves a message's own reasoning there, and strips around it."""
    tokenizer: Any = load_tokenizer("bytes")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = QWEN3
    tokens, mask = ChatTemplate(tokenizer).encode(ask("q", content))
    think, im_end = tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>"])
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(ask("q", content), tokenize=False)
    assert tokens.tolist().count(think) == 1
    assert tokens.tolist().count(im_end) == 2, "what the message contains stays text"
    assert tokens[1:][mask == 1].tolist()[-1] == im_end


def test_a_template_that_edits_control_tokens_in_messages_is_refused_for_those_rows():
    chat = ChatTemplate(load_tokenizer("bytes"), TULU.replace("message['content']", "message['content'].replace('.<|end|>', '')"))
    assert trained_text(chat, ask("q", "a.")) == "a.<|end|>"
    with pytest.raises(ValueError, match="edits the control tokens that a message contains as text"):
        chat.encode(ask("q", "a.<|end|>"))


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ("hello", "messages must be a list"),
        (["hello"], "messages[0] must be an object with role and content"),
        ([{"role": "user"}], "messages[0] must be an object with role and content"),
        ([{"role": "user", "content": "q"}], "needs an assistant turn"),
        ([{"role": "assistant", "content": "a"}], "with a turn before it"),
        ([{"role": "robot", "content": "q"}], "messages[0].role='robot' is unknown; use system, developer, user, assistant, tool, ipython"),
        (ask("q", None), "messages[1].content must be text, not NoneType"),  # pyright: ignore[reportArgumentType]
        (ask("q", "a\ud800"), r"messages[1].content has a lone surrogate, '\ud800', at character 1"),
    ],
)
def test_a_bad_conversation_is_an_error(messages, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        CHATS["tulu"].encode(messages)


def test_a_row_is_messages_or_a_pair_or_tokens():
    chat = CHATS["tulu"]
    for row in (
        {"messages": ask("q", "a"), "tokens": [1]},
        {"prompt": "q", "response": "a"},
        {"messages": None, "prompt": "q", "response": "a"},
    ):
        tokens, mask = chat.encode_row(row)
        assert (tokens.tolist(), mask.tolist()) == tuple(part.tolist() for part in chat.encode(ask("q", "a")))
    for row, mask in (({"tokens": [5, 6, 7]}, [1, 1]), ({"tokens": [5, 6, 7], "mask": [0, 1]}, [0, 1])):
        assert [part.tolist() for part in chat.encode_row(row)] == [[5, 6, 7], mask]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "this one has nothing"),
        ({"question": "q", "answer": "a", "prompt": None}, "this one has answer, question"),
        ({"prompt": "q", "response": 4}, "response must be text, not int"),
        ({"prompt": "q\udfff", "response": ""}, "prompt has a lone surrogate"),
        ({"tokens": []}, "tokens must be a list of integers from 0 to 261"),
        ({"tokens": [1, 262]}, "tokens must be"),
        ({"tokens": [1, -1]}, "tokens must be"),
        ({"tokens": [1.0, 2.0]}, "tokens must be"),
        ({"tokens": [[1, 2], [3]]}, "tokens must be"),
        ({"tokens": [1]}, "no token would be trained"),
        ({"tokens": [1, 2], "mask": [1, 1]}, "mask has 2 values for 2 tokens"),
        ({"tokens": [1, 2], "mask": [2]}, "mask must be a list of integers from 0 to 1"),
        ({"tokens": [1, 2, 3], "mask": [0, 0]}, "no token would be trained"),
    ],
)
def test_a_bad_row_is_an_error(row, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        CHATS["tulu"].encode_row(row)


def test_without_a_template_a_pair_is_plain_text():
    tokenizer = word_tokenizer([])
    chat = ChatTemplate(tokenizer)
    tokens, mask = chat.encode_row({"prompt": "Q: </s>", "response": " A"})
    assert tokenizer.decode(tokens) == "Q: </s> A</s>"
    assert tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens[1:][mask == 1]) == " A</s>"
    with pytest.raises(ValueError, match="chat template is missing; set chat_template to tulu, chatml or Jinja source"):
        chat.encode_row({"messages": ask("q", "a")})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert chat.encode_row({"prompt": "Q", "response": "A"})[0].tolist()[:2] == [bos, *chat.encode_row({"tokens": tokens[:2]})[0][:1]]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an eos token"):
        chat.encode_row({"prompt": "Q", "response": "A"})

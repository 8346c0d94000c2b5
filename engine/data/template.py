"""Tokenize conversations with a chat template and a loss mask. Message content is never encoded as control tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant")

TULU = (
    r"{% for message in messages %}"
    r"{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    r"{{ eos_token if message['role'] == 'assistant' else '' }}"
    r"{{ '' if loop.last and message['role'] == 'assistant' else '\n' }}"
    r"{% endfor %}"
    r"{{ '<|assistant|>\n' if add_generation_prompt else '' }}"
)
CHATML = (
    r"{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    r"{% endfor %}"
    r"{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
BUILT_IN = {"tulu": TULU, "chatml": CHATML}

# Test conversation for templates: leading and trailing white space, digits, several scripts, no special tokens.
_PROBE = [
    {"role": "user", "content": "  Add 12 and 3,\n\nplease: café, 你好 😀 \n"},
    {"role": "assistant", "content": " 12 + 3 = 15.\n\nDone. "},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are welcome."},
]
_SYSTEM = {"role": "system", "content": "Be brief."}


class ChatTemplate:
    """A tokenizer with a chat template, which converts conversations to tokens and loss masks.

    `template` is a name (tulu, chatml), Jinja source, or None for the tokenizer's own. Without any template, rows of prompt and response
    are still encoded, as plain text. Message content is always encoded as text; only the template produces control tokens.
    Raises ValueError if this cannot be guaranteed, or if the result would differ from tokenizer.apply_chat_template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.name, self.text = _resolve(tokenizer, template)
        probes = [_PROBE, [_SYSTEM, *_PROBE]] if self._takes_system() else [_PROBE]
        written = "".join(self._render(probe) for probe in probes) if self.text else ""
        self._control = {
            token.content: id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in written and not token.content.isspace())
        }
        self._never_text = {id: token for token, id in self._control.items() if token != tokenizer.unk_token}
        self._any_control = "|".join(re.escape(token) for token in sorted(self._control, key=len, reverse=True)) or "(?!)"
        self._encoder = _plain_encoder(tokenizer, list(self._control))
        for probe in probes if self.text else []:
            self._verify(probe)

    def encode(self, messages: Messages, given: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [L + 1] and mask uint8 [L] of a conversation; mask[t] belongs to tokens[t + 1].

        The mask is 1 for every assistant turn after the first `given` messages: its content and its end-of-turn token or, if the template
        has none, everything it renders for the turn. A token that starts in the prompt is never trained. Raises ValueError for an invalid
        conversation, and for a template that renders earlier turns differently when later ones are added.
        """
        turns, mark = self._protect(messages)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= given]
        if not answers or answers[0] == 0:
            raise ValueError("messages needs an assistant turn with a turn before it; otherwise there is no response to train on")
        text = self._render(turns)
        spans = [self._span(turns, i, text, mark) for i in answers]
        ids, starts = self._tokenize(text, mark)
        trained = np.zeros(len(ids), np.uint8)
        for start, end in spans:
            trained |= (starts >= start) & (starts < end)
        return _checked(np.array(ids, np.int32), trained[1:])

    def prompt(self, messages: Messages) -> np.ndarray:
        """Tokens int32 [L] of a conversation, ending in the template's generation prompt."""
        turns, mark = self._protect(messages)
        return np.array(self._tokenize(self._render(turns, add_generation_prompt=True), mark)[0], np.int32)

    def plain(self, text: str, continued: bool = False) -> np.ndarray:
        """Tokens int32 [L] of text without a template. Starts with bos if the tokenizer adds it, unless `continued`."""
        bos = self.tokenizer.bos_token_id
        # Not all tokenizers that have a bos token add it.
        adds_bos = not continued and self.tokenizer("")["input_ids"][:1] == [bos]
        return np.array([bos] * adds_bos + self._encode_text(text).ids, np.int32)

    def prompt_row(self, row: Mapping[str, Any]) -> np.ndarray:
        """Tokens int32 [L] of a row's prompt: `tokens`, `messages` (without a final assistant turn) or `prompt`, in this order.

        Raises ValueError, which names the row's keys, if it has none of these.
        """
        has = {key for key, value in row.items() if value is not None}
        if "tokens" in has:
            return given(row["tokens"], None, len(self.tokenizer))[0]
        if "messages" in has:
            messages = row["messages"]
            return self.prompt(messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages)
        if "prompt" in has:
            return self.prompt([{"role": "user", "content": _text(row["prompt"], "prompt")}])
        raise ValueError(f"a row needs tokens, messages or prompt; this one has {', '.join(sorted(has)) or 'nothing'}")

    def encode_row(self, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [L + 1] and mask uint8 [L] of a row with `messages`, `prompt` and `response`, or `tokens`, in this order.

        Prompt and response become a user and an assistant turn. Without a chat template, they are encoded separately as plain text,
        followed by eos, with the loss on response and eos. `tokens` are used unchanged, with an optional `mask` (default: all ones).
        Raises ValueError, which names the row's keys, if it has none of these.
        """
        has = {key for key, value in row.items() if value is not None}
        if "messages" in has:
            return self.encode(row["messages"])
        if {"prompt", "response"} <= has:
            prompt, response = _text(row["prompt"], "prompt"), _text(row["response"], "response")
            if not self.text:
                return self._encode_plain(prompt, response)
            return self.encode([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])
        if "tokens" in has:
            return _checked(*given(row["tokens"], row.get("mask"), len(self.tokenizer)))
        raise ValueError(f"a row needs messages, or prompt and response, or tokens; this one has {', '.join(sorted(has)) or 'nothing'}")

    def _protect(self, messages: Messages) -> tuple[list[dict[str, str]], str]:
        """The turns, with a mark before each text that equals a control token, and the mark: a character that none of them contains."""
        if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
            raise ValueError(f"messages must be a list of at least one message, not {messages!r:.40}")
        turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
        content = "".join(turn["content"] for turn in turns)
        mark = next(chr(point) for point in range(0xF0000, 0xFFFFE) if chr(point) not in content)  # a private-use plane
        return [turn | {"content": re.sub(f"(?={self._any_control})", mark, turn["content"])} for turn in turns], mark

    def _render(self, turns: Messages, add_generation_prompt: bool = False) -> str:
        if not self.text:
            raise ValueError(f"{self.name} is missing; give template= one of {', '.join(BUILT_IN)} or Jinja source")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], chat_template=self.text, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name} cannot render the conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def _span(self, turns: Messages, i: int, text: str, mark: str) -> tuple[int, int]:
        """Start and end of the trained characters of turn i, in `text` without its marks."""
        prompt, upto = self._render(turns[:i], add_generation_prompt=True), self._render(turns[: i + 1])
        if not (text.startswith(upto) and upto.startswith(prompt)):
            raise ValueError(
                f"{self.name} renders messages[{i}] or an earlier one differently as the conversation grows, so the response cannot be "
                f"located; use a template that only appends, such as {' or '.join(BUILT_IN)}"
            )
        closed = re.search(rf"(?<!{mark})(?:{self._any_control})(?=\s*\Z)", upto[len(prompt) :])
        end = len(prompt) + closed.end() if closed else len(upto)
        return len(prompt.replace(mark, "")), len(upto[:end].replace(mark, ""))

    def _tokenize(self, text: str, mark: str) -> tuple[list[int], np.ndarray]:
        """Ids, and the index in `text` without its marks at which each starts. Control tokens are those without a mark before them."""
        ids, starts, at = [], [], 0
        for n, part in enumerate(re.split(f"(?<!{mark})({self._any_control})", text)):
            if n % 2:
                ids.append(self._control[part])
                starts.append(at)
            else:
                part = part.replace(mark, "")
                encoding = self._encode_text(part)
                ids += encoding.ids
                starts += [at + start for start, _ in encoding.offsets]
            at += len(part)
        return ids, np.array(starts, np.int64)

    def _encode_text(self, text: str) -> Encoding:
        encoding = self._encoder.encode(text, add_special_tokens=False)
        forged = self._never_text.keys() & set(encoding.ids)
        if forged:
            raise ValueError(
                f"the tokenizer encodes plain text as the control token {self._never_text[min(forged)]!r}; use another tokenizer"
            )
        return encoding

    def _encode_plain(self, prompt: str, response: str) -> tuple[np.ndarray, np.ndarray]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has neither a chat template nor an eos token; give template= or set tokenizer.eos_token")
        prompt_ids = self.plain(prompt).tolist()
        response_ids = [*self._encode_text(response).ids, eos]
        trained = np.repeat(np.array([0, 1], np.uint8), [len(prompt_ids), len(response_ids)])
        return _checked(np.array(prompt_ids + response_ids, np.int32), trained[1:])

    def _takes_system(self) -> bool:
        try:
            return bool(self._render([_SYSTEM, *_PROBE]))
        except ValueError:
            return False

    def _verify(self, probe: Messages) -> None:
        """Raise ValueError if tokenization changes when text is split at control tokens, or if there is no generation prompt."""
        for ours, turns, open_ended in ((self.encode(probe)[0], probe, False), (self.prompt(probe[:-1]), probe[:-1], True)):
            expected = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], chat_template=self.text, add_generation_prompt=open_ended, return_dict=False
            )
            if ours.tolist() != expected:
                raise ValueError(
                    f"{self.name}: the tokenizer encodes its text differently when cut at control tokens, so message content could not be "
                    "separated from them; use another template, or a tokenizer whose special tokens do not strip or join their neighbours"
                )
        header = self._render(probe)[len(self._render(probe[:-1], add_generation_prompt=True)) :]
        if not header.lstrip().startswith(probe[-1]["content"]):
            raise ValueError(f"{self.name} ignores add_generation_prompt, so a turn's header would be trained; it adds {header!r:.60}")


def _resolve(tokenizer: PreTrainedTokenizerFast, template: str | None) -> tuple[str, str]:
    """(name of the template for errors, its Jinja source or "")."""
    if template is None:
        return "the tokenizer's chat template", tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if template in BUILT_IN:
        if template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_added_vocab().keys():
            raise ValueError("template='chatml' needs the tokens <|im_start|> and <|im_end|>; add them to the tokenizer, or use tulu")
        return f"template {template!r}", BUILT_IN[template]
    if "{" not in template:
        raise ValueError(f"template={template!r} is unknown; use {', '.join(BUILT_IN)} or Jinja source")
    return f"the template {template!r:.40}", template


def _plain_encoder(tokenizer: PreTrainedTokenizerFast, control: list[str]) -> Tokenizer:
    """A copy that encodes control tokens as text. It has no post-processor, which would add tokens and trim white space from offsets."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    encoder.encode_special_tokens = True
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _turn(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{name} must be an object with role and content, not {message!r:.60}")
    if message["role"] not in ROLES:
        raise ValueError(f"{name}.role={message['role']!r} is unknown; use {', '.join(ROLES)}")
    return {"role": message["role"], "content": _text(message["content"], f"{name}.content")}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a lone surrogate, {value[error.start]!r}, at character {error.start}; remove it") from None
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
    """Append one masked token, so that the last token of the sequence becomes part of the model's input."""
    return np.append(tokens, tokens[-1]), np.append(mask, np.uint8(0))


def _integers(values: Any, name: str, below: int) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)  # ragged
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= below:
        raise ValueError(f"{name} must be a list of integers from 0 to {below - 1}, not {values!r:.60}")
    return array


def _checked(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not mask.any():
        raise ValueError("no token would be trained: the mask has no 1 (mask[t] belongs to tokens[t + 1]); remove the row")
    return tokens, mask

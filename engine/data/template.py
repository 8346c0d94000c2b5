"""Tokenize conversations with a chat template and a loss mask. Message content is never encoded as control tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from engine.data.messages import (
    SYSTEM_ROLES,
    TEXT_KEYS,
    TOOL_ROLES,
    Conversation,
    Messages,
    given,
    read_messages,
    read_tools,
    some_trained,
    text,
    texts,
    unused_character,
)
from engine.data.time_limit import time_limit

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

# Test conversations for templates: leading and trailing white space, digits, several scripts, no special tokens.
_ONE_TURN = [
    {"role": "user", "content": "  Add 12 and 3,\n\nplease: café, 你好 😀 \n"},
    {"role": "assistant", "content": "12 + 3 = 15.\n\nDone."},
]
_PROBE = [*_ONE_TURN, {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "You are welcome."}]
_BRIEF = "Be brief."
_SYSTEM = {"role": "system", "content": _BRIEF}
_DIFFERENTLY = "differently as the conversation grows"

BEFORE = "\U0010fffd"  # stands for a control token before a text, for tokenizers that treat the beginning of a text in another way
RENDER_SECONDS = 20.0


Tokens = tuple[list[int], list[int]]  # ids, and the index in the text at which each starts


class ChatTemplate:
    """A tokenizer with a chat template, which converts conversations to tokens and loss masks.

    `template` is a name (tulu, chatml), Jinja source, or None for the tokenizer's own. Without any template, rows of prompt and response
    are still encoded, as plain text. Message content is always encoded as text; only the template produces control tokens.

    `tokenizer` is a copy that has the template as its own. `closing` are the ids of the control tokens that close an assistant turn.

    Raises ValueError if message content cannot be kept apart from control tokens, or if the tokens would differ from those of
    tokenizer.apply_chat_template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None = None) -> None:
        self.name, self.text = _resolve(tokenizer, template)
        self.tokenizer = copy.copy(tokenizer)
        self.tokenizer.chat_template = self.text or None
        with time_limit(RENDER_SECONDS, f"{self.name} does not end on a short conversation"):
            probes = self._probes() if self.text else []
            self._dropped_roles = self._roles_without_text() if self.text else []
        written = "".join(self._render(probe) for probe in probes)
        self._control = {
            token.content: id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in written and not token.content.isspace())
        }
        self._never_text = {id: token for token, id in self._control.items() if token != tokenizer.unk_token}
        self._any_control = _any_of(self._control)
        # Without ordinary tokens that the template itself may look for in a message, such as </think>.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._forgeable = _any_of(token for token in self._control if token in special or token not in self.text)
        self._encoder = _plain_encoder(tokenizer, list(self._control))
        for probe in probes:
            self._verify(probe)
        closing = self._closing_tokens(probes)
        self.closing, self._any_closing = tuple(self._control[token] for token in closing), _any_of(closing)

    @property
    def warnings(self) -> list[str]:
        """Lines for the log of a run: that responses will not end, if no token closes a turn."""
        if not self.text or self.closing:
            return []
        return [
            f"warning: {self.name} closes an assistant turn with no control token, so a model trained with it does not learn to stop; "
            "use a template that ends assistant turns with eos_token"
        ]

    def encode(self, messages: Any, given: int = 0, tools: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [L + 1] and mask uint8 [L] of a conversation; mask[t] belongs to tokens[t + 1].

        The mask is 1 for every assistant turn after the first `given` messages, unless its `weight` is 0: its content and its end-of-turn
        token or, if the template has none, everything it renders for the turn. The tokens of a turn follow those of `prompt` of the
        messages before it, as in sampling. Raises ValueError for an invalid conversation, for keys that the template would drop, and for
        a template that renders earlier turns differently when later ones are added.
        """
        chat = self._read(messages, tools)
        answers = [i for i, turn in enumerate(chat.turns) if turn["role"] == "assistant" and i >= given]
        if not answers or answers[0] == 0:
            raise ValueError("messages needs an assistant turn with a turn before it; otherwise there is no response to train on")
        whole = self._render(chat.turns, chat.tools)
        spans = {i: self._span(chat, i, whole) for i in answers if chat.turns[i].get("weight", 1)}
        ids, starts = self._tokenize(whole, chat.mark, self._cuts(chat, whole, spans))
        trained = np.zeros(len(ids), np.uint8)
        for start, end in spans.values():
            trained |= (starts >= start) & (starts < end)
        return some_trained(np.array(ids, np.int32), trained[1:])

    def prompt(self, messages: Any, tools: Any = None) -> np.ndarray:
        """Tokens int32 [L] of a conversation, ending in the template's generation prompt."""
        chat = self._read(messages, tools)
        whole = self._render(chat.turns, chat.tools, open_ended=True)
        return np.array(self._tokenize(whole, chat.mark, self._cuts(chat, whole, {}))[0], np.int32)

    def plain(self, text: str, continued: bool = False) -> np.ndarray:
        """Tokens int32 [L] of text without a template. Starts with bos if the tokenizer adds it, unless `continued`."""
        bos = self.tokenizer.bos_token_id
        # Not all tokenizers that have a bos token add it.
        adds_bos = not continued and self.tokenizer("")["input_ids"][:1] == [bos]
        return np.array([bos] * adds_bos + self._encode_text(text)[0], np.int32)

    def prompt_row(self, row: Mapping[str, Any]) -> np.ndarray:
        """Tokens int32 [L] of a row's prompt: `tokens`, `messages` (without a final assistant turn) or `prompt`, in this order.

        Raises ValueError, which names the row's keys, if it has none of these.
        """
        has = _keys(row)
        if "tokens" in has:
            return given(row["tokens"], None, len(self.tokenizer))[0]
        if "messages" in has:
            messages = read_messages(row["messages"])
            return self.prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages, row.get("tools"))
        if "prompt" in has:
            return self.prompt([{"role": "user", "content": text(row["prompt"], "prompt")}], row.get("tools"))
        raise ValueError(f"a row needs tokens, messages or prompt; this one has {', '.join(sorted(has)) or 'nothing'}")

    def encode_row(self, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [L + 1] and mask uint8 [L] of a row with `messages`, `prompt` and `response`, or `tokens`, in this order.

        Prompt and response become a user and an assistant turn. Without a chat template, they are encoded separately as plain text,
        followed by eos, with the loss on response and eos. `tokens` are used unchanged, with an optional `mask` (default: all ones).
        Raises ValueError, which names the row's keys, if it has none of these.
        """
        has = _keys(row)
        if "messages" in has:
            return self.encode(row["messages"], tools=row.get("tools"))
        if {"prompt", "response"} <= has:
            prompt, response = text(row["prompt"], "prompt"), text(row["response"], "response")
            if not self.text:
                return self._encode_plain(prompt, response)
            return self.encode([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], tools=row.get("tools"))
        if "tokens" in has:
            return some_trained(*given(row["tokens"], row.get("mask"), len(self.tokenizer)))
        raise ValueError(f"a row needs messages, or prompt and response, or tokens; this one has {', '.join(sorted(has)) or 'nothing'}")

    def _read(self, messages: Any, tools: Any) -> Conversation:
        """The conversation, with marks before texts that equal a control token. Raises ValueError for what the template would drop."""
        turns, tools = read_messages(messages), read_tools(tools)
        for i, turn in enumerate(turns):
            for key in (key for key in TEXT_KEYS if turn.get(key) and key not in self.text):
                raise ValueError(f"{self.name} does not render messages[{i}].{key}; remove it, or use a template that does")
            if turn["role"] in self._dropped_roles:
                raise ValueError(f"{self.name} does not render messages[{i}], whose role is {turn['role']}; remove it")
        if tools and "tools" not in self.text:
            raise ValueError(f"{self.name} does not render tools; remove them, or use a template that does")
        return self._protect(Conversation(turns, tools, unused_character([turns, tools, self.text])))

    def _protect(self, chat: Conversation) -> Conversation:
        if not any(self._any_control.search(each) for each in texts([chat.turns, chat.tools])):
            return chat
        plain = self._render(chat.turns, chat.tools)
        for control in (self._any_control, self._forgeable):
            protected = chat.protected(control)
            if protected.unmarked(self._render(protected.turns, protected.tools)) == plain:
                return protected
        raise ValueError(f"{self.name} edits the control tokens that a message contains as text; remove them from the messages")

    def _render(self, turns: Messages, tools: Any = None, *, open_ended: bool = False) -> str:
        if not self.text:
            raise ValueError(f"{self.name} is missing; set chat_template to {', '.join(BUILT_IN)} or Jinja source")
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], tools, tokenize=False, add_generation_prompt=open_ended
            )
        except TimeoutError:
            raise
        except Exception as error:  # a template can raise anything
            raise ValueError(f"{self.name} cannot render the conversation: {str(error) or type(error).__name__}") from error
        assert isinstance(rendered, str)
        return rendered

    def _turn_texts(self, turns: Messages, tools: Any, i: int, whole: str) -> tuple[str, str]:
        """The beginning of `whole` up to turn i, generation prompt included, and that up to its end."""
        prompt, upto = self._render(turns[:i], tools, open_ended=True), self._render(turns[: i + 1], tools)
        if not (whole.startswith(upto) and upto.startswith(prompt)):
            raise ValueError(
                f"{self.name} renders messages[{i}] or an earlier one {_DIFFERENTLY}, so the response cannot be "
                f"located; use a template that only appends, such as {' or '.join(BUILT_IN)}"
            )
        return prompt, upto

    def _span(self, chat: Conversation, i: int, whole: str) -> tuple[int, int]:
        """Start and end of the trained characters of turn i, in `whole` without its marks."""
        prompt, upto = self._turn_texts(chat.turns, chat.tools, i, whole)
        closed = self._closed(upto[len(prompt) :], chat.mark, self._any_closing)
        end = len(prompt) + closed.end() if closed else len(upto)
        return len(chat.unmarked(prompt)), len(chat.unmarked(upto[:end]))

    def _cuts(self, chat: Conversation, whole: str, spans: Mapping[int, tuple[int, int]]) -> list[int]:
        """Where assistant turns start in `whole` without its marks: as in `spans`, or else where the template only appended since."""
        cuts = []
        for i in chat.answers:
            if i in spans:
                cuts.append(spans[i][0])
            elif whole.startswith(prompt := self._render(chat.turns[:i], chat.tools, open_ended=True)):
                cuts.append(len(chat.unmarked(prompt)))
        return cuts

    def _closed(self, turn: str, mark: str, closing: re.Pattern[str]) -> re.Match[str] | None:
        """The first of the tokens `closing` among the control tokens and blanks at the end of what is rendered for an assistant turn."""
        control = rf"(?<!{mark})(?:{self._any_control.pattern})"
        return re.search(rf"(?<!{mark})(?:{closing.pattern})(?=(?:\s|{control})*\Z)", turn)

    def _tokenize(self, whole: str, mark: str, cuts: Sequence[int] = ()) -> tuple[list[int], np.ndarray]:
        """Ids, and the index in `whole` without its marks at which each starts. Control tokens are those without a mark before them.

        `cuts`: ends of generation prompts. No token lies on both sides of one, and up to it the ids are those of that prompt alone.
        """
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for n, part in enumerate(re.split(f"(?<!{mark})({self._any_control.pattern})", whole)):
            if n % 2:
                ids.append(self._control[part])
                starts.append(at)
            else:
                part = part.replace(mark, "")
                for begin, piece in self._pieces(part, [cut - at for cut in cuts if at < cut < at + len(part)], follows=at > 0):
                    ids += piece[0]
                    starts += [at + begin + start for start in piece[1]]
            at += len(part)
        return ids, np.array(starts, np.int64)

    def _pieces(self, part: str, cuts: list[int], *, follows: bool) -> list[tuple[int, Tokens]]:
        """`part` encoded in pieces, each with its index: cut where the ids before a cut depend on the text after it."""
        pieces, begin = [], 0
        last = None if cuts else self._encode_text(part, follows=follows)
        for cut, after in pairwise([*cuts, len(part)]):
            head, last = (self._encode_text(part[begin:end], follows=follows or begin > 0) for end in (cut, after))
            if last[0][: len(head[0])] != head[0]:
                pieces.append((begin, head))
                begin, last = cut, None
        pieces.append((begin, last or self._encode_text(part[begin:], follows=follows or begin > 0)))
        if begin:
            joined = self._encoder.decode([id for _, (ids, _) in pieces for id in ids], skip_special_tokens=False)
            if joined != self._encoder.decode(self._encode_text(part, follows=follows)[0], skip_special_tokens=False):
                raise ValueError(
                    f"{self.name} ends its generation prompt in {part[:begin][-20:]!r}, from which this tokenizer cannot continue; "
                    "end it in a control token or a newline"
                )
        return pieces

    def _encode_text(self, text: str, *, follows: bool = False) -> Tokens:
        """Ids of `text` without control tokens, and where each starts. `follows`: as after a control token."""
        encoding = self._encoder.encode(BEFORE * follows + text, add_special_tokens=False)
        first = int(follows)
        ids, starts = encoding.ids[first:], [start - first for start, _ in encoding.offsets[first:]]
        if forged := self._never_text.keys() & set(ids):
            raise ValueError(
                f"the tokenizer encodes plain text as the control token {self._never_text[min(forged)]!r}; use another tokenizer"
            )
        return ids, starts

    def _encode_plain(self, prompt: str, response: str) -> tuple[np.ndarray, np.ndarray]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has neither a chat template nor an eos token; set chat_template or tokenizer.eos_token")
        prompt_ids = self.plain(prompt).tolist()
        response_ids = [*self._encode_text(response)[0], eos]
        trained = np.repeat(np.array([0, 1], np.uint8), [len(prompt_ids), len(response_ids)])
        return some_trained(np.array(prompt_ids + response_ids, np.int32), trained[1:])

    def _probes(self) -> list[list[dict[str, Any]]]:
        """Test conversations that the template renders: of two turns, or of one if it renders earlier turns differently."""
        turns = _PROBE
        try:
            self._turn_texts(_PROBE, None, 1, self._render(_PROBE))
        except ValueError as error:
            turns = _PROBE[:2] if _DIFFERENTLY in str(error) else _PROBE
        try:
            return [turns, [_SYSTEM, *turns]] if self._render([_SYSTEM, *turns]) else [turns]
        except ValueError:
            return [turns]

    def _roles_without_text(self) -> list[str]:
        """Roles that the template accepts, but whose messages it drops."""
        dropped = []
        for role in SYSTEM_ROLES + TOOL_ROLES:
            message = {"role": role, "content": _BRIEF}
            turns = [*_PROBE[:2], message, *_PROBE[2:]] if role in TOOL_ROLES else [message, *_PROBE]
            try:
                if _BRIEF not in self._render(turns):
                    dropped.append(role)
            except ValueError:  # the template refuses such messages itself
                continue
        return dropped

    def _verify(self, probe: Messages) -> None:
        """Raise ValueError if tokenization changes when text is split at control tokens, or if there is no generation prompt."""
        for turns, open_ended in ((probe, False), (probe[:-1], True)):
            ours, _ = self._tokenize(self._render(turns, open_ended=open_ended), unused_character(self._render(turns)))
            whole = self.tokenizer.apply_chat_template([dict(turn) for turn in turns], add_generation_prompt=open_ended, return_dict=False)
            if ours != whole:
                raise ValueError(
                    f"{self.name}: the tokenizer encodes its text differently when cut at control tokens, so message content could not be "
                    "separated from them; use another template, or a tokenizer whose special tokens do not strip or join their neighbours"
                )
        prompt, upto = self._turn_texts(probe, None, len(probe) - 1, self._render(probe))
        header = upto[len(prompt) :]
        if prompt == self._render(probe[:-1]) and not header.lstrip().startswith(probe[-1]["content"]):
            raise ValueError(f"{self.name} ignores add_generation_prompt, so a turn's header would be trained; it adds {header!r:.60}")

    def _closing_tokens(self, probes: Sequence[Messages]) -> list[str]:
        """The first control token after the content of an assistant turn, if nothing but control tokens and blanks follows."""
        closing = []
        for probe in probes:
            whole, mark = self._render(probe), unused_character(self._render(probe))
            for i in (i for i, turn in enumerate(probe) if turn["role"] == "assistant"):
                prompt, upto = self._turn_texts(probe, None, i, whole)
                if closed := self._closed(upto[len(prompt) :], mark, self._any_control):
                    closing.append(closed[0])
        return list(dict.fromkeys(closing))


def _resolve(tokenizer: PreTrainedTokenizerFast, template: str | None) -> tuple[str, str]:
    """(name of the template for errors, its Jinja source or "")."""
    if template is None:
        return "the tokenizer's chat template", tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if template in BUILT_IN:
        if template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_added_vocab().keys():
            raise ValueError("chat_template='chatml' needs the tokens <|im_start|> and <|im_end|>; add them to the tokenizer, or use tulu")
        return f"template {template!r}", BUILT_IN[template]
    if "{" not in template:
        raise ValueError(f"chat_template={template!r} is unknown; use {', '.join(BUILT_IN)} or Jinja source")
    return f"the template {template!r:.40}", template


def _plain_encoder(tokenizer: PreTrainedTokenizerFast, control: list[str]) -> Tokenizer:
    """A copy that encodes control tokens as text. It has no post-processor, which would add tokens and trim white space from offsets."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    encoder.add_tokens([AddedToken(BEFORE, normalized=False)])
    encoder.encode_special_tokens = True
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of `tokens`; nothing if there are none."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def _keys(row: Mapping[str, Any]) -> set[str]:
    """The keys of a row with a value. Raises ValueError for settings of the template, which rows cannot change."""
    if row.get("chat_template_kwargs"):
        raise ValueError("chat_template_kwargs of a row are not supported; write them into the chat template")
    return {key for key, value in row.items() if value is not None}

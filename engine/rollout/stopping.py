"""Stop strings: texts that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class StopStrings:
    """Ends a response as soon as its text contains one of `strings`. Depends only on its tokens, so all ranks agree."""

    tokenizer: PreTrainedTokenizerFast
    strings: tuple[str, ...]

    def __call__(self, tokens: list[int]) -> bool:
        """Whether the text of `tokens` contains one, given that it did not without the last token."""
        reach = max((len(string.encode()) for string in self.strings), default=0)  # a token is at least one byte of a string
        text = self._text(tokens[-reach - 1 :]) if reach else ""
        return any(string in text for string in self.strings)

    def before(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` without special tokens, up to the first of the strings."""
        text = self._text(tokens)
        return text[: min((text.find(string) for string in self.strings if string in text), default=len(text))]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

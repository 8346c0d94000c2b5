"""Responses by transformers, until the engine's own sampler takes this file's place behind the same `generate`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from engine.world import World

Tokens = list[int]


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn: `n` for each prompt, greedily where `temperature` is 0, each until a stop string, eos or `max_tokens`."""

    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.n < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_tokens={self.max_tokens}, samples={self.n}, temperature={self.temperature} and top_p={self.top_p}: "
                "they must be at least 1, 1 and 0, and top_p in (0, 1]"
            )


class Response(NamedTuple):
    """A response without what stopped it. `finish` is "stop", or "length" where max_tokens did."""

    text: str
    tokens: int
    finish: str


@dataclass
class _Row:
    prompt: Tokens
    uniform: np.ndarray  # float32 [max_tokens]: the draw of each token, a function of (seed, prompt, sample, position)
    ids: list[int] = field(default_factory=list)
    response: Response | None = None


class Transformers:
    """A causal language model in a Hugging Face folder, on this rank's device. `batch_tokens` bounds rows x length of its KV cache."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, world: World, dtype: torch.dtype, batch_tokens: int):
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(world.device).eval()  # type: ignore[arg-type]
        self.tokenizer, self.device, self.batch_tokens = tokenizer, world.device, batch_tokens
        self.context = self.model.config.max_position_embeddings
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Tokens], names: Sequence[int], decoding: Decoding, seed: int) -> list[list[Response]]:
        """`n` responses to each prompt, in order.

        Draws are a function of (seed, name of the prompt, sample, position): neither the batch nor the rank that a prompt falls into
        changes them. Raises ValueError for a prompt that leaves no room for `max_tokens` in the model's context.
        """
        rows = [
            _Row(prompt, np.random.default_rng([seed, name, sample]).random(decoding.max_tokens, np.float32))
            for prompt, name in zip(prompts, names, strict=True)
            for sample in range(decoding.n)
        ]
        self._check(prompts, decoding.max_tokens)
        prefix = _common(prompts)
        cache = self._prefill(prefix)
        for batch in _batches(rows, decoding.max_tokens, self.batch_tokens):
            self._decode(batch, len(prefix), copy.deepcopy(cache), decoding)
        done = [row.response for row in rows if row.response is not None]
        return [done[i : i + decoding.n] for i in range(0, len(rows), decoding.n)]

    def _check(self, prompts: Sequence[Tokens], max_tokens: int) -> None:
        longest = max(map(len, prompts), default=0)
        if longest + max_tokens > self.context:
            raise ValueError(
                f"a prompt of {longest} tokens and max_tokens={max_tokens} exceed the model's context of {self.context}; lower max_tokens"
            )

    def _prefill(self, prefix: Tokens) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        if prefix:
            self.model(torch.tensor([prefix], device=self.device), past_key_values=cache, logits_to_keep=1)
        return cache

    def _decode(self, rows: list[_Row], shared: int, cache: DynamicCache, decoding: Decoding) -> None:
        """Answer all rows; `cache` holds the first `shared` tokens, which all of them begin with."""
        if shared:
            cache.batch_repeat_interleave(len(rows))
        ids, mask = self._padded([row.prompt[shared:] for row in rows])
        mask = torch.cat([mask.new_ones(len(rows), shared), mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        for position in range(decoding.max_tokens):
            out = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            uniform = torch.tensor([float(row.uniform[position]) for row in rows], device=self.device)
            drawn = _draw(out.logits[:, -1].float(), uniform, decoding)
            for row, token in zip(rows, drawn.tolist(), strict=True):
                if row.response is None:
                    self._take(row, token, decoding)
            live = [i for i, row in enumerate(rows) if row.response is None]
            if not live:
                return
            if 2 * len(live) <= len(rows):  # moving the cache costs about a step: not for every row that ends
                rows, drawn, mask, positions = [rows[i] for i in live], drawn[live], mask[live], positions[live]
                cache.batch_select_indices(torch.tensor(live, device=self.device))
            ids, mask, positions = drawn[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], 1), positions[:, -1:] + 1

    def _padded(self, prompts: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [rows, longest], padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        return ids, mask

    def _take(self, row: _Row, token: int, decoding: Decoding) -> None:
        if token in self.ends:
            row.response = Response(self._text(row.ids), len(row.ids), "stop")
            return
        row.ids.append(token)
        reach = max((len(stop.encode()) for stop in decoding.stop), default=0)  # a token is at least one byte of a stop string
        if any(stop in self._text(row.ids[-reach - 1 :]) for stop in decoding.stop):
            row.response = Response(before_stop(self._text(row.ids), decoding.stop), len(row.ids), "stop")
        elif len(row.ids) == decoding.max_tokens:
            row.response = Response(self._text(row.ids), len(row.ids), "length")

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def before_stop(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of the stop strings."""
    return text[: min((text.find(each) for each in stop if each in text), default=len(text))]


def _draw(logits: Tensor, uniform: Tensor, decoding: Decoding) -> Tensor:
    """A token for each row of `logits` [rows, vocabulary]: the place of `uniform` [rows] in the distribution, likeliest tokens first."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / decoding.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    sums = probs.cumsum(-1)
    kept = (sums - probs < decoding.top_p).sum(-1, keepdim=True)  # the fewest tokens that together reach top_p
    place = torch.searchsorted(sums, uniform[:, None] * sums.gather(-1, kept - 1), right=True)
    return order.gather(-1, place.minimum(kept - 1))[:, 0]


def _common(prompts: Sequence[Tokens]) -> Tokens:
    """The tokens that all prompts begin with, less the last of any of them: examples are prefilled once for all questions."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)  # what these two share, all share
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: min(next(differ, len(first)), *(len(prompt) - 1 for prompt in prompts))]


def _batches(rows: Sequence[_Row], max_tokens: int, batch_tokens: int) -> Iterator[list[_Row]]:
    """Rows of like length together, the longest first: what does not fit into memory shows at once."""
    waiting = sorted(rows, key=lambda row: -len(row.prompt))
    while waiting:
        count = max(1, batch_tokens // (len(waiting[0].prompt) + max_tokens))
        yield waiting[:count]
        waiting = waiting[count:]

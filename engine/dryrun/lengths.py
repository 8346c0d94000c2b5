"""Sequence lengths of one step: sampled from the distributions below, or from given lengths. The data itself is not read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.algorithms.workload import Generation, Workload

BYTES_A_TOKEN = 4.3  # English text in Llama 3's vocabulary; assumed where a dataset card gives bytes


@dataclass(frozen=True)
class LogNormal:
    """Log-normal distribution of token counts: its mean, and the standard deviation of its logarithm."""

    mean: float
    sigma: float

    def draw(self, count: int, most: int, generator: np.random.Generator) -> np.ndarray:
        """Sample lengths, int64 [count], clipped to 1 ... `most`."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return np.clip(generator.lognormal(mu, self.sigma, count).round(), 1, most).astype(np.int64)

    def __str__(self) -> str:
        return f"log-normal, mean {self.mean:g}, sigma {self.sigma:g}"


CONVERSATION = LogNormal(700, 0.9)  # tulu-3-sft-mixture: 2,914 MB in 939,343 rows
# One response of a preference pair: tulu-3-405b-preference-mixture, 3,319 MB in 360,924 rows, which store the prompt three times.
HALF = LogNormal(950, 0.7)
PROMPT = LogNormal(450, 0.5)  # between a MATH problem alone (150 tokens) and a GSM8K problem with eight examples (750)
RESPONSE = LogNormal(400, 0.6)  # approximately Tülu 3's responses to MATH


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of one step, over all ranks."""

    lengths_N: np.ndarray  # int64, predicted tokens: one less than the length of the sequence
    group_N: np.ndarray  # int64; equal for the two sequences of a pair, -1: no group
    prompt_N: np.ndarray  # int64, prompt tokens of rollouts; empty for other workloads
    source: str  # description of where the lengths come from

    @property
    def response_N(self) -> np.ndarray:
        """Sampled tokens of each response, int64 [N]."""
        return self.lengths_N + 1 - self.prompt_N

    @property
    def answered(self) -> float:
        """Share of predicted tokens that are trained on; 1 if unknown."""
        return float(self.response_N.sum() / self.lengths_N.sum()) if len(self.prompt_N) else 1.0


def sample_lengths(workload: Workload, seed: int = 0, given: Sequence[tuple[int, int]] = ()) -> Sequences:
    """Sequences of one step, from `given` (prompt tokens, response tokens), by default from this module's distributions."""
    generator = np.random.default_rng(seed)
    if workload.generation is not None:
        return _rollouts(workload.generation, workload.sequences, generator, given)
    assumed = CONVERSATION if workload.lengths == "conversation" else HALF
    texts = _texts(workload.sequences, assumed, workload.max_length, generator, given)
    if workload.sequences_per_sample == 1:
        return texts
    return replace(texts, group_N=np.arange(workload.sequences) // workload.sequences_per_sample, source=f"halves of pairs: {texts.source}")


def _texts(count: int, spread: LogNormal, most: int, generator: np.random.Generator, given: Sequence[tuple[int, int]]) -> Sequences:
    lengths = np.minimum(_given(given, count, generator).sum(1), most) if len(given) else spread.draw(count, most, generator)
    return Sequences(lengths, np.full(count, -1), np.empty(0, np.int64), f"{_source(given, spread)}, at most {most} tokens")


def _rollouts(generation: Generation, count: int, generator: np.random.Generator, given: Sequence[tuple[int, int]]) -> Sequences:
    samples, most = generation.samples_per_prompt, np.array([generation.max_prompt_tokens, generation.max_response_tokens])
    if len(given):
        pairs = np.clip(_given(given, count, generator), 1, most)
        prompts, responses = np.repeat(pairs[::samples, 0], samples), pairs[:, 1]
    else:
        prompts = np.repeat(PROMPT.draw(count // samples, int(most[0]), generator), samples)
        responses = RESPONSE.draw(count, int(most[1]), generator)
    source = f"prompts {_source(given, PROMPT)}, at most {most[0]} tokens; responses {_source(given, RESPONSE)}, at most {most[1]}"
    return Sequences(prompts + responses - 1, np.full(count, -1), prompts, source)


def _source(given: Sequence[tuple[int, int]], spread: LogNormal) -> str:
    return f"from {len(given)} given rows" if len(given) else str(spread)


def _given(given: Sequence[tuple[int, int]], count: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [count, 2] in random order; no row is used again before all have been used."""
    order = np.concatenate([generator.permutation(len(given)) for _ in range(-(-count // len(given)))])[:count]
    return np.array(given, dtype=np.int64)[order]


def read(path: str) -> list[tuple[int, int]]:
    """Read a .jsonl file with rows {"prompt": tokens, "response": tokens}. Raises ValueError naming the line for any other row."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--lengths {path}: {error.strerror}; give a .jsonl file") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            pair = (int(row["prompt"]), int(row["response"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            pair = (-1, -1)
        if min(pair) < 0 or sum(pair) < 1:
            raise ValueError(f'--lengths {path}:{number}: a row must be {{"prompt": tokens, "response": tokens}}, such as {_EXAMPLE}')
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"--lengths {path} has no rows; give {_EXAMPLE}")
    return pairs


_EXAMPLE = '{"prompt": 450, "response": 400}'

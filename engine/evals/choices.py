"""Log-probabilities of given continuations, for multiple-choice questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.megatron.policy import Policy
from engine.rollout.scoring import score_samples
from engine.types import Sample


def choose(policy: Policy, prompts: Sequence[np.ndarray], choices: Sequence[Sequence[np.ndarray]], budget: int) -> list[list[float]]:
    """Compute the log-prob (natural logarithm) of each choice, int32 [C], as continuation of its prompt, int32 [L].

    Returns the result on rank 0 and an empty list on the other ranks. All ranks must call it. `budget`: tokens per microbatch.
    """
    pairs = [(prompt, choice) for prompt, each in zip(prompts, choices, strict=True) for choice in each]
    logprobs = [
        values for _, block in score_samples(policy, policy.logprobs, (_sample(*pair) for pair in pairs), budget) for values in block
    ]
    sums = [float(values[-len(choice) :].sum()) for values, (_, choice) in zip(logprobs, pairs, strict=False)]
    remaining = iter(sums)
    return [[next(remaining) for _ in each] for each in choices] if sums else []


def _sample(prompt: np.ndarray, choice: np.ndarray) -> Sample:
    tokens = np.concatenate([prompt, choice])
    return Sample(tokens, np.ones(len(tokens) - 1, np.uint8))

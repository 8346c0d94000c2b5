"""PPO with verifiable rewards, implemented from the papers in float64 with loops: the reference for advantages.py and losses.py.

arXiv 2411.15124, section 6 (rewards, KL in the reward, score on the last token); arXiv 1506.02438, equation 16 (GAE); arXiv 1707.06347,
equation 7 (the clip). A response is a dict of lists: mask, reward, old_logprob, ref_logprob, value, and for losses logprob, new_value.
"""

from __future__ import annotations

import math
from typing import Any

Response = dict[str, Any]


def tokens(response: Response) -> list[int]:
    """Positions of the response's tokens."""
    return [t for t, counts in enumerate(response["mask"]) if counts]


def kl(response: Response, t: int, kind: str) -> float:
    ratio = response["old_logprob"][t] - response["ref_logprob"][t]
    return {"k1": ratio, "k2": ratio**2 / 2, "k3": math.exp(-ratio) - 1 + ratio}[kind]


def advantages(responses: list[Response], beta: float, kind: str, gamma: float, lam: float) -> list[dict[int, float]]:
    """Advantages of each token of each response, not whitened."""
    results = []
    for response in responses:
        places, of, following, value_next = tokens(response), {}, 0.0, 0.0
        for t in reversed(places):
            reward = -beta * kl(response, t, kind) + (response["reward"] if t == places[-1] else 0.0)
            delta = reward + gamma * value_next - response["value"][t]
            following = delta + gamma * lam * following
            of[t], value_next = following, response["value"][t]
        results.append(of)
    return results


def whitened(of: list[dict[int, float]], parts: int) -> list[dict[int, float]]:
    """Scaled to mean 0 and variance 1 over all tokens of each of `parts` equal parts of the responses (the first ones may be larger)."""
    results: list[dict[int, float]] = []
    small, larger = divmod(len(of), parts)
    for part in range(parts):
        mine = of[len(results) : len(results) + small + (part < larger)]
        flat = [a for each in mine for a in each.values()]
        mean = sum(flat) / len(flat)
        variance = sum((a - mean) ** 2 for a in flat) / (len(flat) - 1)
        results += [{t: (a - mean) / math.sqrt(variance + 1e-8) for t, a in each.items()} for each in mine]
    return results


def mean_over(responses: list[Response], average: str, of: Any) -> float:
    """The mean of `of(response, t)` over all tokens, or over each response's tokens and then over responses."""
    sums = [(sum(of(r, t) for t in tokens(r)), len(tokens(r))) for r in responses]
    if average == "token":
        return sum(s for s, _ in sums) / sum(n for _, n in sums)
    return sum(s / n for s, n in sums) / len(sums)


def policy_loss(r: Response, t: int, clip_low: float, clip_high: float) -> float:
    ratio, a = math.exp(r["logprob"][t] - r["old_logprob"][t]), r["advantage"][t]
    return max(-a * ratio, -a * min(max(ratio, 1 - clip_low), 1 + clip_high))


def policy_slope(r: Response, t: int, clip_low: float, clip_high: float) -> float:
    """The derivative of policy_loss by logprob: 0 if clipping applies."""
    ratio, a = math.exp(r["logprob"][t] - r["old_logprob"][t]), r["advantage"][t]
    free = -a * ratio >= -a * min(max(ratio, 1 - clip_low), 1 + clip_high)
    return -a * ratio if free else 0.0


def clipped(r: Response, t: int, clip_low: float, clip_high: float) -> float:
    return float(policy_slope(r, t, clip_low, clip_high) == 0.0)


def value_loss(r: Response, t: int, clip: float) -> float:
    new, old, target = r["new_value"][t], r["value"][t], r["returns"][t]
    return 0.5 * max((new - target) ** 2, (min(max(new, old - clip), old + clip) - target) ** 2)


def value_slope(r: Response, t: int, clip: float) -> float:
    new, old, target = r["new_value"][t], r["value"][t], r["returns"][t]
    kept = min(max(new, old - clip), old + clip)
    return new - target if kept == new or (new - target) ** 2 >= (kept - target) ** 2 else 0.0


def importance(r: Response, t: int, most: float) -> float:
    """The probability of the token under the policy before the update over that under the sampling policy, at most `most`."""
    return min(math.exp(r["old_logprob"][t] - float(r["sampler"][t])), most)

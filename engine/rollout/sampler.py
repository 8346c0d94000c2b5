"""The sampler: continuous batching on the policy's own weights. No second copy of the model, nothing to keep in step with it."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import get_args

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from engine.megatron.decode import Drawing
from engine.megatron.graphs import Setting
from engine.megatron.policy import Policy
from engine.rollout.scheduler import Request, Slots, stream
from engine.rollout.stopping import Until
from engine.types import Prompt


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. temperature 0 takes the likeliest token; a response ends with a stop token, or the last token of a stop
    string, which it contains."""

    max_tokens: int
    stop: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    until: Until | None = None  # stop strings

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature}, top_k={self.top_k} must not be negative, top_p={self.top_p} be in (0, 1]")


@dataclass(frozen=True)
class Slotting:
    """Memory, pace and place of generation; of these, responses depend on `lag` alone."""

    slots: int = 64  # sequences under way at once on each replica; fewer where cache_gb does not hold them
    cache_gb: float = 16.0  # keys and values of one rank, in 2**30 bytes
    prefill: int = 8192  # prompt tokens that one forward takes in at most, but for a single longer prompt
    gpus: int = 0  # ranks, the last of the world, that only generate; 0: those that train generate too
    lag: int = 0  # 1: while a step is learned the next is drawn, by the weights before it; needs gpus
    max_weight: float = 2.0  # with lag=1: the most that a token's loss is multiplied by to make up for that
    share: bool = False  # compute and hold what all prompts begin with once: for many questions behind the same examples
    # CUDA graphs for decoding; not with `share`. auto: on GPUs, if the first graph's results equal eager execution. on: fail if they do not
    # (on CPU, "on" only pads rows as graphs do).
    graphs: Setting = "auto"

    def __post_init__(self) -> None:
        if self.slots < 1 or self.cache_gb <= 0 or self.prefill < 1:
            raise ValueError(f"slots={self.slots}, cache_gb={self.cache_gb} and prefill={self.prefill} must be positive")
        if self.gpus < 0 or self.max_weight <= 0:
            raise ValueError(f"rollout.gpus={self.gpus} must not be negative, rollout.max_weight={self.max_weight} must be positive")
        if self.lag not in (0, 1):
            raise ValueError(f"rollout.lag={self.lag} is neither 0 nor 1; use 1 to draw a step ahead of learning, 0 to draw between steps")
        if self.graphs not in get_args(Setting):
            raise ValueError(f"rollout.graphs={self.graphs!r} must be one of {', '.join(get_args(Setting))}")
        if self.lag and not self.gpus:
            raise ValueError("rollout.lag=1 and rollout.gpus=0: drawing ahead needs ranks of its own; set rollout.gpus, or rollout.lag=0")

    def held(self, slot_bytes: int, positions: int, groups: int, beside: int = 0) -> int:
        """How many sequences of `positions` tokens, of `slot_bytes` each on this rank, the cache holds beside so many other bytes. Raises
        ValueError when that is less than one for each of `groups` pipeline stages."""
        held = max(0, int(self.cache_gb * 2**30) - beside) // max(1, slot_bytes)
        if held < groups:
            need = math.ceil(1000 * (groups * slot_bytes + beside) / 2**30) / 1000
            raise ValueError(
                f"cache_gb={self.cache_gb} holds {held} sequences of {positions} tokens, and {groups} pipeline stages need one each; use "
                f"cache_gb={need} or more, or shorter responses"
            )
        return held


@dataclass(frozen=True)
class Response:
    """What followed a prompt."""

    tokens: np.ndarray  # int32 [n], what stopped it at the end where `stopped`
    logprobs: np.ndarray  # float32 [n], of the tempered distribution the token was drawn from (at temperature 0: of temperature 1's)
    stopped: bool


def stop_tokens(tokenizer: PreTrainedTokenizerFast, more: Sequence[str]) -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's eos, and `more` tokens by name. Raises ValueError for a name that is no token."""
    ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]  # type: ignore[list-item]
    for token in more:
        found = tokenizer.convert_tokens_to_ids(token)
        if not isinstance(found, int) or found == tokenizer.unk_token_id:
            raise ValueError(f"stop={token!r} is no token of the tokenizer; name single tokens, such as <|im_end|>")
        ids.append(found)
    if not ids:
        raise ValueError("the tokenizer has no eos token; name the tokens that end a response in stop")
    return tuple(ids)


def generate(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, slotting: Slotting, *, samples: int = 1, seed: tuple[int, ...] = (0,)
) -> list[list[Response]]:
    """`samples` responses to each prompt, in order, on every rank.

    A response is a function of the weights, the prompt, its id, `seed` and its place among the samples of that id: not of slots, replicas
    or of what else is asked. A prompt that is asked twice goes on with the next places.
    Raises ValueError for a prompt that is empty, or that leaves no room in the model's context for max_tokens.
    """
    _check(policy, prompts, sampling)
    prefix = common(prompts) if slotting.share else []
    positions = max((len(prompt.tokens) for prompt in prompts), default=0) - len(prefix) + sampling.max_tokens
    place = defaultdict[int, Iterator[int]](count)  # of the next sample of each id
    requests = [
        Request(
            prompt.tokens[len(prefix) :].tolist(), sampling.max_tokens, stream(*seed, prompt.id, next(place[prompt.id])), (index, sample)
        )
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    mine = _share(requests, policy.grid.dp, policy.grid.dp_rank, whole_prompts=len(prompts) >= policy.grid.dp)
    # As many groups as there are stages, so that each stage always has one to compute.
    slots = _slots(policy, slotting, positions, len(prefix), most=len(mine), groups=policy.grid.pp)
    queue = deque(mine)
    groups = [Slots(slots, queue, frozenset(sampling.stop), slotting.prefill, sampling.until) for _ in range(policy.grid.pp)]
    drawing = Drawing(sampling.temperature, sampling.top_k, sampling.top_p)
    policy.generate(groups, slots, positions, drawing, prefix, graphs=slotting.graphs)
    return _together(policy, mine, len(prompts), samples)


def _check(policy: Policy, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    context = policy.model.max_length
    for index, prompt in enumerate(prompts):
        if not len(prompt.tokens):
            raise ValueError(f"prompt {index} is empty; give it at least one token")
        if len(prompt.tokens) + sampling.max_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(prompt.tokens)} tokens; with max_tokens={sampling.max_tokens} that is over the model's context"
                f" of {context}; shorten it or lower max_tokens"
            )


def common(prompts: Sequence[Prompt]) -> list[int]:
    """The tokens that all prompts begin with, less the last of any of them; none where there is but one prompt."""
    if len(prompts) < 2:
        return []
    each = [prompt.tokens.tolist() for prompt in prompts]
    first, last = min(each), max(each)  # what these two share, all share
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: min(next(differ, len(first)), *(len(tokens) - 1 for tokens in each))]


def _share(requests: list[Request], ranks: int, rank: int, *, whole_prompts: bool) -> list[Request]:
    """This replica's requests: the largest first to the replica with least to do, all samples of a prompt together."""
    units: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        units.setdefault(request.index[:1] if whole_prompts else request.index, []).append(request)
    work = {unit: sum(len(r.prompt) + r.limit for r in members) for unit, members in units.items()}
    loads, mine = [0] * ranks, []
    for unit in sorted(units, key=lambda unit: (-work[unit], unit)):
        least = loads.index(min(loads))
        loads[least] += work[unit]
        if least == rank:
            mine += units[unit]
    return mine


def _slots(policy: Policy, slotting: Slotting, positions: int, shared: int, most: int, groups: int) -> int:
    """Slots of each group: those asked for, as far as the requests need them and the memory holds them beside what they share."""
    held = slotting.held(policy.slot_bytes(positions), positions, groups, beside=policy.slot_bytes(shared))
    return max(1, min(slotting.slots, held, most) // groups)


def _together(policy: Policy, mine: list[Request], prompts: int, samples: int) -> list[list[Response]]:
    """Every replica's responses on every rank, in order of the prompts."""
    done = {r.index: Response(np.array(r.tokens, np.int32), np.array(r.logprobs, np.float32), r.stopped) for r in mine}
    parts = [done]
    if policy.grid.dp > 1:
        parts = [{} for _ in range(policy.grid.dp)]
        dist.all_gather_object(parts, done, group=policy.grid.dp_group)
    whole = {index: response for part in parts for index, response in part.items()}
    return [[whole[prompt, sample] for sample in range(samples)] for prompt in range(prompts)]


def text_of(response: Response, tokenizer: PreTrainedTokenizerFast) -> str:
    """What a response says: its tokens but for the stop token."""
    tokens = response.tokens[:-1] if response.stopped else response.tokens
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

"""Generation on the training ranks: continuous batching on the policy's own weights, without a second copy of the model."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from engine.megatron.decode import TokenSampling
from engine.megatron.policy import Policy
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import GenerationRequest, GenerationResult, Response, SamplingParams
from engine.rollout.scheduler import Request, Scheduler, rng_stream
from engine.types import Prompt


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    rollout: RolloutConfig,
    *,
    samples: int = 1,
    seed: tuple[int, ...] = (0,),
) -> list[list[Response]]:
    """`samples` responses to each prompt, in order, on every rank.

    A response depends on the weights, the prompt, its id, `seed` and the index of the sample among those of that id; not on batch size,
    replicas or the other prompts. If an id occurs twice, its samples are numbered on.
    Raises ValueError for an empty prompt, and for one that leaves no room in the model's context for max_tokens.
    """
    _check(policy, prompts, sampling)
    prefix = common_prefix(prompts) if rollout.prefix_caching else []
    positions = max((len(prompt.tokens) for prompt in prompts), default=0) - len(prefix) + sampling.max_tokens
    place = defaultdict[int, Iterator[int]](count)  # of the next sample of each id
    requests = [
        Request(
            prompt.tokens[len(prefix) :].tolist(),
            sampling.max_tokens,
            rng_stream(*seed, prompt.id, next(place[prompt.id])),
            (index, sample),
        )
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    mine = _assign_to_replica(requests, policy.grid.dp, policy.grid.dp_rank, whole_prompts=len(prompts) >= policy.grid.dp)
    # One group per pipeline stage keeps all stages busy.
    slots = _seqs_per_group(policy, rollout, positions, len(prefix), most=len(mine), groups=policy.grid.pp)
    queue = deque(mine)
    groups = [Scheduler(slots, queue, frozenset(sampling.stop), rollout.max_prefill_tokens, sampling.until) for _ in range(policy.grid.pp)]
    drawing = TokenSampling(sampling.temperature, sampling.top_k, sampling.top_p)
    policy.generate(groups, slots, positions, drawing, prefix, graphs=rollout.cuda_graphs)
    return _gather_responses(policy, mine, len(prompts), samples)


def _check(policy: Policy, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
    context = policy.model.max_length
    for index, prompt in enumerate(prompts):
        if not len(prompt.tokens):
            raise ValueError(f"prompt {index} is empty; give it at least one token")
        if len(prompt.tokens) + sampling.max_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(prompt.tokens)} tokens; with max_tokens={sampling.max_tokens} that is over the model's context"
                f" of {context}; shorten it or lower max_tokens"
            )


def common_prefix(prompts: Sequence[Prompt]) -> list[int]:
    """The longest common prefix of all prompts, without the last token of any of them; empty for a single prompt."""
    if len(prompts) < 2:
        return []
    each = [prompt.tokens.tolist() for prompt in prompts]
    first, last = min(each), max(each)  # the prefix of the smallest and the largest is that of all
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: min(next(differ, len(first)), *(len(tokens) - 1 for tokens in each))]


def _assign_to_replica(requests: list[Request], ranks: int, rank: int, *, whole_prompts: bool) -> list[Request]:
    """This replica's requests: each prompt with all of its samples, the largest first, goes to the least loaded replica."""
    units: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        units.setdefault(request.index[:1] if whole_prompts else request.index, []).append(request)
    work = {unit: sum(len(r.prompt) + r.max_tokens for r in members) for unit, members in units.items()}
    loads, mine = [0] * ranks, []
    for unit in sorted(units, key=lambda unit: (-work[unit], unit)):
        least = loads.index(min(loads))
        loads[least] += work[unit]
        if least == rank:
            mine += units[unit]
    return mine


def _seqs_per_group(policy: Policy, rollout: RolloutConfig, positions: int, shared: int, most: int, groups: int) -> int:
    """Sequences per pipeline stage's group: max_num_seqs, limited by the number of requests and by the memory of the KV cache."""
    held = rollout.max_cached_seqs(policy.kv_bytes(positions), positions, groups, beside=policy.kv_bytes(shared))
    return max(1, min(rollout.max_num_seqs, held, most) // groups)


def _gather_responses(policy: Policy, mine: list[Request], prompts: int, samples: int) -> list[list[Response]]:
    """The responses of all replicas on every rank, in order of the prompts."""
    done = {r.index: Response(np.array(r.tokens, np.int32), np.array(r.logprobs, np.float32), r.stopped) for r in mine}
    parts = [done]
    if policy.grid.dp > 1:
        parts = [{} for _ in range(policy.grid.dp)]
        dist.all_gather_object(parts, done, group=policy.grid.dp_group)
    whole = {index: response for part in parts for index, response in part.items()}
    return [[whole[prompt, sample] for sample in range(samples)] for prompt in range(prompts)]


def text_of(response: Response, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of a response, without its stop token."""
    tokens = response.tokens[:-1] if response.stopped else response.tokens
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=False))


class SamplerEngine:
    """The RolloutEngine of this file: the training ranks generate, on the policy's own weights."""

    def __init__(self, policy: Policy, rollout: RolloutConfig):
        self.policy, self.rollout = policy, rollout

    def generate(self, step: int, request: GenerationRequest, next_request: GenerationRequest | None, checkpoint: Path) -> GenerationResult:
        """On-policy: `next_request` and `checkpoint` are not needed."""
        return GenerationResult(self.respond(request), step)

    def respond(self, request: GenerationRequest) -> list[list[Response]]:
        """See `generate` of this module."""
        return respond(self.policy, self.rollout, request)

    def extra_state(self) -> dict[str, bytes]:
        """Nothing: no responses are generated ahead."""
        return {}

    def close(self) -> None:
        """Nothing to release: the policy belongs to the caller."""


def respond(policy: Policy, rollout: RolloutConfig, request: GenerationRequest) -> list[list[Response]]:
    """The responses of `policy` to a request; see `generate`."""
    return generate(policy, request.prompts, request.sampling, rollout, samples=request.samples_per_prompt, seed=request.seed)

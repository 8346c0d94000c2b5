"""Verify responses. One rank verifies for all, so that a time limit cannot give two ranks different verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from engine.distributed.world import World
from engine.rollout.engine import Response
from engine.rollout.sampler import text_of
from engine.types import Prompt
from engine.verify import Unjudged, Verdict, verifier
from engine.verify.pool import Case, Pool


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt, with its verdict."""

    prompt: Prompt
    response: Response
    text: str  # of the response, without its stop token
    verdict: Verdict


def verify_responses(
    prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]], tokenizer: PreTrainedTokenizerFast, pool: Pool, world: World
) -> tuple[list[Rollout], int]:
    """Every response with its verdict, in order of the prompts, and the number of unjudged, dropped responses; equal on every rank.

    Raises Unjudged on all ranks when more were dropped than `pool` allows, or all.
    """
    flat = [(prompt, response) for prompt, group in zip(prompts, responses, strict=True) for response in group]
    texts = [text_of(response, tokenizer) for _, response in flat]
    box: list[list[Verdict | Unjudged] | Unjudged | None] = [None]
    if world.rank == 0:
        try:
            box[0] = pool.verify([Case(verifier(p.verifier), text, p.truth) for (p, _), text in zip(flat, texts, strict=True)])
        except Unjudged as error:
            box[0] = error
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Unjudged):
        raise box[0]
    assert box[0] is not None
    judged = zip(flat, texts, box[0], strict=True)
    rollouts = [Rollout(*asked, text, verdict) for asked, text, verdict in judged if isinstance(verdict, Verdict)]
    if flat and not rollouts:
        raise Unjudged(f"none of {len(flat)} responses could be judged; the first: {box[0][0]}")
    return rollouts, len(flat) - len(rollouts)

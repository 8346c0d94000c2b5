"""What the tests of generation run on ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.batching.build import batch, scatter
from engine.config import Model, Optim, Parallel
from engine.config.choices import CudaGraphs
from engine.data.tokenizer import load_tokenizer
from engine.distributed.world import World
from engine.losses import SFT_LOSS
from engine.types import Prompt, Sample
from tests.support.jobs import OPTIM, samples
from tests.support.jobs_kernels_logprob import group_name
from triton_kernels import draw

STOP = tuple(range(12))  # of 250 ids: responses of a random model end at ragged lengths


def drawn(world: World, logits: Tensor, keys: Tensor, **how: Any) -> list[int]:
    """draw, the vocabulary cut over the world."""
    width = logits.shape[1] // world.size
    start = world.rank * width
    return draw(logits[:, start : start + width], keys, group=group_name(), vocab_start=start, **how).tolist()


def prompts(count: int = 12, longest: int = 20, prefix: int = 0) -> list[Prompt]:
    """Random prompts of ragged length, the first `prefix` tokens of all the same."""
    draw_ = np.random.default_rng(7)
    found = [draw_.integers(12, 250, n, dtype=np.int32) for n in draw_.integers(1, longest, count)]
    shared = draw_.integers(12, 250, prefix, dtype=np.int32)
    return [Prompt(np.concatenate([shared, tokens]), id=100 + i) for i, tokens in enumerate(found)]


def responses(
    world: World,
    parallel: Parallel,
    model: Model,
    *,
    slots: int = 16,
    samples_each: int = 2,
    trained: bool = False,
    cache_gb: float = 1.0,
    prefill: int = 64,
    prefix: int = 0,
    share: bool = False,
    graphs: CudaGraphs = "auto",
    **sampling: Any,
) -> dict[str, Any]:
    """Tokens and log-probs of every response, and the largest difference to the trainer's log-probs of the same tokens.

    `trained`: after an optimizer step between two generations, of which the second is returned. `prefix`: tokens that all prompts begin
    with.
    """
    from engine.megatron.policy import Policy
    from engine.rollout.config import RolloutConfig
    from engine.rollout.engine import SamplingParams
    from engine.rollout.sampler import generate

    how = SamplingParams(max_tokens=24, stop=STOP, **sampling)
    rollout, asked = RolloutConfig(slots, cache_gb, prefill, prefix_caching=share, cuda_graphs=graphs), prompts(prefix=prefix)
    optim: Optim | None = OPTIM if trained else None
    with closing(Policy(model, optim, parallel, world)) as policy:
        found = generate(policy, asked, how, rollout, samples=samples_each, seed=(3,))
        if trained:
            policy.update(batch(samples(0), 64, **policy.batch_options), SFT_LOSS, 0.01)
            found = generate(policy, asked, how, rollout, samples=samples_each, seed=(3,))
        flat = [(prompt, response) for prompt, answers in zip(asked, found, strict=True) for response in answers]
        whole = [
            Sample(np.concatenate([prompt.tokens, response.tokens]), _mask(len(prompt.tokens), len(response.tokens)))
            for prompt, response in flat
        ]
        step = batch(whole, 64, **policy.batch_options)
        worst = 0.0
        for (prompt, response), values in zip(flat, scatter(policy.logprobs(step, how.temperature or 1.0), step, len(whole)), strict=True):
            if values is not None:
                trainer = values[len(prompt.tokens) - 1 :]
                worst = max(worst, float((trainer - torch.from_numpy(response.logprobs)).abs().max()))
        return {
            "tokens": [response.tokens.tolist() for _, response in flat],
            "logprobs": [response.logprobs.tolist() for _, response in flat],
            "stopped": [response.stopped for _, response in flat],
            "from_trainer": worst,
        }


class _NoReading(TorchDispatchMode):
    """Fails on what reads a tensor's numbers, for which a GPU would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), func
        return func(*args, **(kwargs or {}))


def captured(world: World, **how: Any) -> dict[str, Any]:
    """As `responses`, and how many shapes were captured; by a stand-in, which fails on what a GPU's capture would not survive."""
    from megatron.core.tensor_parallel import random

    from engine.megatron import graphs

    count = 0

    def capture(_: graphs.Graphs, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        nonlocal count
        count += 1
        touched = mock.Mock(side_effect=AssertionError("the state of a generator is touched"))
        states = mock.patch.multiple(random, _get_cuda_rng_state=touched, _set_cuda_rng_state=touched)
        with graphs.without_random_states(), _NoReading(), states:
            compute()
        return compute

    with mock.patch.object(graphs.Graphs, "capture", capture):
        return responses(world, graphs="on", **how) | {"captured": count}


def sent_by_a_thread(world: World, **how: Any) -> dict[str, Any]:
    """As `responses`, tokens sent as on GPUs: by a thread, over a group of their own."""
    from engine.megatron import backend, tokens

    own, made = tokens.TokenSender, []

    def threaded(grid: backend.Grid, *, in_thread: bool) -> tokens.TokenSender:
        before = backend._groups()
        backend.make_host_groups(grid.pp, world.size)
        (hosts,) = backend._groups() - before
        assert dist.get_process_group_ranks(hosts) == dist.get_process_group_ranks(grid.pp_group)
        found = own(replace(grid, pp_host_group=hosts), in_thread=True)
        made.append(found)
        return found

    with mock.patch.object(tokens, "TokenSender", threaded):
        found = responses(world, **how)
    for each in made:
        dist.destroy_process_group(each.grid.pp_host_group)
    return found | {"threads": sum(each.thread is not None for each in made)}


def _mask(prompt: int, response: int) -> np.ndarray:
    return np.array([0] * (prompt - 1) + [1] * response, np.uint8)


def asked_twice(world: World, model: Model) -> tuple[list[list[int]], list[list[int]]]:
    """Two samples of a prompt; and one sample of each of two prompts that are the same."""
    from engine.megatron.policy import Policy
    from engine.rollout.config import RolloutConfig
    from engine.rollout.engine import SamplingParams
    from engine.rollout.sampler import generate

    prompt, how, rollout = prompts()[0], SamplingParams(max_tokens=12, stop=(0,)), RolloutConfig(kv_cache_gb=1.0)
    with closing(Policy(model, None, Parallel(), world)) as policy:
        once = generate(policy, [prompt], how, rollout, samples=2)
        twice = generate(policy, [prompt, prompt], how, rollout)
    return [r.tokens.tolist() for r in once[0]], [group[0].tokens.tolist() for group in twice]


def written(
    world: World,
    folder: Path,
    prompts: list[list[int]],
    decoding: dict[str, Any],
    parallel: Parallel = Parallel(),  # noqa: B008
    rollout: dict[str, Any] | None = None,
    seed: int = 0,
) -> list[list[tuple[Any, ...]]]:
    """What an evaluation hears from the model in `folder`."""
    from engine.data.stops import stop_tokens
    from engine.data.template import ChatTemplate
    from engine.evals.generation import Decoding, respond
    from engine.megatron.policy import Policy
    from engine.rollout.config import RolloutConfig

    how = RolloutConfig(**{"kv_cache_gb": 1.0, "prefix_caching": True} | (rollout or {}))
    asked = [np.array(prompt, np.int32) for prompt in prompts]
    with closing(Policy(Model(str(folder)), None, parallel, world)) as policy:
        tokenizer = load_tokenizer(str(folder))
        found = respond(policy, tokenizer, asked, Decoding(**decoding), how, seed, stop_tokens(ChatTemplate(tokenizer), folder))
    return [[tuple(response) for response in group] for group in found]


def refused(world: World, parallel: Parallel, model: Model, **how: Any) -> str:
    """What is said to a generation that cannot be."""
    from engine.megatron.policy import Policy
    from engine.rollout.config import RolloutConfig
    from engine.rollout.engine import SamplingParams
    from engine.rollout.sampler import generate

    arguments = {"tokens": [1, 2], "max_tokens": 4, "kv_cache_gb": 1.0} | how
    with closing(Policy(model, None, parallel, world)) as policy:
        try:
            prompt = Prompt(np.array(arguments["tokens"], np.int32))
            generate(policy, [prompt], SamplingParams(arguments["max_tokens"], (0,)), RolloutConfig(kv_cache_gb=arguments["kv_cache_gb"]))
        except ValueError as error:
            return str(error)
    return ""

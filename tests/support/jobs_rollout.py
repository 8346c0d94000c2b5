"""Jobs of the generation tests."""

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

STOP = tuple(range(12))  # of 250 ids, so that responses of a random model differ in length


def drawn(world: World, logits: Tensor, keys: Tensor, **options: Any) -> list[int]:
    """draw with the vocabulary sharded over the world."""
    width = logits.shape[1] // world.size
    start = world.rank * width
    return draw(logits[:, start : start + width], keys, group=group_name(), vocab_start=start, **options).tolist()


def prompts(count: int = 12, longest: int = 20, prefix: int = 0) -> list[Prompt]:
    """Random prompts of different lengths with the first `prefix` tokens in common."""
    draw_ = np.random.default_rng(7)
    results = [draw_.integers(12, 250, n, dtype=np.int32) for n in draw_.integers(1, longest, count)]
    shared = draw_.integers(12, 250, prefix, dtype=np.int32)
    return [Prompt(np.concatenate([shared, tokens]), id=100 + i) for i, tokens in enumerate(results)]


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

    `trained`: do an optimizer step between two generations and return the second. `prefix`: number of tokens that all prompts share.
    """
    from engine.megatron.policy import Policy
    from engine.rollout.config import RolloutConfig
    from engine.rollout.engine import SamplingParams
    from engine.rollout.sampler import generate

    options = SamplingParams(max_tokens=24, stop=STOP, **sampling)
    rollout, asked = RolloutConfig(slots, cache_gb, prefill, prefix_caching=share, cuda_graphs=graphs), prompts(prefix=prefix)
    optim: Optim | None = OPTIM if trained else None
    with closing(Policy(model, optim, parallel, world)) as policy:
        results = generate(policy, asked, options, rollout, samples=samples_each, seed=(3,))
        if trained:
            policy.update(batch(samples(0), 64, **policy.batch_options), SFT_LOSS, 0.01)
            results = generate(policy, asked, options, rollout, samples=samples_each, seed=(3,))
        flat = [(prompt, response) for prompt, answers in zip(asked, results, strict=True) for response in answers]
        full = [
            Sample(np.concatenate([prompt.tokens, response.tokens]), _mask(len(prompt.tokens), len(response.tokens)))
            for prompt, response in flat
        ]
        step = batch(full, 64, **policy.batch_options)
        worst = 0.0
        for (prompt, response), values in zip(
            flat, scatter(policy.logprobs(step, options.temperature or 1.0), step, len(full)), strict=True
        ):
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
    """Raises an error for operations that read a tensor's values, which would synchronize with a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), func
        return func(*args, **(kwargs or {}))


def captured(world: World, **options: Any) -> dict[str, Any]:
    """`responses`, and the number of captured shapes, with a fake capture that fails on operations that CUDA graphs do not allow."""
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
        return responses(world, graphs="on", **options) | {"captured": count}


def sent_by_a_thread(world: World, **options: Any) -> dict[str, Any]:
    """`responses` with tokens sent as on GPUs: by a thread, over a separate group."""
    from engine.megatron import backend, tokens

    own, made = tokens.TokenSender, []

    def threaded(grid: backend.Grid, *, in_thread: bool) -> tokens.TokenSender:
        before = backend._groups()
        backend.make_host_groups(grid.pp, world.size)
        (hosts,) = backend._groups() - before
        assert dist.get_process_group_ranks(hosts) == dist.get_process_group_ranks(grid.pp_group)
        results = own(replace(grid, pp_host_group=hosts), in_thread=True)
        made.append(results)
        return results

    with mock.patch.object(tokens, "TokenSender", threaded):
        results = responses(world, **options)
    for each in made:
        dist.destroy_process_group(each.grid.pp_host_group)
    return results | {"threads": sum(each.thread is not None for each in made)}


def _mask(prompt: int, response: int) -> np.ndarray:
    return np.array([0] * (prompt - 1) + [1] * response, np.uint8)


def asked_twice(world: World, model: Model) -> tuple[list[list[int]], list[list[int]]]:
    """Two samples of one prompt, and one sample of each of two equal prompts."""
    from engine.megatron.policy import Policy
    from engine.rollout.config import RolloutConfig
    from engine.rollout.engine import SamplingParams
    from engine.rollout.sampler import generate

    prompt, options, rollout = prompts()[0], SamplingParams(max_tokens=12, stop=(0,)), RolloutConfig(kv_cache_gb=1.0)
    with closing(Policy(model, None, Parallel(), world)) as policy:
        once = generate(policy, [prompt], options, rollout, samples=2)
        twice = generate(policy, [prompt, prompt], options, rollout)
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
    """The responses of the model in `folder` in an evaluation."""
    from engine.data.stops import stop_tokens
    from engine.data.template import ChatTemplate
    from engine.evals.generation import Decoding, respond
    from engine.megatron.policy import Policy
    from engine.rollout.config import RolloutConfig

    options = RolloutConfig(**{"kv_cache_gb": 1.0, "prefix_caching": True} | (rollout or {}))
    asked = [np.array(prompt, np.int32) for prompt in prompts]
    with closing(Policy(Model(str(folder)), None, parallel, world)) as policy:
        tokenizer = load_tokenizer(str(folder))
        results = respond(policy, tokenizer, asked, Decoding(**decoding), options, seed, stop_tokens(ChatTemplate(tokenizer), folder))
    return [[tuple(response) for response in group] for group in results]


def refused(world: World, parallel: Parallel, model: Model, **options: Any) -> str:
    """The error of an invalid generation."""
    from engine.megatron.policy import Policy
    from engine.rollout.config import RolloutConfig
    from engine.rollout.engine import SamplingParams
    from engine.rollout.sampler import generate

    arguments = {"tokens": [1, 2], "max_tokens": 4, "kv_cache_gb": 1.0} | options
    with closing(Policy(model, None, parallel, world)) as policy:
        try:
            prompt = Prompt(np.array(arguments["tokens"], np.int32))
            generate(policy, [prompt], SamplingParams(arguments["max_tokens"], (0,)), RolloutConfig(kv_cache_gb=arguments["kv_cache_gb"]))
        except ValueError as error:
            return str(error)
    return ""

"""Decoding with CUDA graphs on a GPU: replayed results equal those without graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("engine._C")  # make gpu builds it if there is a compiler

from engine.batching.build import batch, scatter
from engine.config import Model, ModelShape, Parallel
from engine.config.choices import CudaGraphs
from engine.distributed.world import World
from engine.megatron import graphs
from engine.megatron.policy import Policy
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import Response, SamplingParams
from engine.rollout.sampler import generate
from engine.types import Prompt, Sample

MODEL = ModelShape(layers=2, hidden=256, ffn=512, heads=8, kv_heads=2, vocab=512)
PROMPT, MOST = 24, 40  # tokens


@pytest.fixture(autouse=True)
def on_the_gpu() -> None:
    """Overrides the fixture of conftest.py, because the engine sets devices itself."""


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    world = World.start("cuda")
    try:
        with closing(Policy(Model(init=MODEL), None, Parallel(), world)) as results:
            yield results
    finally:
        world.close()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which each capture is appended."""
    results: list[Any] = []
    capture = graphs.Graphs.capture

    def counted(own: graphs.Graphs, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        results.append(capture(own, compute))
        return results[-1]

    monkeypatch.setattr(graphs.Graphs, "capture", counted)
    return results


def responses(
    policy: Policy,
    count: int,
    slots: int,
    sampling: SamplingParams,
    *,
    setting: CudaGraphs,
) -> tuple[list[Prompt], list[Response]]:
    draw = np.random.default_rng(0)
    asked = [Prompt(draw.integers(0, MODEL.vocab, PROMPT, dtype=np.int32), id=i) for i in range(count)]
    results = generate(policy, asked, sampling, RolloutConfig(slots, kv_cache_gb=1.0, cuda_graphs=setting))
    return asked, [response for (response,) in results]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_tokens_with_and_without_graphs_are_equal(policy: Policy, captures: list[Any], slots: int, temperature: float) -> None:
    """All rows end at the same step, so that matrix products have the same shapes with and without graphs."""
    options = SamplingParams(MOST, stop=(MODEL.vocab,), temperature=temperature)
    _, plain = responses(policy, slots, slots, options, setting="off")
    assert not captures
    _, replayed = responses(policy, slots, slots, options, setting="on")
    assert len(captures) == 1
    for actual, expected in zip(replayed, plain, strict=True):
        assert actual.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-3)


def test_logprobs_with_changing_batches_equal_the_trainers(policy: Policy, captures: list[Any]) -> None:
    """More responses than concurrent rows, of different lengths: mixed batches, padding rows, and every batch size down to one."""
    asked, results = responses(policy, 30, 11, SamplingParams(MOST, stop=tuple(range(24))), setting="on")
    assert len(captures) >= 4
    assert len({len(response.tokens) for response in results}) > 5
    samples = [
        Sample(np.concatenate([prompt.tokens, response.tokens]), _mask(len(prompt.tokens), len(response.tokens)))
        for prompt, response in zip(asked, results, strict=True)
    ]
    step = batch(samples, 4096, **policy.batch_options)
    for response, values in zip(results, scatter(policy.logprobs(step), step, len(samples)), strict=True):
        assert values is not None
        np.testing.assert_allclose(
            response.logprobs, values[PROMPT - 1 :].numpy(), atol=0.05
        )  # bfloat16, and matrix products of different shapes


def test_memory_of_graphs_is_released(policy: Policy) -> None:
    """Compared with the memory after a first call, which allocates cuBLAS workspaces."""
    options = SamplingParams(MOST, stop=(MODEL.vocab,))
    held = []
    for _ in range(3):
        responses(policy, 16, 16, options, setting="on")
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1]


def _mask(prompt: int, response: int) -> np.ndarray:
    return np.array([0] * (prompt - 1) + [1] * response, np.uint8)

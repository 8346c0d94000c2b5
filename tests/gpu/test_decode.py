"""Decoding in CUDA graphs, on a GPU: what is replayed is what would have been computed."""

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
pytest.importorskip("engine._C")  # make gpu builds it where there is a compiler

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
    """The engine says itself where its tensors are."""


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    world = World.start("cuda")
    try:
        with closing(Policy(Model(init=MODEL), None, Parallel(), world)) as found:
            yield found
    finally:
        world.close()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by what is captured."""
    found: list[Any] = []
    capture = graphs.Graphs.capture

    def counted(own: graphs.Graphs, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        found.append(capture(own, compute))
        return found[-1]

    monkeypatch.setattr(graphs.Graphs, "capture", counted)
    return found


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
    found = generate(policy, asked, sampling, RolloutConfig(slots, kv_cache_gb=1.0, cuda_graphs=setting))
    return asked, [response for (response,) in found]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_replayed_tokens_are_those_computed_one_by_one(policy: Policy, captures: list[Any], slots: int, temperature: float) -> None:
    """All rows go on to the end together: with and without graphs, products have the same shapes."""
    how = SamplingParams(MOST, stop=(MODEL.vocab,), temperature=temperature)
    _, plain = responses(policy, slots, slots, how, setting="off")
    assert not captures
    _, replayed = responses(policy, slots, slots, how, setting="on")
    assert len(captures) == 1
    for got, wanted in zip(replayed, plain, strict=True):
        assert got.tokens.tolist() == wanted.tokens.tolist()
        np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-3)


def test_rows_that_come_and_go_are_said_as_the_trainer_says_them(policy: Policy, captures: list[Any]) -> None:
    """More responses than slots, of ragged lengths: mixed waves in between, rows that pad, every size down to one row."""
    asked, found = responses(policy, 30, 11, SamplingParams(MOST, stop=tuple(range(24))), setting="on")
    assert len(captures) >= 4
    assert len({len(response.tokens) for response in found}) > 5
    samples = [
        Sample(np.concatenate([prompt.tokens, response.tokens]), _mask(len(prompt.tokens), len(response.tokens)))
        for prompt, response in zip(asked, found, strict=True)
    ]
    step = batch(samples, 4096, **policy.batch_options)
    for response, values in zip(found, scatter(policy.logprobs(step), step, len(samples)), strict=True):
        assert values is not None
        np.testing.assert_allclose(response.logprobs, values[PROMPT - 1 :].numpy(), atol=0.05)  # bfloat16, in products of other shapes


def test_what_graphs_held_is_given_back(policy: Policy) -> None:
    """After a first call, which leaves cuBLAS its workspaces."""
    how = SamplingParams(MOST, stop=(MODEL.vocab,))
    held = []
    for _ in range(3):
        responses(policy, 16, 16, how, setting="on")
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1]


def _mask(prompt: int, response: int) -> np.ndarray:
    return np.array([0] * (prompt - 1) + [1] * response, np.uint8)

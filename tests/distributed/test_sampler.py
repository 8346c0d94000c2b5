"""The sampler: tokens are independent of batch size and layout, and log-probs equal the trainer's."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from engine.config import Model, Parallel
from tests.support import jobs, jobs_rollout
from tests.support.pool import ranks

MODEL = Model(init=jobs.TINY)


@lru_cache
def one_rank(**options: Any) -> dict[str, Any]:
    return ranks(1).run(jobs_rollout.responses, parallel=Parallel(), model=MODEL, **options)[0]


def check_same(size: int, parallel: Parallel, expected: dict[str, Any], **options: Any) -> None:
    for results in ranks(size).run(jobs_rollout.responses, parallel=parallel, model=MODEL, **options):
        assert results["tokens"] == expected["tokens"]
        assert results["stopped"] == expected["stopped"]
        for actual, wanted in zip(results["logprobs"], expected["logprobs"], strict=True):
            assert actual == pytest.approx(wanted, abs=1e-5)
        assert results["from_trainer"] <= 1e-5


def test_responses_differ_in_length_and_match_the_trainer() -> None:
    results = one_rank(temperature=1.0)
    lengths = [len(tokens) for tokens in results["tokens"]]
    assert len(set(lengths)) > 5
    assert any(results["stopped"])
    assert not all(results["stopped"])
    assert all(tokens[-1] in jobs_rollout.STOP or len(tokens) == 24 for tokens in results["tokens"])
    assert results["from_trainer"] <= 1e-5
    assert results["tokens"][0] != results["tokens"][1]  # two samples of one prompt


@pytest.mark.parametrize("slots", [1, 4, 64])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_batch_size_and_prefill_do_not_change_tokens(slots: int, temperature: float) -> None:
    check_same(1, Parallel(), one_rank(temperature=temperature), temperature=temperature, slots=slots, prefill=slots * 10)


LAYOUTS = [
    (2, Parallel()),
    (2, Parallel(tp=2)),
    (2, Parallel(pp=2)),
    (2, Parallel(pp=2, vpp=2)),
    (2, Parallel(pp=2, stages=(4, 0))),
    (4, Parallel(tp=2, pp=2)),
    (4, Parallel(pp=4)),
    (8, Parallel(tp=2, pp=2)),
]


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_layouts_do_not_change_tokens(size: int, parallel: Parallel, temperature: float) -> None:
    check_same(size, parallel, one_rank(temperature=temperature), temperature=temperature)


PADDED = [
    (1, Parallel(), 3),
    (1, Parallel(), 16),
    (2, Parallel(), 8),
    (2, Parallel(tp=2), 11),
    (2, Parallel(pp=2), 24),
    (2, Parallel(pp=2, vpp=2), 16),
    (4, Parallel(tp=2, pp=2), 10),
]


@pytest.mark.parametrize(("size", "parallel", "slots"), PADDED, ids=str)
def test_padding_rows_do_not_change_tokens(size: int, parallel: Parallel, slots: int) -> None:
    """Batches are padded to the shapes of captured CUDA graphs."""
    check_same(size, parallel, one_rank(temperature=1.0), temperature=1.0, slots=slots, graphs="on")


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel(recompute="selective")), (2, Parallel(tp=2)), (2, Parallel(pp=2))], ids=str)
def test_captured_code_does_not_synchronize(size: int, parallel: Parallel) -> None:
    """And does not set the state of a generator, which megatron does for recomputation and under tensor parallelism."""
    for results in ranks(size).run(jobs_rollout.captured, parallel=parallel, model=MODEL, temperature=1.0, slots=8):
        assert results["captured"] >= 3  # of 8, 4 and 2 rows
        assert results["tokens"] == one_rank(temperature=1.0)["tokens"]


PIPELINES = [(2, Parallel(pp=2)), (2, Parallel(pp=2, vpp=2)), (4, Parallel(tp=2, pp=2)), (4, Parallel(pp=4))]


@pytest.mark.parametrize(("size", "parallel"), PIPELINES, ids=str)
def test_tokens_sent_by_a_thread_are_the_same(size: int, parallel: Parallel) -> None:
    results = ranks(size).run(jobs_rollout.sent_by_a_thread, parallel=parallel, model=MODEL, temperature=1.0)
    for rank, of_rank in enumerate(results):
        assert of_rank["tokens"] == one_rank(temperature=1.0)["tokens"]
        assert of_rank["threads"] == (rank >= size - size // parallel.pp)  # on last stages


SHARING = [(1, Parallel(), 4), (1, Parallel(), 64), (2, Parallel(), 16), (2, Parallel(tp=2), 16), (2, Parallel(pp=2), 16)]


@pytest.mark.parametrize(("size", "parallel", "slots"), SHARING, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prefix_caching_does_not_change_tokens(size: int, parallel: Parallel, slots: int, temperature: float) -> None:
    """The same tokens, and the trainer's log-probs, with 17 shared tokens that are computed and cached once."""
    options = {"temperature": temperature, "prefix": 17}
    check_same(size, parallel, one_rank(**options), share=True, slots=slots, **options)


def test_fewer_prompts_than_replicas() -> None:
    results = ranks(2).run(jobs_rollout.responses, parallel=Parallel(), model=MODEL, temperature=1.0, samples_each=1)
    assert results[0]["tokens"] == one_rank(temperature=1.0)["tokens"][::2]


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel()), (2, Parallel(pp=2)), (2, Parallel(tp=2))], ids=str)
def test_generation_uses_updated_weights(size: int, parallel: Parallel) -> None:
    expected = one_rank(temperature=1.0, trained=True)
    assert expected["tokens"] != one_rank(temperature=1.0)["tokens"]
    check_same(size, parallel, expected, temperature=1.0, trained=True)


def test_samples_of_one_prompt_differ() -> None:
    once, twice = ranks(1).run(jobs_rollout.asked_twice, model=MODEL)[0]
    assert once[0] != once[1]
    assert twice == once


def test_tied_weights() -> None:
    tied = Model(init=replace(jobs.TINY, tied=True))
    results = [ranks(size).run(jobs_rollout.responses, parallel=Parallel(pp=size), model=tied, temperature=0.0)[0] for size in (1, 2)]
    assert results[0]["tokens"] == results[1]["tokens"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"tokens": []}, "prompt 0 is empty"),
        ({"tokens": [1] * 8190}, "over the model's context of 8192"),
        ({"kv_cache_gb": 1e-6}, "kv_cache_gb=1e-06 holds 0 sequences"),
    ],
)
def test_invalid_settings_are_refused(how: dict[str, Any], says: str) -> None:
    assert says in ranks(1).run(jobs_rollout.refused, parallel=Parallel(), model=MODEL, **how)[0]

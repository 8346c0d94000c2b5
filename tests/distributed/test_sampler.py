"""The sampler says what the trainer would: the same tokens for any slots and any layout, with the trainer's log-probs."""

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
def one_rank(**how: Any) -> dict[str, Any]:
    return ranks(1).run(jobs_rollout.responses, parallel=Parallel(), model=MODEL, **how)[0]


def check_same(size: int, parallel: Parallel, expected: dict[str, Any], **how: Any) -> None:
    for found in ranks(size).run(jobs_rollout.responses, parallel=parallel, model=MODEL, **how):
        assert found["tokens"] == expected["tokens"]
        assert found["stopped"] == expected["stopped"]
        for got, wanted in zip(found["logprobs"], expected["logprobs"], strict=True):
            assert got == pytest.approx(wanted, abs=1e-5)
        assert found["from_trainer"] <= 1e-5


def test_responses_are_ragged_and_the_trainers() -> None:
    found = one_rank(temperature=1.0)
    lengths = [len(tokens) for tokens in found["tokens"]]
    assert len(set(lengths)) > 5
    assert any(found["stopped"])
    assert not all(found["stopped"])
    assert all(tokens[-1] in jobs_rollout.STOP or len(tokens) == 24 for tokens in found["tokens"])
    assert found["from_trainer"] <= 1e-5
    assert found["tokens"][0] != found["tokens"][1]  # two samples of one prompt


@pytest.mark.parametrize("slots", [1, 4, 64])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_slots_and_prefill_change_nothing(slots: int, temperature: float) -> None:
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
def test_layouts_change_nothing(size: int, parallel: Parallel, temperature: float) -> None:
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
def test_rows_that_pad_change_nothing(size: int, parallel: Parallel, slots: int) -> None:
    """As they do where shapes are captured in CUDA graphs."""
    check_same(size, parallel, one_rank(temperature=1.0), temperature=1.0, slots=slots, graphs="on")


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel(recompute="selective")), (2, Parallel(tp=2)), (2, Parallel(pp=2))], ids=str)
def test_what_is_captured_waits_for_nothing(size: int, parallel: Parallel) -> None:
    """And sets no generator's state, which megatron does around what it recomputes, and around everything under tensor parallelism."""
    for found in ranks(size).run(jobs_rollout.captured, parallel=parallel, model=MODEL, temperature=1.0, slots=8):
        assert found["captured"] >= 3  # of 8, 4 and 2 rows
        assert found["tokens"] == one_rank(temperature=1.0)["tokens"]


PIPELINES = [(2, Parallel(pp=2)), (2, Parallel(pp=2, vpp=2)), (4, Parallel(tp=2, pp=2)), (4, Parallel(pp=4))]


@pytest.mark.parametrize(("size", "parallel"), PIPELINES, ids=str)
def test_tokens_sent_by_a_thread_are_the_same(size: int, parallel: Parallel) -> None:
    found = ranks(size).run(jobs_rollout.sent_by_a_thread, parallel=parallel, model=MODEL, temperature=1.0)
    for rank, of_rank in enumerate(found):
        assert of_rank["tokens"] == one_rank(temperature=1.0)["tokens"]
        assert of_rank["threads"] == (rank >= size - size // parallel.pp)  # on last stages


SHARING = [(1, Parallel(), 4), (1, Parallel(), 64), (2, Parallel(), 16), (2, Parallel(tp=2), 16), (2, Parallel(pp=2), 16)]


@pytest.mark.parametrize(("size", "parallel", "slots"), SHARING, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_prompts_share_may_be_computed_once(size: int, parallel: Parallel, slots: int, temperature: float) -> None:
    """The same tokens, and still the trainer's log-probs, behind 17 tokens that each slot would else hold for itself."""
    how = {"temperature": temperature, "prefix": 17}
    check_same(size, parallel, one_rank(**how), share=True, slots=slots, **how)


def test_fewer_prompts_than_replicas() -> None:
    found = ranks(2).run(jobs_rollout.responses, parallel=Parallel(), model=MODEL, temperature=1.0, samples_each=1)
    assert found[0]["tokens"] == one_rank(temperature=1.0)["tokens"][::2]


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel()), (2, Parallel(pp=2)), (2, Parallel(tp=2))], ids=str)
def test_a_step_in_between_is_seen(size: int, parallel: Parallel) -> None:
    expected = one_rank(temperature=1.0, trained=True)
    assert expected["tokens"] != one_rank(temperature=1.0)["tokens"]
    check_same(size, parallel, expected, temperature=1.0, trained=True)


def test_a_prompt_asked_twice_is_answered_afresh() -> None:
    once, twice = ranks(1).run(jobs_rollout.asked_twice, model=MODEL)[0]
    assert once[0] != once[1]
    assert twice == once


def test_tied_weights() -> None:
    tied = Model(init=replace(jobs.TINY, tied=True))
    found = [ranks(size).run(jobs_rollout.responses, parallel=Parallel(pp=size), model=tied, temperature=0.0)[0] for size in (1, 2)]
    assert found[0]["tokens"] == found[1]["tokens"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"tokens": []}, "prompt 0 is empty"),
        ({"tokens": [1] * 8190}, "over the model's context of 8192"),
        ({"kv_cache_gb": 1e-6}, "kv_cache_gb=1e-06 holds 0 sequences"),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, Any], says: str) -> None:
    assert says in ranks(1).run(jobs_rollout.refused, parallel=Parallel(), model=MODEL, **how)[0]

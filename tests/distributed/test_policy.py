"""Guarantees of Policy's methods: non-finite gradients change nothing, and attention calls each kernel with the right arguments."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.config import Model, Parallel
from engine.models.families import to_hf
from tests.support import jobs
from tests.support.pool import ranks


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel()), (2, Parallel(pp=2)), (2, Parallel(tp=2))], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(size: int, parallel: Parallel, by_layer: bool) -> None:
    """One sequence on one rank has a NaN: all ranks refuse the step, and the next step is as if it had not happened."""
    for complaint, after, clean in ranks(size).run(jobs.bad_step, parallel=parallel, model=Model(init=jobs.TINY), by_layer=by_layer):
        assert "gradient norm is nan" in complaint
        assert "the step was not applied" in complaint
        assert after == clean


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel()), (2, Parallel(pp=2))], ids=str)
def test_a_max_metric_is_reduced_over_all_ranks(size: int, parallel: Parallel) -> None:
    expected = max(sample.length for sample in jobs.samples(0)) - 1
    assert ranks(size).run(jobs.longest, parallel=parallel, model=Model(init=jobs.TINY)) == [expected] * size


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(pp=2), Parallel(pp=2, vpp=2)], ids=str)
def test_parameter_gathering_starts_before_it_is_needed(parallel: Parallel) -> None:
    """In a pipeline, the waiting times of all stages would add up."""
    for asked in ranks(2).run(jobs.gather_started_early, parallel=parallel, model=Model(init=jobs.TINY)):
        assert asked
        assert all(asked)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Tensor]:
    """Log-probs at temperature 0.7 and entropies, stacked [2, L], of the samples of jobs.logprobs, by transformers in float64."""
    folder = tmp_path_factory.mktemp("exact")
    ranks(1).run(jobs.export, parallel=Parallel(), model=Model(init=jobs.TINY), folder=folder)
    (folder / "config.json").write_text(json.dumps(to_hf(jobs.TINY)))
    network: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    results = {}
    for i, sample in enumerate(jobs.samples(7)):
        ids = torch.from_numpy(sample.tokens)[None].long()
        with torch.no_grad():
            logprobs = (network(ids).logits[0, :-1] / 0.7).log_softmax(-1)
        results[i] = torch.stack([logprobs.gather(1, ids[0, 1:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)])
    return results


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel(tp=2)), (2, Parallel(pp=2))], ids=str)
def test_entropy_is_that_of_float64(size: int, parallel: Parallel, masked: bool, exact: dict[int, Tensor]) -> None:
    """With a vocabulary of 250, which is padded for sharding; computed in one pass with the log-probs."""
    asked = {"temperature": 0.7, "entropy": True, "masked": masked}
    masks = [torch.from_numpy(sample.mask).double() for sample in jobs.samples(7)]
    for results in ranks(size).run(jobs.logprobs, parallel=parallel, model=Model(init=jobs.TINY), **asked):
        assert results.keys() == exact.keys()
        for i, expected in exact.items():
            torch.testing.assert_close(torch.tensor(results[i]).double(), expected * masks[i] if masked else expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel(pp=2))], ids=str)
def test_closing_a_policy_destroys_its_process_groups(size: int, parallel: Parallel) -> None:
    """Every group has threads, which must not accumulate in a process that creates several policies."""
    for threads in ranks(size).run(jobs.threads_after, parallel=parallel, model=Model(init=jobs.TINY), policies=4):
        assert threads[-1] <= threads[0] + 3


def by_sequence(query: Tensor, key: Tensor, value: Tensor, cu: Tensor) -> Tensor:
    from engine.megatron.attention import PackedForward, attend_by_sequence

    return attend_by_sequence(query, key, value, PackedForward(lengths=tuple(cu.diff().tolist())))


def test_gpu_attention_kernels_are_called_for_causal_grouped_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fakes that have the real kernels' signatures: arguments have the meaning that the kernels expect, and keys and values are not
    repeated."""
    from engine.megatron import attention

    def flash(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        assert causal
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert cu_q is cu_k
        assert max_q == max_k == int(cu_q.diff().max())
        assert (q is query, k is key, v is value) == (True, True, True)
        return by_sequence(q, k, v, cu_q)

    draw = torch.Generator().manual_seed(0)
    query = torch.randn(12, 4, 8, generator=draw)
    key, value = torch.randn(2, 12, 2, 8, generator=draw)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed_forward = attention.PackedForward(cu_seqlens_q=cu, max_seqlen_q=7, lengths=(5, 7))  # type: ignore[arg-type]
    expected = attention.attend_for(on_gpu=False)(query, key, value, packed_forward)

    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert torch.equal(attention.attend_for(on_gpu=True)(query, key, value, packed_forward), expected)

    def new(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, window_size: Any, enable_gqa: bool
    ) -> Tensor:
        assert window_size == (-1, 0)
        assert enable_gqa
        return flash(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)

    def before_2_13(*tensors: Any, window_size: Any) -> Tensor:
        assert window_size == (-1, 0)
        return flash(*tensors, causal=True)

    def before_2_11(*tensors: Any, is_causal: bool = False) -> Tensor:
        return flash(*tensors, causal=is_causal)

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    for kernel in (new, before_2_13, before_2_11):
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
        assert torch.equal(attention.attend_for(on_gpu=True)(query, key, value, packed_forward), expected)


def test_attention_and_gradients_equal_torch() -> None:
    """Bitwise, sequence by sequence, for grouped-query heads and for sequences of one token."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(12, heads, 8, generator=draw, requires_grad=True) for heads in (4, 2, 2))
    weight = torch.randn(12, 4, 8, generator=draw)
    cu = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    out = by_sequence(query, key, value, cu)
    results = [out, *torch.autograd.grad((out * weight).sum(), (query, key, value))]
    parts = []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    expected = torch.cat(parts)
    for ours, theirs in zip(results, [expected, *torch.autograd.grad((expected * weight).sum(), (query, key, value))], strict=True):
        assert torch.equal(ours, theirs)


def test_packed_attention_does_not_leak() -> None:
    """Changing one sequence of a pack does not change a bit of the others' outputs."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(12, 4, 8, generator=draw)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    before = by_sequence(query, query[:, :2], query[:, :2], cu)
    query[7] += 1
    after = by_sequence(query, query[:, :2], query[:, :2], cu)
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:], after[7:])

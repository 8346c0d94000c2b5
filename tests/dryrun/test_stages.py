"""The rehearsal of a launch against formulas worked out by hand, and against what our kernels' own code multiplies and allocates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.config import ModelShape, Optim, Parallel, RopeScaling
from engine.dryrun import stages
from engine.dryrun.clock import CostModel
from engine.dryrun.hardware import Hardware
from engine.dryrun.kernels import KERNELS
from engine.dryrun.meter import Meter
from engine.dryrun.types import Collective, Matmul, Stage, Work
from triton_kernels import linear_logprob, linear_policy_loss

LLAMA_405B = ModelShape(126, 16384, 53248, 128, 8, 128256, rope_theta=5e5, rope_scaling=RopeScaling(), max_length=131072)
GRID = Parallel(8, 16, count_embedding=True, count_loss=True)
LENGTHS = (2048, 1024, 1024)
T, TP, DP = 4096, 8, 2
SMALL = ModelShape(layers=14, hidden=64, ffn=192, heads=8, kv_heads=4, vocab=500)
OPTIM = Optim(1e-5)


@lru_cache
def rehearsed(recompute: Any = "none") -> list[Stage]:
    return stages.simulate_stages(LLAMA_405B, replace(GRID, recompute=recompute), 256, LENGTHS, optim=OPTIM)


def products(work: Work) -> float:
    return work.flops - work.attention


def causal_pairs() -> int:
    return sum(length * (length + 1) // 2 for length in LENGTHS)


# A layer of 405B on one of 8 tensor-parallel ranks: multiply-adds a token.
_M = LLAMA_405B
ATTENTION_MATRICES = _M.hidden * _M.head_dim * (2 * _M.heads + 2 * _M.kv_heads) // TP
MLP_MATRICES = 3 * _M.hidden * _M.ffn // TP
LAYER = 2 * T * (ATTENTION_MATRICES + MLP_MATRICES)
SCORES = _M.heads // TP * _M.head_dim * causal_pairs()


def test_a_replica_has_the_parameters_of_the_model() -> None:
    """Norms are on every tensor-parallel rank; all else is cut in 8, and 128256 rows of vocabulary need no padding."""
    found = rehearsed()
    assert [stage.layers for stage in found] == [7, *[8] * 14, 7]
    norms = (2 * 126 + 1) * 16384
    assert 8 * sum(stage.parameters for stage in found) - 7 * norms == LLAMA_405B.parameters == 405_853_388_800


def test_a_layer_multiplies_what_its_matrices_ask_for() -> None:
    stage = rehearsed()[1]
    assert products(stage.forward) == products(stage.inference) == 8 * LAYER
    assert products(stage.backward) == 2 * 8 * LAYER
    assert stage.forward.attention == 8 * 4 * SCORES
    assert stage.backward.attention == 8 * 10 * SCORES
    assert stage.forward.matmuls[Matmul(T, _M.hidden, 2 * _M.ffn // TP)] == 8  # gates and ups in one


@pytest.mark.parametrize(("recompute", "again"), [("selective", 2 * T * MLP_MATRICES), ("full", LAYER)])
def test_recomputation_is_paid_in_backward(recompute: str, again: int) -> None:
    plain, stage = rehearsed()[1], rehearsed(recompute)[1]
    assert stage.forward.matmuls == plain.forward.matmuls
    assert products(stage.backward) == 8 * (2 * LAYER + again)
    assert stage.backward.attention == 8 * (14 if recompute == "full" else 10) * SCORES
    assert stage.held < plain.held / 2
    assert stage.held < stage.peak < plain.peak


def test_the_head_multiplies_three_times() -> None:
    """And the last stage has one layer less than those between. Forward, the microbatch is four blocks of 1024 rows."""
    vocabulary = Matmul(1024, _M.hidden, _M.vocab // TP)
    last = rehearsed()[-1]
    assert last.forward.matmuls[vocabulary] == 4
    assert products(last.forward) == 7 * LAYER + 4 * 2 * vocabulary.m * vocabulary.k * vocabulary.n
    assert products(last.backward) == 2 * products(last.forward)


def test_what_lasts_between_steps() -> None:
    """bf16 weights, fp32 gradients, and of two replicas each half of 12 bytes a parameter (and a counter of steps each)."""
    for stage in rehearsed():
        assert stage.weights == 2 * stage.parameters
        assert stage.gradients == 4 * stage.parameters
        assert stage.optimizer == pytest.approx(12 * stage.parameters / DP, rel=1e-6)


def test_a_model_that_is_only_read() -> None:
    stage = stages.simulate_stages(LLAMA_405B, GRID, 256, LENGTHS, optim=None)[1]
    trained = rehearsed()[1]
    assert (stage.weights, stage.gradients, stage.optimizer, stage.held) == (trained.weights, 0, 0, 0)
    assert (stage.backward, stage.inference) == (Work(), trained.inference)
    assert stage.peak == stage.inference_peak == trained.inference_peak < trained.held


def test_a_critic_ends_in_a_number_a_token() -> None:
    """No vocabulary to multiply with: beyond its layers a stage gathers T numbers, and that alone."""
    critic = stages.simulate_stages(SMALL.with_scalar_head(), Parallel(2), 2, (48, 16), optim=OPTIM)[0]
    policy = stages.simulate_stages(SMALL, Parallel(2), 2, (48, 16), optim=OPTIM)[0]
    assert critic.forward.collectives[Collective("all_gather", "tp", 64 * 4, True)] == 1
    assert critic.forward.matmuls[Matmul(32, 64, 1)] == 1
    assert critic.parameters == policy.parameters - 512 // 2 * 64 + 64


def test_a_tensor_parallel_layer_talks_eight_times() -> None:
    """Each of its two halves gathers its input and scatters its output; backward does both again the other way round, and while it
    multiplies gathers the input anew for the weight's gradient and scatters the input's gradient."""
    whole = T * _M.hidden * 2
    stage = rehearsed()[1]
    gather, scatter = Collective("all_gather", "tp", whole, True), Collective("reduce_scatter", "tp", whole, True)
    assert stage.forward.collectives == Counter({gather: 16, scatter: 16})
    beside = [collective._replace(waits=False) for collective in (gather, scatter)]
    assert stage.backward.collectives == Counter({gather: 16, **dict.fromkeys(beside, 16)})


def test_overlapped_a_layer_waits_for_no_message() -> None:
    """The same products: those that were waited for have their messages with them, and the others are as they were."""
    whole = T * _M.hidden * 2
    plain = rehearsed()[1]
    stage = stages.simulate_stages(LLAMA_405B, replace(GRID, tp_comm_overlap=True), 256, LENGTHS, optim=OPTIM)[1]
    for found, before in ((stage.forward, plain.forward), (stage.backward, plain.backward)):
        assert products(found) == products(before)
        assert found.flops == before.flops
        assert not any(collective.waits for collective in found.collectives)
        assert found.collectives == Counter({c: times for c, times in before.collectives.items() if not c.waits})
        assert {each.size for each in found.overlapped} == {whole}
        assert found.matmuls + Counter({each.matmul: times for each, times in found.overlapped.items()}) == before.matmuls
    assert [sum(work.overlapped.values()) for work in (stage.forward, stage.backward)] == [32, 16]
    assert stage.held == plain.held
    clock = CostModel(Hardware.load("h100"), GRID, 256)
    assert clock.parts(stage.forward).products == pytest.approx(clock.parts(plain.forward).products)
    assert clock.parts(stage.forward).waits < 0.05 * clock.parts(plain.forward).waits


def held_by_a_layer(model: ModelShape, tokens: int, tp: int) -> int:
    """Bytes in bf16, by hand: its input, what both norms and the attention's residual leave, each token on one rank; queries, keys, values
    and what attention makes of them; the MLP's two branches and their product; and in fp32 a number a token and norm, and one a token and
    head."""
    heads, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    numbers = 4 * model.hidden + 2 * heads + 2 * kv + 3 * model.ffn
    return tokens * (2 * numbers + 4 * (2 + model.heads)) // tp


def test_a_layer_of_405b_holds_a_quarter_of_a_gigabyte() -> None:
    """Of 4096 tokens. What is left of the stage's are the microbatch's own numbers: ids, angles, rows."""
    layer = held_by_a_layer(LLAMA_405B, T, TP)
    assert layer == 266_604_544
    assert 0 < rehearsed()[1].held - 8 * layer < layer / 100


def test_sixteen_layers_are_twice_eight() -> None:
    """Work between the ends is that of the layers alone, and what is held grows by as much with each, whatever the cut."""
    found = {}
    for layers, pp in ((2, 8), (4, 4)):
        model = replace(SMALL, layers=layers * pp)
        found[layers] = stages.simulate_stages(model, Parallel(2, pp), 2 * pp, (48, 16), optim=OPTIM)[1]
    assert found[4].forward.matmuls == found[2].forward.matmuls + found[2].forward.matmuls
    assert found[4].backward.collectives == found[2].backward.collectives + found[2].backward.collectives
    by_hand = stages.simulate_stages(model, Parallel(2, 4, stages=(4, 3, 5, 4)), 8, (48, 16), optim=OPTIM)
    held = {stage.layers: stage.held for stage in by_hand[1:3]} | {layers: stage.held for layers, stage in found.items()}
    assert held[5] - held[4] == held[4] - held[3] == held[3] - held[2] == held_by_a_layer(model, tokens=64, tp=2)


def test_virtual_stages_are_told_apart() -> None:
    """Four ranks' worth of layers on two: stage i is chunk i // 2 of rank i % 2, and together they are what four ranks are."""
    model = replace(SMALL, layers=8)
    two = stages.simulate_stages(model, Parallel(1, 2, 2), 2, (64,), optim=OPTIM)
    four = {stage.pp: stage for stage in stages.simulate_stages(model, Parallel(1, 4), 4, (64,), optim=OPTIM)}
    assert [(stage.pp, stage.chunk) for stage in two] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for stage in two:
        alone = four[2 * stage.chunk + stage.pp]
        assert (stage.layers, stage.parameters, stage.held) == (alone.layers, alone.parameters, alone.held)
        assert (stage.forward, stage.backward) == (alone.forward, alone.backward)
        assert stage.optimizer == pytest.approx(alone.optimizer, rel=1e-3)


def clean() -> bool:
    from megatron.core import parallel_state

    return not dist.is_initialized() and not parallel_state.model_parallel_is_initialized() and torch.zeros(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("where", ["engine.megatron.single_stage.SingleStage.backward", "engine.megatron.optimizers.make_optimizer"])
def test_the_process_is_left_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a failure in the middle, and by one before there is a policy to close."""
    stages.simulate_stages(SMALL, Parallel(2), 4, (64,), optim=OPTIM)
    assert clean()

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(where, fail)
    with pytest.raises(RuntimeError, match="planted"):
        stages.simulate_stages(SMALL, Parallel(2), 4, (64,), optim=OPTIM)
    assert clean()


def test_what_cannot_be_rehearsed_is_named() -> None:
    with pytest.raises(ValueError, match=r"parallel.tp=3 must divide .* use parallel.tp=1"):
        stages.simulate_stages(SMALL, Parallel(3), 3, (63,), optim=None)
    with pytest.raises(ValueError, match=r"their sum 63 must be a multiple of parallel.tp=2"):
        stages.simulate_stages(SMALL, Parallel(2), 2, (63,), optim=None)


def metered(compute: Callable[[], Any], device: str = "meta") -> tuple[Work, int, int]:
    """(work, live at the end, peak)."""
    with Meter(torch.device(device), {"a group": "tp"}) as meter:
        kept = compute()
        live = meter.live
    del kept
    return meter.taken(), live, meter.peak


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_memory_is_counted_by_storage(device: str) -> None:
    """Views and what was there before are nothing; a storage given back or resized is what it is then."""
    before = torch.zeros(100, device=device)

    def compute() -> torch.Tensor:
        before.add_(1)
        first = before.view(10, 10) * 2  # 400 bytes
        second = first.t()[2:].reshape(-1)[:5]  # a copy: 320
        del first
        third = torch.zeros(50, device=device)
        third.untyped_storage().resize_(0)
        return second

    work, live, peak = metered(compute, device)
    assert (live, peak) == (320, 720)
    assert work.kernels == 4
    assert work.traffic == 800 + 800 + 640 + 200


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def cases() -> dict[str, tuple[str, str, tuple[Any, ...]]]:
    """name -> (file, operation, arguments): what a launch does with our kernels, 10 rows in chunks of 4 among them."""
    hidden, weight = tensors((10, 64), (8192, 64))
    target = torch.empty(10, dtype=torch.int64, device="meta")
    stats, grad_stats, main_grad, kept = tensors((5, 10), (5, 10), (8192, 64), (12, 8192), dtype=torch.float32)
    rstd = torch.empty(600, dtype=torch.float32, device="meta")
    narrow_grad, narrow, wide_grad, wide = tensors((600, 128), (600, 128), (600, 32768), (600, 32768))
    whole, tail = ("", 0, 8000, 1.0, False), (4, torch.float32)
    tokens, clips = (hidden, weight, target, stats[0]), (0.2, 0.2, "k3", 0.0)
    given, wanted = (hidden, weight, target, stats, grad_stats), (True, True)
    return {
        "kept": ("linear_logprob", "_linear_logprob", (hidden, weight, target, main_grad, *whole, True, *tail)),
        "not kept": ("linear_logprob", "_linear_logprob", (hidden, weight, target, main_grad, *whole, False, *tail)),
        "backward": ("linear_logprob", "_linear_logprob_backward", (*given, kept, main_grad, *wanted, *whole, *tail)),
        "made again": ("linear_logprob", "_linear_logprob_backward", (*given, None, main_grad, *wanted, *whole, *tail)),
        "its own gradient": ("linear_logprob", "_linear_logprob_backward", (*given, kept, None, *wanted, *whole, *tail)),
        "one chunk": ("linear_logprob", "_linear_logprob_backward", (*given, kept, None, *wanted, *whole, 16, torch.float32)),
        "spoiled": ("linear_logprob", "_linear_logprob_backward", (*given, None, main_grad, *wanted, *whole, 4, torch.bfloat16)),
        "hidden alone": ("linear_logprob", "_linear_logprob_backward", (*given, None, None, True, False, *whole, *tail)),
        "policy loss": ("policy_loss", "_linear_policy_loss", (*tokens, None, None, None, main_grad, *clips, *whole, *tail, *wanted)),
        "policy loss, its own gradient": ("policy_loss", "_linear_policy_loss", (*tokens, *[None] * 4, *clips, *whole, *tail, *wanted)),
        "logprob": ("logprob", "_logprob", (kept[:10], target, *whole)),
        "rmsnorm": ("rmsnorm", "_backward", (narrow_grad, None, narrow, narrow[0], rstd)),
        "rmsnorm, wide": ("rmsnorm", "_backward", (wide_grad, None, wide, wide[0], rstd)),
    }


@pytest.mark.parametrize("rows", [0, 1, 1000, 1024, 4097, 5000, 8192, 20000])
@pytest.mark.parametrize("vocab", [16032, 128256])
def test_few_rows_of_the_output_layer_are_padding(rows: int, vocab: int) -> None:
    """Products on a GPU over those that are needed: whole blocks of 1024 rows forward, and no padding in the gradients."""
    hidden, weight = tensors((rows, 512), (vocab, 512))
    target, ones = torch.empty(rows, dtype=torch.int64, device="meta"), torch.empty(rows, device="meta")
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    work, _, _ = metered(lambda: linear_policy_loss(hidden, weight, target, ones))
    needed, blocks = 2 * rows * 512 * vocab, -(-rows // 1024)
    assert work.flops == 2 * blocks * 1024 * 512 * vocab + 2 * needed
    if rows == 5000:
        assert work.flops <= 1.01 * 3 * needed
        forward, _, _ = metered(lambda: linear_logprob(hidden, weight, target, mode="nograd"))
        assert forward.flops <= 1.03 * needed


@pytest.mark.parametrize("case", cases())
def test_formulas_are_what_the_code_of_our_kernels_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation is metered as a rehearsal does it, closed; and opened, its code run on shapes, where every product and every
    allocation is seen and launches are counted."""
    file, operation, arguments = cases()[case]
    module = import_module(f"triton_kernels.{file}")
    launches: list[Any] = []
    for name in ("logprob", "rmsnorm"):
        monkeypatch.setattr(import_module(f"triton_kernels.{name}"), "launch", lambda kernel, *_, **__: launches.append(kernel))
    closed, live, peak = metered(lambda: getattr(module, operation)(*arguments))
    assert not launches
    opened, opened_live, opened_peak = metered(lambda: getattr(module, operation).function(*arguments))
    assert closed.matmuls == opened.matmuls
    assert closed.kernels == opened.kernels + len(launches)
    assert closed.traffic >= opened.traffic
    assert live == opened_live
    assert peak == pytest.approx(opened_peak, rel=0.01)


def test_formulas_are_of_operations_that_there_are() -> None:
    assert all(hasattr(torch.ops.trivet, name) for name in KERNELS)

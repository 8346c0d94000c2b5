"""Simulated stages against formulas derived by hand, and against the products and allocations in the code of our kernels."""

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
def simulated(recompute: Any = "none") -> list[Stage]:
    return stages.simulate_stages(LLAMA_405B, replace(GRID, recompute=recompute), 256, LENGTHS, optim=OPTIM)


def products(work: Work) -> float:
    return work.flops - work.attention


def causal_pairs() -> int:
    return sum(length * (length + 1) // 2 for length in LENGTHS)


# A layer of 405B on one of 8 tensor-parallel ranks: multiply-adds per token.
_M = LLAMA_405B
ATTENTION_MATRICES = _M.hidden * _M.head_dim * (2 * _M.heads + 2 * _M.kv_heads) // TP
MLP_MATRICES = 3 * _M.hidden * _M.ffn // TP
LAYER = 2 * T * (ATTENTION_MATRICES + MLP_MATRICES)
SCORES = _M.heads // TP * _M.head_dim * causal_pairs()


def test_a_replica_has_the_parameters_of_the_model() -> None:
    """Norms are on every tensor-parallel rank, everything else is sharded in 8, and 128256 vocabulary rows need no padding."""
    results = simulated()
    assert [stage.layers for stage in results] == [7, *[8] * 14, 7]
    norms = (2 * 126 + 1) * 16384
    assert 8 * sum(stage.parameters for stage in results) - 7 * norms == LLAMA_405B.parameters == 405_853_388_800


def test_flops_of_a_layer_equal_those_of_its_matrices() -> None:
    stage = simulated()[1]
    assert products(stage.forward) == products(stage.inference) == 8 * LAYER
    assert products(stage.backward) == 2 * 8 * LAYER
    assert stage.forward.attention == 8 * 4 * SCORES
    assert stage.backward.attention == 8 * 10 * SCORES
    assert stage.forward.matmuls[Matmul(T, _M.hidden, 2 * _M.ffn // TP)] == 8  # gate and up in one product


@pytest.mark.parametrize(("recompute", "again"), [("selective", 2 * T * MLP_MATRICES), ("full", LAYER)])
def test_recomputation_is_counted_in_backward(recompute: str, again: int) -> None:
    plain, stage = simulated()[1], simulated(recompute)[1]
    assert stage.forward.matmuls == plain.forward.matmuls
    assert products(stage.backward) == 8 * (2 * LAYER + again)
    assert stage.backward.attention == 8 * (14 if recompute == "full" else 10) * SCORES
    assert stage.held < plain.held / 2
    assert stage.held < stage.peak < plain.peak


def test_the_output_layer_has_three_products() -> None:
    """The last stage has one layer less than the middle stages. In forward, the microbatch is four blocks of 1024 rows."""
    vocabulary = Matmul(1024, _M.hidden, _M.vocab // TP)
    last = simulated()[-1]
    assert last.forward.matmuls[vocabulary] == 4
    assert products(last.forward) == 7 * LAYER + 4 * 2 * vocabulary.m * vocabulary.k * vocabulary.n
    assert products(last.backward) == 2 * products(last.forward)


def test_memory_between_steps() -> None:
    """bf16 weights, fp32 gradients, and on each of two replicas half of 12 bytes per parameter (and step counters)."""
    for stage in simulated():
        assert stage.weights == 2 * stage.parameters
        assert stage.gradients == 4 * stage.parameters
        assert stage.optimizer == pytest.approx(12 * stage.parameters / DP, rel=1e-6)


def test_memory_of_a_model_without_optimizer() -> None:
    stage = stages.simulate_stages(LLAMA_405B, GRID, 256, LENGTHS, optim=None)[1]
    trained = simulated()[1]
    assert (stage.weights, stage.gradients, stage.optimizer, stage.held) == (trained.weights, 0, 0, 0)
    assert (stage.backward, stage.inference) == (Work(), trained.inference)
    assert stage.peak == stage.inference_peak == trained.inference_peak < trained.held


def test_a_critic_outputs_one_number_per_token() -> None:
    """It has no vocabulary product: in addition to its layers, the last stage only gathers T numbers."""
    critic = stages.simulate_stages(SMALL.with_scalar_head(), Parallel(2), 2, (48, 16), optim=OPTIM)[0]
    policy = stages.simulate_stages(SMALL, Parallel(2), 2, (48, 16), optim=OPTIM)[0]
    assert critic.forward.collectives[Collective("all_gather", "tp", 64 * 4, True)] == 1
    assert critic.forward.matmuls[Matmul(32, 64, 1)] == 1
    assert critic.parameters == policy.parameters - 512 // 2 * 64 + 64


def test_a_tensor_parallel_layer_has_eight_collectives() -> None:
    """Each of its two halves gathers its input and scatters its output. Backward does the reverse, and during its products it also gathers
    the input again for the weight gradient and scatters the input gradient."""
    full = T * _M.hidden * 2
    stage = simulated()[1]
    gather, scatter = Collective("all_gather", "tp", full, True), Collective("reduce_scatter", "tp", full, True)
    assert stage.forward.collectives == Counter({gather: 16, scatter: 16})
    beside = [collective._replace(waits=False) for collective in (gather, scatter)]
    assert stage.backward.collectives == Counter({gather: 16, **dict.fromkeys(beside, 16)})


def test_with_overlap_a_layer_waits_for_no_collective() -> None:
    """The products are the same; blocking collectives are now part of their products, and the others are unchanged."""
    full = T * _M.hidden * 2
    plain = simulated()[1]
    stage = stages.simulate_stages(LLAMA_405B, replace(GRID, tp_comm_overlap=True), 256, LENGTHS, optim=OPTIM)[1]
    for results, before in ((stage.forward, plain.forward), (stage.backward, plain.backward)):
        assert products(results) == products(before)
        assert results.flops == before.flops
        assert not any(collective.waits for collective in results.collectives)
        assert results.collectives == Counter({c: times for c, times in before.collectives.items() if not c.waits})
        assert {each.size for each in results.overlapped} == {full}
        assert results.matmuls + Counter({each.matmul: times for each, times in results.overlapped.items()}) == before.matmuls
    assert [sum(work.overlapped.values()) for work in (stage.forward, stage.backward)] == [32, 16]
    assert stage.held == plain.held
    clock = CostModel(Hardware.load("h100"), GRID, 256)
    assert clock.parts(stage.forward).products == pytest.approx(clock.parts(plain.forward).products)
    assert clock.parts(stage.forward).waits < 0.05 * clock.parts(plain.forward).waits


def held_by_a_layer(model: ModelShape, tokens: int, tp: int) -> int:
    """Bytes held, by hand. In bf16: the input and the outputs of both norms and of the attention's residual, sharded by token; queries,
    keys, values and attention's output; the MLP's two branches and their product. In fp32: one number per token and norm, and per token and
    head."""
    heads, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    numbers = 4 * model.hidden + 2 * heads + 2 * kv + 3 * model.ffn
    return tokens * (2 * numbers + 4 * (2 + model.heads)) // tp


def test_a_layer_of_405b_holds_a_quarter_of_a_gigabyte() -> None:
    """For 4096 tokens. The remaining bytes of the stage are those of the microbatch: ids, angles, row indices."""
    layer = held_by_a_layer(LLAMA_405B, T, TP)
    assert layer == 266_604_544
    assert 0 < simulated()[1].held - 8 * layer < layer / 100


def test_sixteen_layers_are_twice_eight() -> None:
    """Work and held memory of middle stages are proportional to the number of layers, for any layout."""
    results = {}
    for layers, pp in ((2, 8), (4, 4)):
        model = replace(SMALL, layers=layers * pp)
        results[layers] = stages.simulate_stages(model, Parallel(2, pp), 2 * pp, (48, 16), optim=OPTIM)[1]
    assert results[4].forward.matmuls == results[2].forward.matmuls + results[2].forward.matmuls
    assert results[4].backward.collectives == results[2].backward.collectives + results[2].backward.collectives
    by_hand = stages.simulate_stages(model, Parallel(2, 4, stages=(4, 3, 5, 4)), 8, (48, 16), optim=OPTIM)
    held = {stage.layers: stage.held for stage in by_hand[1:3]} | {layers: stage.held for layers, stage in results.items()}
    assert held[5] - held[4] == held[4] - held[3] == held[3] - held[2] == held_by_a_layer(model, tokens=64, tp=2)


def test_virtual_stages_equal_stages_of_more_ranks() -> None:
    """Four virtual stages on two ranks: stage i is chunk i // 2 of rank i % 2, and equals the stage of rank i of four."""
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
def test_the_process_state_is_restored(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error during the simulation, and after one before the policy is created."""
    stages.simulate_stages(SMALL, Parallel(2), 4, (64,), optim=OPTIM)
    assert clean()

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(where, fail)
    with pytest.raises(RuntimeError, match="planted"):
        stages.simulate_stages(SMALL, Parallel(2), 4, (64,), optim=OPTIM)
    assert clean()


def test_unsupported_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"parallel.tp=3 must divide .* use parallel.tp=1"):
        stages.simulate_stages(SMALL, Parallel(3), 3, (63,), optim=None)
    with pytest.raises(ValueError, match=r"their sum 63 must be a multiple of parallel.tp=2"):
        stages.simulate_stages(SMALL, Parallel(2), 2, (63,), optim=None)


def metered(compute: Callable[[], Any], device: str = "meta") -> tuple[Work, int, int]:
    """(work, bytes live at the end, peak bytes)."""
    with Meter(torch.device(device), {"a group": "tp"}) as meter:
        kept = compute()
        live = meter.live
    del kept
    return meter.taken(), live, meter.peak


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_memory_is_counted_by_storage(device: str) -> None:
    """Views and earlier allocations are not counted; freed and resized storages are counted with their new size."""
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
    """name -> (file, operation, arguments) for the kernel operations of a launch, including 10 rows in chunks of 4."""
    hidden, weight = tensors((10, 64), (8192, 64))
    target = torch.empty(10, dtype=torch.int64, device="meta")
    stats, grad_stats, main_grad, kept = tensors((5, 10), (5, 10), (8192, 64), (12, 8192), dtype=torch.float32)
    rstd = torch.empty(600, dtype=torch.float32, device="meta")
    narrow_grad, narrow, wide_grad, wide = tensors((600, 128), (600, 128), (600, 32768), (600, 32768))
    full, tail = ("", 0, 8000, 1.0, False), (4, torch.float32)
    tokens, clips = (hidden, weight, target, stats[0]), (0.2, 0.2, "k3", 0.0)
    given, expected = (hidden, weight, target, stats, grad_stats), (True, True)
    return {
        "kept": ("linear_logprob", "_linear_logprob", (hidden, weight, target, main_grad, *full, True, *tail)),
        "not kept": ("linear_logprob", "_linear_logprob", (hidden, weight, target, main_grad, *full, False, *tail)),
        "backward": ("linear_logprob", "_linear_logprob_backward", (*given, kept, main_grad, *expected, *full, *tail)),
        "made again": ("linear_logprob", "_linear_logprob_backward", (*given, None, main_grad, *expected, *full, *tail)),
        "its own gradient": ("linear_logprob", "_linear_logprob_backward", (*given, kept, None, *expected, *full, *tail)),
        "one chunk": ("linear_logprob", "_linear_logprob_backward", (*given, kept, None, *expected, *full, 16, torch.float32)),
        "spoiled": ("linear_logprob", "_linear_logprob_backward", (*given, None, main_grad, *expected, *full, 4, torch.bfloat16)),
        "hidden alone": ("linear_logprob", "_linear_logprob_backward", (*given, None, None, True, False, *full, *tail)),
        "policy loss": ("policy_loss", "_linear_policy_loss", (*tokens, None, None, None, main_grad, *clips, *full, *tail, *expected)),
        "policy loss, its own gradient": ("policy_loss", "_linear_policy_loss", (*tokens, *[None] * 4, *clips, *full, *tail, *expected)),
        "logprob": ("logprob", "_logprob", (kept[:10], target, *full)),
        "rmsnorm": ("rmsnorm", "_backward", (narrow_grad, None, narrow, narrow[0], rstd)),
        "rmsnorm, wide": ("rmsnorm", "_backward", (wide_grad, None, wide, wide[0], rstd)),
    }


@pytest.mark.parametrize("rows", [0, 1, 1000, 1024, 4097, 5000, 8192, 20000])
@pytest.mark.parametrize("vocab", [16032, 128256])
def test_few_rows_of_the_output_layer_are_padding(rows: int, vocab: int) -> None:
    """FLOPs on a GPU over the necessary ones: forward is padded to blocks of 1024 rows, gradients are not padded."""
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
def test_cost_formulas_equal_the_code_of_our_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost formula of an operation is compared with its code run on meta tensors, in which all products, allocations and launches are
    counted."""
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


def test_cost_formulas_are_for_existing_operations() -> None:
    assert all(hasattr(torch.ops.trivet, name) for name in KERNELS)

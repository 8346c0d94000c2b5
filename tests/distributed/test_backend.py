"""The backends: megatron-core on CPU and on meta tensors, and every distinct rank of 405B on 256 GPUs built in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from engine.config import Model, ModelShape, Optim, Parallel, RopeScaling, padded_vocab
from engine.distributed.world import World
from engine.megatron import backend
from engine.megatron.policy import Policy

LLAMA_405B = ModelShape(126, 16384, 53248, 128, 8, 128256, rope_theta=5e5, rope_scaling=RopeScaling(), max_length=131072)


@pytest.fixture(autouse=True)
def leave_the_world() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_patched_megatron_attributes_exist() -> None:
    assert backend.moved_sites() == []


def test_a_missing_megatron_attribute_is_named_with_its_use() -> None:
    moved = backend.moved_sites(
        (
            ("models.gpt", "GPTModel._gone", (), "log-probs"),
            ("pipeline_parallel", "get_forward_backward_func", ("never",), "the schedules"),
            ("no_such_module", "x", (), "nothing"),
        )
    )
    assert len(moved) == 3
    assert moved[0].startswith("megatron.core.models.gpt.GPTModel._gone is gone")
    assert "needed for: log-probs" in moved[0]
    assert moved[1] == "megatron.core.pipeline_parallel.get_forward_backward_func no longer takes never; it is needed for: the schedules"
    assert "megatron.core.no_such_module.x is gone" in moved[2]


def test_the_backend_is_restored() -> None:
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "_lazy_init")}
    with backend.cpu_backend(World("cpu", 0, 1, torch.device("cpu"))):
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert {name: getattr(torch.cuda, name) for name in before} == before
    assert torch.zeros(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("parallel", [Parallel(8, 16, count_embedding=True, count_loss=True), Parallel(8, 16, 4, True, True)], ids=str)
def test_every_distinct_rank_of_405b(parallel: Parallel) -> None:
    """TP8 x PP16 x DP2 = 256 ranks: the parameters of one replica add up to the model's, without padding of the vocabulary."""
    replica = 0
    for stage in range(parallel.pp):
        counts = {}
        for tp_rank in (0, 7):
            world = World.fake(rank=tp_rank + 2 * parallel.tp * stage, size=256)
            with closing(Policy(Model(init=LLAMA_405B), None, parallel, world)) as policy:
                assert policy.grid.pp_rank == stage
                assert policy.grid.tp_rank == tp_rank
                parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
                assert {p.device.type for p in parameters} == {"meta"}
                sharded = sum(p.numel() for p in parameters if getattr(p, "tensor_model_parallel", False))
                counts[tp_rank] = (sharded, sum(p.numel() for p in parameters) - sharded)
        assert counts[0] == counts[7]
        sharded, replicated = counts[0]
        replica += parallel.tp * sharded + replicated
    assert padded_vocab(LLAMA_405B.vocab, parallel.tp) == LLAMA_405B.vocab
    assert replica == LLAMA_405B.parameters
    assert round(replica / 1e9, 2) == 405.85


def test_a_training_rank_of_405b_has_its_optimizer() -> None:
    """With gradients in fp32 and the optimizer sharded over 2 replicas: 12 bytes of state per 2 parameters of this rank."""
    world = World.fake(rank=16, size=256)
    with closing(Policy(Model(init=LLAMA_405B), Optim(2e-6), Parallel(8, 16, count_embedding=True, count_loss=True), world)) as policy:
        here = sum(p.numel() for p in policy.chunks[0].parameters())
        adamw = policy.optimizer.chained_optimizers[0].optimizer
        state = sum(t.numel() for moments in adamw.state.values() for t in moments.values() if t.dim())
        master = sum(p.numel() for group in adamw.param_groups for p in group["params"])
        assert policy.chunks[0].config.params_dtype == torch.bfloat16
        assert (master + state) * 4 == pytest.approx(12 * here / 2, rel=1e-3)

"""The operations of a layer: numbers of additions, norms, splits and copies, counted on meta tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import ModelShape, Optim, Parallel, Recompute
from engine.dryrun import stages
from engine.megatron.single_stage import SingleStage

MODEL = ModelShape(layers=9, hidden=64, ffn=192, heads=8, kv_heads=4, vocab=500)
LAYERS = 3
VIEWS = {"view", "_unsafe_view", "t", "detach", "slice", "select", "transpose", "split", "squeeze", "unsqueeze", "expand", "alias"}
ALLOCATIONS = {"empty", "new_empty", "empty_like"}


class Names(TorchDispatchMode):
    """Counts operations by name on tensors at least as wide as hidden states. A norm with fused addition is "rmsnorm, adding"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).partition(".")[2]
        wide = any(isinstance(x, torch.Tensor) and x.numel() >= 24 * MODEL.hidden for x in args)
        if wide and name not in VIEWS | ALLOCATIONS and not str(func).startswith("c10d"):
            self.counts["rmsnorm, adding" if name == "rmsnorm" and args[1] is not None else name] += 1
        return out


def counted(pp: int, recompute: Recompute) -> tuple[Counter[str], Counter[str]]:
    """The counts (forward, backward) of one microbatch of 24 tokens through three of nine layers."""
    parallel = Parallel(pp=3, recompute=recompute)
    with stages.become(MODEL, parallel, 3, pp, Optim(1e-5), "bf16") as policy:
        passage = SingleStage(policy, 0, stages.microbatch((16, 8), 24))
        with Names() as forward:
            passage.forward()
        with Names() as backward:
            passage.backward()
    return forward.counts, backward.counts


LAYER = {"mm": 4, "rope_qkv": 1, "attention": 1, "swiglu": 1}
BACKWARD = {"mm": 4, "addmm": 4, "rope_qkv_backward": 1, "attention_backward": 1, "swiglu_backward": 1, "rmsnorm_backward": 2}


def times(count: int, each: dict[str, int]) -> Counter[str]:
    return Counter({name: count * n for name, n in each.items()})


def test_number_of_additions_of_a_stage() -> None:
    """A stage adds once, for the next stage. All other additions are fused into norms: that after attention, and that of the next layer
    after the MLP. Backward adds once, at the input of the stage, which is used twice. Nothing is copied, repeated or concatenated."""
    forward, backward = counted(pp=1, recompute="none")
    assert forward == times(LAYERS, LAYER) + Counter({"rmsnorm": 1, "rmsnorm, adding": 2 * LAYERS - 1, "add": 1})
    assert backward == times(LAYERS, BACKWARD) + Counter({"add": 1})


def test_the_final_norm_includes_the_last_addition() -> None:
    forward, backward = counted(pp=2, recompute="none")
    assert (forward["rmsnorm"], forward["rmsnorm, adding"], forward["add"]) == (1, 2 * LAYERS, 0)
    assert (backward["rmsnorm_backward"], backward["add"]) == (2 * LAYERS + 1, 1)


def test_recomputation_adds_no_additions() -> None:
    """Recomputation of the MLP or of SwiGLU only, which have no additions."""
    plain = counted(pp=1, recompute="none")
    again: dict[Recompute, dict[str, int]] = {"selective": {"mm": 2, "swiglu": 1}, "swiglu": {"swiglu": 1, "new_zeros": 1}}
    for recompute, operations in again.items():
        forward, backward = counted(pp=1, recompute=recompute)
        assert forward == plain[0]
        assert backward == plain[1] + times(LAYERS, operations)


def test_with_full_recomputation_each_layer_adds() -> None:
    """So that one tensor per layer is saved instead of two."""
    forward, backward = counted(pp=1, recompute="full")
    assert forward == times(LAYERS, LAYER | {"rmsnorm": 1, "rmsnorm, adding": 1, "add": 1})
    assert backward == forward + times(LAYERS, BACKWARD | {"add": 1})


@pytest.mark.parametrize("recompute", ["none", "swiglu", "selective", "full"])
def test_bytes_held_per_layer(recompute: Recompute) -> None:
    """Bytes per token and layer in bf16, by hand: full recomputation saves a layer's input, the others also the inputs of both norms,
    attention and the MLP."""
    parallel = Parallel(pp=3, recompute=recompute)
    longer = ModelShape(layers=12, hidden=64, ffn=192, heads=8, kv_heads=4, vocab=500)
    held = [stages.simulate_stages(model, parallel, 3, (16, 8), optim=Optim(1e-5))[1].held for model in (MODEL, longer)]
    norms, heads, branches = 4 * 64, 2 * 64 + 2 * 32, 3 * 192
    of_each = {"none": norms + heads + branches, "swiglu": norms + heads + branches - 192, "selective": norms + heads, "full": 64}
    numbers = of_each[recompute]
    statistics = 0 if recompute == "full" else 4 * (2 + 8)  # fp32: two norms' and each head's
    assert held[1] - held[0] == 24 * (2 * numbers + statistics)

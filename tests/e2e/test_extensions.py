"""What CONTRIBUTING says an extension takes: one of each kind is added here, from outside the package. Of a kernel, its files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batching.build import batch
from engine.commands.recipe import load_recipe
from engine.config import ModelShape, override
from engine.megatron.microbatch import finish_for
from engine.models.families import FAMILIES, LLAMA, from_hf, tensor_shapes, to_hf
from engine.rollout.config import ENGINES, RolloutConfig
from engine.rollout.engine import start_engine
from engine.types import Loss, Packed, Sample
from engine.verify import VERIFIERS, verifier

ROOT = Path(__file__).parents[2]
MY_VERIFIER = """
from engine.verify.verdict import Verdict, Verifier

def verify(response, truth):
    return Verdict(response.endswith(truth), "the last word")

MINE = Verifier("mine", verify, check=str, judge=verify)
"""


def test_a_recipe_is_one_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text((ROOT / "recipes/tiny_sft.py").read_text())
    assert override(load_recipe(str(recipe)), ["optim.lr=0.5"]).optim.lr == 0.5


def test_a_verifier_is_a_file_and_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_verifier.py").write_text(MY_VERIFIER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(VERIFIERS, "mine", "my_verifier:MINE")
    assert verifier("mine").verify("no: yes", "yes").correct
    assert not verifier("mine").verify("yes or no", "yes").correct


def test_a_rollout_engine_is_a_file_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_engine.py").write_text("class Mine:\n    def __init__(self, policy, rollout):\n        self.rollout = rollout\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ENGINES, "mine", "my_engine:Mine")
    policy = cast(Any, SimpleNamespace(world=SimpleNamespace(parent=None)))
    started = start_engine(policy, RolloutConfig(engine="mine"))
    assert type(started).__name__ == "Mine"


def test_an_unknown_rollout_engine_is_an_error_of_the_recipe() -> None:
    with pytest.raises(ValueError, match=r"rollout.engine='vllm' must be one of sampler"):
        RolloutConfig(engine="vllm")


def test_a_model_family_is_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(
        LLAMA, model_type="mine", causal_lm="MineForCausalLM", from_hf=lambda config: replace(LLAMA.from_hf(config), family="mine")
    )
    monkeypatch.setitem(FAMILIES, "mine", mine)
    llama = ModelShape(vocab=256, hidden=64, ffn=96, layers=2, heads=4, kv_heads=2, head_dim=16)
    shape = from_hf(to_hf(llama) | {"model_type": "mine", "architectures": ["MineForCausalLM"]})
    assert shape == replace(llama, family="mine")
    assert to_hf(shape) == to_hf(llama) | {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    assert tensor_shapes(shape) == tensor_shapes(llama)


def test_a_loss_is_a_function() -> None:
    """The negative probability of the trained tokens: its sum and count, as the policy calls it, are the same for any microbatches."""

    def mine(logprob_T: Tensor, packed: Packed) -> Loss:
        total, count = -(logprob_T.exp() * packed.mask_T).sum(), int(packed.counts().sum())
        return Loss(total, count, {"loss": (total.detach(), count)})

    samples = [Sample(np.arange(n + 1), np.ones(n, np.uint8)) for n in (5, 9, 3)]
    for budget in (16, 64):
        packs = batch(samples, budget)
        results = [finish_for(mine)(packed, torch.full((len(packed.tokens_T),), -1.0)) for packed in packs]
        total, count = sum(float(total) for total, _, _ in results), sum(int(count) for _, count, _ in results)
        assert (len(packs) > 1) == (budget == 16)
        assert count == 17
        assert total == pytest.approx(-17 * math.exp(-1))
        assert all(result[2]["metrics"]["loss"][1] == int(result[1]) for result in results)


@pytest.mark.parametrize("kernel", ["ppo", "swiglu"])
def test_a_kernel_is_four_files(kernel: str) -> None:
    paths = [
        f"triton_kernels/{kernel}.py",
        f"tests/kernels/test_{kernel}.py",
        "benchmarks/kernels/floors.py",
        "benchmarks/kernels/operations.py",
    ]
    assert all((ROOT / path).exists() for path in paths)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(path.replace(f"{kernel}.py", "x.py") in text for path in paths)

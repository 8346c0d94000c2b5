"""Invalid launches of the 405B recipes are refused in one line that names the field, its value and a value that works. That value works.
The same holds for warnings."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.commands.recipe import load_recipe
from engine.config import Run, override
from engine.config.checks import problems, warnings
from engine.dryrun.model_shapes import shape_of
from tests.support import jobs
from tests.support.launch_405b import RECIPE, prepared
from tests.support.paths import ROOT
from tests.support.pool import ranks


class Fault(NamedTuple):
    """An invalid launch: its error, and the settings that fix it, each of which is named in the error."""

    recipe: str
    settings: list[str]
    says: str
    mended: list[str]
    world: int = 256
    tokens: int = 0  # of the tokenizer, if it is not the model's
    named: str = ""  # the setting's name in the error, if different


FAULTS = [
    Fault("405b_sft", ["parallel.tp=16"], "parallel.tp=16 must divide model.heads=128, model.kv_heads=8 and", ["parallel.tp=8"]),
    Fault(
        "405b_sft",
        ["parallel.pp=12", "parallel.vpp=1"],
        "parallel.pp=12 x parallel.vpp=1 must divide model.layers=126 (128 slots with embedding and loss counted)",
        ["parallel.pp=16"],
    ),
    Fault("405b_sft", ["parallel.vpp=3"], "parallel.pp=32 x parallel.vpp=3 must divide model.layers=126", ["parallel.vpp=4"]),
    Fault(
        "405b_sft",
        ["parallel.count_embedding=false"],
        "must divide model.layers=126 (127 slots with loss counted)",
        ["parallel.count_embedding=true"],
    ),
    Fault(
        "405b_sft",
        ["parallel.vpp=1", "parallel.pp=16", "parallel.stages=[8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8]"],
        "must have pp x vpp = 16 entries that add up to model.layers=126",
        ["parallel.stages=[7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7]"],
    ),
    Fault("405b_sft", ["parallel.pp=1"], "parallel.vpp=4 needs parallel.pp of at least 2", ["parallel.vpp=1"]),
    Fault(
        "405b_sft", ["algorithm.batch_size=16"], "algorithm.batch_size=16 gives 16 samples per optimizer step", ["algorithm.batch_size=32"]
    ),
    Fault(
        "405b_sft",
        ["algorithm.max_length=16380"],
        "algorithm.max_length=16380 exceeds tokens_per_microbatch=6400",
        ["tokens_per_microbatch=16384"],
    ),
    Fault(
        "405b_sft",
        ["algorithm.max_length=262144", "tokens_per_microbatch=262144"],
        "algorithm.max_length=262144 exceeds the model's context of 131072",
        ["algorithm.max_length=131072"],
    ),
    Fault("405b_sft", ["algorithm.epochs=inf"], "algorithm.epochs=inf must be positive and at most 1e9", ["algorithm.epochs=1"]),
    Fault("405b_sft", ["optim.lr=2"], "optim.lr=2.0 must be from 0 to 1", ["optim.lr=1e-6"]),
    Fault("405b_sft", ["optim.lr=nan"], "optim.lr=nan must be from 0 to 1", ["optim.lr=1e-6"]),
    Fault("405b_sft", ["optim.warmup_ratio=3"], "optim.warmup_ratio=3.0 must be at least 0 and below 1", ["optim.warmup_ratio=0.03"]),
    Fault(
        "405b_sft",
        ["model.tokenizer=elsewhere"],
        "model.tokenizer=elsewhere has 128264 tokens, more than the model's vocabulary of 128256",
        ["model.tokenizer="],
        tokens=128264,
        named="leave model.tokenizer empty",
    ),
    Fault("405b_dpo", ["model.head=scalar"], "is a reward model, but a language model is needed", ["model.head=auto"]),
    Fault("405b_dpo", ["algorithm.beta=0"], "algorithm.beta=0.0 must be positive", ["algorithm.beta=1"]),
    Fault("405b_dpo", ["tokens_per_microbatch=1024"], "algorithm.max_length=2048 exceeds", ["tokens_per_microbatch=2048"]),
    Fault(
        "405b_rlvr",
        ["algorithm.critic.model.path=allenai/Llama-3.1-Tulu-3-8B-SFT"],
        "algorithm.critic.model allenai/Llama-3.1-Tulu-3-8B-SFT is a language model, but a reward model is needed",
        ["algorithm.critic.model.head=scalar"],
    ),
    Fault(
        "405b_rlvr",
        ["algorithm.critic.model.path=meta-llama/Llama-3.1-8B", "algorithm.critic.model.head=scalar"],
        "has a vocabulary of 128256 and the policy one of 128264, but both must use the same token ids",
        ["algorithm.critic.model.path=allenai/Llama-3.1-Tulu-3-8B-SFT"],  # which has a scalar head
        named="a critic with a vocabulary of 128264",
    ),
    Fault(
        "405b_rlvr",
        ["parallel.vpp=8"],
        "algorithm.critic.model: parallel.pp=16 x parallel.vpp=8 must divide its 32 layers",
        ["parallel.vpp=2"],
    ),
    Fault(
        "405b_rlvr",
        ["algorithm.rollout.kv_cache_gb=0.1"],
        "algorithm.rollout.kv_cache_gb=0.1 holds 8 sequences of 3072 tokens, and 16 pipeline stages need one each",
        ["algorithm.rollout.kv_cache_gb=0.188"],
    ),
    Fault("405b_rlvr", ["algorithm.prompts_per_step=24"], "algorithm.prompts_per_step=24 gives", ["algorithm.prompts_per_step=32"]),
    Fault(
        "405b_rlvr",
        ["algorithm.minibatches=100"],
        "algorithm.prompts_per_step=1856 with algorithm.minibatches=100 gives 18 samples per optimizer step",
        ["algorithm.minibatches=58"],
    ),
    Fault(
        "405b_rlvr",
        ["algorithm.max_response_tokens=4096"],
        "algorithm.max_prompt_tokens=2048 with max_response_tokens=4096 exceeds tokens_per_microbatch=3072",
        ["tokens_per_microbatch=6144"],
    ),
    Fault(
        "405b_rlvr",
        [
            "algorithm.max_prompt_tokens=130048",
            "tokens_per_microbatch=131072",
            "algorithm.max_response_tokens=2048",
            "algorithm.rollout.kv_cache_gb=100",
        ],
        "algorithm.max_prompt_tokens=130048 with max_response_tokens=2048 exceeds the model's context of 131072 tokens",
        ["algorithm.max_response_tokens=1024"],
    ),
    Fault("405b_rlvr", ["algorithm.temperature=0"], "algorithm.temperature=0.0 must be positive", ["algorithm.temperature=1.0"]),
    Fault("70b_rlvr", ["parallel.pp=2", "parallel.vpp=2"], "parallel.pp=2 with parallel.vpp=2 cannot generate", ["parallel.vpp=1"], 64),
]


@lru_cache
def recipe(name: str) -> Run:
    return load_recipe(str(ROOT / f"recipes/tulu3_{name}.py"))


def complaints(fault: Fault, settings: list[str]) -> list[str]:
    try:
        run = override(recipe(fault.recipe), settings)
    except ValueError as error:
        return [str(error)]
    return problems(run, shape_of, fault.world, tokens=fault.tokens if run.model.tokenizer else shape_of(run.model).vocab)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.recipe} {' '.join(fault.settings)}"[:60])
def test_a_fault_is_refused_and_the_suggestion_fixes_it(fault: Fault) -> None:
    (line,) = complaints(fault, fault.settings)
    assert fault.says in line
    assert "\n" not in line
    way_out = line.partition(fault.says)[2]
    for setting in fault.mended:
        value = re.escape(fault.named or setting.partition("=")[2])
        assert re.search(rf"(?<![\d.]){value}(?![\d.]*\d)", way_out), line
    assert complaints(fault, [*fault.settings, *fault.mended]) == []


def test_run_refuses_before_a_weight_is_read(tmp_path: Path) -> None:
    """The error is about the setting, not about missing weights."""
    settings = [*prepared(tmp_path), "parallel.tp=1", "parallel.pp=1", f"out={tmp_path / 'out'}", "algorithm.rollout.kv_cache_gb=1e-6"]
    for name in ("policy", "critic"):
        (tmp_path / name / "model.safetensors").write_bytes(b"no weights")
    code, _, stderr = ranks(1).run(jobs.command, words=["run", str(ROOT / RECIPE), *settings])[0]
    assert code == 1
    assert "error: algorithm.rollout.kv_cache_gb=1e-06 holds 0 sequences of 80 tokens, and 1 pipeline stages need one each; use" in stderr
    assert not (tmp_path / "out").exists()


def test_the_world_size_is_checked() -> None:
    (line,) = problems(recipe("405b_rlvr"), shape_of, 250)
    assert line.startswith("parallel.tp=8 x parallel.pp=16 = 128 must divide the world size of 250")
    assert "128 or 256 ranks" in line
    assert problems(recipe("405b_rlvr"), shape_of, 256) == []
    assert problems(recipe("405b_rlvr"), shape_of, 128) == []


def test_several_faults_are_all_reported() -> None:
    run = override(
        recipe("405b_rlvr"), ["algorithm.prompts_per_step=24", "algorithm.rollout.kv_cache_gb=0.1", "algorithm.max_response_tokens=4096"]
    )
    assert len(problems(run, shape_of, 256)) == 3


def test_a_fault_beyond_one_setting_names_a_pair_that_works() -> None:
    (line,) = problems(override(recipe("405b_sft"), ["parallel.tp=3", "parallel.pp=7"]), shape_of, 256)
    assert "parallel.tp=8 with parallel.pp=4 and vpp=1" in line
    assert problems(override(recipe("405b_sft"), ["parallel.tp=8", "parallel.pp=4", "parallel.vpp=1"]), shape_of, 256) == []


WARNED = [
    ("405b_sft", [], {"node": 4}, "parallel.tp=8 spans several nodes of 4 GPUs", "parallel.tp=4"),
    (
        "70b_sft",
        ["parallel.stages=[]"],
        {},
        "have as many parameters as 1.2 layers each",
        "parallel.stages=[4, 5, 5, 5, 5, 5, 5, 6, 6, 5, 5, 5, 5, 5, 5, 4]",
    ),
    (
        "405b_sft",
        ["parallel.pp=16", "algorithm.batch_size=257"],
        {},
        "gives 257 samples per optimizer step, not a multiple of the 2 replicas",
        "algorithm.batch_size=258",
    ),
    (
        "405b_sft",
        ["parallel.vpp=1", "parallel.pp=16", "tokens_per_microbatch=8192"],
        {"tokens": 700.0},
        "gives 11 microbatches per replica, so the parallel.pp=16 stages are idle 58%",
        "parallel.vpp=8",
    ),
    (
        "405b_dpo",
        ["tokens_per_microbatch=2048"],
        {},
        "they can have 4096 tokens, more than tokens_per_microbatch=2048",
        "tokens_per_microbatch=4096",
    ),
    ("405b_sft", ["parallel.recompute=none", "parallel.vpp=1"], {}, "keeps about 56 GB of activations", "parallel.recompute=selective"),
    ("405b_rlvr", ["algorithm.rollout.max_num_seqs=1000"], {}, "is more than the 928 responses", "algorithm.rollout.max_num_seqs=896"),
    (
        "405b_rlvr",
        ["algorithm.rollout.max_num_seqs=500"],
        {},
        "makes 31 for each of parallel.pp=16 stages",
        "algorithm.rollout.max_num_seqs=384",
    ),
]


@pytest.mark.parametrize(("name", "settings", "how", "says", "mended"), WARNED, ids=lambda value: str(value)[:40])
def test_a_warning_disappears_with_its_suggestion(name: str, settings: list[str], how: dict[str, float], says: str, mended: str) -> None:
    def said(*more: str) -> list[str]:
        run = override(recipe(name), [*settings, *more])
        assert problems(run, shape_of, 64 if name.startswith("70b") else 256) == []
        return [line for line in warnings(run, shape_of, 64 if name.startswith("70b") else 256, **how) if "model.vocab" not in line]  # type: ignore[arg-type]

    (line,) = said()
    assert says in line
    assert said(mended) == []


def test_padding_of_the_vocabulary_is_explained() -> None:
    (line,) = warnings(recipe("405b_rlvr"), shape_of, 256)
    assert "model.vocab=128264 with parallel.tp=8 gives 16033 rows per rank; it is padded to 128320, 16040 per rank" in line

"""The Tülu 3 recipes for 8B, 70B and 405B: they have the paper's numbers and pass all checks on their GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.dryrun.bench_recipes import layout, longest
from engine.batching.plan import plan
from engine.commands.recipe import load_recipe
from engine.config import Optim, Parallel, Run, override
from engine.config.checks import problems, warnings
from engine.dryrun.compose import composer
from engine.dryrun.forecast import forecast
from engine.dryrun.hardware import Hardware
from engine.dryrun.model_shapes import shape_of
from engine.dryrun.search import ROOM
from engine.dryrun.stages import simulate_stages
from engine.dryrun.workload import StageBuilder
from tests.support import jobs_rlvr
from tests.support.launch_405b import RECIPE, check_same, metric_records, prepared
from tests.support.paths import ROOT
from tests.support.pool import ranks

GPUS = {"8b": 8, "70b": 64, "405b": 256}
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("tulu3_*.py"))


def recipe(name: str) -> Run:
    return load_recipe(str(ROOT / f"recipes/{name}.py"))


def gpus(name: str) -> int:
    return GPUS[name.split("_")[1]]


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_valid_and_warn_only_about_padding(name: str) -> None:
    run = recipe(name)
    assert problems(run, shape_of, gpus(name)) == []
    message = warnings(run, shape_of, gpus(name))
    assert [line.split(" with ")[0] for line in message] == ["model.vocab=128264"] * (shape_of(run.model).vocab == 128264)


@lru_cache
def composed() -> StageBuilder:
    """Stages of all recipes; equal stages are simulated once."""
    return composer(simulate_stages)


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_with_sequences_of_the_maximum_length(name: str) -> None:
    run = recipe(name)
    results = forecast(run, gpus(name), Hardware.load("h100"), given=longest(run), rehearse=composed(), seek=False)
    assert results.fits
    assert all(line.startswith("model.vocab=128264 with ") for line in results.warnings)


@pytest.mark.parametrize("name", NAMES)
def test_its_prediction_is_on_the_page_and_nearly_the_best(name: str) -> None:
    """benchmarks/results/dryrun_recipes_*: of the current recipe, which fits with a margin and is at most 5 % slower than the best."""
    facts = json.loads(max((ROOT / "benchmarks/results").glob("dryrun_recipes_*.json")).read_text())
    fact, run = facts["recipes"][name], recipe(name)
    assert fact["layout"] == layout(run, fact["gpus"])
    assert fact["gpus"] == gpus(name)
    assert fact["fits"]
    assert fact["peak_bytes"] <= ROOM * Hardware.load("h100").memory
    assert fact["step_seconds"] <= 1.05 * fact["best"]["step_seconds"]


@pytest.mark.parametrize("name", NAMES)
def test_stages_have_all_layers_of_the_model(name: str) -> None:
    run = recipe(name)
    layers = run.parallel.layers_per_stage(shape_of(run.model))
    assert sum(layers) == shape_of(run.model).layers
    assert max(layers) - min(layers) <= 2
    ranks_ = [sum(layers[rank :: run.parallel.pp]) for rank in range(run.parallel.pp)]
    assert max(ranks_) - min(ranks_) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_microbatches_fit_the_schedule(name: str) -> None:
    """All replicas have equally many microbatches, within the budget, and a multiple of the stages if there are virtual stages."""
    run = recipe(name)
    grid, dp = run.parallel, gpus(name) // run.parallel.model_ranks
    turns = grid.pp if grid.vpp > 1 else 1
    count = getattr(run.algorithm, "batch_size", None) or run.algorithm.prompts_per_step
    lengths = np.random.default_rng(0).integers(50, 1400, count)
    planned = plan(lengths, dp, run.microbatch_tokens, cost=shape_of(run.model).cost, total_multiple=grid.tp, microbatch_multiple=turns)
    assert planned.microbatches % turns == 0
    assert planned.microbatches >= grid.pp or grid.pp == 1
    assert planned.totals.max() <= run.microbatch_tokens
    assert not (planned.totals % grid.tp).any()


PUBLISHED: dict[str, dict[str, Any]] = {  # arXiv 2411.15124; 405B: its model card
    "8b_sft": {"lr": 5e-6, "warmup_ratio": 0.03, "batch_size": 128, "max_length": 4096, "epochs": 2},
    "70b_sft": {"lr": 2e-6, "warmup_ratio": 0.03, "batch_size": 128, "max_length": 4096, "epochs": 2},
    "405b_sft": {"lr": 2e-6, "warmup_ratio": 0.03, "batch_size": 256, "max_length": 4096, "epochs": 2},
    "8b_dpo": {"lr": 5e-7, "warmup_ratio": 0.1, "batch_size": 128, "max_length": 2048, "beta": 5.0, "epochs": 1, "normalize": True},
    "70b_dpo": {"lr": 2e-7, "warmup_ratio": 0.1, "batch_size": 128, "max_length": 2048, "beta": 5.0, "epochs": 1, "normalize": True},
    "405b_dpo": {"lr": 2e-7, "warmup_ratio": 0.1, "batch_size": 256, "max_length": 2048, "beta": 5.0, "epochs": 1, "normalize": True},
    "8b_reward": {"lr": 3e-6, "batch_size": 256, "max_length": 2048, "epochs": 1},
    "8b_rlvr": {
        "lr": 3e-7,
        "warmup_ratio": 0.0,
        "kl_coef": 0.05,
        "prompts_per_step": 224,
        "epochs": 4,
        "max_response_tokens": 2048,
        "steps": 446,
    },
    "70b_rlvr": {
        "lr": 1e-7,
        "warmup_ratio": 0.1,
        "kl_coef": 0.07,
        "prompts_per_step": 640,
        "epochs": 4,
        "max_response_tokens": 2048,
        "steps": 625,
    },
    "405b_rlvr": {
        "lr": 1e-7,
        "warmup_ratio": 0.0,
        "kl_coef": 0.05,
        "prompts_per_step": 1856,
        "epochs": 4,
        "max_response_tokens": 1024,
        "steps": 75,
    },
}
RLVR = {
    "max_prompt_tokens": 2048, "temperature": 1.0, "correct_reward": 10.0, "no_stop_reward": -10.0, "gamma": 1.0, "gae_lambda": 0.95,
    "clip_low": 0.2, "clip_high": 0.2, "kl_estimator": "k1", "loss_average": "sequence",
    "minibatches": 1, "samples_per_prompt": 1, "weight_decay": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_settings_equal_the_papers(name: str) -> None:
    run = recipe(name)
    where = {**vars(run.algorithm), **vars(run.optim), "steps": run.steps}
    expected = PUBLISHED[name.removeprefix("tulu3_")] | (RLVR if name.endswith("rlvr") else {"weight_decay": 0.0, "steps": 0})
    assert {field: where[field] for field in expected} == expected
    assert (run.optim.schedule, run.optim.max_grad_norm, run.optim.betas, run.optim.eps) == ("linear", 1.0, (0.9, 0.999), 1e-8)
    assert run.algorithm.chat_template == "tulu"
    if name.endswith("rlvr"):
        critic = run.algorithm.critic
        assert (critic.loss_coef, critic.value_clip) == (0.1, 0.2)
        assert critic.optim == Optim(run.optim.lr, warmup_ratio=run.optim.warmup_ratio, weight_decay=0.01)
        assert "8B-RM" in critic.model.path


def test_the_405b_recipe_on_four_ranks(tmp_path: Path) -> None:
    """With settings that replace 405B by a tiny model. python -m tests.support.launch_405b does the same with torchrun on 16 ranks."""
    run = override(load_recipe(str(ROOT / RECIPE)), prepared(tmp_path))
    alone, four = (replace(run, parallel=replace(run.parallel, tp=n, pp=n), out=str(tmp_path / f"out-{n}")) for n in (1, 2))
    assert four.parallel == Parallel(tp=2, pp=2, count_embedding=True, count_loss=True)
    ranks(1).run(jobs_rlvr.trained, run=alone)
    ranks(4).run(jobs_rlvr.trained, run=four)
    check_same(metric_records(tmp_path / "out-2"), metric_records(tmp_path / "out-1"))

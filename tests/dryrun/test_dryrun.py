"""The dry run from recipe to prediction: predictions are consistent, invalid launches are refused, and suggested settings work."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.dryrun import bench_tulu
from engine.__main__ import main
from engine.algorithms.rlvr import RLVR, Critic
from engine.algorithms.sft import SFT
from engine.commands.recipe import load_recipe
from engine.config import Model, ModelShape, Optim, Parallel, Run, override
from engine.data.rows import Source
from engine.dryrun import lengths, model_shapes
from engine.dryrun import search as searching
from engine.dryrun.compose import composer
from engine.dryrun.forecast import Forecast, forecast
from engine.dryrun.hardware import Hardware
from engine.dryrun.microbatches import MicrobatchPlan, attention_cost
from engine.dryrun.phases import GENERATION
from engine.dryrun.report import as_json
from engine.dryrun.search import ROOM, search
from engine.dryrun.stages import simulate_stages
from engine.megatron import overlap
from engine.models.families import to_hf
from engine.rollout.config import RolloutConfig
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"
SMALL = ModelShape(layers=6, hidden=64, ffn=128, heads=4, kv_heads=2, vocab=320, max_length=4096)
H100 = Hardware.load("h100")
PARTS = composer(simulate_stages)  # simulated stages are shared between tests


def predict(run: Run, gpus: int, hardware: Hardware = H100) -> Forecast:
    """A prediction with composed stages, which equal simulated ones: see test_composed_stages_equal_simulated_ones."""
    return forecast(run, gpus, hardware, rehearse=PARTS)


def apply_advice(run: Run, gpus: int, way_out: str) -> tuple[Run, int]:
    """The run and the number of GPUs after applying a suggestion."""
    arguments = way_out.split()
    if "--gpus" in arguments:
        gpus = int(arguments[arguments.index("--gpus") + 1])
    return override(run, [word for word in arguments if "=" in word]), gpus


def sft(**parallel: Any) -> Run:
    return Run(
        model=Model(init=SMALL),
        algorithm=SFT(sources=(Source("allenai/RLVR-MATH"),), batch_size=64, max_length=512, epochs=2),
        optim=Optim(lr=1e-5),
        parallel=Parallel(**parallel),
        tokens_per_microbatch=1024,
    )


def rlvr(critic: ModelShape = SMALL, **settings: Any) -> Run:
    algorithm = RLVR(
        sources=(Source("allenai/RLVR-MATH"),),
        critic=Critic(Model(init=critic.with_scalar_head()), Optim(lr=1e-5)),
        prompts_per_step=32,
        max_prompt_tokens=512,
        max_response_tokens=256,
        rollout=RolloutConfig(max_num_seqs=8, kv_cache_gb=1.0),
        **settings,
    )
    return replace(sft(pp=2, tp=2), algorithm=algorithm)


def test_model_shapes_come_from_a_folder_or_a_known_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(SMALL)))
    assert model_shapes.shape_of(Model(str(tmp_path))) == SMALL
    assert model_shapes.guess_note(Model(str(tmp_path))) == ""
    big = model_shapes.shape_of(Model("meta-llama/Llama-3.1-405B"))
    assert big.parameters == 405_853_388_800
    critic = model_shapes.shape_of(Model("allenai/Llama-3.1-Tulu-3-8B-RM"))
    assert (critic.head, critic.vocab, critic.layers) == ("scalar", 128264, 32)
    assert "126 layers of hidden size 16384" in model_shapes.guess_note(Model("meta-llama/Llama-3.1-405B"))
    with pytest.raises(ValueError, match=r"model.path='runs/mine' is not on this machine.*; give a folder with config.json"):
        model_shapes.shape_of(Model("runs/mine"))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_number_of_gpus_equals_the_recipes_torchrun_line(path: Path) -> None:
    line = dict(re.findall(r"--(nnodes|nproc-per-node)\s+(\d+)", path.read_text()))
    expected = int(line.get("nnodes", 1)) * int(line["nproc-per-node"]) if line else 0
    assert load_recipe(str(path)).gpus == expected


@pytest.mark.parametrize("settings", [
    [], ["algorithm.kl_coef=0"], ["algorithm.epochs=1", "algorithm.minibatches=1"],
    ["algorithm.advantage=group", "algorithm.critic=none", "algorithm.samples_per_prompt=2"],
], ids=" ".join)  # fmt: skip
def test_the_flops_of_a_step_are_those_that_a_run_reports(settings: list[str]) -> None:
    """The loop adds the workload's inference passes to three forward passes per epoch; the dry run adds its phases."""
    predicted = predict(override(rlvr(), settings), 4)
    workload, lengths_N = predicted.simulation.workload, predicted.simulation.sequences.lengths_N
    models = predicted.simulation.models
    passes = [workload.collect_passes[trained.name] + 3 * workload.epochs for trained in models]
    expected = sum(count * trained.model.forward_flops(lengths_N) for count, trained in zip(passes, models, strict=True))
    assert sum(phase.flops for phase in predicted.phases) == pytest.approx(expected, rel=1e-12)


def test_lengths_are_sampled_or_given(tmp_path: Path) -> None:
    drawn = lengths.LogNormal(400, 0.6).draw(100_000, 10**6, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(400, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(0.6, rel=0.02)
    asked = rlvr(samples_per_prompt=2).algorithm
    sequences = lengths.sample_lengths(asked.workload(), seed=3)
    assert len(sequences.lengths_N) == 64
    assert (sequences.prompt_N[::2] == sequences.prompt_N[1::2]).all()
    assert sequences.prompt_N.max() <= 512
    assert sequences.response_N.max() <= 256
    assert (lengths.sample_lengths(asked.workload(), seed=3).lengths_N == sequences.lengths_N).all()
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": 100, "response": 28}\n')
    assert set(lengths.sample_lengths(sft().algorithm.workload(), given=lengths.read(str(file))).lengths_N) == {128}
    file.write_text('{"prompt": 100, "response": 28}\n{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: a row must be"):
        lengths.read(str(file))


def test_microbatches_are_those_of_the_planner() -> None:
    lengths_N, alone = np.array([500, 300, 200, 100, 900, 24]), np.full(6, -1)
    cut = MicrobatchPlan.of(lengths_N, alone, SMALL, Parallel(tp=2), 1, 1024)
    assert (cut.microbatches, cut.tokens) == (2, 2024)
    assert cut.cost == pytest.approx(attention_cost(lengths_N.tolist(), SMALL) / 2)
    full = cut.full(lengths_N, Parallel(tp=2), 1024)
    assert sum(full) == 1024
    assert full == (500, 300, 200, 24)
    virtual = MicrobatchPlan.of(lengths_N, alone, SMALL, Parallel(tp=2, pp=2, vpp=3), 1, 1024)
    assert virtual.microbatches == 2
    assert virtual.tokens == 2 * virtual.most  # all padded to the longest


@pytest.mark.parametrize("setting", [*(f"recompute={kind}" for kind in ("none", "swiglu", "selective", "full")), "tp_comm_overlap=true"])
def test_composed_stages_equal_simulated_ones(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "LEAST_ROWS", 1)
    deep = replace(SMALL, layers=10)
    grid = override(sft(tp=2, pp=2, vpp=3, count_embedding=True, count_loss=True), [f"parallel.{setting}"]).parallel
    options: dict[str, Any] = {"optim": Optim(lr=1e-5), "rows": 100, "dtype": "bf16"}
    full, parts = (make(deep, grid, 8, (100, 156), **options) for make in (simulate_stages, composer(simulate_stages)))
    for stage, other in zip(full, parts, strict=True):
        assert other.optimizer == pytest.approx(stage.optimizer, rel=0.01)  # small shards are padded
        assert other.inference_peak == pytest.approx(stage.inference_peak, rel=0.1)
        assert replace(other, optimizer=0, inference_peak=0) == replace(stage, optimizer=0, inference_peak=0)


def check_sums(found: Forecast) -> dict[str, Any]:
    """Checks that hold for every prediction. Returns it as JSON."""
    report = json.loads(json.dumps(as_json(found)))
    grid = report["grid"]
    generating = report["generating"] or {"ranks": 0, "stages": []}
    assert grid["tp"] * grid["pp"] * grid["dp"] + generating["ranks"] == report["ranks"]
    assert [stage["pp"] for stage in report["stages"]] == list(range(grid["pp"]))
    assert sum(stage["layers"] for stage in report["stages"]) == found.simulation.policy.model.layers
    for stage in [*report["stages"], *generating["stages"]]:
        assert stage["peak_bytes"] == sum(stage["bytes"].values()) == max(stage["moments"].values())
        assert stage["fits"] == (stage["peak_bytes"] <= found.simulation.hardware.memory)
    assert report["fits"] == all(stage["fits"] for stage in [*report["stages"], *generating["stages"]])
    assert report["step_seconds"] == pytest.approx(sum(s for name, s in report["phases"].items() if name not in report["beside"]))
    assert all(seconds >= 0 for seconds in report["phases"].values())
    assert 0 < report["mfu"] < 1
    assert 0 <= report["bubble"] < 1
    assert 0 < report["batch"]["fill"] <= 1 <= report["batch"]["imbalance"]
    assert report["tokens_per_second"] == pytest.approx(report["batch"]["tokens"] / report["step_seconds"])
    assert report["assumptions"]
    return report


def test_a_prediction_of_sft_adds_up() -> None:
    results = forecast(sft(tp=2, pp=3), 12, H100)
    report = check_sums(results)
    assert list(report["phases"]) == ["forward and backward", "gradient reduction", "optimizer"]
    assert results.steps == 2 * 7500 // 64 + 1
    hours = 12 * results.steps * results.step_seconds / 3600
    assert report["recipe"] == pytest.approx({"steps": results.steps, "gpu_hours": hours, "energy_kwh": 0.7 * hours})
    norms = 2 * SMALL.hidden * SMALL.layers + SMALL.hidden
    assert 2 * sum(rank.params for rank in results.stages) == SMALL.parameters + norms  # both tp ranks have the norms


def test_a_prediction_of_rlvr_has_all_phases_and_memory() -> None:
    run = rlvr(epochs=4)
    results = forecast(run, 8, H100)
    report = check_sums(results)
    assert list(report["phases"]) == [
        "prefill", "decoding", "verification", "log-probs, policy", "log-probs, reference", "values, critic",
        "updates, policy", "updates, critic",
    ]  # fmt: skip
    stage = report["stages"][0]
    assert stage["bytes"]["reference"] == stage["bytes"]["weights"]
    assert stage["moments"].keys() == {"generation", "inference, policy", "inference, critic", "update, policy", "update, critic"}
    offloaded = predict(override(run, ["algorithm.reference=offloaded"]), 8)
    assert "reference" not in offloaded.stages[0].parts
    assert as_json(offloaded)["phases"]["log-probs, reference"] > report["phases"]["log-probs, reference"]
    once = predict(override(run, ["algorithm.epochs=1"]), 8)
    assert report["phases"]["updates, policy"] == pytest.approx(4 * as_json(once)["phases"]["updates, policy"])
    alone = forecast(override(run, ["algorithm.epochs=1", "algorithm.kl_coef=0"]), 8, H100)
    assert (
        not {"log-probs, policy", "log-probs, reference"} & as_json(alone)["phases"].keys()
    )  # with a single update, they are computed in the update
    # 4 sequences in each of 2 groups, 3 layers, keys and values of one head of size 16 with 2 bytes each, 768 positions.
    settings = ["algorithm.rollout.max_num_seqs=4", "algorithm.reference=offloaded"]
    halved = predict(override(run, settings), 8).stages[0].moments["generation"]
    spared = offloaded.stages[0].moments["generation"] - halved
    assert spared == pytest.approx(2 * 2 * 3 * 2 * 16 * 2 * 768, rel=0.05)


@pytest.mark.parametrize("epochs", [1, 400], ids=["drawing is longer", "learning is longer"])
def test_disaggregated_generation_is_predicted_as_two_launches(epochs: int) -> None:
    """8 ranks train like a launch of 8, and 4 generate like a launch of 4, plus the transfer of weights. If generation is one step ahead,
    the time is the longer of both."""
    run = rlvr(epochs=epochs)
    learning, drawing = (as_json(predict(run, gpus))["phases"] for gpus in (8, 4))
    between, ahead = (
        check_sums(predict(override(run, ["algorithm.rollout.generator_gpus=4", f"algorithm.rollout.max_staleness={lag}"]), 12))
        for lag in (0, 1)
    )
    for report in (between, ahead):
        assert report["generating"]["dp"] == 1
        for name, seconds in report["phases"].items():
            if name not in ("weight sync", "waiting for responses"):
                assert seconds == pytest.approx((drawing if name in GENERATION else learning)[name])
    drawn = sum(drawing[name] for name in GENERATION)
    learned = sum(learning.values()) - sum(learning[name] for name in GENERATION)
    handed = ahead["phases"]["weight sync"]
    assert (learned > drawn) == (epochs == 400)
    assert between["beside"] == []
    assert between["step_seconds"] == pytest.approx(drawn + handed + learned)
    assert ahead["beside"] == list(GENERATION)
    assert ahead["step_seconds"] == pytest.approx(handed + max(drawn, learned))


def test_memory_of_generator_ranks_is_weights_and_cache() -> None:
    run = override(rlvr(), ["algorithm.rollout.generator_gpus=4"])
    results, alone = predict(run, 12), predict(rlvr(), 4)
    for near, far, both in zip(results.stages, results.generating, alone.stages, strict=True):
        assert far.parts.keys() == {"weights", "context", "cache", "activations"}
        assert far.moments["generation"] == both.moments["generation"] - sum(
            both.parts[name] for name in ("gradients", "optimizer", "reference", "critic")
        )
        assert "generation" not in near.moments
        assert near.moments["weight sync"] <= near.moments["update, policy"] + near.parts["weights"]
    assert "generation" in predict(override(run, ['algorithm.held_out=["allenai/RLVR-GSM"]']), 12).stages[0].moments
    with pytest.raises(ValueError, match=r"rollout.generator_gpus=3 must be a multiple of .* = 4.*use 4"):
        predict(override(run, ["algorithm.rollout.generator_gpus=3"]), 12)
    assert not predict(run, 12, replace(H100, memory=float(max(rank.peak_bytes for rank in results.generating) - 1))).fits


def test_405b_fits_and_a_smaller_gpu_gets_a_working_suggestion() -> None:
    """The recipe fits. With a gigabyte less than it needs it does not fit, but with the suggested setting it does."""
    run = load_recipe(str(RECIPES / "tulu3_405b_sft.py"))
    results = predict(run, 256)
    check_sums(results)
    assert results.fits
    assert results.way_out is None
    assert sum(rank.params for rank in results.stages) * 8 == pytest.approx(405.85e9, rel=1e-3)
    need = max(rank.peak_bytes for rank in results.stages)
    smaller = replace(H100, memory=float(need - 10**9))
    tight = predict(run, 256, smaller)
    assert not tight.fits
    assert tight.way_out
    assert predict(*apply_advice(run, 256, tight.way_out), smaller).fits


def test_a_critic_that_does_not_fit_gets_a_working_suggestion() -> None:
    large, bare = replace(SMALL, hidden=512, ffn=1024, layers=12), replace(H100, allowance=0.0)
    roomy = predict(rlvr(), 8, bare)
    tight = replace(bare, memory=4.0 * max(rank.peak_bytes for rank in roomy.stages))
    assert predict(rlvr(), 8, tight).fits
    results = predict(rlvr(critic=large), 8, tight)
    assert not results.fits
    worst = max(results.stages, key=lambda rank: rank.peak_bytes)
    assert worst.parts["critic"] > worst.parts["weights"] + worst.parts["optimizer"]
    assert results.way_out
    assert predict(*apply_advice(rlvr(critic=large), 8, results.way_out), tight).fits


def test_search_equals_exhaustive_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "BUDGETS", 3)
    run = replace(sft(), model=Model(init=replace(SMALL, layers=2, kv_heads=1)))
    full = forecast(run, 2, H100, seek=False)
    room = full.stages[0].peak_bytes - (1 << 14)  # less than the recipe needs, by more than the error of composed stages
    tight = replace(H100, memory=room / ROOM)
    results = search(run, 2, tight, confirm=1)
    assert results
    tried = []
    for pp in (1, 2):
        for recompute in ("none", "swiglu", "selective", "full"):
            for budget in (512, 768, 1024):
                settings = [f"parallel.pp={pp}", f"parallel.recompute={recompute}", f"tokens_per_microbatch={budget}"]
                other = forecast(override(run, settings), 2, tight, seek=False)
                tried += [other.step_seconds] if other.fullest.peak_bytes <= room else []
    assert results[0].step_seconds == pytest.approx(min(tried))
    best = forecast(override(run, results[0].settings), 2, tight)
    assert best.fullest.peak_bytes <= room
    assert best.step_seconds == pytest.approx(results[0].step_seconds)


def recipe(folder: Path) -> str:
    path = folder / "recipe.py"
    path.write_text(f"""
from engine.algorithms.sft import SFT
from engine.config import Model, ModelShape, Optim, Parallel, RopeScaling, Run
from engine.data.rows import Source
run = Run(Model(init={SMALL!r}), SFT((Source("rows.jsonl"),), batch_size=64, max_length=512), Optim(lr=1e-5), Parallel(tp=2, pp=2), gpus=8)
""")
    return str(path)


def test_the_command_writes_a_table_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dryrun", recipe(tmp_path), "parallel.vpp=3", "--device", "h200", "--json", str(tmp_path / "f.json"), "optim.lr=2e-6"]
    assert main([*words, "--png", str(tmp_path / "f.png")]) == 0
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["ranks"] == 8
    assert report["grid"] == {"tp": 2, "pp": 2, "vpp": 3, "dp": 2}
    assert report["recipe"]["steps"] is None  # the number of rows is unknown
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "it fits: stage" in output
    assert "8 x h200, tp2 pp2 x 3 virtual stages dp2" in output


def test_exit_codes_and_one_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    replace(H100, name="mine", memory=H100.allowance + 1e5).save(tmp_path / "mine.toml")
    assert main(["dryrun", path, "--device", str(tmp_path / "mine.toml"), "--gpus", "4"]) == 3
    assert "it does not fit: stage 0 needs" in capsys.readouterr().out
    for words, complaint in (
        ([path, "parallel.tp=3"], "parallel.tp=3 must divide"),
        ([path, "--gpus", "6"], "world size of 6"),
        ([path, "--gpus", "0"], "gpus=0 must be at least 1"),
        ([path, "--device", "h300"], "device='h300' is unknown; use"),
        ([path, "--json", str(tmp_path / "no" / "f.json")], "its folder does not exist"),
        ([path, "tokens_per_microbatch=100"], "algorithm.max_length=512"),
        ([str(tmp_path / "nothing.py")], "is not a file; see recipes/"),
        ([], "dryrun takes either a recipe"),
    ):
        assert main(["dryrun", *words]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert complaint in lines[0]


def test_a_picture_needs_matplotlib(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["dryrun", recipe(tmp_path), "--png", str(tmp_path / "f.png")]) == 1
    assert "f.png needs the package matplotlib; pip install matplotlib, or leave it out" in capsys.readouterr().err


def test_the_page_of_tulus_step_shows_the_prediction() -> None:
    fact = bench_tulu.fact_of(predict(rlvr(epochs=2), 8))
    assert fact["training"] == pytest.approx(sum(s for name, s in fact["phases"].items() if name not in bench_tulu.GENERATES))
    assert fact["ratio"] == pytest.approx(1500 / fact["training"])
    row = next(line for line in bench_tulu.page([fact]).splitlines() if line.startswith("| 8 |"))
    assert "TP2 PP2 DP2, none, 1024 tokens" in row

"""The command line from end to end, and bad input: a one-line error, exit code 1, and no overwritten files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.commands.recipe import load_recipe
from engine.config import override
from engine.data.wordproblems import problems, write
from tests.support import jobs
from tests.support.paths import ROOT
from tests.support.pool import ranks

SMALL = "ModelShape(layers=2, hidden=64, ffn=128, heads=8, kv_heads=4, vocab=260, max_length=512)"


def engine(*words: object, **limits: Any) -> tuple[int, str, str]:
    """Runs the command on one rank. Returns exit code, stdout, stderr."""
    return ranks(1).run(jobs.command, words=[str(w) for w in words], **limits)[0]


def complaint(*words: object, **limits: Any) -> str:
    """The single line on stderr of a failing command."""
    code, _, stderr = engine(*words, **limits)
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert code == 1
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of three steps on 40 word problems in data.jsonl, into tmp_path/out."""
    write(tmp_path / "data.jsonl", problems(40, 0))
    write(tmp_path / "held_out.jsonl", problems(4, 1, held_out=True))
    path = tmp_path / "recipe.py"
    path.write_text(f"""
from engine.algorithms.sft import SFT
from engine.config import ModelShape, Logging, Model, Optim, Run
from engine.data.rows import Source

run = Run(
    model=Model(init={SMALL}, tokenizer="bytes"),
    algorithm=SFT(sources=(Source({str(tmp_path / "data.jsonl")!r}),), held_out=(Source({str(tmp_path / "held_out.jsonl")!r}),),
                  batch_size=8, max_length=256),
    optim=Optim(lr=1e-3), tokens_per_microbatch=1024, steps=3, save_every=2, out={str(tmp_path / "out")!r},
    logging=Logging(tensorboard=False, every=0),
)
""")
    return path


def metric_records(folder: Path) -> list[list[Any]]:
    """The records of metrics.jsonl, without times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[record.get(name) for name in ("kind", "step", "policy/loss", "policy/grad_norm", "policy/lr")] for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_train_export_and_score_under_torchrun(recipe: Path, tmp_path: Path) -> None:
    """Two processes train with torchrun. Scores of the export, on two other layouts, equal those of transformers."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "engine"]
    alone = [sys.executable, "-m", "engine"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*words: object) -> str:
        done = subprocess.run([str(w) for w in words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    output = run(*torchrun, "run", recipe, "parallel.pp=2")
    assert output.count("step ") == 3 + 2  # and two evaluations
    assert "held-out loss" in output
    run(*alone, "export", tmp_path / "out", tmp_path / "model")
    data = tmp_path / "held_out.jsonl"
    run(*torchrun, "score", tmp_path / "model", "--data", data, "--out", tmp_path / "scores.jsonl", "parallel.tp=2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows, scores = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (data, tmp_path / "scores.jsonl")
    )  # fmt: skip
    assert len(rows) == len(scores) == 4
    for row, score in zip(rows, scores, strict=True):
        assert score["tokens"] == tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert len(score["logprobs"]) == len(score["mask"]) == len(score["tokens"]) - 1
        answer = [t for t, m in zip(score["tokens"][1:], score["mask"], strict=True) if m]
        assert tokenizer.decode(answer) == row["messages"][1]["content"] + "<|end|>"
        tokens = torch.tensor([score["tokens"]])
        with torch.no_grad():
            expected = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        assert score["logprobs"] == pytest.approx(expected.tolist(), abs=2e-5)


def test_a_resumed_run_has_the_same_metrics(recipe: Path, tmp_path: Path) -> None:
    assert engine("run", recipe, f"out={tmp_path / 'whole'}")[0] == 0
    assert engine("run", recipe)[0] == 0
    out = tmp_path / "out"
    shutil.rmtree(out / "step-00000003")  # as if the run had stopped after the checkpoint of step 2
    code, stdout, _ = engine("run", recipe)
    assert code == 0
    assert "resumed from step 2" in stdout
    full, resumed = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (tmp_path / "whole", out)
    )
    numbers = ("kind", "step", "policy/loss", "policy/grad_norm", "policy/lr")
    assert [{k: r.get(k) for k in numbers} for r in resumed] == [{k: r.get(k) for k in numbers} for r in full]


def test_score_takes_rows_of_ids_in_order(recipe: Path, tmp_path: Path) -> None:
    assert engine("run", recipe)[0] == 0
    assert engine("export", tmp_path / "out", tmp_path / "model")[0] == 0
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()  # rows of ids need no tokenizer
    rows = [{"tokens": [1, 2, 3, 4]}, {"tokens": [7]}, {"tokens": [5, 6], "mask": [0]}, {"tokens": list(range(200))}]
    data = tmp_path / "ids.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert engine("score", tmp_path / "model", "--data", data, "--out", tmp_path / "o.jsonl")[0] == 0
    scores = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [s["tokens"] for s in scores] == [r["tokens"] for r in rows]
    assert [s["mask"] for s in scores] == [[1, 1, 1], [], [0], [1] * 199]
    assert [len(s["logprobs"]) for s in scores] == [3, 0, 1, 199]
    assert all(value < 0 for s in scores for value in s["logprobs"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"messages": [', "data.jsonl:41: not valid JSON"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "data.jsonl:41: messages needs an assistant turn"),
        ('{"text": "hi"}', "data.jsonl:41: a row needs messages, or prompt and response, or tokens; this one has text"),
        (
            json.dumps({"prompt": "x" * 300, "response": "y"}),
            "more than max_length=256, with too_long=error; set too_long=truncate or drop",
        ),
    ],
)
def test_bad_rows_are_named(recipe: Path, tmp_path: Path, line: str, expected: str) -> None:
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(line + "\n")
    assert expected in complaint("run", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("policy", "fate"), [("truncate", "1 truncated, 0 dropped"), ("drop", "0 truncated, 1 dropped")])
def test_long_rows_are_truncated_or_dropped_and_counted(recipe: Path, tmp_path: Path, policy: str, fate: str) -> None:
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * 200, "response": "y" * 200}) + "\n")
    code, stdout, _ = engine("run", recipe, f"algorithm.too_long={policy}")
    assert code == 0
    assert f"data.jsonl: 41 rows, {fate}; " in stdout


def test_an_empty_file_is_an_error(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("")
    assert "has no rows" in complaint("run", recipe)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.tp=3", "parallel.tp=3 must divide model.heads=8, model.kv_heads=4 and model.ffn=128; use parallel.tp=1"),
        ("parallel.pp=2", "parallel.tp=1 x parallel.pp=2 = 2 must divide the world size of 1"),
        ("optim.learning_rate=1", "unknown setting 'optim.learning_rate'; nearest: optim."),
        ("paralel.tp=1", "unknown setting 'paralel.tp'; nearest: parallel"),
        ("algorithm.max_lenght=9", "nearest: algorithm.max_length"),
        ("steps=many", "steps=many cannot be parsed; use int"),
        ("tokens_per_microbatch=100", "algorithm.max_length=256 exceeds tokens_per_microbatch=100"),
        ("algorithm.max_length=1000", "algorithm.max_length=1000 exceeds"),
        ("model.path=smollm2-135m-instruct", "model: give either path"),
        ("model.tokenizer=nowhere", "tokenizer='nowhere' is neither 'bytes', 'words' nor a folder"),
    ],
)
def test_bad_settings_are_refused(recipe: Path, tmp_path: Path, override: str, expected: str) -> None:
    assert expected in complaint("run", recipe, override)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_refused(recipe: Path, tmp_path: Path) -> None:
    assert engine("run", recipe)[0] == 0
    before = contents(tmp_path / "out")
    assert "already holds another run (its optim differ)" in complaint("run", recipe, "optim.lr=2e-3")
    assert contents(tmp_path / "out") == before


def test_a_finished_run_started_again_changes_no_checkpoint(recipe: Path, tmp_path: Path) -> None:
    assert engine("run", recipe)[0] == 0
    before = contents(tmp_path / "out")
    assert engine("run", recipe)[0] == 0
    after = contents(tmp_path / "out")
    assert {n: b for n, b in after.items() if n != "metrics.jsonl"} == {n: b for n, b in before.items() if n != "metrics.jsonl"}


def test_a_full_disk_while_saving(recipe: Path, tmp_path: Path) -> None:
    """Files are limited to 100 kB, which a checkpoint exceeds. The older checkpoint stays, and no part of the new one."""
    assert engine("run", recipe, "keep_last=5")[0] == 0
    out = tmp_path / "out"
    shutil.rmtree(out / "step-00000003")
    before = {name: data for name, data in contents(out).items() if name.startswith("step")}
    line = complaint("run", recipe, "keep_last=5", largest_file=100_000)
    assert "step-00000003: could not be saved (" in line
    assert "GiB are free there" in line
    assert "earlier checkpoints are untouched" in line
    assert {name: data for name, data in contents(out).items() if name.startswith("step")} == before


def test_a_damaged_checkpoint_is_skipped_with_a_warning(recipe: Path, tmp_path: Path) -> None:
    assert engine("run", recipe)[0] == 0
    victim = next((tmp_path / "out" / "step-00000003" / "tensors").glob("*.distcp"))
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    code, stdout, stderr = engine("run", recipe)
    assert code == 0
    assert "step-00000003 is damaged and is skipped: tensors/" in stderr
    assert "resumed from step 2" in stdout


def test_export_refuses_invalid_folders(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "already exists" in complaint("export", tmp_path / "out", tmp_path / "there")
    assert "is not the folder of a run" in complaint("export", tmp_path / "out", tmp_path / "new")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ('{"tokens": [1, 999]}', "rows.jsonl:1: tokens must be a list of integers from 0 to 259"),
        ('{"tokens": [1, 2]}\n{"tokens": []}', "rows.jsonl:2: tokens must be"),
        (json.dumps({"tokens": [1] * 50}), "has 49 tokens, more than tokens_per_microbatch=32; raise it"),
        ("", "has no rows"),
    ],
)
def test_bad_rows_to_score_are_named(recipe: Path, tmp_path: Path, rows: str, expected: str) -> None:
    assert engine("run", recipe, "steps=1")[0] == 0
    assert engine("export", tmp_path / "out", tmp_path / "model")[0] == 0
    (tmp_path / "rows.jsonl").write_text(rows)
    words = [tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "o.jsonl", "tokens_per_microbatch=32"]
    assert expected in complaint("score", *words)
    assert list(tmp_path.glob("o.jsonl*")) == []


def test_an_invalid_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.py").write_text("x = 1\n")
    assert "does not define run = Run(...)" in complaint("run", tmp_path / "no.py")
    assert "is not a file" in complaint("run", tmp_path / "nowhere.py")
    assert "model 'no/such-model' is not a folder" in complaint("score", "no/such-model", "--data", "x", "--out", "y")


@pytest.mark.parametrize("command", [[], ["run"], ["score"], ["export"]])
def test_help_in_plain_words(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from engine.__main__ import main

    with pytest.raises(SystemExit, match="0"):
        main([*command, "-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "torchrun --nproc-per-node 2 -m engine" in text
    assert len(text) > 300


START = """
import sys
from engine.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(*sorted({"torch", "transformers", "datasets", "megatron"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rnu"], "unknown command 'rnu'; nearest: run"),
        (["--help"], ""),
        (["score", "--help"], ""),
        (["generate", "--help"], ""),
        (["dryrun", "--help"], ""),
        (["run", "recipes/tiny_sftt.py"], "nearest: recipes/tiny_sft.py"),
        (["run", "recipes/tiny_sft.py", "optim.lrr=1"], "unknown setting 'optim.lrr'"),
        (["run", "recipes/smollm2_dpo.py", "optim.lrr=1"], "unknown setting 'optim.lrr'"),
        (["run", "recipes/smollm2_reward.py", "optim.lrr=1"], "unknown setting 'optim.lrr'"),
        (["run", "recipes/smollm2_rlvr.py", "optim.lrr=1"], "unknown setting 'optim.lrr'"),
        (["generate", "somewhere", "question", "max_token=1"], "unknown setting 'max_token'; nearest: max_tokens"),
        (["score", "somewhere", "--data", "x", "--out", "y", "parallel.tpp=1"], "unknown setting 'parallel.tpp'"),
    ],
)
def test_mistakes_and_help_import_no_large_library(words: list[str], expected: str) -> None:
    done = subprocess.run([sys.executable, "-c", START, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == ""
    assert expected in done.stderr


def test_the_former_option_model_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    from engine.__main__ import main

    assert main(["score", "--model", "somewhere", "--data", "x", "--out", "y"]) == 1
    assert "--model is not an option: the model is the first argument; use python -m engine score MODEL" in capsys.readouterr().err


def test_settings_of_generate_are_also_options(capsys: pytest.CaptureFixture[str]) -> None:
    from engine.__main__ import main

    assert main(["generate", "somewhere", "question", "--max-tokens", "many"]) == 1
    assert "max_tokens=many cannot be parsed; use int" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["algorithm.advantage=group"], "set algorithm.critic=none as well"),
        (["algorithm.critic=none"], "set algorithm.advantage=group"),
        (["algorithm.critic=none", "algorithm.advantage=group"], "algorithm.samples_per_prompt=1 must be at least 2"),
    ],
)
def test_a_critic_is_switched_off_by_settings(settings: list[str], expected: str) -> None:
    run = load_recipe(str(ROOT / "recipes/tiny_rlvr.py"))
    with pytest.raises(ValueError, match=expected):
        override(run, settings)
    off = override(run, ["algorithm.critic=none", "algorithm.advantage=group", "algorithm.samples_per_prompt=4"])
    assert off.algorithm.critic is None


def test_a_mistake_under_torchrun_is_reported_once_at_the_end() -> None:
    """In torchrun's root-cause report, which a process that it started cannot suppress."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "engine"]
    words += ["run", "recipes/tiny_sft.py", "optim.lr=9"]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("error: optim.lr=9.0 must be from 0 to 1") == 1
    assert "error: optim.lr=9.0 must be from 0 to 1" in done.stderr.splitlines()[-2]

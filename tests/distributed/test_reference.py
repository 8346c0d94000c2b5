"""DPO from the command line: reference log-probs are computed once, saved, resumed, and rejected if they belong to another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import Parallel
from engine.data.tokenizer import load_tokenizer
from engine.data.wordproblems import pairs, write
from tests.support import jobs
from tests.support.golden_run import MACHINE_METRICS
from tests.support.pool import ranks

ONE = Parallel()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as a Hugging Face folder, with the byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=260, max_position_embeddings=512, tie_word_embeddings=False)).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    """A recipe of four steps on 12 pairs, into tmp_path/out."""
    shutil.copytree(model, tmp_path / "model")
    write(tmp_path / "train.jsonl", pairs(12, 0))
    write(tmp_path / "held_out.jsonl", pairs(3, 1, held_out=True))
    path = tmp_path / "recipe.py"
    path.write_text(f"""
from engine.algorithms.dpo import DPO
from engine.config import Logging, Model, Optim, Run
from engine.data.rows import Source

run = Run(
    model=Model({str(tmp_path / "model")!r}),
    algorithm=DPO((Source({str(tmp_path / "train.jsonl")!r}),), (Source({str(tmp_path / "held_out.jsonl")!r}),), 6, max_length=256),
    optim=Optim(lr=1e-3), tokens_per_microbatch=768, steps=4, save_every=2, out={str(tmp_path / "out")!r},
    logging=Logging(tensorboard=False),
)
""")
    return path


def engine(*words: object, size: int = 1) -> tuple[int, str, str]:
    return ranks(size).run(jobs.command, words=[str(word) for word in words])[0]


def complaint(*words: object) -> str:
    """The single line on stderr of a failing command."""
    code, _, stderr = engine(*words)
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert (code, len(lines)) == (1, 1), stderr
    assert "Traceback" not in stderr
    return lines[0]


def metric_records(out: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without times."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not MACHINE_METRICS.match(name)} for record in records]


def forget_last_step(out: Path) -> None:
    """Deletes the last checkpoint, as if the run had been killed before."""
    shutil.rmtree(out / "step-00000004")
    (out / "LATEST").write_text("step-00000002\n")


def test_a_run_learns_and_resumes(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = engine("run", recipe)
    assert code == 0, stderr
    records = metric_records(out)
    evaluations, steps = ([record for record in records if record["kind"] == kind] for kind in ("evaluation", "step"))
    assert [record["step"] for record in evaluations] == [0, 4]
    assert evaluations[0]["policy/loss"] == pytest.approx(np.log(2), abs=1e-4)  # the policy is the reference
    assert steps[-1]["policy/loss"] < 0.65
    assert steps[-1]["reward/accuracy"] > 0.8
    for record in (*evaluations, *steps):
        assert record["reward/margin"] == pytest.approx(record["reward/chosen"] - record["reward/rejected"], abs=1e-5)
        assert -1 <= record["reward/length_bias"] <= 1
        assert record.keys() >= {"reward/accuracy", "logps/chosen", "logps/rejected", "length/chosen", "length/rejected"}
    assert "train.jsonl: 12 rows, 0 truncated, 0 dropped;" in stdout
    assert "held-out reward/accuracy" in stdout
    assert "logps/chosen" not in stdout  # details are only in the file

    reference = (out / "reference" / "logprobs.bin").read_bytes()
    forget_last_step(out)
    code, stdout, stderr = engine("run", recipe)
    assert code == 0, stderr
    assert "reference log-probs of" not in stdout  # they exist already
    assert metric_records(out) == records

    forget_last_step(out)
    shutil.rmtree(out / "reference")  # computed again with the initial weights, not those of step 2
    assert engine("run", recipe)[0] == 0
    assert (out / "reference" / "logprobs.bin").read_bytes() == reference
    assert metric_records(out) == records


def test_reference_logprobs_equal_engine_score(recipe: Path, tmp_path: Path) -> None:
    assert engine("run", recipe, "steps=1", size=2)[0] == 0
    rows = [json.loads(line) for name in ("train", "held_out") for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    halves = [{"prompt": row["prompt"], "response": row[half]} for row in rows for half in ("chosen", "rejected")]
    write(tmp_path / "halves.jsonl", halves)
    assert engine("score", tmp_path / "model", "--data", tmp_path / "halves.jsonl", "--out", tmp_path / "scores.jsonl")[0] == 0
    scores = [json.loads(line)["logprobs"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    kept = np.fromfile(tmp_path / "out" / "reference" / "logprobs.bin", np.float32)
    np.testing.assert_allclose(kept, np.concatenate(scores), atol=5e-6)


def keep(folder: Path, tmp_path: Path, size: int = 1, parallel: Parallel = ONE, **options: Any) -> tuple[int, list[float], str]:
    return ranks(size).run(jobs.keep_reference, parallel=parallel, root=tmp_path, folder=folder, **options)[0]


LAYOUTS = [(1, Parallel()), (2, Parallel()), (2, Parallel(tp=2)), (2, Parallel(pp=2)), (4, Parallel(tp=2, pp=2))]


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
def test_an_interrupted_computation_resumes(size: int, parallel: Parallel, recipe: Path, tmp_path: Path) -> None:
    blocks, full, _ = keep(tmp_path / "whole", tmp_path)
    assert blocks >= 6
    folder = tmp_path / "kept"
    assert keep(folder, tmp_path, size, parallel, die_after=2) == (2, [], "killed here")
    lines = (folder / "blocks").read_bytes()
    assert 0 < int(lines.splitlines()[-1].split()[0]) < 30
    with (folder / "logprobs.bin").open("ab") as file:
        file.write(b"half a block")
    (folder / "blocks").write_bytes(lines + b"29 1")  # and half a line
    rest, values, _ = keep(folder, tmp_path)
    assert 0 < rest < blocks
    assert values == pytest.approx(full, abs=5e-6)
    assert keep(folder, tmp_path, size, parallel) == (0, values, "")


STALE: list[tuple[dict[str, Any], str]] = [
    ({"chat_template": "another"}, "of other template than this run's"),
    ({"max_length": 200}, "of other length than"),
    ({"other_data": True}, "of other data than"),
    ({"other_data": True, "max_length": 200}, "of other data and length than"),
]


@pytest.mark.parametrize(("change", "reason"), STALE, ids=[reason for _, reason in STALE])
def test_reference_logprobs_of_other_data_are_refused(change: dict[str, Any], reason: str, recipe: Path, tmp_path: Path) -> None:
    keep(tmp_path / "kept", tmp_path)
    assert reason in keep(tmp_path / "kept", tmp_path, **change)[2]


def test_reference_logprobs_of_other_weights_are_refused(recipe: Path, tmp_path: Path) -> None:
    assert engine("run", recipe, "steps=1")[0] == 0
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    message = complaint("run", recipe, "steps=1")
    assert f"{tmp_path / 'out' / 'reference'} holds log-probs of other weights than this run's; delete it" in message


def test_a_short_file_is_refused(recipe: Path, tmp_path: Path) -> None:
    keep(tmp_path / "kept", tmp_path)
    with (tmp_path / "kept" / "logprobs.bin").open("r+b") as file:
        file.truncate(100)
    assert "is damaged" in keep(tmp_path / "kept", tmp_path)[2]


@pytest.mark.parametrize("size", [1, 2])
def test_a_flipped_bit_is_refused(size: int, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    _, values, _ = keep(folder, tmp_path, size)
    for name in ("logprobs.bin", "blocks", "key.json"):
        good = (folder / name).read_bytes()
        for place in (0, len(good) // 2, len(good) - 2):
            (folder / name).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            said = keep(folder, tmp_path, size)[2]
            assert str(folder) in said, (name, place)
            assert "delete" in said or "not the key" in said
        (folder / name).write_bytes(good)
    assert keep(folder, tmp_path, size) == (0, values, "")


def test_other_data_is_refused_by_its_path(recipe: Path, tmp_path: Path) -> None:
    keep(tmp_path / "kept", tmp_path)
    write(tmp_path / "train.jsonl", pairs(12, 7))
    assert f"of other data than this run's ({tmp_path / 'train.jsonl'}); delete it" in keep(tmp_path / "kept", tmp_path)[2]


LONG = "word " * 60
BAD: list[tuple[dict[str, str], tuple[str, ...], str]] = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, (), "train.jsonl:2: chosen and rejected are equal"),
    ({"prompt": "q", "chosen": "", "rejected": "a"}, (), "train.jsonl:2: chosen is empty"),
    ({"prompt": LONG, "chosen": "a", "rejected": "b"}, (), "of them in the prompt, more than max_length=256"),
    ({"prompt": "q", "chosen": "a" * 230, "rejected": "b" * 200}, ("tokens_per_microbatch=300",), "1 of 13 pairs do not fit a microbatch"),
]


@pytest.mark.parametrize(("row", "settings", "expected"), BAD, ids=[expected[:30] for *_, expected in BAD])
def test_bad_input_is_reported_in_one_line(
    row: dict[str, str], settings: tuple[str, ...], expected: str, recipe: Path, tmp_path: Path
) -> None:
    rows = pairs(12, 0)
    write(tmp_path / "train.jsonl", [rows[0], row, *rows[1:]])
    assert expected in complaint("run", recipe, *settings)
    assert not (tmp_path / "out").exists()


def test_dropped_bad_rows_are_reported(recipe: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*pairs(12, 0), BAD[0][0], BAD[1][0]])
    code, stdout, stderr = engine("run", recipe, "steps=1", "algorithm.bad_rows=drop")
    assert code == 0, stderr
    assert "14 rows, 0 truncated, 0 dropped, 2 bad (" in stdout
    assert "train.jsonl:14: chosen is empty" in stdout


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("algorithm.beta=0", "algorithm.beta=0.0 must be positive"),
        ("algorithm.batch_size=0", "algorithm.batch_size=0 must be positive"),
        ("algorithm.label_smoothing=0.5", "label_smoothing=0.5 must be in [0, 0.5)"),
        ("algorithm.nll_weight=-1", "nll_weight=-1.0 at least 0"),
    ],
)
def test_bad_settings_are_refused(setting: str, expected: str, recipe: Path) -> None:
    assert expected in complaint("run", recipe, setting)

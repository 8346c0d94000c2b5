"""The commands on foreign or changed files: each refuses in one line what would train on something else or write nonsense."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.tokenizer import load_tokenizer
from engine.models.hub import cache_folder
from tests.e2e.test_cli import complaint, contents, engine, metric_records, recipe

__all__ = ["recipe"]  # the fixture


@pytest.fixture
def exported(recipe: Path, tmp_path: Path) -> Path:
    assert engine("run", recipe, "steps=1")[0] == 0
    assert engine("export", tmp_path / "out", tmp_path / "model")[0] == 0
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["data.jsonl", "held_out.jsonl"])
def test_a_run_resumes_on_its_own_data_only(name: str, recipe: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / name
    assert engine("run", recipe)[0] == 0
    whole = metric_records(out)
    shutil.rmtree(out / "step-00000003")  # as if it had stopped after the checkpoint of step 2
    before, good = contents(out), data.read_bytes()

    lines = good.splitlines(keepends=True)
    data.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))  # as many bytes, of other samples
    assert f"{data} gives other samples than when {out} was started; restore the file" in complaint("run", recipe)
    data.write_bytes(b"".join(lines[:-1]))
    assert f"{data} gives other samples" in complaint("run", recipe)
    assert contents(out) == before

    data.write_bytes(good)  # the same content, written anew
    code, said, stderr = engine("run", recipe)
    assert code == 0, stderr
    assert "resumed from step 2" in said
    assert metric_records(out) == whole


def test_a_run_that_never_started_may_get_other_data(recipe: Path, tmp_path: Path) -> None:
    """data.json is written before run.json: without the latter there is no run yet."""
    assert engine("run", recipe)[0] == 0
    for path in (tmp_path / "out").iterdir():
        if path.name != "data.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(lines[:-1]))
    assert engine("run", recipe)[0] == 0
    assert engine("run", recipe)[0] == 0


@pytest.mark.parametrize("file", ["tokens.bin", "trained.bin", "offsets.bin"])
def test_a_flipped_bit_of_a_tokenised_source_is_refused(file: str, recipe: Path, tmp_path: Path) -> None:
    assert engine("run", recipe)[0] == 0
    (folder,) = (
        path.parent
        for path in (cache_folder() / "corpora").glob("data-*/key.json")
        if json.loads(path.read_text())["data"].get("path") == str(tmp_path / "data.jsonl")
    )
    content = (folder / file).read_bytes()
    place = len(content) // 2
    (folder / file).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    said = complaint("run", recipe, f"out={tmp_path / 'other'}")
    assert f"{folder / file} is damaged (sha256 of block 0 differs); delete {folder} to prepare it again" in said
    shutil.rmtree(folder)
    assert engine("run", recipe, f"out={tmp_path / 'other'}")[0] == 0


@pytest.mark.parametrize("field", [{"rope_theta": 0}, {"rope_theta": float("nan")}, {"rms_norm_eps": -1.0}, {"head_dim": -16}])
def test_a_config_of_nonsense_is_refused(field: dict[str, float], exported: Path, tmp_path: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    if "rope_theta" in field:
        config.pop("rope_parameters", None)
    (exported / "config.json").write_text(json.dumps(config | field))
    (tmp_path / "ids.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    words = ("--data", tmp_path / "ids.jsonl", "--out", tmp_path / "o.jsonl")
    assert f"config.json: {next(iter(field))}=" in complaint("score", exported, *words)
    assert f"config.json: {next(iter(field))}=" in complaint("generate", exported, "hello", "max_tokens=4")
    assert not (tmp_path / "o.jsonl").exists()


def test_weights_that_are_no_numbers_write_nothing(exported: Path, tmp_path: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "ids.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    words = ("--data", tmp_path / "ids.jsonl", "--out", tmp_path / "o.jsonl")
    assert "model.layers.1.mlp.down_proj.weight holds values that are NaN" in complaint("score", exported, *words)
    assert "model.layers.1.mlp.down_proj.weight holds values that are NaN" in complaint("generate", exported, "hello", "max_tokens=4")
    assert not list(tmp_path.glob("o.jsonl*"))


def test_a_tokenizer_larger_than_the_embedding_is_refused_everywhere(exported: Path, recipe: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens("more")
    tokenizer.save_pretrained(exported)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "response": "more", "question": "q", "answer": "#### 1"}\n')
    data = tmp_path / "rows.jsonl"
    commands = [
        ("score", exported, "--data", data, "--out", tmp_path / "o.jsonl"),
        ("generate", exported, "hello", "max_tokens=4"),
        ("eval", exported, "--suite", "gsm8k", "--data", f"gsm8k={data}", "max_tokens=4"),
        ("run", recipe, f"model.tokenizer={exported}", f"out={tmp_path / 'other'}"),
    ]
    for words in commands:
        assert "261 tokens, more than the model's vocabulary of 260" in complaint(*words)


@pytest.mark.parametrize("command", ["score", "generate"])
def test_ids_beyond_the_vocabulary_name_the_line(command: str, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"tokens": [1, 2]}\n{"tokens": [1, 260]}\n')
    option = "--data" if command == "score" else "--prompts"
    said = complaint(command, exported, option, tmp_path / "ids.jsonl", "--out", tmp_path / "o.jsonl")
    assert "ids.jsonl:2: tokens must be a list of integers from 0 to 259" in said


def test_an_export_can_be_read_by_whom_the_umask_allows(exported: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in exported.iterdir()} == {
        path.name: oct(0o666 & ~mask) for path in exported.iterdir()
    }


def test_an_export_of_an_odd_dtype_is_in_the_compute_dtype(recipe: Path, tmp_path: Path) -> None:
    assert engine("run", recipe, "steps=1")[0] == 0
    (config,) = (tmp_path / "out").glob("step-*/model/config.json")
    assert "dtype" not in json.loads(config.read_text())
    assert engine("export", tmp_path / "out", tmp_path / "model")[0] == 0
    assert {weight.dtype for weight in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("words", [("out=",), ("out= ",)])
def test_an_empty_name_of_a_folder_is_refused(words: tuple[str, ...], recipe: Path) -> None:
    assert "is not the name of a folder" in complaint("run", recipe, *words)

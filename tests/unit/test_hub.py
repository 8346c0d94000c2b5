"""Names become folders; the bundled SmolLM2 is the model it should be; its cached conversion survives races, crashes and damage."""

from __future__ import annotations

import functools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import gguf
import pytest

from engine.files import sha256
from engine.models import hub
from engine.models.hub import SMOLLM2, resolve
from tests.support.paths import SHARED

PARAGRAPH = (
    "The sun rises in the east and sets in the west. Every morning people wake up, drink a cup of coffee or tea, and go to work or to "
    "school. In the evening they come home, have dinner with their families, and talk about what happened during the day."
)
GSM8K = SHARED / "gsm8k_test.jsonl"


# The real model, converted once for every test session on this machine.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return resolve(SMOLLM2)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2)


def test_weights_and_config_equal_those_that_transformers_reads_from_the_gguf(model: Any, monkeypatch: pytest.MonkeyPatch):
    """Both equal, so the logits are; test_gguf.py compares logits on a tiny model."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # transformers builds this table anew for each of 397 modules, which takes three quarters of the time.
    monkeypatch.setattr("gguf.get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    theirs = load_gguf_checkpoint(str(hub._bundled_gguf()), return_tensors=True, model_to_load=model)
    ours = model.state_dict()
    assert set(ours) - set(theirs["tensors"]) == {"lm_head.weight"}  # tied to the embedding
    assert all(torch.equal(ours[name], torch.as_tensor(weight)) for name, weight in theirs["tensors"].items())

    theirs = LlamaConfig(**theirs["config"]).to_dict()
    ours = model.config.to_dict()
    assert ours["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"], rel=1e-6)
    changing = (
        "rope_parameters",
        "hidden_act",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    )
    for name in (*changing, "num_hidden_layers", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        assert ours[name] == theirs[name], name


def test_it_reads_english(model: Any, tokenizer: Any):
    import torch

    tokens = tokenizer(PARAGRAPH, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        nll = model(tokens, labels=tokens).loss.item()
    assert nll < 3.0  # 2.03; with q and k in llama.cpp's row order it is 3.57


def test_it_knows_the_capital_of_france(model: Any, tokenizer: Any):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def test_chat_template_is_chatml(tokenizer: Any):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("<|im_start|>")["input_ids"] == [1]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a  1", ["a", "ĠĠ", "1"]),
        ("¾ cup", ["Â¾", "Ġcup"]),
        ("1234", ["1", "2", "3", "4"]),
        ("日本語と中文", None),
        ("👩‍👩‍👧 😀", None),
        ("  x\n\n\ty \u200b\u00a0é e\u0301 ١٢ ＡＢ１ \r\n", None),
    ],
)
def test_tokenizer_round_trips_awkward_strings(tokenizer: Any, text: str, tokens: list[str] | None):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokens is None or tokenizer.convert_ids_to_tokens(ids) == tokens


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K")
def test_tokenizer_round_trips_gsm8k_and_keeps_digits_apart(tokenizer: Any):
    questions = [json.loads(line)["question"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    batch = tokenizer(questions)["input_ids"]
    assert tokenizer.batch_decode(batch) == questions
    used = tokenizer.convert_ids_to_tokens({id for ids in batch for id in ids})
    assert [token for token in used if len(token) > 1 and any("0" <= c <= "9" for c in token)] == []


# The cache, with a converter that writes a few bytes.


def tiny_convert(source: Path, folder: Path) -> dict[str, Any]:
    """Stands in for the real converter, slow enough to be raced; leaves a line beside the folder for every conversion."""
    time.sleep(0.1)
    with (folder.parent / "conversions").open("a") as log:
        log.write(f"{source}\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    return {"source": str(source), "source_sha256": "0" * 64}


def use_tiny_convert(patch: pytest.MonkeyPatch, cache: Path) -> None:
    patch.setenv("TRIVET_CACHE", str(cache))
    patch.setattr("engine.models.gguf.convert", tiny_convert)
    patch.setattr(hub, "_bundled_gguf", lambda: Path("tiny.gguf"))


def conversions(cache: Path) -> int:
    return len((cache / "conversions").read_text().splitlines())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_tiny_convert(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


def test_a_finished_conversion_is_used_again(cache: Path):
    assert resolve(SMOLLM2) == resolve(SMOLLM2) == cache / SMOLLM2
    assert conversions(cache) == 1
    record = json.loads((cache / SMOLLM2 / "conversion.json").read_text())
    assert record["source"] == "tiny.gguf"
    assert record["files"]["model.safetensors"] == sha256(cache / SMOLLM2 / "model.safetensors")


def damage_cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def damage_bit(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(500_000)
        file.write(b"\xff\xff")


def damage_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_record(folder: Path) -> None:
    (folder / "conversion.json").write_text('{"converter": 1, "fi')


def damage_age(folder: Path) -> None:
    record = json.loads((folder / "conversion.json").read_text())
    (folder / "conversion.json").write_text(json.dumps(record | {"converter": 0}))


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, damage_missing, damage_record, damage_age])
def test_a_damaged_or_outdated_conversion_is_made_again(cache: Path, damage: Any, caplog: pytest.LogCaptureFixture):
    folder = resolve(SMOLLM2)
    damage(folder)
    assert resolve(SMOLLM2) == folder
    assert "converting it again" in caplog.text
    assert conversions(cache) == 2
    assert (folder / "model.safetensors").read_bytes() == bytes(range(256)) * 4000
    assert (folder / "config.json").read_text() == "{}"


def test_a_conversion_that_was_killed_leaves_nothing_behind(cache: Path):
    unfinished = cache / f"{SMOLLM2}.tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "leftover").write_text("half")
    folder = resolve(SMOLLM2)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "conversion.json", "model.safetensors"]
    assert not unfinished.exists()


def resolve_in_another_process(cache: Path, barrier: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_convert(patch, cache)
        barrier.wait(timeout=60)
        assert hub._intact(resolve(SMOLLM2))


def test_processes_that_race_convert_once_and_all_get_the_folder(cache: Path):
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(4)
    processes = [spawn.Process(target=resolve_in_another_process, args=(cache, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert conversions(cache) == 1


# Folders and names.


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no model\.safetensors; give"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json; give"):
        resolve(str(tmp_path))


def test_every_shard_of_a_local_folder_must_be_there(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model-2\.safetensors is missing"):
        resolve(str(tmp_path))
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map"', "[]", '{"weight_map": {"a": "/a.safetensors"}}']
)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: str):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json"):
        resolve(str(tmp_path))


def test_a_hugging_face_id_is_fetched_without_what_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def snapshot_download(name: str, **patterns: Any) -> str:
        asked[name] = patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve("some/model") == tmp_path
    from huggingface_hub.utils import filter_repo_objects

    repo = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja"]
    extra = ["pytorch_model.bin", "consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "README.md"]
    assert list(filter_repo_objects(repo + extra, **asked["some/model"])) == repo


@pytest.mark.parametrize("name", ["some/model", "not a name", "./nowhere", "SmolLM2-135M-Instruct"])
def test_a_name_that_leads_nowhere_says_what_was_tried(name: str, monkeypatch: pytest.MonkeyPatch):
    def offline(name: str, **_: Any) -> str:
        raise OSError("Got: ConnectError\nPlease check your internet connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError) as error:
        resolve(name)
    message = str(error.value)
    assert message.startswith(
        f"model {name!r} is not a folder, not the known name 'smollm2-135m-instruct', and the Hugging Face hub answered: "
    )
    assert "\n" not in message
    assert message.endswith("Got: ConnectError Please check your internet connection")


def test_a_missing_export_names_the_commands_that_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"python -m engine run recipes/mine\.py && python -m engine export runs/mine runs/mine/export"):
        resolve("runs/mine/export")
    (tmp_path / "runs/mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"export the run first: python -m engine export runs/mine runs/mine/export"):
        resolve("runs/mine/export")

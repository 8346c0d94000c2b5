"""Hugging Face folder <-> any layout: bit for bit, and the damage that a reader must notice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engine.config import Model, ModelShape, Parallel, RopeScaling
from engine.models import families
from engine.models.families import to_hf
from tests.support import jobs
from tests.support.pool import ranks

UNTIED = replace(jobs.TINY, rope_theta=500000.0, rope_scaling=RopeScaling(original_length=32), max_length=64)
SHAPES = {"untied": UNTIED, "tied": replace(UNTIED, tied=True, vocab=256, rope_scaling=None, head_dim=16)}
LAYOUTS = [(1, Parallel()), (2, Parallel(tp=2)), (2, Parallel(pp=2, vpp=2)), (4, Parallel(tp=2, pp=2)), (4, Parallel(tp=2))]


def make_folder(folder: Path, shape: ModelShape) -> Path:
    """A random model as transformers writes it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**to_hf(shape)))
    for parameter in model.parameters():  # norms too, so that a forgotten one shows
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / request.param, SHAPES[request.param])


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
def test_export_of_an_import_is_the_original(folder: Path, size: int, parallel: Parallel, tmp_path: Path) -> None:
    ranks(size).run(jobs.export, parallel=parallel, model=Model(str(folder)), folder=tmp_path)
    got, expected = read(tmp_path), read(folder)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
def test_hf_weights_are_whole_on_the_first_rank_of_each_replica(folder: Path, size: int, parallel: Parallel) -> None:
    expected = {name: tensor.numpy().tobytes() for name, tensor in read(folder).items()}
    found = ranks(size).run(jobs.hf_weights, parallel=parallel, model=Model(str(folder)))
    receivers = size // parallel.model_ranks * parallel.tp  # ranks of the first stages, of which every tp-th is a replica's first
    for rank, tensors in enumerate(found):
        assert tensors == (expected if rank < receivers and rank % parallel.tp == 0 else {})


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
def test_logprobs_are_those_of_transformers(folder: Path, size: int, parallel: Parallel) -> None:
    found: dict[int, list[float]] = {}
    for part in ranks(size).run(jobs.logprobs, parallel=parallel, model=Model(str(folder))):
        found |= part
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for i, sample in enumerate(jobs.samples(7)):
        tokens = torch.from_numpy(sample.tokens).long()[None]
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        assert found[i] == pytest.approx(logprobs.tolist(), abs=2e-5)


def test_trained_weights_are_the_same_from_any_layout_and_load_in_transformers(folder: Path, tmp_path: Path) -> None:
    """Written from two replicas right after a step, when a sharded optimizer has not yet gathered its parameters by itself."""
    for name, size, parallel in [("one", 1, Parallel()), ("dp2", 2, Parallel()), ("tp2pp2", 4, Parallel(tp=2, pp=2))]:
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors*"))
        ranks(size).run(jobs.export, parallel=parallel, model=Model(str(folder)), folder=tmp_path / name, steps=2)
    one, original = read(tmp_path / "one"), read(folder)
    assert all(not torch.equal(one[name], original[name]) for name in original)
    for other in ("dp2", "tp2pp2"):
        for name, tensor in read(tmp_path / other).items():
            difference = (tensor - one[name]).abs()  # AdamW divides by a moment that can be next to nothing: hence the mean
            assert difference.mean() < 1e-7, name
            assert difference.max() < 1e-3, name
    AutoModelForCausalLM.from_pretrained(tmp_path / "tp2pp2")


def test_a_rank_reads_only_its_own_slices(folder: Path) -> None:
    """Over all of tp2's rank 0, the elements that are read are those of its parameters: half the matrices, all the norms."""

    model = SHAPES[folder.name]
    read_elements = 0
    for name, shape in families.tensor_shapes(model).items():
        for parameter in _parameters_of(name):
            for piece in families.slices(parameter, model, 2, 0):
                if piece.name == name:
                    read_elements += piece.length * (shape[1 - piece.dim] if len(shape) > 1 else 1)
    matrices = sum(s[0] * s[1] for s in families.tensor_shapes(model).values() if len(s) > 1)
    norms = sum(s[0] for s in families.tensor_shapes(model).values() if len(s) == 1)
    vocab_rows = 128 - model.vocab / 2  # the first shard has no padding
    assert read_elements == matrices / 2 + norms + (1 if model.tied else 2) * vocab_rows * model.hidden


def _parameters_of(name: str) -> list[str]:
    if "layers" not in name:
        short = {"model.embed_tokens": "embedding.word_embeddings", "model.norm": "decoder.final_layernorm", "lm_head": "output_layer"}
        return [short[name.removesuffix(".weight")] + ".weight"]
    layer = name.split(".")[2]
    parts = "input_layernorm pre_mlp_layernorm self_attention.linear_qkv self_attention.linear_proj mlp.linear_fc1 mlp.linear_fc2"
    return [f"decoder.layers.{layer}.{part}.weight" for part in parts.split()]


@contextmanager
def shards(folder: Path, tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A copy of `folder` in two shards with an index."""
    copy = tmp_path / "sharded"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = read(folder)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, copy / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    yield copy, weight_map


def load(folder: Path) -> str:
    """The one-line complaint about a folder."""
    with pytest.raises(RuntimeError) as caught:
        ranks(1).run(jobs.logprobs, parallel=Parallel(), model=Model(str(folder)))
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith("ValueError: ")
    return last.removeprefix("ValueError: ")


def test_shards_load_like_one_file(folder: Path, tmp_path: Path) -> None:
    with shards(folder, tmp_path) as (copy, _):
        assert ranks(1).run(jobs.logprobs, parallel=Parallel(), model=Model(str(copy))) == ranks(1).run(
            jobs.logprobs, parallel=Parallel(), model=Model(str(folder))
        )


def test_one_file_beside_an_index_counts_as_in_transformers(folder: Path, tmp_path: Path) -> None:
    """transformers does not look at an index where there is model.safetensors."""
    with shards(folder, tmp_path) as (copy, _):
        first = copy / "model-00001-of-00002.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(first).items()}, first, metadata={"format": "pt"})
        shutil.copy(folder / "model.safetensors", copy)
        theirs = AutoModelForCausalLM.from_pretrained(copy).state_dict()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in read(folder).items())
        same = [ranks(1).run(jobs.logprobs, parallel=Parallel(), model=Model(str(each))) for each in (copy, folder)]
        assert same[0] == same[1]


@pytest.mark.parametrize("damage", ["missing", "truncated", "header", "no tensor", "wrong shape", "outside"])
def test_damaged_folders_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = make_folder(tmp_path / "model", jobs.TINY)
    with shards(folder, tmp_path) as (copy, weight_map):
        second = copy / "model-00002-of-00002.safetensors"
        index = copy / "model.safetensors.index.json"
        match damage:
            case "missing":
                second.unlink()
                expected = second.name
            case "truncated":
                second.write_bytes(second.read_bytes()[:-100])
                expected = second.name
            case "header":
                second.write_bytes(b"\xff" * 8 + second.read_bytes()[8:])
                expected = second.name
            case "no tensor":
                del weight_map["model.norm.weight"]
                index.write_text(json.dumps({"weight_map": weight_map}))
                expected = "model.norm.weight"
            case "wrong shape":
                config = json.loads((copy / "config.json").read_text())
                (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
                expected = "mlp.down_proj.weight has shape (64, 128), but config.json requires (64, 256)"
            case _:
                index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": "../model/model.safetensors"}}))
                expected = "outside"
        assert expected in load(copy)


def test_a_tp_that_does_not_divide_names_what_does() -> None:
    smollm2 = ModelShape(30, 576, 1536, 9, 3, 49152, tied=True)
    with pytest.raises(ValueError, match=r"tp=2 must divide model.heads=9, model.kv_heads=3 .*; use parallel.tp=1"):
        Parallel(tp=2).check(smollm2, 2)

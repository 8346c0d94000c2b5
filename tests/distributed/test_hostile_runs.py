"""Run folders that are made to attack, and weights that are no numbers: refused in one line on every rank; no code of a folder runs."""

from __future__ import annotations

import builtins
import functools
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata

from engine.config import Model, Parallel
from engine.files import sha256
from engine.megatron import checkpoint
from engine.megatron.checkpoint import MANIFEST, SEAL, damage_of
from engine.megatron.pickles import problem_of
from tests.distributed.test_weights import make_folder
from tests.support import jobs, jobs_files
from tests.support.pool import ranks

MODEL = Model(init=jobs.TINY)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of step 1, saved by two ranks."""
    out = tmp_path_factory.mktemp("saved") / "run"
    out.mkdir()
    ranks(2).run(jobs.train_and_save, parallel=Parallel(tp=2), model=MODEL, out=out, first=0, last=1, save_at=1)
    return out


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def seal(step: Path) -> None:
    """Write the manifest anew: whoever makes a folder can seal it."""
    manifest = json.loads((step / MANIFEST).read_text())
    manifest["sha256"] = {name: sha256(step / name) for name in checkpoint._files(step) - {MANIFEST, SEAL}}
    (step / MANIFEST).write_text(json.dumps(manifest))
    (step / SEAL).write_text(sha256(step / MANIFEST) + "\n")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touch(marker: Path) -> dict[str, Any]:
    """Objects that, when they are unpickled, create `marker`."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Call(os.system, command),
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "nested": {"state": [Call(dict, Call(os.system, command))]},
        "a file of torch": Call(torch.load, str(marker)),
        "a module": Call(__import__, "os"),
        "getattr": Call(getattr, dict, "fromkeys"),
        "partial": Call(functools.partial(os.system, command)),
    }


ATTACKS = sorted(touch(Path("x")))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("attack", ATTACKS)
def test_metadata_calls_nothing(attack: str, protocol: int, run: Path, tmp_path: Path) -> None:
    tensors = run / "step-00000001" / "tensors"
    good = pickle.loads((tensors / ".metadata").read_bytes())
    good.planner_data = touch(tmp_path / "executed")[attack]
    for attempt in (good.planner_data, good):
        (tensors / ".metadata").write_bytes(pickle.dumps(attempt, protocol))
        said = problem_of(tensors)
        assert said is not None
        assert "it could run code" in said
        assert "\n" not in said
    assert not (tmp_path / "executed").exists()


def named(module: str, name: str) -> bytes:
    """Push a global of protocol 4."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


STREAMS = {
    "a name with a dot": b"\x80\x04" + named("torch.serialization", "os.system") + b".",
    "a private name of torch": b"\x80\x04" + named("torch._C._jit", "x") + b".",
    "torch.hub": b"\x80\x04" + named("torch.hub", "load") + b".",
    "a class is changed": b"\x80\x04" + named("torch.distributed.checkpoint.metadata", "Metadata") + b"N}\x8c\x01aNs\x86b.",
    "a function is changed": b"\x80\x04" + named("torch.serialization", "_get_layout") + b"N}\x8c\x0c__defaults__)s\x86b.",
    "an extension": b"\x80\x04\x82\x01.",
    "a persistent id": b"Pevil\n.",
    "an old class": b"(ios\nsystem\n.",
    "an old call": b"(ctorch\nSize\no.",
    "a set": b"\x80\x04\x8f(K\x01\x90.",
    "a key that takes for ever to hash": b"\x80\x04}()" + b"2\x86" * 60 + b"K\x01u.",
    "cut": b"\x80\x04}(",
    "empty": b"",
    "another type": pickle.dumps({"state_dict_metadata": {}}),
    "bytes of 2^60": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_are_no_metadata(name: str, run: Path) -> None:
    tensors = run / "step-00000001" / "tensors"
    (tensors / ".metadata").write_bytes(STREAMS[name])
    said = problem_of(tensors)
    assert said is not None
    assert ".metadata" in said
    assert "\n" not in said


def moved(change: Callable[[Any, Any, Path], object]) -> Callable[[Path], object]:
    """Change the place of the first part of a tensor."""

    def write(tensors: Path) -> None:
        found = pickle.loads((tensors / ".metadata").read_bytes())
        index = next(iter(found.storage_data))
        place = found.storage_data[index]
        change(found, place, tensors)
        (tensors / ".metadata").write_bytes(pickle.dumps(found))

    return write


def evil(tensors: Path) -> Call:
    return Call(os.system, f"touch {tensors.parents[2] / 'executed'}")


def hidden_object(found: Any, place: Any, tensors: Path) -> None:
    """An object among the tensors, which torch would unpickle."""
    name = next(name for name, kind in found.state_dict_metadata.items() if isinstance(kind, metadata.BytesStorageMetadata))
    index = next(index for index in found.storage_data if index.fqn == name)
    content = io.BytesIO()
    torch.save(evil(tensors), content)
    place = found.storage_data[index]
    file = tensors / place.relative_path
    place.__dict__.update(offset=file.stat().st_size, length=len(content.getvalue()))
    file.write_bytes(file.read_bytes() + content.getvalue())


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "path out": (moved(lambda _, place, __: place.__dict__.update(relative_path="../manifest.json")), "plain name"),
    "absolute path": (moved(lambda _, place, __: place.__dict__.update(relative_path="/etc/passwd")), "plain name"),
    "no path": (moved(lambda _, place, __: place.__dict__.update(relative_path=7)), "plain name"),
    "missing file": (moved(lambda _, place, __: place.__dict__.update(relative_path="__9_9.distcp")), "is missing"),
    "beyond the end": (moved(lambda _, place, __: place.__dict__.update(length=1 << 40)), "is not within"),
    "negative": (moved(lambda _, place, __: place.__dict__.update(offset=-1)), "is not within"),
    "transformed": (moved(lambda _, place, __: place.__dict__.update(transform_descriptors=["zstd"])), "is transformed"),
    "object": (moved(hidden_object), "it could run code"),
    "common.pt": (
        lambda tensors: torch.save(Call(os.system, f"touch {tensors.parents[2] / 'executed'}"), tensors / "common.pt"),
        "run code",
    ),
    "common.pt a pickle": (lambda tensors: (tensors / "common.pt").write_bytes(pickle.dumps(evil(tensors))), "it could run code"),
    "common.pt missing": (lambda tensors: (tensors / "common.pt").unlink(), "is missing"),
}


@pytest.mark.parametrize("name", PLACES)
def test_parts_that_are_elsewhere_or_run_code(name: str, run: Path, tmp_path: Path) -> None:
    change, expected = PLACES[name]
    tensors = run / "step-00000001" / "tensors"
    assert problem_of(tensors) is None
    change(tensors)
    said = problem_of(tensors)
    assert said is not None
    assert expected in said
    assert "\n" not in said
    assert not (tmp_path / "executed").exists()


def test_a_resealed_attack_is_refused_on_every_rank(run: Path, tmp_path: Path) -> None:
    step = run / "step-00000001"
    (step / "tensors" / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'executed'}")))
    seal(step)
    said = ranks(2).run(jobs_files.refusal, parallel=Parallel(tp=2), model=MODEL, out=run)
    assert said[0] == said[1]
    assert "posix.system, which no checkpoint needs; it is not loaded, because it could run code" in said[0]
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_with_infinite_weights_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ranks(1).run(jobs_files.save_infinite, parallel=Parallel(), model=MODEL, out=tmp_path / "run")
    (said,) = ranks(1).run(jobs_files.refusal, parallel=Parallel(), model=MODEL, out=tmp_path / "run")
    assert "final_layernorm.weight holds NaN or infinite values" in said


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda manifest: [manifest],
    "null": lambda manifest: None,
    "no hashes": lambda manifest: manifest | {"sha256": None},
    "hashes a list": lambda manifest: manifest | {"sha256": list(manifest["sha256"])},
    "hashes of no text": lambda manifest: manifest | {"sha256": dict.fromkeys(manifest["sha256"], 1)},
    "a file out": lambda manifest: manifest | {"sha256": manifest["sha256"] | {"../x": "0"}},
    "step of text": lambda manifest: manifest | {"step": "1"},
    "step negative": lambda manifest: manifest | {"step": -1},
    "another step": lambda manifest: manifest | {"step": 10**9},
    "model a list": lambda manifest: manifest | {"model": []},
    "optimizer a number": lambda manifest: manifest | {"optimizer": 3},
}


@pytest.mark.parametrize("name", [*MANIFESTS, "nonsense", "deep", "not UTF-8"])
def test_a_sealed_manifest_of_nonsense_is_damage(name: str, run: Path) -> None:
    step = run / "step-00000001"
    texts = {"nonsense": b"{", "deep": b"[" * 100_000, "not UTF-8": b'{"\xff": 1}'}
    content = texts.get(name) or json.dumps(MANIFESTS[name](json.loads((step / MANIFEST).read_text()))).encode()
    (step / MANIFEST).write_bytes(content)
    (step / SEAL).write_text(sha256(step / MANIFEST) + "\n")
    said = damage_of(step)
    assert said is not None
    assert "\n" not in said


@pytest.mark.parametrize("kind", ["link", "folder link", "pipe"])
def test_a_checkpoint_holds_files_only(kind: str, run: Path) -> None:
    """An export copies the folder's files: a link would take in others of this machine."""
    step = run / "step-00000001"
    make = {"link": lambda path: path.symlink_to("/etc/passwd"), "folder link": lambda path: path.symlink_to("/etc"), "pipe": os.mkfifo}
    make[kind](step / "tensors" / "evil")
    assert damage_of(step) == "tensors/evil is not a regular file"


def test_a_killed_deletion_leaves_no_part_under_a_checkpoints_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run / "step-00000001", run / "step-00000002")

    def killed(folder: Path, **_: Any) -> None:
        next(path for path in folder.rglob("*") if path.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint._prune(run, 1)
    assert [path.name for path in checkpoint.checkpoint_folders(run)] == ["step-00000002"]
    assert (run / "step-00000001.deleted").exists()
    seal_step(run / "step-00000002", 2)
    assert ranks(1).run(jobs_files.refusal, parallel=Parallel(), model=MODEL, out=run) == [""]
    assert sorted(path.name for path in run.glob("step-*")) == ["step-00000002"]


def seal_step(step: Path, number: int) -> None:
    manifest = json.loads((step / MANIFEST).read_text())
    (step / MANIFEST).write_text(json.dumps(manifest | {"step": number}))
    seal(step)


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN": lambda weight: weight.index_fill(0, torch.tensor(0), float("nan")),
    "infinite": lambda weight: weight.index_fill(0, torch.tensor(weight.shape[0] - 1), float("-inf")),
    "too large": lambda weight: weight.double() * 1e300,
}


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("wrong", WRONG)
def test_weights_that_are_no_numbers_are_refused_by_name_on_every_rank(wrong: str, tensor: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", jobs.TINY)
    weights = load_file(folder / "model.safetensors")
    weights[tensor] = WRONG[wrong](weights[tensor])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = ranks(2).run(jobs_files.refusal, parallel=Parallel(tp=2), model=Model(str(folder)))
    assert said[0] == said[1]
    assert f"{folder}: {tensor} holds values that are NaN, infinite or too large for float32" in said[0]

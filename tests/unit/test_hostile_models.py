"""Model folders that are damaged or made to attack: each loads right or is refused in one line; none runs code, hangs or fills memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.config import Model, ModelShape
from engine.data.prepare import fitting_tokenizer
from engine.data.tokenizer import load_tokenizer
from engine.megatron.weights import FolderWeights
from engine.models.families import Slice, read_shape, tensor_shapes, to_hf
from engine.models.hub import resolve
from tests.support import hostile

SHAPE = ModelShape(layers=1, hidden=8, ffn=16, heads=2, kv_heads=1, vocab=260, max_length=64)
EVIL = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n"
SECONDS, MEBIBYTES = 20, 400  # far more than any case needs


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with nothing wrong, but for code beside it that nothing may run."""
    folder = tmp_path_factory.mktemp("good") / "model"
    load_tokenizer("bytes").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(to_hf(SHAPE)))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(SHAPE).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "evil.py").write_text(EVIL)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail instead of hanging, asking at a terminal or filling the memory."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEBIBYTES << 10


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that loading a model reads: its name, config, weights and tokenizer."""
    path = resolve(str(folder))
    shape = read_shape(path)
    weights = FolderWeights(path, shape)
    found = {name: weights.read(Slice(name, 0, 0, 0, size[0])) for name, size in tensor_shapes(shape).items()}
    fitting_tokenizer(Model(str(path)), path, shape.vocab)
    return found


def test_the_table_is_long_enough_and_names_are_unique() -> None:
    names = [name for name, _, _ in hostile.FOLDERS]
    assert len(names) >= 250
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("change", "expected"), [case[1:] for case in hostile.FOLDERS], ids=[case[0] for case in hostile.FOLDERS])
def test_it_loads_right_or_is_refused(change: hostile.Change, expected: str, folder: Path, good: Path) -> None:
    change(folder)
    if expected:
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert type(caught.value) is ValueError
        message = str(caught.value)
        assert expected in message
        assert "\n" not in message
        assert len(message) < 1000
    else:
        loaded, there = load(folder), load(good)
        assert loaded.keys() == there.keys()
        assert all(torch.equal(loaded[name], there[name]) for name in there)
    assert not (folder / "executed").exists()


def test_links_of_the_hub_cache_are_followed_and_no_others(good: Path, tmp_path: Path) -> None:
    """The hub keeps contents in blobs and links to them from snapshots."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(path for path in good.iterdir() if path.suffix != ".py"):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert load(snapshot).keys() == load(good).keys()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(good / "config.json")
    with pytest.raises(ValueError, match="outside its folder"):
        load(snapshot)

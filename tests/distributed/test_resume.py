"""Resume is bitwise, and a run never continues from a checkpoint that is incomplete or damaged."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import Model, Parallel
from tests.support import jobs
from tests.support.paths import ROOT
from tests.support.pool import ranks

MODEL = Model(init=jobs.TINY)


def train(size: int, parallel: Parallel, out: Path, **steps: Any) -> list[dict[str, float]]:
    out.mkdir(exist_ok=True)
    return ranks(size).run(jobs.train_and_save, parallel=parallel, model=MODEL, out=out, **steps)[0]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (1, Parallel()),
        (2, Parallel()),
        (2, Parallel(distributed_optimizer=False)),
        (2, Parallel(tp=2)),
        (2, Parallel(pp=2, vpp=2)),
        (4, Parallel(tp=2, pp=2)),
    ],
    ids=str,
)
def test_resumed_is_bitwise_uninterrupted(size: int, parallel: Parallel, tmp_path: Path) -> None:
    full = train(size, parallel, tmp_path / "run", first=0, last=5, save_at=2)
    rest = train(size, parallel, tmp_path / "run", first=2, last=5)
    assert rest == full[2:]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [(1, Parallel()), (2, Parallel()), (2, Parallel(pp=2)), (2, Parallel(pp=2, vpp=2)), (4, Parallel(tp=2, pp=2)), (4, Parallel(tp=4))],
    ids=str,
)
def test_resume_on_another_grid(size: int, parallel: Parallel, tmp_path: Path) -> None:
    full = train(2, Parallel(tp=2), tmp_path / "run", first=0, last=5, save_at=2)
    rest = train(size, parallel, tmp_path / "run", first=2, last=5)
    for actual, expected in zip(rest, full[2:], strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)


def test_sharded_state_does_not_load_into_an_unsharded_optimizer(tmp_path: Path) -> None:
    train(2, Parallel(), tmp_path / "run", first=0, last=1, save_at=1)
    with pytest.raises(RuntimeError, match=r"ValueError: .*distributed_optimizer=True.*False"):
        train(2, Parallel(distributed_optimizer=False), tmp_path / "run", first=1, last=2)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 5):
        train(1, Parallel(), tmp_path / "run", first=step - 1, last=step, save_at=step)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["LATEST", "step-00000003", "step-00000004"]
    assert (tmp_path / "run" / "LATEST").read_text() == "step-00000004\n"


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    out = tmp_path_factory.mktemp("saved") / "run"
    for step in (1, 2):
        train(1, Parallel(), out, first=step - 1, last=step, save_at=step)
    return out


def test_a_flipped_byte_in_any_file_is_detected(two_saved: Path) -> None:
    from engine.megatron.checkpoint import damage_of

    newest = two_saved / "step-00000002"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        good = path.read_bytes()
        place = random.Random(path.name).randrange(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert damage_of(newest) is not None, path
        path.write_bytes(good)
    assert damage_of(newest) is None


def test_a_damaged_checkpoint_is_skipped_with_a_warning(two_saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    victim = next((two_saved / "step-00000002").glob("tensors/*.distcp"))
    good = victim.read_bytes()
    victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert ranks(1).run(jobs.load, parallel=Parallel(), model=MODEL, out=two_saved) == [1]
    victim.write_bytes(good)


def test_without_an_intact_checkpoint_the_run_stops(two_saved: Path) -> None:
    victims = {path: path.read_bytes() for path in two_saved.glob("step-*/tensors/*.distcp")}
    for path in victims:
        path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="none of its 2 checkpoints is complete"):
        ranks(1).run(jobs.load, parallel=Parallel(), model=MODEL, out=two_saved)
    for path, good in victims.items():
        path.write_bytes(good)


def test_a_checkpoint_of_another_model_is_refused(two_saved: Path) -> None:
    other = Model(init=replace(jobs.TINY, ffn=256))
    with pytest.raises(RuntimeError, match=r"another model \(intermediate_size=128, expected 256\)"):
        ranks(1).run(jobs.load, parallel=Parallel(), model=other, out=two_saved)


def test_a_run_killed_while_saving_resumes_bitwise(tmp_path: Path) -> None:
    """Two ranks save after every step. 20 times, one or both are killed at a random time, and a new run resumes from the checkpoint.
    All steps equal those of an uninterrupted run, so every loaded checkpoint was complete and consistent."""
    script = [sys.executable, "-m", "tests.support.killed_saver", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads(done.stdout)
    full = train(2, Parallel(tp=2), tmp_path / "whole", first=0, last=max(r["step"] for r in records["steps"]) + 1)
    for record in records["steps"]:
        assert record["metrics"] == full[record["step"]]
    assert records["kills"] == 20
    assert records["starts"][-1] > 0
    assert records["starts"] == sorted(records["starts"])

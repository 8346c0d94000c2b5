"""What make gpu and the timed half of the kernels' benchmark do, with a clock that lies and parts that are small: no GPU is needed."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import accuracy, floors, gpu, throughput, timed
from benchmarks.clock import CudaClock, Timing
from benchmarks.floors import Shape
from benchmarks.operations import OPERATIONS, Contender, plain
from benchmarks.operations import timed as call_of
from benchmarks.peers import COMPILED, EAGER, PEERS
from benchmarks.timing import Spread
from engine.config import Llama
from tests.on_device import everything_on

TINY = Shape("tiny", hidden=64, ffn=96, heads=4, kv_heads=2, head_size=16, vocab=1000, tokens=64, tp=1)
CPU = torch.device("cpu")


def clock(call: Callable[[], Any]) -> Timing:
    """Runs once, and says 2 ms whatever it was."""
    call()
    return Timing(Spread(2e-3, 1e-3, 3e-3), 7, 5 << 20, 4e-3)


def absent(_: dict[str, Tensor]) -> Callable[[], Any]:
    raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")


def failing(_: dict[str, Tensor]) -> Tensor:
    raise RuntimeError("out of\nluck")


class Event:
    """torch.cuda.Event where every pair is 2 ms apart."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Event) -> float:
        return 2.0


def test_a_call_is_timed_as_often_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.clock.WRITTEN", 16)
    fakes = {"Event": Event, "synchronize": lambda _: None, "reset_peak_memory_stats": lambda _: None}
    fakes |= {"memory_allocated": lambda _: 100, "max_memory_allocated": lambda _: 350}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for seconds, runs in ((0.001, 5), (0.02, 10), (9.0, 100)):
        calls: list[int] = []
        timing = CudaClock(CPU, seconds)(partial(calls.append, 1))
        assert timing.seconds == Spread(2e-3, 2e-3, 2e-3)
        assert (timing.runs, timing.peak_bytes, timing.launches) == (runs, 250, None)
        assert len(calls) == 2 + 1 + 1 + runs + min(runs, 20) + 1  # warm-up, memory, how long, timed, back to back, launches


def test_every_operation_has_a_floor_and_every_peer_an_operation() -> None:
    assert OPERATIONS.keys() == floors.OPERATIONS.keys()
    assert PEERS.keys() <= OPERATIONS.keys()


@pytest.mark.parametrize("name", [name for name, peers in PEERS.items() if EAGER in peers and name != "draw"])  # draws differ
def test_torch_computes_the_same(name: str) -> None:
    """What computes something else is not compared: outputs but for a loss's sign and sum, and gradients."""
    operation = OPERATIONS[name]
    found = []
    for contender in (*operation.ours.values(), PEERS[name][EAGER]):
        torch.manual_seed(0)
        got = call_of(operation, contender, operation.draw(TINY, CPU))()
        outputs, gradients = got if operation.which == "both" else ((), got) if operation.which == "backward" else (got, ())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if "logprob" in name:  # theirs are losses, whose gradients are the opposite, or totals of them
            outputs, gradients = [output.abs().sum() for output in outputs], [g.double().abs() for g in gradients]
        found.append([*outputs[: 2 if name == "gae" else None], *gradients])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            scale = float(theirs.double().abs().max())
            assert float((ours.double() - theirs.double()).abs().max()) <= 2e-2 * scale


def test_the_page_of_times(tmp_path: Path) -> None:
    peers: dict[str, dict[str, Contender]] = {"rope": {"elsewhere": absent, "broken": plain(failing), EAGER: PEERS["rope"][EAGER]}}
    saved: list[int] = []
    found = timed.measure([TINY], CPU, clock, peers, save=lambda facts: saved.append(len(facts["rows"])))
    assert saved == list(range(1, len(found["rows"]) + 1))
    page = "\n".join(timed.page(json.loads(json.dumps(found)), [TINY]))
    assert "take 2.00 + 2.00 + 2.00 ms by torch.matmul" in page
    assert f"| rope | {EAGER} | 2000.0 (1000.0..3000.0) | " in page
    assert "- elsewhere: not installed (nowhere) (rope)" in page
    assert "- broken: RuntimeError: out of luck (rope)" in page
    ours = next(row for row in found["rows"] if row["operation"] == "linear_logprob forward and backward" and row["contender"] == "ours")
    assert ours["timing"] == asdict(clock(lambda: None))
    assert ours["floor_s"] == pytest.approx(6e-3)  # the three products, 2 ms each
    assert "| linear_logprob forward and backward | ours | 2000.0 (1000.0..3000.0) | " in page


def test_targets_are_judged() -> None:
    def row(shape: str, who: str, seconds: float) -> dict[str, Any]:
        timing = asdict(Timing(Spread(seconds, seconds, seconds), 5, 0, seconds))
        return {"operation": timed.OUTPUT_LAYER, "shape": shape, "contender": who, "floor_s": 1e-2, "timing": timing}

    rows = [row("8b-tp1", "ours", 1.1e-2), row("405b-tp8", "ours", 1.1e-2), row("8b-tp1", "Liger", 2.2e-2)]
    assert timed._verdicts(rows) == [
        "Targets:",
        "",
        "- linear_logprob forward and backward, 8b-tp1: 1.10x of the floor, target 1.12x: met",
        "- linear_logprob forward and backward, 405b-tp8: 1.10x of the floor, target 1.06x: MISSED",
        "- linear_logprob forward and backward, 8b-tp1: 2.00x faster than Liger, target 3x: MISSED",
    ]
    assert timed._verdicts([]) == []


def test_who_runs_late_is_named_when_time_is_over() -> None:
    found = timed.measure([TINY], CPU, clock, {}, seconds=0)
    assert {row["error"] for row in found["rows"]} == {"not measured: out of time"}
    assert [timed._turn(who) for who in ("ours", EAGER, "F.linear_cross_entropy", "Liger", COMPILED)] == [0, 0, 0, 1, 2]


def test_accuracy_tells_float32_logits_from_bfloat16_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {(row["from"], row["contender"]): row for row in accuracy.measure(CPU, 16, 64, vocab=3000)}
    ours, rounded = rows["hidden states", "ours"], rows["hidden states", "ours, bfloat16 logits"]
    assert ours["logp_max"] < 1e-5 < 1e-3 < rounded["logp_max"]
    assert rows["float32 logits", "ours"]["gradient"][0] < 1e-6
    assert all(error < 1e-2 for error in ours["gradient"])
    assert "error" in rows["float32 logits", "flash-attn"]
    found = {"versions": {}, "tokens": 16, "hidden": 64, "device": "cpu", "rows": list(rows.values())}
    page = "\n".join(accuracy.page(found))
    assert "| float32 logits | ours | " in page
    assert "only sums" in page  # of linear_policy_loss


def test_flops_of_a_step() -> None:
    model = Llama(layers=2, hidden=8, ffn=16, heads=2, kv_heads=2, vocab=10)
    matrices = 2 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8 * 10 + 8
    assert throughput.flops(model, torch.tensor([3, 5]).numpy()) == 6 * matrices * 8 + 6 * 2 * 8 * (9 + 25)


def test_decoding_is_told_or_why_it_was_not() -> None:
    rows = [
        {"case": "one", "decode": {"launched": [90.0, 100.0], "replayed": [300.0, 250.0]}},
        {"case": "two", "decode": {"error": "no room"}},
    ]
    page = "\n".join(throughput._decoding(rows))
    assert "| one | 95 (90..100) | 275 (250..300) | 3.00x |" in page
    assert "- two, decoding: not measured: no room" in page
    assert throughput._decoding([{"case": "three", "error": "no GPU"}]) == []


def test_a_run_reports_what_failed_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write = "import json, sys; json.dump({'said': 1}, open(sys.argv[1], 'w')); print('noise\\n# A page\\n\\nits text')"
    parts = (
        gpu.Part("dies", ("-c", "import os; os.kill(os.getpid(), 11)"), 20),
        gpu.Part("hangs", ("-c", "import time; print('so far', flush=True); time.sleep(60)"), 1),
        gpu.Part("works", ("-c", write, gpu.FACTS), 20),
    )
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "prepared", lambda wheels, site: ({}, ["a note"]))
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main([]) == 1
    (page,) = tmp_path.glob("gpu_h100-80gb-hbm3_*.md")
    text, facts = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    assert "| dies | FAILED with status -11 |" in text
    assert "| hangs | STOPPED after 1 s |" in text
    assert "so far" in text
    assert "# A page\n\nits text" in text
    assert "noise" not in text
    assert facts["works"]["facts"] == {"said": 1}
    monkeypatch.setattr(gpu, "PARTS", parts[2:])
    assert gpu.main([]) == 0


def test_what_pytest_leaves_is_counted(tmp_path: Path) -> None:
    test = tmp_path / "test_x.py"
    test.write_text("import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_not(): pass\n")
    part = gpu.Part("correctness", ("-m", "pytest", str(test), f"--junitxml={gpu.FACTS}"), 60)
    outcome = gpu.run(part, tmp_path, {"PYTHONPATH": ":".join(sys.path)}, 60)
    assert outcome.ended == "FAILED with status 1"
    assert {**outcome.facts, "failed": [name.rsplit(".")[-1] for name in outcome.facts["failed"]]} == {
        "tests": 3,
        "skipped": 1,
        "failed": ["test_bad"],
    }


def test_wheels_are_there_for_the_parts_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what their .pth files add to the path."""
    wheels, place = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("inner/brought.py", "word = 'with me'")
        wheel.writestr("brought.pth", "inner")
        wheel.writestr("brought-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        wheel.writestr("brought-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("brought-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    environment, notes = gpu.prepared(wheels, place)
    assert notes == ["1 wheels were installed", "the C++ extension was not built: no g++ here"]
    part = gpu.Part("uses", ("-c", "import brought; print(brought.word)"), 20)
    assert gpu.run(part, tmp_path, environment, 20).text == "with me\n"


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "gpu_name", lambda: None)
    assert gpu.main([]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_numbers_are_drawn_on_the_host_and_moved() -> None:
    with everything_on(torch.device("meta")):
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))
        assert drawn.device.type == torch.zeros(2).device.type == "meta"
    with everything_on(CPU):
        expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(expected, torch.randn(3, generator=torch.Generator().manual_seed(0)))
